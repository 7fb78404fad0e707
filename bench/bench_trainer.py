"""Times examples/dlrm against the same model in PyTorch, in alternating pairs, and prints one JSON line.

usage: bench_trainer.py --build FOLDER [--data FILE] [--ranks N] [--epochs N] [--pairs N]

Both sides train the same rows with the same settings; each reports samples per second from the first row read to the
last step, start-up excluded. They must agree on what they learned before a figure is printed. Without --data: rows made
up here, as skewed as click logs are. Without PyTorch: no peer.
"""
import argparse
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
GOAL = 3.0  # times the peer's samples per second
AUC_AGREES = 0.03
PEER_THREADS = 2
ROWS_GENERATED = 80_000
# The matrix products of the default model for a batch of one rank: (inputs, outputs) of each layer.
LAYERS = ((13, 64), (64, 32), (32, 16), (367, 64), (64, 32), (32, 1))


def generate(path, rows):
    """Clicks in Criteo layout: 26 id columns of 10 to a million values, log-uniform, some missing; labels that depend
    on two of the columns."""
    source = random.Random(1)
    sizes = [10 ** (1 + 5 * column / 25) for column in range(26)]
    with open(path, "w", encoding="ascii") as file:
        for _ in range(rows):
            ranks = [int(size ** source.random()) for size in sizes]
            logit = -3 + (ranks[3] % 5 - 2) * 0.5 + (ranks[5] % 7 - 3) * 0.3
            label = int(source.random() < 1 / (1 + math.exp(-logit)))
            integers = [str(int(1000 ** source.random())) if source.random() < 0.9 else "" for _ in range(13)]
            ids = [f"{(column << 32) + rank * 2654435761 % 2 ** 32:010x}" if source.random() < 0.9 else ""
                   for column, rank in enumerate(ranks)]
            file.write("\t".join([str(label), *integers, *ids]) + "\n")


def output_of(command, **env):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, **env})
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def train_ours(options, data):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        output_of([HERE.parent / "run", "ranks", options.ranks, options.build / "examples" / "dlrm", "--data", data,
                   "--mode", "fast", "--epochs", options.epochs, "--report", report])
        return json.loads(report.read_text())


def train_peer(options, data):
    out = output_of([sys.executable, HERE / "bench_torch.py", "--data", data, "--epochs", options.epochs,
                     "--threads", PEER_THREADS])
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def has_torch():
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def floor_samples_per_second(ranks):
    """What the dense layers' matrix products alone allow: three products a layer (forward and two backward) at the
    speed one BLAS thread reaches on these shapes, on as many cores as have a rank."""
    try:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        import numpy
    except ImportError:
        return None
    batch = 512 // ranks
    pairs = [(numpy.ones((batch, rows), numpy.float32), numpy.ones((rows, columns), numpy.float32))
             for rows, columns in LAYERS]
    times = []
    for _ in range(200):
        began = time.perf_counter()
        for inputs, weights in pairs:
            numpy.dot(inputs, weights)
        times.append(time.perf_counter() - began)
    return batch / (3 * min(times)) * min(ranks, os.cpu_count() or 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or os.path.join(folder, "clicks.tsv")
        if not options.data:
            generate(data, ROWS_GENERATED)
        peer = has_torch()
        ours, theirs = [], []
        for _ in range(options.pairs):
            ours.append(train_ours(options, data))
            if peer:
                theirs.append(train_peer(options, data))
    if peer and abs(ours[0]["auc"] - theirs[0]["auc"]) > AUC_AGREES:
        sys.exit(f"the two models differ: AUC {ours[0]['auc']} here, {theirs[0]['auc']} there")
    value = statistics.median(run["samples_per_second"] for run in ours)
    peer_value = statistics.median(run["samples_per_second"] for run in theirs) if peer else None
    ratio = value / peer_value if peer else None
    print(json.dumps({
        "name": "trainer",
        "config": f"{'generated' if not options.data else os.path.basename(data)}, {options.ranks} ranks, "
                  f"{os.cpu_count()} cores, {options.epochs} epochs, fast, batch 512",
        "value": round(value, 1), "unit": "samples/s", "floor": floor_samples_per_second(options.ranks),
        "peer": f"torch, 1 process, {PEER_THREADS} threads" if peer else None, "peer_value": peer_value, "ratio": ratio,
        "goal": f">= {GOAL:g} x peer", "goal_met": ratio >= GOAL if peer else None}))


if __name__ == "__main__":
    main()
