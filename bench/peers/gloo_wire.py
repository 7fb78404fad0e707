"""The shm wire's all-to-all beside gloo's, through torch.distributed. Prints JSON lines as bench.h does.

usage: gloo_wire.py --bench bench_wire --run run [--rounds N]

Both do the same: a block for every rank, uneven, from the source array to the last byte read on both sides. gloo cannot
live in the process of bench_wire, so rounds alternate: one start of `bench_wire alone`, one of four gloo processes.
Each start gives a median, and figure and ratio are medians over the rounds. torch 1.13 has all_to_all_single for gloo;
where a version lacks it, the blocks go by isend and irecv, and the peer's name says so. Results are checked before
anything is timed. Without torch a line says so, and names no figure.
"""
import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

RANKS, GOAL, TIMEOUT_S = 4, 5.0, 120
SIZES = [64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]  # bytes of a rank
WARM_UP, REPEATS_MIN, REPEATS_MAX, BYTES = 3, 7, 50, 32 << 20


def words(size, source, target):
    """As bench_wire cuts them: by turns a quarter smaller and a quarter larger than the mean."""
    mean = size // 8 // RANKS
    return mean + mean // 4 if (source + target) % 2 else mean - mean // 4


class Exchange:
    def __init__(self, rank, size):
        import torch
        import torch.distributed as dist
        self.dist, self.rank = dist, rank
        self.counts = [words(size, rank, peer) for peer in range(RANKS)]  # the same in both directions
        self.source = torch.cat([torch.arange(n) + 1000 * rank + peer for peer, n in enumerate(self.counts)])
        self.target = torch.zeros_like(self.source)
        self.expected = sum(int((torch.arange(n) + 1000 * peer + rank).sum()) for peer, n in enumerate(self.counts))
        self.way = "all_to_all_single"
        try:
            self.run()
        except RuntimeError:
            self.way = "isend and irecv"
            self.run()

    def run(self):
        if self.way == "all_to_all_single":
            self.dist.all_to_all_single(self.target, self.source, self.counts, self.counts)
        else:
            sources, targets = self.source.split(self.counts), self.target.split(self.counts)
            targets[self.rank].copy_(sources[self.rank])
            others = [peer for peer in range(RANKS) if peer != self.rank]
            for work in [*[self.dist.irecv(targets[peer], peer) for peer in others],
                         *[self.dist.isend(sources[peer], peer) for peer in others]]:
                work.wait()
        if int(self.target.sum()) != self.expected:
            raise SystemExit(f"gloo's all-to-all of {self.source.numel() * 8} bytes brought the wrong words")

    def time(self):
        """Microseconds from the first rank's start to the last rank's end."""
        import torch
        self.dist.barrier()
        began = time.monotonic_ns()  # one clock for all processes of the host
        self.run()
        span = torch.tensor([-began, time.monotonic_ns()])
        self.dist.all_reduce(span, self.dist.ReduceOp.MAX)
        return int(span.sum()) / 1e3


def be_rank(rank, file):
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=RANKS,
                            timeout=datetime.timedelta(seconds=TIMEOUT_S))
    figures, way = {}, None
    for size in SIZES:
        exchange = Exchange(rank, size)
        exchange.target.zero_()
        exchange.run()
        repeats = min(max(BYTES // size, REPEATS_MIN), REPEATS_MAX)
        times = [exchange.time() for _ in range(WARM_UP + repeats)][WARM_UP:]
        figures[size], way = statistics.median(times), exchange.way
    if rank == 0:
        print(json.dumps({"way": way, "figures": figures}))


def run_gloo():
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--file", os.path.join(folder, "meet"), "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(RANKS)]
        try:
            shown = [rank.communicate(timeout=TIMEOUT_S)[0] for rank in ranks]
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a gloo rank failed")
    answer = json.loads(shown[0])
    return answer["way"], {int(size): figure for size, figure in answer["figures"].items()}


def run_ours(run, bench):
    shown = subprocess.run([run, "ranks", str(RANKS), bench, "alone"], check=True, stdout=subprocess.PIPE, text=True,
                           timeout=TIMEOUT_S).stdout
    lines = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
    return {line["config"]: line for line in lines}


def config_of(size):
    shown = f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB"
    return f"shm, {RANKS} ranks, {shown} a rank"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench")
    parser.add_argument("--run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--file")
    options = parser.parse_args()
    if options.rank is not None:
        be_rank(options.rank, options.file)
        return
    try:
        import torch.distributed as dist
        absent = None if dist.is_available() and dist.is_gloo_available() else "this torch has no gloo"
    except ImportError:
        absent = "torch is not installed"
    except AttributeError:  # versions before is_gloo_available; those for CPUs have gloo
        absent = None
    line = {"name": "all_to_all", "unit": "us", "goal": None, "goal_met": None}
    if absent:
        print(json.dumps({**line, "config": f"shm, {RANKS} ranks", "value": None, "floor": None,
                          "peer": f"gloo: {absent}", "peer_value": None, "ratio": None}))
        return
    rounds = [(run_ours(options.run, options.bench), *run_gloo()) for _ in range(options.rounds)]
    for size in SIZES:
        config = config_of(size)
        ours = [mine[config]["value"] for mine, _, _ in rounds]
        theirs = [figures[size] for _, _, figures in rounds]
        ratio = statistics.median(their / our for our, their in zip(ours, theirs))
        print(json.dumps({**line, "config": config, "value": statistics.median(ours),
                          "floor": statistics.median(mine[config]["floor"] for mine, _, _ in rounds),
                          "peer": "gloo" if rounds[0][1] == "all_to_all_single" else f"gloo, {rounds[0][1]}",
                          "peer_value": statistics.median(theirs), "ratio": ratio,
                          "goal": f">= {GOAL:g} x faster", "goal_met": ratio >= GOAL}))


if __name__ == "__main__":
    main()
