"""Times lookups and updates on one rank beside PyTorch, on the same ids, in alternating rounds. Prints JSON lines.

usage: bench_lookup.py --build FOLDER [--rounds N] [--threads N ...]

    pooled            the pool kernel over known rows, beside torch.nn.functional.embedding_bag with plain indices
    pooled_of_gather  the same beside a bare gather of the same rows with prefetch: the floor
    pooled_by_hash    covey_route_build and covey_lookup in a world of one (unique ids found, each found in the index),
                      beside the same embedding_bag: it is spared both
    backward_adagrad  covey_backward and covey_step_commit (row-wise Adagrad, undo log and all) beside PyTorch's
                      backward with a sparse gradient and its Adagrad, which has a state for each column. Every bag's
                      gradient is the same in all columns, so both come to the same rows

Both sides are processes that wait for a line (lookup_worker.c, peers/torch_rows.py); pooled rows and updated rows are
compared before anything is timed. Each timed lookup, pooling or gather comes right after an untimed one of another
batch, as in training, and pooling and gather take turns in being first: so all of them find the caches alike. Without
PyTorch: no peer.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
BAG, BAGS = 20, 12500
SHAPES = ((16, 2_000_000), (128, 500_000))
GOALS = {"pooled": 1.2, "pooled_of_gather": 0.8, "pooled_by_hash": 0.9, "backward_adagrad": 4.0}


class Side:
    """A process that answers a line with a line."""

    def __init__(self, *command):
        self.process = subprocess.Popen([str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})
        self.answer()

    def answer(self):
        line = self.process.stdout.readline().strip()
        if not line:
            sys.exit(f"{self.process.args[0]} ended with status {self.process.wait()}")
        return line

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.answer()

    def time(self, line):
        """Seconds, or None for what this build has not got."""
        answer = self.ask(line)
        return None if answer.startswith("no ") else int(answer) * 1e-9

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def has_torch():
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def draw(rows, skew, seed):
    """Two batches of ids: uniform, or rank r with probability proportional to r^-skew and each rank some id."""
    source = np.random.default_rng(seed)
    if not skew:
        return source.integers(0, rows, 2 * BAG * BAGS)
    up_to = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -skew)
    return source.permutation(rows)[np.searchsorted(up_to, source.random(2 * BAG * BAGS) * up_to[-1])]


def floats(side, command, name):
    side.ask(f"{command} {name}")
    return np.fromfile(name, np.float32)


def check_pooled(ours, theirs, ids, dim, name):
    values = np.fromfile(ids, np.int64)[BAG * BAGS:] % 1000
    expected = values.reshape(-1, BAG).sum(1)[:, None] + BAG * np.arange(dim)[None]
    ours.ask(f"ids {ids}")
    sides = [(ours, "pool"), (ours, "lookup")]
    if theirs:
        theirs.ask(f"ids {ids}")
        sides.append((theirs, "lookup"))
    for side, command in sides:
        if side.time(command) is not None and (floats(side, f"write {command}", name) != expected.reshape(-1)).any():
            sys.exit(f"{side.process.args[0]}: {command} gives other rows than the ids say")


def check_rows(ours, theirs, name):
    """After a step on both sides."""
    before = floats(ours, "rows", name)
    for side in (ours, theirs):
        side.ask("step")
        side.ask("backward")
    mine, other = floats(ours, "rows", name), floats(theirs, "rows", name)
    if not np.allclose(mine, other, rtol=1e-5, atol=1e-3) or np.allclose(before, mine):
        sys.exit(f"the two updates differ by up to {np.abs(mine - other).max()}")


def measure(ours, theirs, rounds):
    """A list of seconds for each of what is run."""
    times = {"pool": [], "gather": [], "lookup": [], "backward": [], "peer lookup": [], "peer backward": []}
    for number in range(-1, rounds):
        rows = ("pool", "gather") if number // 2 % 2 else ("gather", "pool")  # the second finds more in the caches
        sides = [(ours, (*rows, "lookup", "step", "backward"), ""),
                 (theirs, ("lookup", "step", "backward"), "peer ")]
        for side, commands, prefix in sides if number % 2 else reversed(sides):
            for command in commands if side else ():
                seconds = side.time(command)
                if number >= 0 and command != "step" and seconds is not None:
                    times[prefix + command].append(seconds)
    return times


def line(name, config, mine, floor, other, peer):
    """Rates in millions of ids a second from lists of seconds; the ratio is a median over rounds."""
    rate = lambda times: BAG * BAGS / statistics.median(times) / 1e6 if times else None
    against = floor if name == "pooled_of_gather" else other
    ratio = statistics.median(b / a for a, b in zip(mine, against)) if mine and against else None
    what = "the gather" if name == "pooled_of_gather" else "peer"
    print(json.dumps({
        "name": name, "config": config if mine else f"{config}: not in this build", "value": rate(mine),
        "unit": "M ids/s", "floor": rate(floor), "peer": peer, "peer_value": rate(against), "ratio": ratio,
        "goal": f">= {GOALS[name]:g} x {what}",
        "goal_met": ratio >= GOALS[name] if ratio is not None else None}), flush=True)


def report(config, times, peer):
    missing = None if peer else "PyTorch is not installed"
    bag = "torch embedding_bag" if peer else missing
    line("pooled", config, times["pool"], times["gather"], times["peer lookup"], bag)
    line("pooled_of_gather", config, times["pool"], times["gather"], None, "bare gather, prefetched")
    line("pooled_by_hash", config, times["lookup"], times["gather"], times["peer lookup"], bag)
    line("backward_adagrad", config, times["backward"], [], times["peer backward"],
         "torch backward, Adagrad" if peer else missing)


def bench(build, dim, rows, threads, rounds, peer, folder):
    shape = [dim, rows, threads, BAG]
    ours = Side(build / "bench" / "lookup_worker", *shape)
    theirs = Side(sys.executable, HERE / "peers" / "torch_rows.py", *shape) if peer else None
    scratch = os.path.join(folder, "floats")
    sets = [("uniform", os.path.join(folder, "uniform")), ("Zipf 1.05", os.path.join(folder, "zipf"))]
    for (name, file), skew in zip(sets, (0, 1.05)):
        draw(rows, skew, 1).tofile(file)
        check_pooled(ours, theirs, file, dim, scratch)
    for name, file in sets:
        for side in filter(None, (ours, theirs)):
            side.ask(f"ids {file}")
        if theirs and ours.time("lookup") is not None:
            check_rows(ours, theirs, scratch)
        times = measure(ours, theirs, rounds)
        report(f"dim {dim}, {name}, L {BAG}, {threads} thread{'s' if threads > 1 else ''}", times, peer)
    for side in filter(None, (ours, theirs)):
        side.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of a rank; PyTorch gets as many")
    options = parser.parse_args()
    peer = has_torch()
    with tempfile.TemporaryDirectory() as folder:
        for dim, rows in SHAPES:
            for threads in options.threads:
                bench(options.build, dim, rows, threads, options.rounds, peer, folder)


if __name__ == "__main__":
    main()
