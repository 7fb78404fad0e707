"""Jobs whose world changes: the named cases, each on real processes that share a machine. The worker is
tests/elastic_worker.c, whose faults happen where the case wants them; jobs are looked at and judged with
tests/chaos.py: the same hash and the same steps as undisturbed, the right exit code, nothing left over."""
import contextlib
import ctypes
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest

import chaos
import tap

LONG = 60  # seconds after which a job counts as hanging
UNDISTURBED = chaos.Undisturbed()
DEATH = ("kill", "exit", "abort")
# What Open MPI 4 and 5 leave when mpirun or a rank that has called MPI is killed; covey run -n has it put elsewhere.
OPEN_MPI = ("ompi.", "prte", "pmix")


def slow_wire(path):
    """Writes the numbers of a machine that copies a tenth of a byte a nanosecond, as lib/plan/machine.c does."""
    numbers = {"cores": 2, "copy_one": 100, "copy_all": 100, "add_one": 130000,
               **{f"row_{64 << i}_ns": 2500 << i for i in range(8)}, "dedup_ns": 12000, "find_ns": 16000, "bag_ns": 600,
               "list_ns": 9600, "hold_ns": 6200, "update_ns": 9000, "sent_id_ns": 1, "sent_row_ns": 1500,
               "sent_sum_ns": 16000, "copied_ids_ns": 11000, "copied_rows_ns": 1000, "copied_gradients_ns": 3000,
               "copied_commit_ns": 3000, "message_ns": 800000}
    text = "covey machine 2, in thousandths\n" + "".join(f"{name} {value}\n" for name, value in numbers.items())
    xxh3 = ctypes.CDLL("libxxhash.so.0").XXH3_64bits_withSeed
    xxh3.restype, xxh3.argtypes = ctypes.c_uint64, [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
    path.write_text(f"{text}check {xxh3(text.encode(), len(text), 1):016x}\n", encoding="ascii")


class Case(unittest.TestCase):
    def setUp(self):
        self.jobs = []
        self.addCleanup(self.clean)

    def clean(self):
        for job in self.jobs:
            job.end_all()
            job.remove()

    def start(self, ranks, *more, launcher="run", name="worker", steps=150, delay=4, base=(), options=(),
              environment=None, **popen):
        """base: arguments that change what is trained."""
        if name == "worker":
            base, more = ["--steps", steps, *base], ["--delay-ms", delay, *more]
        job = chaos.Job(launcher, name, ranks, [*base, *more], options, environment, "covey-test-", **popen)
        job.base = base
        self.jobs.append(job)
        return job

    def say(self, job, what):
        text = job.text("err")
        views = sorted({(event["epoch"], event["cause"], event["size"], event["step"]) for event in job.events()
                        if event["kind"] == "view"})
        return (f"{what}\n$ {' '.join(map(str, job.process.args))}\nviews {views}\n{text[:3000]}"
                + (f"\n...\n{text[-3000:]}" if len(text) > 3000 else ""))

    def end(self, job, code=0, seconds=LONG, but=()):
        """It ends with the code (None: any but 0), in time, and leaves nothing."""
        got = job.finish(seconds)
        left = job.left_over(but) if got is not None else []
        self.assertIsNotNone(got, self.say(job, f"it hangs; {job.steps()} steps"))
        if code is None:
            self.assertNotEqual(got, 0, self.say(job, "exit code"))
        elif code != "any":
            self.assertEqual(got, code, self.say(job, "exit code"))
        self.assertEqual(left, [], self.say(job, "left over"))
        return job.text("err")

    def sound(self, job, code=0, seconds=LONG, but=()):
        """And it trained what an undisturbed job trains."""
        text = self.end(job, code, seconds, but)
        undisturbed, ledger = UNDISTURBED.of(job.name, job.base)
        self.assertEqual(job.hashes(), {undisturbed}, self.say(job, "hash"))
        self.assertIsNone(job.check_ledger(ledger), self.say(job, "ledger"))
        return text

    def happens(self, job, condition, what, seconds=30):
        value = job.wait(condition, seconds)
        if not value:
            self.fail(self.say(job, f"it did not happen: {what}; {job.steps()} steps, {job.events()[-5:]}"))
        return value

    def reach(self, job, steps):
        self.happens(job, lambda: job.steps() >= steps, f"step {steps}")

    def event(self, job, kind, count=1, seconds=30, **fields):
        """The count-th event of that kind with those fields."""
        def find():
            found = [event for event in job.events() if event["kind"] == kind
                     and all(event.get(name) == value for name, value in fields.items())]
            return found[count - 1] if len(found) >= count else None
        return self.happens(job, find, f"{count} times {kind} {fields}", seconds)

    def causes(self, job):
        """Of all views, by epoch."""
        return [cause for _, cause in sorted({(event["epoch"], event["cause"]) for event in job.events()
                                              if event["kind"] == "view"})]

    def pid_of(self, job, rank):
        return self.happens(job, lambda: dict((row[0], row[1]) for row in job.members()).get(rank), f"rank {rank}")

    def ask(self, job, what, *arguments, code=0):
        got, text = job.ask(what, *arguments)
        self.assertEqual(got, code, text)
        return text


class Points(Case):
    """A rank dies at a named point."""

    def test_each_point_of_a_step(self):
        for k, point in enumerate(("begin", "lookup", "backward", "dense", "voted", "committed")):
            for rank in (0, 2):
                with self.subTest(point=point, rank=rank):
                    job = self.start(3, "--fault", f"{point}:{DEATH[k % 3]}:40:{rank}")
                    self.sound(job)
                    self.assertIn("death", self.causes(job))

    def test_before_and_while_the_world_comes_together(self):
        for point in ("open", "tables"):
            for rank in (0, 1):
                with self.subTest(point=point, rank=rank):
                    self.sound(self.start(3, "--fault", f"{point}:kill:*:{rank}"))

    def test_among_collectives_between_steps(self):
        for rank in (0, 1):
            for us in (0, 300, 1000, 3000):
                with self.subTest(rank=rank, us=us):
                    self.sound(self.start(3, "--between", 1, "--fault", f"between:soonus{us}:30:{rank}"))

    def test_at_the_very_first_and_the_very_last_step(self):
        for step in (0, 149):
            for point in ("lookup", "voted", "committed"):
                with self.subTest(step=step, point=point):
                    self.sound(self.start(3, "--fault", f"{point}:kill:{step}:1"))

    def test_after_the_last_step(self):
        """The others may have ended: nobody can come back, and the job has come to its end all the same."""
        for point in ("end", "hash", "close"):
            for rank in (0, 1):
                with self.subTest(point=point, rank=rank):
                    job = self.start(3, "--fault", f"{point}:kill:*:{rank}")
                    began = time.monotonic()
                    self.sound(job)
                    self.assertLess(time.monotonic() - began, 20, self.say(job, "the end takes too long"))

    def test_inside_close(self):
        for us in (100, 1000, 5000):
            with self.subTest(us=us):
                self.sound(self.start(3, "--fault", f"close:soonus{us}:*:1"))

    def test_both_of_two(self):
        """One after the other; each time the other one holds all."""
        job = self.start(2, "--fault", "voted:kill:30:0", "--fault", "lookup:kill:90:s", steps=300, delay=10)
        self.sound(job)

    def test_a_refused_step_comes_again(self):
        job = self.start(3, "--fault", "lookup:refuse:30:1", "--fault", "dense:refuse:60:0",
                         "--fault", "voted:kill:60:2")
        self.sound(job)

    def test_with_rows_that_are_copied_to_all(self):
        """The undisturbed job has no copies; this one has, before the death and again after it."""
        for k, point in enumerate(("lookup", "backward", "voted", "committed")):
            with self.subTest(point=point):
                job = self.start(4, "--copies", 1, "--fault", f"{point}:{DEATH[k % 3]}:75:{k}", base=["--ids", 40])
                self.sound(job)
                self.assertIn("death", self.causes(job))
                copies = [event for event in job.events() if event["kind"] == "copies" and event["others"] > 40]
                self.assertGreater(len({event["epoch"] for event in copies}), 1, self.say(job, "copies"))

    def test_a_layout_that_covey_chose(self):
        """On a machine to which bytes are dear long bags stay whole. Who enters has no say in it, and knows no machine:
        it starts as a world of one, and with another file."""
        with tempfile.TemporaryDirectory(prefix="covey-test-") as folder:
            machine = pathlib.Path(folder) / "machine"
            slow_wire(machine)
            job = self.start(3, "--bags", 1, "--fault", "voted:kill:40:0", steps=300, delay=10,
                             environment={"COVEY_MACHINE": machine})
            self.event(job, "view", cause="join")
            self.sound(job)
        layouts = [event for event in job.events() if event["kind"] == "layout"]
        self.assertEqual({event["whole"] for event in layouts}, {2}, self.say(job, "layouts"))
        self.assertEqual({event["joined"] for event in layouts}, {0, 1}, self.say(job, "who told them"))

    def test_a_table_made_late(self):
        calm = self.start(1, steps=1, launcher="alone")
        self.end(calm)
        flag = calm.folder / "more.late"
        alone = self.start(1, "--late", flag, launcher="alone", steps=100)
        self.end(alone)
        flag.unlink()
        job = self.start(3, "--late", flag, "--fault", "voted:kill:30:1", steps=100, delay=10)
        self.end(job)
        self.assertEqual(job.hashes(), alone.hashes())


class Recovery(Case):
    """A second failure while the world recovers from a first."""

    def kill_two(self, first, second, pause_ms, **more):
        job = self.start(4, **more)
        self.reach(job, 30)
        pids = {rank: pid for rank, pid, _, _ in job.members()}
        job.kill(pids[first], signal.SIGKILL)
        until = time.monotonic() + pause_ms / 1000
        while time.monotonic() < until:
            pass
        job.kill(pids[second], signal.SIGKILL)
        self.sound(job)

    def test_second_failure_in_each_state_of_recovery(self):
        for pause_ms in (0, 1, 2, 4, 8, 16, 40):
            for first, second in ((1, 0), (0, 1), (3, 2)):
                with self.subTest(pause_ms=pause_ms, first=first, second=second):
                    self.kill_two(first, second, pause_ms)

    def test_the_coordinator_and_who_takes_its_place(self):
        for pause_ms in (1, 5):
            job = self.start(4)
            self.reach(job, 30)
            pids = {rank: pid for rank, pid, _, _ in job.members()}
            for rank in (0, 1):
                job.kill(pids[rank], signal.SIGKILL)
                time.sleep(pause_ms / 1000)
            self.reach(job, job.steps() + 10)  # a step that loses a third member ends the job: that is another test
            job.kill(pids[2], signal.SIGKILL)
            self.sound(job)

    big_state = ("--state-mb", 32)

    def joiner_dies(self, us):
        job = self.start(3, "--fault", "begin:kill:20:1", "--fault", f"tables:soonus{us}:*:j", base=self.big_state,
                         steps=250, delay=8)
        self.sound(job)
        self.assertIn("join", self.causes(job), "a later one entered")

    def test_joiner_dies_while_it_is_copied_to(self):
        for us in (0, 1000, 5000, 15000, 40000, 80000):
            with self.subTest(us=us):
                self.joiner_dies(us)

    def test_source_of_the_copy_dies(self):
        for rank, pause_ms in ((0, 1), (0, 10), (0, 30), (0, 60), (1, 10), (1, 30)):
            with self.subTest(rank=rank, pause_ms=pause_ms):
                job = self.start(3, "--fault", "begin:kill:20:2", base=self.big_state, steps=250, delay=8)
                self.event(job, "open", joining=1)
                pid = self.pid_of(job, rank)
                time.sleep(pause_ms / 1000)
                job.kill(pid, signal.SIGKILL)
                self.sound(job)

    def test_growth_is_interrupted(self):
        for us in (0, 5000, 20000):
            with self.subTest(us=us):
                job = self.start(2, "--fault", f"tables:soonus{us}:*:j:2", steps=300, delay=10)
                self.reach(job, 10)
                self.ask(job, "resize", 4)
                self.sound(job)
                self.assertEqual({end["world"] for end in job.ends()}, {"4"}, self.say(job, "it did grow in the end"))

    def test_death_while_one_leaves(self):
        for us in (0, 500, 2000, 10000):
            with self.subTest(us=us):
                job = self.start(4, "--fault", "begin:leave:30:2", "--fault", f"begin:soonus{us}:30:1")
                self.sound(job)

    def test_a_child_that_keeps_all_sockets(self):
        job = self.start(3, "--fault", "begin:fork:20:1", "--fault", "begin:kill:40:1")
        self.sound(job)
        changed = self.event(job, "changed", cause="death")
        self.assertLess(changed["detect_ms"] + changed["recover_ms"], 2000)

    def test_a_child_of_one_that_stays(self):
        self.sound(self.start(3, "--fault", "begin:fork:20:1", "--fault", "begin:kill:40:0"))


class Wishes(Case):
    """leave, resize."""

    def no_step_redone(self, job):
        self.assertEqual({end["redone"] for end in job.ends()}, {"0"}, self.say(job, "steps redone"))

    def test_the_coordinator_leaves(self):
        job = self.start(3)
        self.reach(job, 20)
        self.ask(job, "leave", 0)
        self.event(job, "left")
        self.sound(job)
        self.no_step_redone(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"2"})

    def test_the_coordinator_leaves_by_itself(self):
        job = self.start(3, "--fault", "begin:leave:30:0", "--fault", "begin:leave:60:0")
        self.sound(job)
        self.no_step_redone(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"1"})

    def test_a_signal_to_one_worker(self):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            with self.subTest(number):
                job = self.start(3)
                self.reach(job, 20)
                job.kill(self.pid_of(job, 1), number)
                self.event(job, "left")
                self.sound(job)
                self.no_step_redone(job)

    def test_the_last_one_may_not_leave(self):
        job = self.start(1)
        self.reach(job, 20)
        self.assertIn("last rank", self.ask(job, "leave", 0, code=1))
        self.sound(job)

    def test_all_wish_to_leave_on_their_own(self):
        """If all come to one boundary with it the job ends there, else the last one stays and comes to the end."""
        job = self.start(3, *sum((["--fault", f"begin:leave:30:{rank}"] for rank in range(3)), []))
        self.end(job)
        left = sum(event["kind"] == "left" for event in job.events())
        if left < 3:
            self.assertEqual((left, job.hashes()), (2, {UNDISTURBED.of("worker", job.base)[0]}), job.events())
            self.no_step_redone(job)

    def test_two_wish_to_leave_at_once(self):
        job = self.start(4, "--fault", "begin:leave:30:1", "--fault", "begin:leave:30:3")
        self.sound(job)
        self.no_step_redone(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"2"})

    def all_leave(self, number, launcher="run"):
        job = self.start(3, launcher=launcher, steps=100000)
        self.reach(job, 30)
        job.process.send_signal(number)
        self.end(job, 0, 20)
        events = job.events()
        self.assertEqual(sum(event["kind"] == "left" for event in events), 3, events[-10:])
        self.assertFalse([event for event in events if event.get("cause") == "death"])
        ends = {int(pathlib.Path(name).read_text().splitlines()[-1].split()[0])
                for name in map(str, job.folder.glob("ledger.*"))}
        self.assertEqual(len(ends), 1, "all ended at one commit")

    def test_all_are_told_to_leave(self):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            with self.subTest(number):
                self.all_leave(number)

    def test_all_are_told_to_leave_through_mpirun(self):
        self.all_leave(signal.SIGUSR1, "mpirun")

    def test_one_that_does_not_hear_is_killed_when_grace_is_over(self):
        job = self.start(3, "--fault", "begin:sleep60000:30:1", options=["--grace", 500], steps=100000)
        self.event(job, "fault")
        job.process.send_signal(signal.SIGTERM)
        self.end(job, "any", 10)

    def test_grow_and_shrink(self):
        job = self.start(2, steps=400, delay=10)
        self.reach(job, 10)
        for size in (4, 3, 5, 1, 2):
            self.assertIn(f"will have {size} ranks", self.ask(job, "resize", size))
            self.happens(job, lambda: len(job.members()) == size, f"{size} members")
        self.sound(job)
        self.no_step_redone(job)
        self.assertNotIn("death", self.causes(job))

    def test_of_several_wishes_the_last_one_stands(self):
        job = self.start(3, steps=300, delay=10)
        self.reach(job, 10)
        for size in (5, 2, 6, 4):
            self.ask(job, "resize", size)
        self.happens(job, lambda: len(job.members()) == 4, "4 members")
        self.sound(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"4"})

    def test_resize_during_recovery(self):
        job = self.start(4, base=["--state-mb", 32], steps=300, delay=10)
        self.reach(job, 10)
        job.kill(self.pid_of(job, 1), signal.SIGKILL)
        for size in (6, 5):
            self.ask(job, "resize", size)
        self.happens(job, lambda: len(job.members()) == 5, "5 members")
        self.sound(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"5"})

    def test_from_the_program(self):
        job = self.start(2, "--fault", "begin:resize4:20:1", "--fault", "begin:resize1:150:0", steps=250, delay=10)
        self.sound(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"1"})
        self.assertIn(4, {event.get("size") for event in job.events()})

    def test_a_wish_survives_the_coordinator(self):
        """If another one was asked. Who asks the coordinator and sees it die asks again."""
        job = self.start(3, steps=300, delay=10)
        self.reach(job, 10)
        pid = self.pid_of(job, 0)
        lines = job.file.read_text().splitlines()
        addresses = [line for line in lines if line.startswith("address")]
        other = job.folder / "more.others"
        other.touch(0o600)
        other.write_text("\n".join(line for line in lines if line != addresses[0]) + "\n")
        done = subprocess.run([chaos.COVEY, "resize", "--job", str(other), "5"], capture_output=True, text=True,
                              timeout=30)
        self.assertEqual(done.returncode, 0, done.stderr)
        job.kill(pid, signal.SIGKILL)
        self.happens(job, lambda: len(job.members()) == 5, "5 members")
        self.sound(job)

    def test_a_job_of_one_grows(self):
        job = self.start(1, steps=250, delay=8)
        self.reach(job, 10)
        self.ask(job, "resize", 3)
        self.happens(job, lambda: len(job.members()) == 3, "3 members")
        self.sound(job)


@contextlib.contextmanager
def debugged(pid):
    """All threads of the process stand still, as under a debugger. One thread must do all of it: use it as it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    attach, detach, wall = 16, 17, 0x40000000
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    for thread in threads:
        if libc.ptrace(attach, thread, None, None) != 0:
            raise unittest.SkipTest(f"nobody may be traced here: {os.strerror(ctypes.get_errno())}")
        os.waitpid(thread, wall)
    try:
        yield
    finally:
        for thread in threads:
            libc.ptrace(detach, thread, None, None)


class Watching(Case):
    """Who is silent, who stands still; limits are small here so that nobody waits for long."""
    quick = {"COVEY_SILENCE_MS": "400"}

    def test_stopped(self):
        """At the defaults: verdict and recovery within 2 s and 3 steps, on a busy machine with a second of grace."""
        job = self.start(3)
        self.reach(job, 20)
        pid = self.pid_of(job, 1)
        began = time.monotonic()
        job.kill(pid, signal.SIGSTOP)
        stopped_at = job.steps()
        self.event(job, "changed", cause="death")
        took = time.monotonic() - began
        self.sound(job)
        self.assertTrue(1.5 < took < 4, f"{took} s, at step {stopped_at}")

    def test_stopped_for_a_moment(self):
        job = self.start(3)
        self.reach(job, 20)
        pid = self.pid_of(job, 0)
        job.kill(pid, signal.SIGSTOP)
        time.sleep(0.7)
        job.kill(pid, signal.SIGCONT)
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])

    def test_debugged(self):
        job = self.start(3, environment={**self.quick, "COVEY_STUCK_LIMIT_MS": "1000"})
        self.reach(job, 20)
        pid = self.pid_of(job, 1)
        with debugged(pid):
            time.sleep(3)
            self.assertTrue(pathlib.Path(f"/proc/{pid}").exists())
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])

    def test_training_thread_debugged(self):
        """Only that thread stands still; the watch thread goes on."""
        job = self.start(3, environment={**self.quick, "COVEY_STUCK_LIMIT_MS": "1000"})
        self.reach(job, 20)
        pid = self.pid_of(job, 2)
        libc = ctypes.CDLL(None)
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        if libc.ptrace(16, pid, None, None) != 0:
            self.skipTest("nobody may be traced here")
        os.waitpid(pid, 0x40000000)
        time.sleep(3)
        libc.ptrace(17, pid, None, None)
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])

    def test_training_thread_gone(self):
        for how in ([], ["--threaded"]):
            with self.subTest(how):
                job = self.start(3, *how, "--fault", "lookup:thread:30:1",
                                 environment={**self.quick, "COVEY_STUCK_LIMIT_MS": "1500"})
                fault = self.event(job, "fault")
                self.event(job, "stuck", of=1)
                self.event(job, "changed", cause="death")
                took = (self.event(job, "changed", cause="death")["us"] - fault["us"]) / 1e6
                self.sound(job)
                self.assertTrue(1.4 < took < 5, took)

    def test_standing_still_is_told_but_not_punished_before_the_limit(self):
        job = self.start(3, "--fault", "lookup:sleep2000:30:1", environment=self.quick)
        self.event(job, "stuck", of=1)
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])

    def test_a_long_first_step(self):
        """Ten times the limit before the first commit: 4 s here, with a limit of 1."""
        for point in ("tables", "begin"):
            with self.subTest(point):
                job = self.start(3, "--fault", f"{point}:sleep4000:*:1",
                                 environment={**self.quick, "COVEY_STUCK_LIMIT_MS": "1000"})
                self.sound(job)
                self.assertEqual(self.causes(job), ["start"])

    def test_a_long_first_step_of_one_who_enters(self):
        for point in ("tables", "begin"):
            with self.subTest(point):
                job = self.start(3, "--fault", "begin:kill:20:2", "--fault", f"{point}:sleep4000:*:j", steps=300,
                                 delay=20, environment={**self.quick, "COVEY_STUCK_LIMIT_MS": "1000"})
                self.sound(job)
                self.assertEqual(self.causes(job), ["start", "death", "join"])

    def test_never(self):
        job = self.start(2, "--fault", "lookup:sleep3000:30:1",
                         environment={"COVEY_SILENCE_MS": "200", "COVEY_STUCK_LIMIT_MS": "-1"})
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])


class Ends(Case):
    """How jobs end that do not end well, and supervisors and mpirun that die."""

    def test_a_step_that_kills(self):
        """The third loss at one step is the last: it looks like the step's own doing."""
        job = self.start(4, "--fault", "lookup:abort:50:0:99")
        text = self.end(job, None, 40)
        self.assertIn("step 50 lost a member 3 times", text)
        self.assertRegex(text, r"Lost: rank \d \(slices \d to \d\), rank \d \(slices \d to \d\), rank \d \(slices")
        self.assertEqual(job.steps(), 50)

    def test_a_step_that_kills_the_only_member(self):
        job = self.start(1, "--fault", "lookup:kill:50:0:99")
        self.end(job, None, 40)

    def test_no_restarts(self):
        job = self.start(3, "--fault", "voted:kill:50:1", options=["--max-restarts", 0])
        self.sound(job)
        self.assertEqual({end["world"] for end in job.ends()}, {"2"})

    def test_few_restarts(self):
        job = self.start(3, "--fault", "begin:kill:30:2", options=["--max-restarts", 1], steps=300, delay=8)
        job.kill(self.event(job, "view", cause="join", rank=2)["pid"], signal.SIGKILL)
        text = self.sound(job)
        self.assertIn("which is the limit", text)
        self.assertEqual({end["world"] for end in job.ends()}, {"2"})

    def test_all_workers_killed(self):
        for launcher in ("run", "mpirun"):
            with self.subTest(launcher):
                job = self.start(3, launcher=launcher, steps=100000)
                self.reach(job, 30)
                began = time.monotonic()
                for pid in job.workers():
                    job.kill(pid, signal.SIGKILL)
                self.end(job, None, 50)
                print(f"# a whole job lost under {launcher} ended in {time.monotonic() - began:.1f} s")

    def test_supervisor_killed_under_mpirun(self):
        job = self.start(3, launcher="mpirun", steps=100000)
        self.reach(job, 30)
        job.kill(job.supervisor_of(self.pid_of(job, 1)), signal.SIGKILL)
        self.end(job, None, 10 + job.began - time.monotonic() + 20)

    def test_supervisors_killed_under_covey_run(self):
        for rank in (0, 2):
            for worker_too in (False, True):
                with self.subTest(rank=rank, worker_too=worker_too):
                    job = self.start(3)
                    self.reach(job, 30)
                    pid = self.pid_of(job, rank)
                    supervisor = job.supervisor_of(pid)
                    self.assertTrue(supervisor)
                    if worker_too:
                        job.kill(pid, signal.SIGKILL)
                    job.kill(supervisor, signal.SIGKILL)
                    self.assertIn("lost for good", self.sound(job))
                    self.assertEqual({end["world"] for end in job.ends()}, {"2"})

    def test_mpirun_killed(self):
        for launcher in ("run", "mpirun"):
            with self.subTest(launcher):
                job = self.start(3, launcher=launcher, steps=100000)
                self.reach(job, 30)
                pid = job.process.pid if launcher == "mpirun" else chaos.children(job.process.pid)[0]
                self.assertIn(chaos.program(pid), ("mpirun", "prterun"))
                os.kill(pid, signal.SIGKILL)
                began = time.monotonic()
                while chaos.processes_with(str(job.folder)) and time.monotonic() < began + 10:
                    time.sleep(0.02)
                self.assertLess(time.monotonic() - began, 3, "all is gone within 2 s, on a busy machine 3")
                job.began = time.monotonic()
                self.end(job, None, 5, but=OPEN_MPI if launcher == "mpirun" else ())
                self.assertFalse(job.file.exists())

    def test_mpirun_killed_but_keep_going(self):
        for launcher in ("run", "mpirun"):
            with self.subTest(launcher):
                job = self.start(3, "--fault", "begin:kill:100:1", launcher=launcher, options=["--keep-going"],
                                 steps=200, delay=10)
                self.reach(job, 30)
                os.kill(job.process.pid if launcher == "mpirun" else chaos.children(job.process.pid)[0], signal.SIGKILL)
                if launcher == "mpirun":
                    job.process.wait()
                    deadline = time.monotonic() + LONG
                    while chaos.processes_with(str(job.folder)) and time.monotonic() < deadline:
                        time.sleep(0.05)
                    self.assertLess(time.monotonic(), deadline, self.say(job, "it hangs"))
                if launcher == "mpirun":  # and what is printed is lost with it
                    self.end(job, "any", but=OPEN_MPI)
                    self.assertEqual({event["hash"] for event in job.events() if event["kind"] == "end"},
                                     {UNDISTURBED.of("worker", job.base)[0]}, self.say(job, "hash"))
                    self.event(job, "view", cause="join")
                else:
                    self.sound(job)


class Unsupervised(Case):
    """mpirun --enable-recovery alone; fixed worlds."""

    def test_shrinks_and_grows_by_hand(self):
        for name, arguments in (("worker", {}), ("dlrm", {"base": ["--data", "gen:20000", "--batch", 64, "--dim", 8]})):
            with self.subTest(name):
                more = ["--step-delay-ms", 8] if name == "dlrm" else []
                job = self.start(3, *more, launcher="plain", name=name, steps=300, delay=8, **arguments)
                self.reach(job, 30)
                job.kill(self.pid_of(job, 0), signal.SIGKILL)
                self.happens(job, lambda: len(job.members()) == 2, "2 members")
                for count in (3, 4):
                    job.join_by_hand()
                    self.happens(job, lambda: len(job.members()) == count, f"{count} members")
                self.sound(job, "any")
                self.assertEqual([process.returncode for process in job.others], [0, 0])

    def test_what_is_not_possible_is_told_at_the_start(self):
        """Under mpirun without --enable-recovery a death ends the job; asked to be elastic, it says so."""
        job = self.start(2, "--fault", "begin:kill:30:1", launcher="fixed",
                         options=[*chaos.mpirun_command(2)], environment={"COVEY_ELASTIC": "on"}, steps=100000)
        text = self.end(job, None, 30)
        self.assertIn("mpirun ends this job when a rank dies", text)

    def fixed(self, environment, mpirun_options=(), code=None):
        job = self.start(3, "--fault", "begin:kill:30:1", launcher="fixed", steps=100000,
                         options=chaos.mpirun_command(3, *mpirun_options), environment=environment)
        return self.end(job, code, 30, but=OPEN_MPI)

    def test_a_fixed_world_ends_when_a_peer_is_lost(self):
        for wire in ("shm", "mpi"):
            with self.subTest(wire):
                self.fixed({"COVEY_ELASTIC": "off", "COVEY_WIRE": wire, "COVEY_TIMEOUT_MS": "5000"})

    def test_a_fixed_world_names_who_was_lost(self):
        """Where mpirun lets the others live, covey finds out."""
        for wire in ("shm", "mpi"):
            with self.subTest(wire):
                text = self.fixed({"COVEY_ELASTIC": "off", "COVEY_WIRE": wire, "COVEY_TIMEOUT_MS": "3000"},
                                  ["--enable-recovery"], "any")  # mpirun's code says nothing then
                self.assertEqual(len(re.findall(r"rank [02]: step: .*rank 1", text)), 2, text)

    def test_joining_what_is_not_there(self):
        job = self.start(2, launcher="plain")
        self.sound(job)
        late = self.start(1, "--join", job.file, launcher="alone")
        self.assertIn(str(job.file), self.end(late, 1))


class Strangers(Case):
    """Who does not know the secret, or the job, gets nowhere, and nobody notices but the log."""

    def serve(self, **more):
        job = self.start(3, steps=300, delay=8, **more)
        self.reach(job, 10)
        return job

    def undisturbed(self, job):
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])
        self.assertEqual({end["redone"] for end in job.ends()}, {"0"})

    def addresses(self, job):
        found = re.findall(r"^address ([\d.]+):(\d+)$", job.file.read_text(), re.MULTILINE)
        self.assertTrue(found, job.file.read_text())
        return [(host, int(port)) for host, port in found]

    def altered(self, job, line, text):
        lines = job.file.read_text().splitlines()
        lines[line] = text
        path = job.folder / "more.altered"
        path.touch(0o600)
        path.write_text("\n".join(lines) + "\n")
        return path

    def refused(self, path, job):
        """Neither a worker nor the tool gets in with this file."""
        worker = self.start(1, "--join", path, launcher="alone")
        began = time.monotonic()
        tool = subprocess.run([chaos.COVEY, "resize", "--job", str(path), "1"], capture_output=True, text=True,
                              timeout=30)
        self.assertEqual(tool.returncode, 3, tool.stderr)
        self.assertEqual(worker.finish(30), 1)
        self.assertLess(time.monotonic() - began, 25)

    def test_wrong_secret_and_other_job(self):
        job = self.serve(environment={"COVEY_SILENCE_MS": "1000"})
        self.refused(self.altered(job, 2, "secret " + "0" * 64), job)
        self.undisturbed(job)
        job = self.serve(environment={"COVEY_SILENCE_MS": "1000"})
        self.refused(self.altered(job, 1, "job " + "0" * 32), job)
        self.undisturbed(job)

    def test_two_jobs_do_not_mix(self):
        first, second = self.start(2, steps=300, delay=8), self.start(2, steps=250, delay=8)
        self.reach(first, 10)
        self.reach(second, 10)
        text = first.file.read_text().splitlines()
        mixed = [line for line in text if not line.startswith("address")][:-1]
        mixed += [line for line in second.file.read_text().splitlines() if line.startswith("address")] + ["end"]
        path = second.folder / "more.mixed"
        path.touch(0o600)
        path.write_text("\n".join(mixed) + "\n")
        tool = subprocess.run([chaos.COVEY, "resize", "--job", str(path), "1"], capture_output=True, text=True,
                              timeout=30)
        self.assertEqual(tool.returncode, 3, tool.stderr)
        for job in (first, second):
            self.undisturbed(job)

    def test_a_program_that_sets_up_other_things(self):
        job = self.serve()
        other = self.start(1, "--join", job.file, "--state-mb", 1, launcher="alone")
        self.assertIn("has set up other registered state", self.end(other, 1, 20))
        self.undisturbed(job)

    def test_a_stale_file_is_replaced_by_the_next_job(self):
        first = self.start(2, steps=30)
        stale = first.job_text = self.happens(first, lambda: first.file.exists() and first.file.read_text(), "the file")
        self.sound(first)
        path = first.folder / "more.stale"
        path.touch(0o600)
        path.write_text(stale)
        late = self.start(1, "--join", path, launcher="alone", environment={"COVEY_SILENCE_MS": "300"})
        self.end(late, 1, 20)
        second = self.start(2, steps=30, options=["--job", path])
        self.sound(second)

    def test_garbage(self):
        job = self.serve()
        for round_ in range(40):
            for address in self.addresses(job):
                with contextlib.suppress(OSError), socket.create_connection(address, 5) as stranger:
                    stranger.sendall(os.urandom(1 << round_ % 17))
        self.undisturbed(job)

    def test_slow_loris(self):
        job = self.serve()
        strangers = []
        for address in self.addresses(job) * 100:
            with contextlib.suppress(OSError):
                stranger = socket.create_connection(address, 5)
                stranger.send(b"c")
                strangers.append(stranger)
        self.assertIn("rank 2", self.ask(job, "status"))
        job.kill(self.pid_of(job, 1), signal.SIGKILL)  # the replacement finds its way through them
        self.event(job, "view", cause="join")
        self.sound(job)
        for stranger in strangers:
            stranger.close()


class Many(Case):
    """Slow."""

    def test_ten_thousand_connections(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 16384), hard))
        job = self.start(3, steps=2000, delay=8)
        self.reach(job, 10)
        addresses = Strangers.addresses(self, job)
        pids = [pid for _, pid, _, _ in job.members()]
        memory = lambda: [int(re.search(rb"VmRSS:\s+(\d+)", chaos.read(f"/proc/{pid}/status"))[1]) for pid in pids]
        before, began, step, strangers = memory(), time.monotonic(), job.steps(), []
        for k in range(10000):
            stranger = socket.socket()
            stranger.setblocking(False)
            stranger.connect_ex(addresses[k % len(addresses)])
            strangers.append(stranger)
            if len(strangers) > 3000:
                strangers.pop(0).close()
        took = time.monotonic() - began
        self.assertIn("rank 2", self.ask(job, "status"))
        after = memory()
        for stranger in strangers:
            stranger.close()
        print(f"# 10000 connections in {took:.1f} s; {job.steps() - step} steps meanwhile; KiB {before} before, "
              f"{after} after")
        self.assertLess(max(b - a for a, b in zip(before, after)), 64 << 10)
        self.sound(job)
        self.assertEqual(self.causes(job), ["start"])

    def test_big_tables_outlive_their_ranks(self):
        job = self.start(3, "--fault", "voted:kill:60:0", "--fault", "lookup:kill:130:1", base=["--mb", 64], steps=200,
                         delay=10)
        self.end(job)
        calm = self.start(3, base=["--mb", 64], steps=200)
        self.end(calm)
        self.assertEqual(job.hashes(), calm.hashes())


class Dlrm(Case):
    base = ["--data", "gen:24000", "--batch", 96, "--dim", 8]

    def test_the_report_tells_what_befell_the_job(self):
        job = self.start(4, "--step-delay-ms", 10, name="dlrm", base=self.base)
        self.reach(job, 30)
        job.kill(self.pid_of(job, 1), signal.SIGKILL)
        self.happens(job, lambda: len(job.members()) == 3, "the death")
        self.happens(job, lambda: len(job.members()) == 4, "the replacement")
        self.ask(job, "leave", 2)
        self.happens(job, lambda: len(job.members()) == 3, "the leave")
        self.sound(job)
        report = json.loads(job.text("report"))
        self.assertEqual([view["cause"] for view in report["views"]], ["start", "death", "join", "leave"])
        self.assertEqual([view["world_size"] for view in report["views"]], [4, 3, 4, 3])
        self.assertEqual(report["steps_lost"], 0)
        self.assertLessEqual(report["steps_redone"], 1)
        death = report["views"][1]
        self.assertTrue(0 <= death["detect_ms"] < 2000 and 0 <= death["recover_ms"] < 2000, death)

    def test_a_pipe_outlives_those_who_do_not_read_it(self):
        data = self.folder_of_clicks()
        base = ["--batch", 96, "--dim", 8]
        calm = self.start(1, "--data", data, launcher="alone", name="dlrm", base=base)
        self.end(calm)
        for killed, code in ((2, 0), (0, None)):
            with self.subTest(killed=killed), open(data, "rb") as file:
                feeder = subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE)
                job = self.start(3, "--data", "-", "--step-delay-ms", 8, name="dlrm", base=base, stdin=feeder.stdout)
                feeder.stdout.close()
                self.reach(job, 40)
                job.kill(self.pid_of(job, killed), signal.SIGKILL)
                text = self.end(job, code)
                feeder.kill()
                feeder.wait()
                if killed:
                    self.assertEqual(job.hashes(), calm.hashes(), text)
                else:
                    self.assertRegex(text, "pipe|standard input")

    def folder_of_clicks(self):
        """A file of clicks in Criteo layout."""
        job = self.start(1, launcher="alone", name="dlrm", base=["--data", "gen:100", "--batch", 96])
        job.finish()
        path = job.folder / "more.clicks"
        with open(path, "w", encoding="ascii") as file:
            for row in range(20000):
                numbers = [str((row * 7 + k * 13) % 50) for k in range(13)]
                ids = [f"{(row * 2654435761 + k * 40503) % (997 + 13 * k):08x}" for k in range(26)]
                file.write("\t".join([str(row * 31 % 7 // 6), *numbers, *ids]) + "\n")
        return path


def main():
    if not chaos.shutil.which("mpirun"):
        tap.skip_all("no mpirun here")
    try:
        tap.main()
    finally:
        UNDISTURBED.remove()


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main()
