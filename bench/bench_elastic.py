"""Times what befalls an elastic job, and what being elastic costs when nothing does. Prints JSON lines.

usage: bench_elastic.py --build FOLDER [--ranks N] [--kills N] [--gb N] [--minutes N] [--pairs N] [--only NAME ...]

Each figure comes from bench/elastic_worker.c, whose ranks write down when they committed which step. Recovery: from the
signal to the first commit of the new view, less one ordinary step. Rejoin: from the signal to the first commit of a
view that is whole again. Before anything is timed the same job is checked: steps are committed once, in order.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent


def line(name, config, value, unit, goal=None, met=None, **more):
    print(json.dumps({"name": name, "config": config, "value": value, "unit": unit, "floor": more.get("floor"),
                      "peer": more.get("peer"), "peer_value": more.get("peer_value"), "ratio": more.get("ratio"),
                      "goal": goal, "goal_met": met}), flush=True)


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))]


class Job:
    """One `covey run -n` of the worker, in a session of its own."""

    def __init__(self, options, ranks, *worker):
        self.folder = tempfile.TemporaryDirectory()
        self.log = pathlib.Path(self.folder.name) / "log"
        self.file = pathlib.Path(self.folder.name) / "job"
        self.log.mkdir()
        self.errors = open(pathlib.Path(self.folder.name) / "errors", "w+", encoding="utf-8")
        self.tool = options.build / "tools" / "covey"
        self.process = subprocess.Popen(
            [self.tool, "run", "--job", self.file, "--max-restarts", "100000", "-n", str(ranks), "--",
             options.build / "bench" / "elastic_worker", "--log", self.log, *map(str, worker)],
            stdout=subprocess.DEVNULL, stderr=self.errors, start_new_session=True)

    def status(self):
        """[(rank, pid)] as the job itself tells."""
        result = subprocess.run([self.tool, "status", "--job", self.file], capture_output=True, text=True, timeout=20)
        return [(int(rank), int(pid)) for rank, pid in re.findall(r"^rank (\d+) +process (\d+)", result.stdout, re.M)]

    def commits(self, since=0):
        """All commits so far: (nanoseconds, step, epoch, world_size), oldest first."""
        found = []
        for path in self.log.iterdir():
            for text in path.read_text().splitlines():
                step, epoch, size, when = text.split()
                if step != "redo" and int(when) > since:
                    found.append((int(when), int(step), int(epoch), int(size)))
        return sorted(found)

    def redone(self):
        return sum(text.startswith("redo") for path in self.log.iterdir() for text in path.read_text().splitlines())

    def wait_for(self, wanted, since=0, limit=120):
        """The first commit that `wanted` says yes to."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            for commit in self.commits(since):
                if wanted(commit):
                    return commit
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        self.errors.seek(0)
        sys.exit("the job made no progress:\n" + self.errors.read()[-3000:])

    def whole(self, ranks, since=0):
        return self.wait_for(lambda commit: commit[3] == ranks, since)

    def step_ms(self):
        """The median time of a step, from the commits of one rank in its longest view."""
        gaps = []
        for path in self.log.iterdir():
            rows = [text.split() for text in path.read_text().splitlines() if not text.startswith("redo")]
            gaps += [int(b[3]) - int(a[3]) for a, b in zip(rows, rows[1:]) if a[1] == b[1]]
        return statistics.median(gaps) / 1e6

    def check(self):
        """Every step from 0 on was committed, and by nobody twice."""
        steps = set()
        for path in self.log.iterdir():
            mine = [int(text.split()[0]) for text in path.read_text().splitlines() if not text.startswith("redo")]
            assert mine == sorted(set(mine)), f"{path}: a step was committed twice or out of order"
            steps.update(mine)
        assert steps == set(range(len(steps))), "a step is missing"

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.check()
        self.folder.cleanup()
        return code



def kill_and_time(job, ranks, pick, number):
    """One signal: (recovery ms, rejoin ms)."""
    members = job.status()
    while len(members) != ranks:
        time.sleep(0.1)
        members = job.status()
    before = job.commits()[-1]
    pid = dict(members)[pick % ranks]
    began = time.monotonic_ns()
    os.kill(pid, number)
    first = job.wait_for(lambda commit: commit[2] > before[2], began)
    whole = job.wait_for(lambda commit: commit[2] > before[2] and commit[3] == ranks, began)
    return (first[0] - began) / 1e6, (whole[0] - began) / 1e6


def recovery(options, name, mb, kills, coordinator=False):
    ranks = options.ranks
    job = Job(options, ranks, "--mb", mb)
    job.whole(ranks)
    time.sleep(1)
    recovered, rejoined = [], []
    for k in range(kills):
        a, b = kill_and_time(job, ranks, 0 if coordinator else k * 5 + 1, signal.SIGKILL)
        recovered.append(a)
        rejoined.append(b)
        time.sleep(0.3)
    step = job.step_ms()
    code = job.end()
    assert code == 0, f"the job ended with {code}"
    recovered = [value - step for value in recovered]
    config = {"ranks": ranks, "GB a rank": mb / 1000, "kills": kills, "step ms": round(step, 1)}
    median, worst = statistics.median(recovered), percentile(recovered, 0.99)
    line(f"{name}: recovery, median", config, median, "ms", "<= 250", median <= 250)
    line(f"{name}: recovery, p99", config, worst, "ms", "<= 1000", worst <= 1000)
    rejoin = statistics.median(rejoined)
    line(f"{name}: world whole again, median", config, rejoin, "ms", "<= 3000", rejoin <= 3000)


def stop(options):
    ranks = options.ranks
    job = Job(options, ranks)
    job.whole(ranks)
    time.sleep(1)
    recovered = [kill_and_time(job, ranks, k * 3 + 1, signal.SIGSTOP)[0] for k in range(3)]
    step = job.step_ms()
    code = job.end()
    assert code == 0, f"the job ended with {code}"
    limit = 2000 + 3 * step
    worst = max(recovered)
    line("SIGSTOP: verdict and recovery, worst", {"ranks": ranks, "stops": 3, "step ms": round(step, 1)}, worst, "ms",
         f"<= 2 s + 3 steps = {limit:.0f}", worst <= limit)


def leave(options):
    ranks = options.ranks
    job = Job(options, ranks)
    job.whole(ranks)
    time.sleep(1)
    pauses, leaves = [], 5
    for k in range(leaves):
        before = job.commits()[-1]
        size = len(job.status())
        began = time.monotonic_ns()
        subprocess.run([job.tool, "leave", "--job", job.file, str(k % size)], check=True, capture_output=True)
        changed = job.wait_for(lambda commit: commit[2] > before[2], began)
        last = max(commit for commit in job.commits() if commit[2] == before[2])
        pauses.append((changed[0] - last[0]) / 1e6)
        if size <= 2:
            break
    redone, step = job.redone(), job.step_ms()
    code = job.end()
    assert code == 0, f"the job ended with {code}"
    line("graceful leave: steps redone", {"ranks": ranks, "leaves": leaves}, redone, "steps", "= 0", redone == 0)
    line("graceful leave: pause beyond a step, median", {"ranks": ranks, "leaves": leaves},
         statistics.median(pauses) - step, "ms")


def train(options, kind):
    """Samples a second and state hash of the trainer of examples/ on two ranks. Private: a fixed world whose tables lie
    in memory of the process alone."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report"
        trainer = [options.build / "examples" / "dlrm", "--data", "gen:1000000", "--quiet", "--report", report]
        command = [HERE.parent / "run", "ranks", "2", *trainer]
        if kind == "elastic":
            command = [options.build / "tools" / "covey", "run", "-n", "2", "--", *trainer]
        elif kind == "private":
            preload = f"LD_PRELOAD={options.build / 'bench' / 'libprivate_memory.so'}"
            command = [HERE.parent / "run", "ranks", "2", "env", preload, *trainer]
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
        assert (kind == "private") == ("private memory: " in done.stderr), done.stderr
        told = json.loads(report.read_text())
        return told["samples_per_second"], told["state_hash"]


def cost(options):
    """Fixed worlds have their tables in shared memory, too, and vote on each commit. So elastic beside fixed is
    watching and what a commit has to do for others; fixed beside private is memory that outlives its process."""
    kinds = ["private", "fixed", "elastic"]
    speeds, hashes = {kind: [] for kind in kinds}, set()
    for pair in range(options.pairs):
        for kind in kinds if pair % 2 else reversed(kinds):
            speed, state = train(options, kind)
            speeds[kind].append(speed)
            hashes.add(state)
    assert len(hashes) == 1, "the three came to different bits"
    for name, kind, peer, goal in (("watching and commit", "elastic", "fixed", 2),
                                   ("memory that outlives its process", "fixed", "private", 5)):
        percent = 100 * (statistics.median(a / b for a, b in zip(speeds[peer], speeds[kind])) - 1)
        line(f"cost without failures: {name}", {"ranks": 2, "pairs": options.pairs, "batch": 512}, percent,
             "% of a step", f"<= {goal}", percent <= goal, peer=f"{peer} world", peer_value=0.0,
             ratio=1 + percent / 100)


def false_verdicts(options):
    """A job among 16 busy processes, which nobody disturbs: every view after the first is a false verdict."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(16)]
    try:
        job = Job(options, 4)
        job.whole(4)
        time.sleep(60 * options.minutes)
        verdicts = max(commit[2] for commit in job.commits()) - 1
        code = job.end()
        assert code == 0, f"the job ended with {code}"
    finally:
        for process in busy:
            process.kill()
            process.wait()
    line("false verdicts", {"ranks": 4, "busy processes": 16, "minutes": options.minutes}, verdicts, "verdicts", "= 0",
         verdicts == 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gb", type=float, default=1.0, help="of tables a rank, in the case with large tables")
    parser.add_argument("--minutes", type=float, default=1.0, help="to watch for false verdicts")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=["kill", "coordinator", "large", "stop", "leave", "cost", "false"])
    options = parser.parse_args()
    options.build = options.build.resolve()
    cases = {"kill": lambda: recovery(options, "kill -9 of any rank", 0, options.kills),
             "coordinator": lambda: recovery(options, "kill -9 of rank 0", 0, options.kills // 2, True),
             "large": lambda: recovery(options, "kill -9, large tables", int(options.gb * 1000), options.kills // 3),
             "stop": lambda: stop(options), "leave": lambda: leave(options), "cost": lambda: cost(options),
             "false": lambda: false_verdicts(options)}
    for name, case in cases.items():
        if not options.only or name in options.only:
            case()


if __name__ == "__main__":
    main()
