"""Trains examples/dlrm with rows and gradients in fewer bytes and prints JSON lines: AUC and bytes beside fp32.

usage: bench_payload.py --build FOLDER [--data FILE] [--ranks N] [--epochs N] [--seeds N]

Each type trains the same rows with the same seeds as fp32, all in fast mode, the only one in which gradients may be
rounded. AUC is that of the last quarter of what was trained, each sample judged before it is learned, as a mean over
the seeds; how far fp32 itself differs from seed to seed is said in its line. With more epochs than one the last
quarter has been learned before, and AUC tells how well the model remembers. Bytes are what left all ranks in ids, rows
and gradients. Without --data: rows made up here, as skewed as click logs are.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

from bench_trainer import ROWS_GENERATED, generate

HERE = pathlib.Path(__file__).resolve().parent
TYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("int8", "fp32"),
         ("bf16", "bf16"), ("fp16", "fp16"), ("int8", "int8"))
BYTES_GOAL = {("bf16", "bf16"): 0.56}
PHASES = ("ids", "rows", "gradients")


def train(options, data, rows, gradients, seed):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [HERE.parent / "run", "ranks", options.ranks, options.build / "examples" / "dlrm", "--data", data,
                   "--mode", "fast", "--epochs", options.epochs, "--seed", seed, "--rows-type", rows,
                   "--gradients-type", gradients, "--quiet", "--report", report]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))}: status {result.returncode}\n{result.stdout}{result.stderr}")
        return json.loads(report.read_text(encoding="utf-8"))


def print_line(config, value, unit, peer_value=None, ratio=None, goal=None, goal_met=None):
    print(json.dumps({"name": "payload", "config": config, "value": value, "unit": unit, "floor": None,
                      "peer": "fp32" if peer_value is not None else None, "peer_value": peer_value, "ratio": ratio,
                      "goal": goal, "goal_met": goal_met}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    plain_auc = plain_bytes = None
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or os.path.join(folder, "clicks.tsv")
        if not options.data:
            generate(data, ROWS_GENERATED)
        what = f"{os.path.basename(options.data) if options.data else 'generated'}, {options.ranks} ranks, " \
               f"{options.epochs} epochs, {options.seeds} seeds"
        for rows, gradients in TYPES:
            runs = [train(options, data, rows, gradients, seed) for seed in range(1, options.seeds + 1)]
            aucs = [run["auc_last_quarter"] for run in runs]
            auc = statistics.mean(aucs)
            moved = statistics.median(sum(run["bytes"][phase] for phase in PHASES) for run in runs)
            config = f"rows {rows}, gradients {gradients}; {what}"
            if plain_auc is None:
                plain_auc, plain_bytes = auc, moved
                print_line(f"{config}; seeds differ by {max(aucs) - min(aucs):.4f}", round(auc, 5), "AUC")
                print_line(config, moved, "bytes")
                continue
            print_line(f"{config}; difference {auc - plain_auc:+.5f}", round(auc, 5), "AUC", round(plain_auc, 5),
                       auc / plain_auc)
            goal = BYTES_GOAL.get((rows, gradients))
            print_line(config, moved, "bytes", plain_bytes, moved / plain_bytes, goal and f"<= {goal:g} x peer",
                       goal and moved / plain_bytes <= goal)


if __name__ == "__main__":
    main()
