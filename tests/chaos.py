#!/usr/bin/env python3
"""Chaos on real processes: starts jobs, kills, stops, aborts and dismisses what they consist of, resizes them
meanwhile, and then holds them to their word: the same bits as undisturbed, every step in the ledger once, an end in
time, the right exit code, nothing left over.

Prints the seed, a line of the Test Anything Protocol for each job, and totals. A job's plan depends on (seed, number of
the job) alone, its timing on the machine: --seed S --job K runs job K again. The programs lie in --build FOLDER, unless
the variables TOOL, DLRM and WORKER name them.
"""
import argparse
import collections
import glob
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
if "--build" in sys.argv[:-1]:
    BUILD = pathlib.Path(sys.argv[sys.argv.index("--build") + 1]).resolve()
COVEY = os.environ.get("TOOL", str(BUILD / "tools/covey"))
DLRM = os.environ.get("DLRM", str(BUILD / "examples/dlrm"))
WORKER = os.environ.get("WORKER", str(BUILD / "tests/elastic_worker"))
LEDGER_CHECK = ROOT / "examples/ledger_check.py"
HANG = 120       # seconds after which a job counts as hanging
GONE = 4         # seconds in which everything must be gone after the end
ORDINARY = ("log", "out", "err", "events", "report", "ledger.", "once", "more.", "tmp")


# ---- processes ----

def read(path):
    try:
        return pathlib.Path(path).read_bytes()
    except OSError:
        return b""


def processes_with(text):
    """pid: command line of all that have the text in their environment or arguments, without this process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            arguments = read(f"/proc/{name}/cmdline")
            if text.encode() in read(f"/proc/{name}/environ") + arguments:
                found[int(name)] = arguments.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def children(pid):
    return [int(child) for task in glob.glob(f"/proc/{pid}/task/*/children") for child in read(task).split()]


def tree(pid):
    found, todo = [], [pid]
    while todo:
        for child in children(todo.pop()):
            found.append(child)
            todo.append(child)
    return found


def parent(pid):
    fields = read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def program(pid):
    return os.path.basename(read(f"/proc/{pid}/cmdline").split(b"\0")[0].decode(errors="replace"))


def shared_memory():
    return set(os.listdir("/dev/shm"))


def unused(names):
    """Those of the names in /dev/shm that no process has mapped: whoever made them is gone."""
    maps = b"".join(read(f"/proc/{pid}/maps") for pid in os.listdir("/proc") if pid.isdigit())
    return {name for name in names if os.path.exists(f"/dev/shm/{name}") and f"/dev/shm/{name}".encode() not in maps}


def scrubbed():
    return {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_", "COVEY_"))}


def mpirun_command(ranks, *options):
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), *options]


# ---- jobs ----

class Job:
    """A job in a folder and a session of its own, with all that is needed to look at it and to hurt it."""

    def __init__(self, launcher, name, ranks, arguments=(), options=(), environment=None,
                 prefix="covey-chaos-", **popen):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix))
        (self.folder / "tmp").mkdir()
        self.file = self.folder / "job"
        self.launcher, self.name, self.ranks = launcher, name, ranks
        self.shm_before = shared_memory()
        self.environment = {**scrubbed(), "COVEY_MACHINE": "typical", "TMPDIR": str(self.folder / "tmp"),
                            "OMPI_MCA_btl_vader_single_copy_mechanism": "none", **(environment or {})}
        if launcher == "plain":  # of Open MPI 5, whose --enable-recovery is for signals alone
            self.environment["PRTE_MCA_state_base_error_non_zero_exit"] = "0"
        own = ["--report", "report", "--quiet"] if name == "dlrm" else ["--events", "events", "--once", "once"]
        self.program = [DLRM if name == "dlrm" else WORKER, "--ledger", str(self.folder / "ledger")]
        self.program += [str(self.folder / word) if word in ORDINARY else word for word in own]
        self.program += [str(argument) for argument in arguments]
        options = [str(option) for option in options]
        if launcher == "run":
            command = [COVEY, "run", "-n", str(ranks), "--job", str(self.file), *options, "--", *self.program]
        elif launcher == "mpirun":
            command = [*mpirun_command(ranks), COVEY, "run", "--job", str(self.file), *options, "--", *self.program]
        elif launcher == "plain":
            command = [*mpirun_command(ranks, "--enable-recovery"), *options, *self.program, "--job", str(self.file)]
        else:
            command = [*options, *self.program]
        self.others = []  # processes started by hand to join
        self.out, self.err = open(self.folder / "out", "ab"), open(self.folder / "err", "ab")
        self.began = time.monotonic()
        settings = {"stdin": subprocess.DEVNULL, "stdout": self.out, "stderr": self.err, "start_new_session": True}
        self.process = subprocess.Popen(command, env=self.environment, **{**settings, **popen})

    def join_by_hand(self, *more):
        process = subprocess.Popen([*self.program, *more, "--join", str(self.file)], env=self.environment,
                                   stdin=subprocess.DEVNULL, stdout=self.out, stderr=self.err, start_new_session=True)
        self.others.append(process)
        return process

    def over(self):
        for process in self.others:
            process.poll()
        return self.process.poll() is not None

    def alive(self):
        """All processes of the job but the one we started."""
        found = tree(self.process.pid)
        return found + [process.pid for process in self.others if process.poll() is None]

    def workers(self):
        name = os.path.basename(self.program[0])
        return [pid for pid in self.alive() if program(pid) == name]

    def supervisor_of(self, worker):
        pid = parent(worker)
        return pid if program(pid) == os.path.basename(COVEY) and pid != self.process.pid else 0

    def ask(self, what, *arguments):
        done = subprocess.run([COVEY, what, "--job", str(self.file), *map(str, arguments)], capture_output=True,
                              text=True, timeout=30, env=self.environment)
        return done.returncode, done.stdout + done.stderr

    def members(self):
        """(rank, pid, life, step) of each member, as somebody of the job sees it."""
        code, text = self.ask("status")
        row = r"^rank (\d+) +process (\d+) +\S+ +(\w+), step (\d+)"
        rows = re.findall(row, text, re.MULTILINE) if code == 0 else []
        return [(int(rank), int(pid), life, int(step)) for rank, pid, life, step in rows]

    def wait(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not (value := condition()) and time.monotonic() < deadline and not self.over():
            time.sleep(0.005)
        return value

    def steps(self):
        """Committed steps, as far as the ledger tells."""
        last = 0
        for name in glob.glob(str(self.folder / "ledger.*")):
            with open(name, "rb") as file:
                file.seek(max(os.path.getsize(name) - 200, 0))
                lines = file.read().rpartition(b"\n")[0].split(b"\n")
            if lines[-1]:
                last = max(last, int(lines[-1].split()[0]) + 1)
        return last

    def kill(self, pid, number):
        """True if the process is this job's and was there."""
        if str(self.folder).encode() not in read(f"/proc/{pid}/environ"):
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    # -- what it left --

    def finish(self, seconds=HANG):
        """The exit code, or None: it hangs, and was put an end to."""
        try:
            self.process.wait(max(self.began + seconds - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            return None
        deadline = time.monotonic() + 15
        for process in self.others:
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                return None
        return self.process.returncode

    def end_all(self):
        for pid in processes_with(str(self.folder)):
            self.kill(pid, signal.SIGKILL)
        for process in [self.process, *self.others]:
            process.wait()

    def left_over(self, but=()):
        """What is still there that should not be, as sentences. but: beginnings of names in TMPDIR that may stay."""
        deadline = time.monotonic() + GONE
        while (left := processes_with(str(self.folder))) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = [f"process {pid} is left over: {line[:120]}" for pid, line in left.items()]
        for path in [*self.folder.iterdir(), *(self.folder / "tmp").rglob("*")]:
            inside = path.relative_to(self.folder).parts
            if not (inside[1].startswith(tuple(but)) if len(inside) > 1 else path.name.startswith(ORDINARY)):
                found.append(f"file {path} is left over")
        new = shared_memory() - self.shm_before
        while (left := unused(new)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found + [f"/dev/shm/{name} is left over" for name in left]

    def text(self, name):
        return read(self.folder / name).decode(errors="replace")

    def events(self):
        return [json.loads(line) for line in self.text("events").splitlines() if line.endswith("}")]

    def ends(self):
        """What the workers said last."""
        return [dict(pair.split("=") for pair in line.split()[1:]) for line in self.text("out").splitlines()
                if line.startswith("end hash=")]

    def hashes(self):
        if self.name == "dlrm":
            text = self.text("report")
            return {json.loads(text)["state_hash"]} if text else set()
        return {end["hash"] for end in self.ends()}

    def check_ledger(self, like):
        done = subprocess.run([sys.executable, str(LEDGER_CHECK), str(self.folder / "ledger"), "--like", str(like)],
                              capture_output=True, text=True)
        return None if done.returncode == 0 else done.stderr.strip()

    def remove(self):
        self.out.close()
        self.err.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Undisturbed:
    """Hash and ledger of the same training, alone; run once for each kind of training."""

    def __init__(self):
        self.known, self.jobs = {}, []

    def of(self, name, arguments):
        key = (name, *map(str, arguments))
        if key not in self.known:
            job = Job("alone", name, 1, arguments)
            self.jobs.append(job)
            if job.finish() != 0:
                raise SystemExit(f"Bail out! the undisturbed run failed: {job.text('err')}")
            self.known[key] = job.hashes().pop(), job.folder / "ledger"
        return self.known[key]

    def remove(self):
        for job in self.jobs:
            job.remove()


# ---- what is done to a job ----

DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
# action: weight; which launchers it suits
ACTIONS = {
    "one": (8, "run mpirun plain"), "first": (4, "run mpirun plain"), "two": (4, "run mpirun plain"),
    "again": (5, "run mpirun plain"), "joiner": (5, "run mpirun plain"), "stop": (2, "run mpirun plain"),
    "pause": (2, "run mpirun plain"), "leave": (2, "run mpirun plain"), "term": (2, "run mpirun plain"),
    "resize": (3, "run mpirun"), "resize-joiner": (2, "run mpirun"), "supervisor": (2, "run"),
    "supervisor-worker": (2, "run"), "join": (6, "plain"),
}


class Chaos:
    """One job, and what befalls it."""

    def __init__(self, seed, number, options, undisturbed):
        self.number = number
        self.random = random.Random(f"{seed}/{number}")
        pick = self.random.choices
        self.launcher = options.launcher or pick(["run", "mpirun", "plain"], [6, 2, 2])[0]
        self.program = options.program or pick(["dlrm", "worker"], [1, 1])[0]
        self.ranks = options.ranks or pick([2, 3, 4, 5, 6], [1, 2, 4, 2, 1])[0]
        self.mean = self.random.choice([0.2, 0.4, 0.8])  # seconds between actions
        self.spared = 1  # so many who hold all are left alone; one more where one may fall by its own hand
        delay = self.random.choice([5, 10, 15])
        if self.program == "dlrm":
            base, more = ["--data", "gen:24000", "--batch", 96, "--dim", 8], ["--step-delay-ms", delay]
            more += self.exchange(base)
        else:
            base = ["--steps", 300, "--between", 0 if self.random.random() < 0.5 else self.random.choice([1, 7])]
            more = ["--delay-ms", delay, *self.inside()]
        self.hash, self.ledger = undisturbed.of(self.program, base)
        limits = ["--max-restarts", 1000] if self.launcher != "plain" else []
        self.job = Job(self.launcher, self.program, self.ranks, [*base, *more], limits)
        self.kills = collections.Counter()
        self.done = collections.Counter()
        self.wrong, self.log, self.threads = [], [], []
        self.started, self.struck = set(), set()
        self.last_kill = 0.0

    def exchange(self, base):
        """How tables lie and travel, which changes no bit: the undisturbed run has the defaults."""
        sharding = self.random.choice(["auto", "row_wise", "table_wise", "column_wise", "data_parallel"])
        if sharding == "column_wise":
            base[base.index("--dim") + 1] = 72  # so that there is something to cut
        return ["--sharding", sharding, "--hot-rows", self.random.choice(["auto", "off", "on"]),
                "--prefetch", self.random.randrange(4)]

    def inside(self):
        """Faults that the worker commits itself, at points that a signal from outside hardly hits."""
        options = []
        count = self.random.choice([0, 1, 2, 3])
        if self.launcher == "plain":  # nobody is replaced, and one has to remain
            count = min(count, self.ranks - 1)
        for step in self.random.sample(range(20, 280, 60), count):
            point = self.random.choice("begin lookup backward dense voted voted committed between".split())
            what = self.random.choice(["kill", "kill", "abort", "exit", f"soonus{self.random.randrange(3000)}"])
            options += ["--fault", f"{point}:{what}:{step + self.random.randrange(20)}:{self.random.choice('*013')}"]
        if self.random.random() < 0.3:
            options += ["--fault", f"tables:soonus{self.random.randrange(40000)}:*:j"]
        self.spared = 1 + max(bool(options), count if self.launcher == "plain" else 0)
        return options

    def note(self, text):
        self.log.append(f"{time.monotonic() - self.job.began:7.3f} {text}")

    def strike(self, pid, number, kind, workers=()):
        """workers: who goes down with it."""
        self.struck |= {pid, *workers}
        if pid and self.job.kill(pid, number):
            self.last_kill = time.monotonic()
            self.kills[kind] += 1
            self.note(f"{kind}: {signal.Signals(number).name} to {pid} {program(pid)}")

    def whole(self):
        """Members that hold the dense weights, by rank: one of them must stay, or the job is lost as it should be. Who
        was hit may look alive for a while, as long as it writes its core."""
        return [pid for _, pid, life, step in self.job.members()
                if life == "alive" and pid not in self.struck and (step > 0 or pid in self.started)]

    def victims(self, count=1, first=False):
        whole = self.whole()
        if len(whole) < count + self.spared:
            return []
        return whole[:count] if first else self.random.sample(whole, count)

    def deadly(self):
        return self.random.choice(DEADLY)

    # -- the actions --

    def one(self):
        for pid in self.victims():
            self.strike(pid, self.deadly(), "one")

    def first(self):
        for pid in self.victims(first=True):
            self.strike(pid, self.deadly(), "first")

    def two(self):
        for pid in self.victims(2):
            self.strike(pid, self.deadly(), "two")

    def again(self):
        """The second one while the world recovers from the first."""
        for pid in self.victims(2):
            self.strike(pid, self.deadly(), "again")
            time.sleep(self.random.choice([0, 0.002, 0.005, 0.01, 0.02, 0.05]) * self.random.random() * 2)

    def new_worker(self, before):
        found = self.job.wait(lambda: set(self.job.workers()) - before, 1.5)
        return found.pop() if found else 0

    def joiner(self):
        """The replacement while it enters."""
        before = set(self.job.workers())
        if self.launcher == "plain":
            self.job.join_by_hand()
        else:
            self.one()
        pid = self.new_worker(before)
        time.sleep(self.random.random() * self.random.choice([0.01, 0.05, 0.2]))
        self.strike(pid, self.deadly(), "joiner")

    def stop(self):
        """Stopped for ever: the others must notice and put an end to it."""
        for pid in self.victims():
            self.strike(pid, signal.SIGSTOP, "stop")

    def pause(self):
        for pid in self.victims():
            self.strike(pid, signal.SIGSTOP, "pause")
            wake = threading.Timer(self.random.random() * 1.5, self.go_on, (pid,))
            wake.start()
            self.threads.append(wake)

    def go_on(self, pid):
        if self.job.kill(pid, signal.SIGCONT):
            self.struck.discard(pid)

    def term(self):
        for pid in self.victims():
            self.strike(pid, signal.SIGTERM, "term")

    def leave(self):
        rows = self.job.members()
        if len(self.whole()) > self.spared:
            self.note(f"leave: {self.job.ask('leave', self.random.choice(rows)[0])}")

    def resize(self):
        self.note(f"resize: {self.job.ask('resize', self.random.randrange(2, self.ranks + 2))}")

    def resize_joiner(self):
        """Growth that is interrupted."""
        before = set(self.job.workers())
        self.note(f"resize: {self.job.ask('resize', self.ranks + 1)}")
        pid = self.new_worker(before)
        time.sleep(self.random.random() * 0.05)
        self.strike(pid, self.deadly(), "resize-joiner")

    def supervisor(self, worker_too=False):
        """It may have more workers than one: those it was asked for when the job grew."""
        whole = self.whole()
        if not whole:
            return
        victim = self.random.choice(whole)
        supervisor = self.job.supervisor_of(victim)
        workers = set(children(supervisor)) if supervisor else set()
        if not supervisor or len(set(whole) - workers) < self.spared:
            return
        pids = [supervisor, victim] if worker_too else [supervisor]
        self.random.shuffle(pids)
        for pid in pids:
            self.strike(pid, signal.SIGKILL, "supervisor-worker" if worker_too else "supervisor", workers)

    def supervisor_worker(self):
        self.supervisor(True)

    def join(self):
        if len(self.job.workers()) < self.ranks + 2:
            self.job.join_by_hand()

    # -- one job from start to judgement --

    def run(self, wanted):
        names = [name for name, (_, suits) in ACTIONS.items() if self.launcher in suits.split()]
        weights = [ACTIONS[name][0] for name in names]
        self.job.wait(lambda: self.job.steps() > 0)
        self.started = {pid for _, pid, _, _ in self.job.members()}
        supervisors = self.ranks
        while not self.job.over() and time.monotonic() - self.job.began < HANG and sum(self.kills.values()) < wanted:
            self.job.wait(lambda end=time.monotonic() + self.random.expovariate(1 / self.mean): time.monotonic() > end)
            name = self.random.choices(names, weights)[0]
            if name.startswith("supervisor"):
                supervisors -= 1
            if not self.job.over() and (supervisors > 1 or not name.startswith("supervisor")):
                self.done[name] += 1
                getattr(self, name.replace("-", "_"))()
        self.judge()

    def codes(self):
        """The exit codes that are right."""
        plain = self.launcher == "plain"  # mpirun tells the signal of the first one that died
        return range(256) if plain and sum(self.kills.values()) + self.faults() else [0]

    def faults(self):
        return sum(event["kind"] == "fault" for event in self.job.events()) if self.program == "worker" else 0

    def judge(self):
        job = self.job
        code = job.finish(HANG)
        self.ended = time.monotonic()
        if code is None:
            code, text = job.ask("status") if job.file.exists() else (3, "no job file")
            self.wrong.append(f"it hangs: {job.steps()} steps after {HANG} s; status: {text}"
                              + "".join(f"\n{pid} {line}" for pid, line in processes_with(str(job.folder)).items()))
            self.note(f"still there: {[(pid, program(pid), read(f'/proc/{pid}/wchan')) for pid in job.alive()]}")
            job.end_all()
            return
        for thread in self.threads:
            thread.join()
        if "lost a member 3 times" in job.text("err"):
            self.judge_stopped(code)
            return
        if code not in self.codes():
            self.wrong.append(f"exit code {code}")
        hashes = job.hashes()
        late = self.ended - self.last_kill < 1.5  # who was to print it may have been hit
        if hashes - {self.hash} or (not hashes and not late):
            self.wrong.append(f"hash {hashes or 'not told'} instead of {self.hash}")
        if (said := job.check_ledger(self.ledger)) is not None:
            self.wrong.append(f"ledger: {said}")
        self.wrong += job.left_over()
        job.end_all()

    def judge_stopped(self, code):
        """Three deaths in one step, by chance, and the job has stopped at its last commit, as it is to."""
        job = self.job
        deaths = sum(self.kills.values()) + self.faults()
        if deaths < 3 or code == 0 or job.hashes():
            self.wrong.append(f"stopped after {deaths} deaths with code {code} and hash {job.hashes()}")
        said = (job.check_ledger(self.ledger) or "").splitlines()
        missing = [f"step {job.steps() + i} is in one of the ledgers only" for i in range(len(said))]
        if not said or said != missing:  # nothing but what comes after the last commit
            self.wrong.append(f"ledger of {job.steps()} steps: {said}")
        self.wrong += job.left_over()
        job.end_all()

    def figures(self):
        """detect_ms, recover_ms, steps redone."""
        job = self.job
        if self.program == "dlrm":
            report = json.loads(job.text("report") or "{}")
            views = report.get("views", [])
            redone = report.get("steps_redone", 0)
            if report.get("steps_lost", 0):
                self.wrong.append(f"{report['steps_lost']} steps lost")
        else:
            views = [event for event in job.events() if event["kind"] == "changed"]
            redone = max([int(end["redone"]) for end in job.ends()], default=0)
        deaths = [view for view in views if view["cause"] == "death"]
        return ([view["detect_ms"] for view in deaths if "detect_ms" in view],
                [view["recover_ms"] for view in deaths if "recover_ms" in view], redone)

    def line(self):
        hits = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items())) or "no kills"
        faults = self.faults()
        calm = ", ".join(f"{count} {name}" for name, count in sorted(self.done.items())
                         if name in ("leave", "resize", "join"))
        return (f"job {self.number}: {self.launcher} {self.program} {self.ranks} ranks, {self.job.steps()} steps in "
                f"{self.ended - self.job.began:.1f} s: {hits}" + (f", {faults} from inside" if faults else "")
                + (f"; {calm}" if calm else ""))


def spread(name, values):
    if not values:
        return f"# {name}: none\n"
    values = sorted(values)
    p99 = values[min(len(values) - 1, len(values) * 99 // 100)]
    return f"# {name}: median {statistics.median(values):.0f}, p99 {p99}, most {values[-1]}, of {len(values)}\n"


def keep(chaos, folder):
    """What is needed to understand a failure."""
    target = pathlib.Path(folder) / f"job-{chaos.number}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(chaos.job.folder, target, ignore_dangling_symlinks=True)
    command = "$ " + " ".join(map(str, chaos.job.process.args))
    (target / "plan").write_text("\n".join([command, *chaos.log, *chaos.wrong]))
    return target


def show(chaos):
    for line in "\n".join([*chaos.wrong, "-- done to it:", *chaos.log[-25:], "-- its last words:",
                           *chaos.job.text("err").splitlines()[-25:]]).splitlines():
        print(f"#   {line}")


def main():
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", help="folder with tools/covey, examples/dlrm and tests/elastic_worker (build)")
    parser.add_argument("--kills", type=int, default=10, help="go on until so many were delivered (10)")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=0, help="0: 2 to 6, by the seed")
    parser.add_argument("--job", type=int, default=None, help="this job alone")
    parser.add_argument("--launcher", choices=["run", "mpirun", "plain"])
    parser.add_argument("--program", choices=["dlrm", "worker"])
    parser.add_argument("--keep", default=str(pathlib.Path(tempfile.gettempdir()) / "covey-chaos-failures"),
                        help="where to put the folders of jobs that went wrong")
    parser.add_argument("--seconds", type=int, default=0, help="begin no more jobs after so many seconds; 0: no limit")
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # what the caller blocks jobs would block, too
    if not shutil.which("mpirun"):
        print("1..0 # SKIP no mpirun here")
        return 0
    options.seed = random.randrange(1 << 31) if options.seed is None else options.seed
    print(f"# seed {options.seed}", flush=True)
    undisturbed = Undisturbed()
    kills, detect, recover = collections.Counter(), [], []
    redone = jobs = failed = faults = 0
    began = time.monotonic()
    number = options.job or 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    while True:
        chaos = Chaos(options.seed, number, options, undisturbed)
        try:
            chaos.run(options.kills - sum(kills.values()) if options.job is None else 1 << 30)
        except BaseException:
            chaos.job.end_all()
            raise
        figures = chaos.figures()
        jobs += 1
        number += 1
        kills += chaos.kills
        faults += chaos.faults()
        detect += figures[0]
        recover += figures[1]
        redone += figures[2]
        print(f"{'not ok' if chaos.wrong else 'ok'} {jobs} - {chaos.line()}", flush=True)
        if chaos.wrong:
            failed += 1
            show(chaos)
            print(f"#   kept in {keep(chaos, options.keep)}; again: ./run chaos --seed {options.seed} "
                  f"--job {chaos.number}", flush=True)
        chaos.job.remove()
        late = options.seconds and time.monotonic() - began > options.seconds
        if options.job is not None or sum(kills.values()) >= options.kills or late:
            break
    undisturbed.remove()
    kinds = ", ".join(f"{count} {kind}" for kind, count in kills.most_common())
    print(f"1..{jobs}\n# {sum(kills.values())} kills ({kinds}) and "
          f"{faults} faults from inside in {jobs} jobs, {time.monotonic() - began:.0f} s\n"
          + spread("detect_ms", detect) + spread("recover_ms", recover)
          + f"# steps redone: {redone}\n# again: ./run chaos --seed {options.seed} --kills {options.kills}"
          + (f" --ranks {options.ranks}" if options.ranks else ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
