"""The covey program: a supervisor and its worker, jobs of several ranks under mpirun, questions to a running job. The
worker is tests/worker.c, which does what its arguments say and appends what it learned to a log."""
import json
import os
import pathlib
import pty
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import unittest

import tap

COVEY = os.environ["TOOL"]
WORKER = os.environ["WORKER"]
LONG = 60  # seconds after which something counts as hanging
START, JOIN = 1, 2
MPIRUN = shutil.which("mpirun")


def wait_for(condition, seconds=LONG):
    """The first true value of the condition, or the last one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return value


def processes_with(text):
    """Processes that have the text in their environment or arguments, without this one."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
            if text.encode() in (folder / "environ").read_bytes() + arguments and int(folder.name) != os.getpid():
                found[int(folder.name)] = arguments.replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="covey-test-"))
        self.log = self.folder / "log"
        self.file = self.folder / "job"
        self.running = []
        self.crowd = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.crowd.close)
        self.addCleanup(self.clean)

    def clean(self):
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.communicate()
        left = wait_for(lambda: not processes_with(str(self.folder)), 4)
        shutil.rmtree(self.folder)
        self.assertTrue(left, "processes are left over")

    def environment(self, more=None):
        scrubbed = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMIX_"))}
        return {**scrubbed, "WORKER_LOG": str(self.log), "TMPDIR": str(self.folder),
                "WORKER_CROWD": "127.0.0.1:%d" % self.crowd.getsockname()[1], **(more or {})}

    def start(self, *options, does, ranks=0, mpirun=(), env=None, **more):
        """covey run, alone, under mpirun (mpirun: its options) or with -n; `does`: what the worker is to do."""
        command = [COVEY, "run", *(["-n", str(ranks)] if ranks and not mpirun else []), *map(str, options), "--",
                   WORKER, *does.split()]
        if mpirun:
            self.need_mpirun()
            command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
                       *[option for option in mpirun if option], *command]
        elif ranks:
            self.need_mpirun()
        quiet = {"OMPI_MCA_btl_vader_single_copy_mechanism": "none"} if mpirun else {}
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        process = subprocess.Popen(command, env=self.environment({**quiet, **(env or {})}), **settings)
        self.running.append(process)
        return process

    def need_mpirun(self):
        if not MPIRUN:
            self.skipTest("no mpirun here")

    def end(self, process, code=0, seconds=LONG):
        """What it said on standard error, after it ended with the code."""
        try:
            out, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.fail(f"did not end within {seconds} s")
        said = said.decode(errors="replace")
        self.assertEqual(process.returncode, code, said + (out or b"").decode(errors="replace"))
        return said

    def run_through(self, *options, does, code=0, **more):
        return self.end(self.start(*options, does=does, **more), code)

    def lines(self):
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def births(self):
        return [line for line in self.lines() if "kind" in line]

    def wait_births(self, count):
        self.assertTrue(wait_for(lambda: len(self.births()) >= count), f"{len(self.births())} of {count} births")
        return self.births()

    def left(self):
        return sum("left" in line for line in self.lines())


class Alone(Case):
    def test_birth_of_a_job_of_one(self):
        self.run_through(does="birth enter over 0")
        birth, = self.births()
        self.assertEqual((birth["kind"], birth["rank"], birth["restarts"]), (START, 0, 0))
        self.assertEqual(birth["members"], [birth["address"]])
        self.assertTrue(birth["address"].startswith("127.0.0.1:"))

    def test_worker_sees_a_clean_world(self):
        ours, theirs = os.pipe()
        strange = {name + "X": "1" for name in ("OMPI_MCA_", "PMIX_", "PRTE_")}
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
        try:
            self.run_through(does="birth", env=strange, pass_fds=[ours, theirs], restore_signals=False)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            os.close(ours)
            os.close(theirs)
        birth, = self.births()
        self.assertEqual((birth["strangers"], birth["signals"]), ("", ""))
        self.assertEqual(len(birth["descriptors"].strip(",").split(",")), 4, birth["descriptors"])

    def test_exit_codes(self):
        for does, code, words in (("exit 0", 0, ""), ("exit 3", 3, "only member"), ("die 15", 143, "Terminated"),
                                  ("exit 127", 127, "cannot be run"), ("birth enter over 5 exit 5", 5, ""),
                                  ("birth enter over 6 die 9", 6, "over for it"), ("birth crowd over 0 exit 4", 4, "")):
            with self.subTest(does):
                began = time.monotonic()
                said = self.run_through(does=does, code=code)
                self.assertIn(words, said)
                if not words:
                    self.assertEqual(said, "")
                self.assertLess(time.monotonic() - began, 5)

    def test_programs_that_cannot_run(self):
        for program, code, words in (("no-such-program", 127, "not tried again"), ("/tmp", 126, "Permission denied"),
                                     ("./no/such", 127, "No such file")):
            with self.subTest(program):
                done = subprocess.run([COVEY, "run", "--", program], capture_output=True, text=True, timeout=LONG)
                self.assertEqual(done.returncode, code)
                self.assertIn(words, done.stderr)

    def test_replacement(self):
        self.run_through(does="birth crowd first die 9 again over 0")
        first, second = self.births()
        self.assertEqual((second["kind"], second["restarts"]), (JOIN, 1))
        self.assertEqual(second["replaces"], first["id"])
        self.assertNotEqual(second["id"], first["id"])
        for same in ("address", "job", "secret", "parent"):
            self.assertEqual(second[same], first[same], same)
        self.assertEqual(second["members"], [self.environment()["WORKER_CROWD"]])

    def test_limit_and_backoff(self):
        began = time.monotonic()
        said = self.run_through("--max-restarts", 4, does="birth crowd exit 7", code=1)
        self.assertEqual(len(self.births()), 5)
        self.assertIn("replaced 4 times within an hour, which is the limit", said)
        self.assertGreater(time.monotonic() - began, 0.2 + 0.4 + 0.8)
        self.assertIn("starts now (1 of at most 4", said)
        self.assertIn("in 0.2 s (2 of", said)

    def test_no_restarts(self):
        said = self.run_through("--max-restarts", 0, does="birth crowd die 9", code=1)
        self.assertEqual(len(self.births()), 1)
        self.assertIn("--max-restarts", said)

    def test_worker_that_never_gets_in(self):
        said = self.run_through(does="birth first crowd die 9 again exit 7", code=7)
        self.assertEqual(len(self.births()), 4)
        self.assertIn("3rd time in a row", said)

    def test_told_to_leave(self):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number.name):
                before = len(self.births())
                process = self.start(does="birth crowd obey")
                self.wait_births(before + 1)
                process.send_signal(number)
                self.assertEqual(self.end(process, seconds=10), "")
        self.assertEqual((self.left(), len(self.births())), (4, 4))

    def test_leave_comes_before_the_worker_listens(self):
        process = self.start(does="sleep 600 birth crowd obey")
        self.assertTrue(wait_for(lambda: any(WORKER in line for line in processes_with(str(self.log)).values())))
        time.sleep(0.2)
        process.terminate()
        self.end(process)
        self.assertEqual(self.left(), 1)

    def test_grace_ends(self):
        process = self.start("--grace", 300, does="birth crowd ignore")
        self.wait_births(1)
        began = time.monotonic()
        process.terminate()
        self.assertIn("did not leave within 300 ms", self.end(process, 137))
        self.assertTrue(0.25 < time.monotonic() - began < 5)
        self.assertEqual(len(self.births()), 1)

    def test_second_interrupt_kills(self):
        process = self.start(does="birth crowd ignore")
        self.wait_births(1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        self.assertIsNone(process.poll())
        process.send_signal(signal.SIGINT)
        self.end(process, 130, seconds=5)

    def test_leave_while_waiting_to_start_again(self):
        process = self.start("--max-restarts", 100, does="birth crowd exit 1")
        self.wait_births(5)  # the next one is more than a second away
        time.sleep(0.1)
        process.terminate()
        self.end(process, 0, seconds=3)

    def test_supervisor_killed_takes_the_worker_along(self):
        process = self.start(does="birth crowd ignore")
        self.wait_births(1)
        process.kill()
        process.wait()
        self.assertTrue(wait_for(lambda: not processes_with(str(self.log)), 2), processes_with(str(self.log)))

    def test_what_the_worker_started_ends_with_it(self):
        self.run_through(does="birth child over 0")
        self.assertFalse(processes_with(str(self.log)))

    def test_shell_may_go(self):
        """Without mpirun the parent is a shell, and nohup's children live on."""
        script = f"nohup {COVEY} run -- {WORKER} birth enter sleep 400 over 0 echo >/dev/null 2>&1 & sleep 0.1"
        subprocess.run(["sh", "-c", script], env=self.environment(), timeout=LONG)
        self.assertTrue(wait_for(lambda: any("echo" in line for line in self.lines()), 5))

    def test_spawned_workers(self):
        self.run_through(does="birth first crowd spawn 2 sleep 200 over 0 exit 0 again enter sleep 800 over 0")
        births = self.births()
        self.assertEqual(sorted(birth["kind"] for birth in births), [START, JOIN, JOIN])
        self.assertEqual(len({birth["address"] for birth in births}), 3)
        for birth in births[1:]:
            self.assertEqual(int(birth["replaces"], 16), 0)
            self.assertIn(births[0]["address"], birth["members"])

    def test_spawned_worker_is_replaced_and_told_to_leave(self):
        process = self.start(does="birth first crowd spawn 1 obey again crowd obey")
        births = self.wait_births(2)
        os.kill(births[1]["pid"], signal.SIGKILL)
        births = self.wait_births(3)
        self.assertEqual(births[2]["replaces"], births[1]["id"])
        time.sleep(0.1)
        process.terminate()
        self.end(process)
        self.assertEqual(self.left(), 2)

    def test_a_spawned_worker_that_is_through_is_nobody_to_come_back_to(self):
        """Its socket listens on, as that of its supervisor, which has another worker to care for."""
        process = self.start(does="birth first crowd spawn 1 ignore again crowd over 0")
        first, second = (birth["pid"] for birth in self.wait_births(2))
        self.assertTrue(wait_for(lambda: not os.path.exists(f"/proc/{second}")))
        self.crowd.close()
        os.kill(first, signal.SIGKILL)
        self.assertIn("the others have come to their end", self.end(process))
        self.assertEqual(len(self.births()), 2)

    def test_too_many_are_not_spawned(self):
        said = self.run_through(does="birth first crowd spawn 1000 sleep 500 over 0 exit 0 again exit 0")
        self.assertIn("more workers than one process may have", said)
        self.assertEqual(len(self.births()), 64)

    def test_job_file(self):
        process = self.start("--job", self.file, does="birth file crowd obey")
        self.assertTrue(wait_for(self.file.exists))
        self.assertEqual(stat.S_IMODE(self.file.stat().st_mode), 0o600)
        process.terminate()
        self.end(process)
        self.assertEqual(os.listdir(self.folder), ["log"])

    def test_a_relative_job_file_is_found_from_anywhere(self):
        process = self.start("--job", "job", does="birth file crowd obey", cwd=self.folder)
        self.assertTrue(wait_for(self.file.exists))
        process.terminate()
        self.end(process)
        self.assertFalse(self.file.exists())

    def test_the_file_of_another_job_stays(self):
        process = self.start("--job", self.file, does="birth file crowd obey")
        self.assertTrue(wait_for(self.file.exists))
        text = self.file.read_text()
        other = text.splitlines()
        other[1] = "job " + "f" * 32
        self.file.write_text("\n".join(other) + "\n")
        process.terminate()
        self.end(process)
        self.assertTrue(self.file.exists())

    def test_a_terminal_reaches_the_worker(self):
        """The worker is in the background of the terminal; what is typed is read for it."""
        ours, theirs = pty.openpty()
        process = self.start(does="birth echo over 0", stdin=theirs, start_new_session=True)
        os.write(ours, b"typed\n")
        self.end(process)
        os.close(ours)
        os.close(theirs)
        self.assertIn({"echo": "typed"}, self.lines())


class UnderMpirun(Case):
    """mpirun -n 3 covey run: mpirun sees neither deaths nor replacements."""
    plain = ("",)

    def test_births_and_replacements(self):
        self.run_through(does="birth enter first births 3 die 9 again births 6 over 0", ranks=3, mpirun=self.plain)
        births = self.births()
        first = {birth["rank"]: birth for birth in births if birth["kind"] == START}
        second = {birth["rank"]: birth for birth in births if birth["kind"] == JOIN}
        self.assertEqual((sorted(first), sorted(second), len(births)), ([0, 1, 2], [0, 1, 2], 6))
        table = [first[rank]["address"] for rank in range(3)]
        for rank in range(3):
            self.assertEqual(first[rank]["members"], table)
            self.assertEqual(second[rank]["replaces"], first[rank]["id"])
            self.assertEqual(second[rank]["address"], table[rank])
            self.assertEqual(second[rank]["members"], [address for address in table if address != table[rank]])
        self.assertEqual(len({(birth["job"], birth["secret"]) for birth in births}), 1)
        self.assertEqual({birth["strangers"] for birth in births}, {""})
        self.assertEqual({len(birth["descriptors"].strip(",").split(",")) for birth in births}, {4})
        self.assertEqual(len({birth["id"] for birth in births}), 6)

    def test_exit_code_counts(self):
        self.run_through(does="birth enter over 4 exit 4", ranks=2, mpirun=self.plain, code=4)

    def test_stdin_reaches_rank_0(self):
        process = self.start(does="birth echo over 0", ranks=2, mpirun=self.plain, stdin=subprocess.PIPE)
        process.stdin.write(b"hello rank 0\n")
        process.stdin.close()
        process.stdin = None
        self.end(process)
        self.assertEqual(sorted(line["echo"] for line in self.lines() if "echo" in line), ["", "hello rank 0"])

    def test_mpirun_killed_ends_everything(self):
        process = self.start("--job", self.file, does="birth file enter ignore", ranks=3, mpirun=self.plain)
        self.wait_births(3)
        process.kill()
        process.wait()
        self.assertTrue(wait_for(lambda: not processes_with(str(self.log)), 2), processes_with(str(self.log)))
        self.assertFalse(self.file.exists())

    def test_keep_going(self):
        process = self.start("--keep-going", does="birth enter sleep 2000 child over 0", ranks=2, mpirun=self.plain)
        self.wait_births(2)
        process.kill()
        process.wait()
        self.assertTrue(wait_for(lambda: sum("child" in line for line in self.lines()) == 2, 5), self.lines())

    def test_a_wrong_interface_is_told_by_name(self):
        said = self.run_through("--listen", "nowhere0", does="birth", ranks=2, mpirun=self.plain, code=1)
        self.assertIn("--listen nowhere0: neither a numeric address nor a network interface", said)


class Outer(Case):
    """covey run -n: its own record of how ranks ended."""

    def supervisors(self):
        return {birth["rank"]: birth["parent"] for birth in self.births() if birth["kind"] == START}

    def test_runs_replaces_and_ends(self):
        said = self.run_through(does="birth enter first births 3 die 9 again births 6 over 0", ranks=3)
        self.assertEqual(len(self.births()), 6)
        self.assertEqual(said.count("a replacement starts now"), 3)

    def test_lost_supervisors_are_lost_ranks(self):
        process = self.start("--job", self.file, does="birth file enter obey", ranks=3)
        self.wait_births(3)
        os.kill(self.supervisors()[1], signal.SIGKILL)
        self.assertTrue(wait_for(lambda: len([line for line in processes_with(str(self.log)).values()
                                              if line.startswith(WORKER)]) == 2, 3))
        self.assertIsNone(process.poll())
        process.terminate()
        said = self.end(process)
        self.assertIn("lost for good: rank 1", said)
        self.assertNotIn("BAD-PARAM", said)
        self.assertEqual(self.left(), 2)
        self.assertEqual(os.listdir(self.folder), ["log"])

    def test_all_lost_is_a_failure(self):
        process = self.start(does="birth enter ignore", ranks=2)
        self.wait_births(2)
        for pid in self.supervisors().values():
            os.kill(pid, signal.SIGKILL)
        self.end(process, 1)

    def test_a_failure_counts(self):
        self.run_through(does="birth enter over 9 exit 9", ranks=2, code=9)
        self.log.unlink()
        said = self.run_through("--max-restarts", 1, does="birth enter die 9", ranks=2, code=1)
        self.assertIn("which is the limit", said)

    def test_all_die(self):
        """Each is the other's hope, until none is left: that is not how a job ends well."""
        self.run_through("--max-restarts", 0, does="birth enter sleep 200 die 9", ranks=3, code=1)

    def test_killed_when_all_was_over(self):
        said = self.run_through(does="birth enter over 0 sleep 100 die 9", ranks=2)
        self.assertIn("was ended by signal 9 (Killed) after the job was over for it", said)

    def test_a_rank_that_cannot_come_back_is_lost_not_failed(self):
        """One rank ends well; the other was in the job and its replacements do not get in any more."""
        process = self.start(does="birth first enter obey again exit 3", ranks=2)
        births = self.wait_births(2)
        os.kill(next(birth["pid"] for birth in births if birth["rank"] == 1), signal.SIGKILL)
        self.wait_births(5)
        time.sleep(0.3)
        process.terminate()
        self.assertIn("lost for good: rank 1", self.end(process))

    def test_told_to_leave(self):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            with self.subTest(number.name):
                before = len(self.births()), self.left()
                process = self.start(does="birth enter obey", ranks=2)
                self.wait_births(before[0] + 2)
                process.send_signal(number)
                self.assertEqual(self.end(process), "")
                self.assertEqual(self.left(), before[1] + 2)

    def test_told_to_leave_before_anybody_is_there(self):
        process = self.start(does="birth enter obey", ranks=2)
        status = pathlib.Path(f"/proc/{process.pid}/status")
        caught = re.compile(r"SigCgt:\s*([0-9a-f]+)")
        self.assertTrue(wait_for(lambda: int(caught.search(status.read_text())[1], 16) >> signal.SIGTERM - 1 & 1))
        process.terminate()
        self.assertEqual(self.end(process), "")
        self.assertEqual((len(self.births()), self.left()), (2, 2))

    def test_grace_and_second_interrupt(self):
        process = self.start("--grace", 300, does="birth enter ignore", ranks=2)
        self.wait_births(2)
        process.terminate()
        self.end(process, 137, seconds=10)
        process = self.start(does="birth enter ignore", ranks=2)
        self.wait_births(4)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        self.end(process, 130, seconds=10)

    def mpirun_of(self, process):
        children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return int(children[0])

    def test_mpirun_killed_ends_everything(self):
        process = self.start("--job", self.file, does="birth file enter ignore", ranks=3)
        self.wait_births(3)
        os.kill(self.mpirun_of(process), signal.SIGKILL)
        self.assertIn("mpirun was ended by signal 9", self.end(process, 1, seconds=3))
        self.assertFalse(processes_with(str(self.log)))
        self.assertEqual(os.listdir(self.folder), ["log"])

    def test_keep_going_without_mpirun(self):
        process = self.start("--keep-going", does="birth enter obey", ranks=2)
        self.wait_births(2)
        os.kill(self.mpirun_of(process), signal.SIGKILL)
        time.sleep(1)
        self.assertIsNone(process.poll())
        self.assertEqual(len(self.births()), 2)
        process.terminate()
        self.assertIn("goes on without it", self.end(process))
        self.assertEqual(self.left(), 2)

    def test_outer_killed_ends_everything(self):
        process = self.start(does="birth enter ignore", ranks=2)
        self.wait_births(2)
        process.kill()
        process.wait()
        self.assertTrue(wait_for(lambda: not processes_with(str(self.log)), 3), processes_with(str(self.log)))
        self.assertTrue(wait_for(lambda: os.listdir(self.folder) == ["log"], 3), os.listdir(self.folder))

    def test_standard_streams_are_those_of_the_caller(self):
        process = self.start(does="birth echo over 0", ranks=2, stdin=subprocess.PIPE, env={"WORKER_LOG": ""})
        out, said = process.communicate(b"first line\nsecond\n", timeout=LONG)
        self.assertEqual(process.returncode, 0, said)
        self.assertEqual(said, b"")
        self.assertEqual(sorted(line["echo"] for line in map(json.loads, out.splitlines()) if "echo" in line),
                         ["", "first line"])

    def test_program_that_cannot_run(self):
        done = subprocess.run([COVEY, "run", "-n", "2", "--", "./no/such"], capture_output=True, text=True,
                              timeout=LONG)
        self.need_mpirun()
        self.assertEqual(done.returncode, 127, done.stderr)

    def test_mpirun_missing(self):
        done = subprocess.run([COVEY, "run", "-n", "2", "--", "true"], capture_output=True, text=True, timeout=LONG,
                              env={"PATH": "/nowhere"})
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("mpirun", done.stderr)


class Questions(Case):
    """covey status, resize, leave."""

    def ask(self, what, *arguments, file=None, code=0, seconds=7):
        done = subprocess.run([COVEY, what, "--job", str(file or self.file), *map(str, arguments)],
                              capture_output=True, text=True, timeout=seconds, env=self.environment())
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        return done.stdout if code == 0 else done.stderr

    def serve(self):
        process = self.start("--job", self.file, does="birth crowd serve")
        self.assertTrue(wait_for(self.file.exists))
        return process

    def test_answers(self):
        self.serve()
        self.assertEqual(self.ask("status"), "one member, all is well\n")
        self.assertEqual(self.ask("resize", 3), "will be 3\n")
        self.assertIn("there is no rank 1", self.ask("leave", 1, code=1))

    def test_a_member_that_does_not_answer(self):
        self.serve()
        began = time.monotonic()
        self.assertIn("did not answer within 5 s", self.ask("resize", 64, code=3))
        self.assertLess(time.monotonic() - began, 6)

    def test_a_member_that_stands_still(self):
        self.serve()
        birth, = self.births()
        os.kill(birth["pid"], signal.SIGSTOP)
        self.assertIn("nobody answered within 5 s", self.ask("status", code=3))
        os.kill(birth["pid"], signal.SIGCONT)
        self.assertEqual(self.ask("status"), "one member, all is well\n")

    def test_wrong_secret(self):
        self.serve()
        other = self.folder / "other"
        text = self.file.read_text().splitlines()
        text[2] = "secret " + "0" * 64
        other.touch(0o600)
        other.write_text("\n".join(text) + "\n")
        self.assertIn("another job", self.ask("status", file=other, code=3))

    def test_files_that_are_no_use(self):
        self.assertIn("there is no job file", self.ask("status", code=3))
        self.file.touch(0o600)
        self.assertIn("is no job file", self.ask("status", code=3))
        stale = ["covey rendezvous 1", "job " + "0" * 32, "secret " + "0" * 64, "epoch 1", "address 127.0.0.1:1", "end"]
        self.file.write_text("\n".join(stale) + "\n")
        began = time.monotonic()
        self.assertIn("nobody listens", self.ask("status", code=3))
        self.assertLess(time.monotonic() - began, 2, "it waited for an answer")
        self.file.chmod(0o644)
        self.assertIn("can be used by others", self.ask("status", code=3))


class Arguments(Case):
    def test_help_and_version(self):
        for arguments, words in ((["--help"], "covey run"), (["run", "--help"], "--max-restarts"),
                                 (["status", "--help"], "--job FILE"), (["version"], "covey 0.")):
            done = subprocess.run([COVEY, *arguments], capture_output=True, text=True, timeout=LONG)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn(words, done.stdout)

    def test_wrong_ones(self):
        for arguments, words in (([], "usage"), (["fly"], "no command 'fly'"), (["run"], "name a program"),
                                 (["run", "--fast", "--", "true"], "--help"), (["run", "-n", "0", "true"], "-n takes"),
                                 (["run", "--grace", "x", "true"], "--grace takes"), (["status"], "--job FILE"),
                                 (["resize", "--job", "x"], "usage: covey resize --job FILE N"),
                                 (["resize", "--job", "x", "0"], "whole number from 1"),
                                 (["leave", "--job", "x", "-1"], ""), (["run", "--job", "x" * 300, "true"], "--job")):
            with self.subTest(arguments):
                done = subprocess.run([COVEY, *arguments], capture_output=True, text=True, timeout=LONG)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertIn(words, done.stderr)


if __name__ == "__main__":
    tap.main()
