"""Times examples/dlrm beside the same model in PyTorch, in alternating runs, and prints JSON lines.

usage: bench_trainer.py --build FOLDER [--data FILE] [--pairs N] [--only NAME ...]

    trainer        4 ranks beside one process of PyTorch with two threads (bench_torch.py)
    trainer_gloo   2 and 4 ranks, batches of 512 and 4096, beside PyTorch on as many ranks over gloo
                   (peers/dlrm_gloo.py: tables sharded over the ranks, networks by all_reduce)
    exact_of_fast  what exact mode costs: time of exact over time of fast
    ranks_1_to_2   what a second rank brings where computing is most of the work (dim 64, batch 4096, one thread a rank)

Both sides train the same rows with the same settings; each reports samples per second from the first row read to the
last step, start-up and unpacking excluded. The peers have their rows parsed in memory before the clock starts. Both
must agree on what they learned before a figure is printed: AUC, medians over runs with seeds of their own. Without
--data: rows made up here, as skewed as click logs are. Without PyTorch: no peer.
"""
import argparse
import gzip
import json
import lzma
import math
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
GOAL = 3.0  # times the peer's samples per second
GLOO_GOALS = {512: 5.0, 4096: 3.0}
EXACT_GOAL = 1.15
SECOND_RANK_GOAL = 1.8
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


def unpacked(name, folder):
    """A plain copy of a packed file: what is compared is training, and a peer's rows lie parsed in memory."""
    with open(name, "rb") as file:
        head = file.read(6)
    open_packed = lzma.open if head == b"\xfd7zXZ\0" else gzip.open if head[:2] == b"\x1f\x8b" else None
    if not open_packed:
        return name
    plain = os.path.join(folder, "clicks.tsv")
    with open_packed(name, "rb") as file, open(plain, "wb") as out:
        shutil.copyfileobj(file, out)
    return plain


def output_of(command, **env):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env={**os.environ, **env})
    if result.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def train_ours(options, data, ranks, epochs, *more, mode="fast", **env):
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        output_of([HERE.parent / "run", "ranks", ranks, options.build / "examples" / "dlrm", "--data", data,
                   "--mode", mode, "--epochs", epochs, "--report", report, *more], **env)
        return json.loads(report.read_text())


def train_peer(script, data, *more):
    out = output_of([sys.executable, HERE / script, "--data", data, *more])
    return json.loads([line for line in out.splitlines() if line.startswith("{")][-1])


def has_torch():
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def floor_samples_per_second(ranks, global_batch):
    """What the dense layers' matrix products alone allow: three products a layer (forward and two backward) at the
    speed one BLAS thread reaches on these shapes, on as many cores as have a rank."""
    try:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        import numpy
    except ImportError:
        return None
    batch = global_batch // ranks
    pairs = [(numpy.ones((batch, rows), numpy.float32), numpy.ones((rows, columns), numpy.float32))
             for rows, columns in LAYERS]
    times = []
    for _ in range(200):
        began = time.perf_counter()
        for inputs, weights in pairs:
            numpy.dot(inputs, weights)
        times.append(time.perf_counter() - began)
    return batch / (3 * min(times)) * min(ranks, os.cpu_count() or 1)


def alternating(pairs, first, second):
    """Reports of both, run by turns, each pair with a seed of its own; second may be None."""
    a, b = [], []
    for number in range(pairs):
        runs = [(first, a), (second, b)]
        for run, reports in runs if number % 2 == 0 else reversed(runs):
            if run:
                reports.append(run("--seed", number + 1))
    return a, b


def auc(reports):
    return statistics.median(run["auc"] for run in reports)


def agree(ours, theirs):
    if theirs and abs(auc(ours) - auc(theirs)) > AUC_AGREES:
        sys.exit(f"the two models differ: AUC {auc(ours)} here, {auc(theirs)} there")


def speed(reports):
    return statistics.median(run["samples_per_second"] for run in reports) if reports else None


def faster(ours, theirs):
    """How many times as fast: the median over the pairs."""
    if not theirs:
        return None
    return statistics.median(a["samples_per_second"] / b["samples_per_second"] for a, b in zip(ours, theirs))


def show(name, config, ours, theirs, floor, peer, ratio, goal, met):
    print(json.dumps({"name": name, "config": config, "value": round(speed(ours), 1), "unit": "samples/s",
                      "floor": floor, "peer": peer, "peer_value": speed(theirs), "ratio": ratio, "goal": goal,
                      "goal_met": met}), flush=True)


def aucs(ours, theirs):
    return f"AUC {auc(ours):.3f}" + (f" and {auc(theirs):.3f}" if theirs else "")


def bench_trainer(options, data, named):
    ranks, epochs, batch = 4, 5, 512

    def ours_of(*seed):
        return train_ours(options, data, ranks, epochs, *seed)

    def peer_of(*seed):
        return train_peer("bench_torch.py", data, "--epochs", epochs, "--threads", PEER_THREADS, *seed)

    ours, theirs = alternating(options.pairs, ours_of, peer_of if options.torch else None)
    agree(ours, theirs)
    ratio = faster(ours, theirs)
    show("trainer", f"{named}, {ranks} ranks, {epochs} epochs, fast, batch {batch}, {aucs(ours, theirs)}",
         ours, theirs, floor_samples_per_second(ranks, batch),
         f"torch, 1 process, {PEER_THREADS} threads" if options.torch else "PyTorch is not installed", ratio,
         f">= {GOAL:g} x peer", ratio >= GOAL if ratio else None)


def bench_gloo(options, data, named):
    for ranks in (2, 4):
        for batch, goal in GLOO_GOALS.items():
            bench_gloo_case(options, data, named, ranks, batch, goal)


def bench_gloo_case(options, data, named, ranks, batch, goal):
    epochs = 4

    def ours_of(*seed):
        return train_ours(options, data, ranks, epochs, "--batch", batch, *seed)

    def peer_of(*seed):
        return train_peer("peers/dlrm_gloo.py", data, "--epochs", epochs, "--ranks", ranks, "--batch", batch, *seed)

    ours, theirs = alternating(options.pairs, ours_of, peer_of if options.torch else None)
    agree(ours, theirs)
    ratio = faster(ours, theirs)
    show("trainer_gloo", f"{named}, {ranks} ranks, fast, batch {batch}, {aucs(ours, theirs)}", ours, theirs,
         floor_samples_per_second(ranks, batch),
         f"torch, gloo, {ranks} ranks" if options.torch else "PyTorch is not installed", ratio,
         f">= {goal:g} x peer", ratio >= goal if ratio else None)


def bench_exact(options, data, named):
    ranks, epochs = 4, 5

    def train(mode):
        return lambda *seed: train_ours(options, data, ranks, epochs, *seed, mode=mode)

    exact, fast = alternating(options.pairs, train("exact"), train("fast"))
    agree(exact, fast)
    ratio = 1 / faster(exact, fast)
    show("exact_of_fast", f"{named}, {ranks} ranks, batch 512", exact, fast, None, "covey, fast mode", ratio,
         f"time <= {EXACT_GOAL:g} x fast", ratio <= EXACT_GOAL)


def bench_second_rank(options, data, named):
    epochs = 5

    def train(ranks):
        return lambda *seed: train_ours(options, data, ranks, epochs, "--dim", 64, "--batch", 4096, *seed,
                                        COVEY_THREADS="1")

    two, one = alternating(options.pairs, train(2), train(1))
    agree(two, one)
    ratio = faster(two, one)
    show("ranks_1_to_2", f"{named}, fast, dim 64, batch 4096, 1 thread a rank", two, one, None, "covey, 1 rank", ratio,
         f">= {SECOND_RANK_GOAL:g} x 1 rank", ratio >= SECOND_RANK_GOAL)


BENCHMARKS = {"trainer": bench_trainer, "gloo": bench_gloo, "exact": bench_exact, "second_rank": bench_second_rank}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--only", choices=list(BENCHMARKS), action="append")
    options = parser.parse_args()
    options.torch = has_torch()
    with tempfile.TemporaryDirectory() as folder:
        data = unpacked(options.data, folder) if options.data else os.path.join(folder, "clicks.tsv")
        if not options.data:
            generate(data, ROWS_GENERATED)
        for name in options.only or BENCHMARKS:
            BENCHMARKS[name](options, data, os.path.basename(options.data or "generated"))


if __name__ == "__main__":
    main()
