#!/usr/bin/env python3
"""Trains the DLRM of this folder twice: undisturbed, and with one of its ranks killed in the middle. Both must come to
the same bits.

usage: demo.py --build FOLDER [--ranks N] [--no-kill] [OPTION OF dlrm ...]

Prints what the disturbed run printed, when the death was noticed, how long the others stood, when the world was whole
again, and where the picture of it lies (throughput over time, deaths and joins marked). Ends with code 1 if the state
hashes differ. With --data - (standard input, which cannot be read twice) and with --no-kill it trains once,
undisturbed.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time


def say(text):
    print(text, file=sys.stderr, flush=True)


def train(options, report, *more, job=None):
    """Starts a training under covey run."""
    command = [options.build / "tools" / "covey", "run", "-n", options.ranks, *(["--job", job] if job else []), "--",
               options.build / "examples" / "dlrm", *options.rest, "--report", report, *more]
    return subprocess.Popen([str(part) for part in command])


def status(options, job):
    """Steps committed so far and the processes by rank; (0, {}) while the job cannot be asked."""
    told = subprocess.run([options.build / "tools" / "covey", "status", "--job", job], capture_output=True, text=True)
    steps = re.search(r"(\d+) steps committed", told.stdout)
    ranks = {int(rank): int(pid) for rank, pid in re.findall(r"^rank (\d+) +process (\d+)", told.stdout, re.M)}
    return int(steps[1]) if steps else 0, ranks


def kill_one(options, job, process, steps):
    """Waits until a good part of the steps are committed, then kills the last rank with SIGKILL."""
    while process.poll() is None:
        done, ranks = status(options, job)
        if done >= steps / 3 and len(ranks) == options.ranks:
            victim = max(ranks)
            say(f"\ndemo: {done} steps are committed; kill -9 of rank {victim}, process {ranks[victim]}")
            os.kill(ranks[victim], signal.SIGKILL)
            return
        time.sleep(0.02)


def tell_views(report):
    views = report["views"]
    for view in views[1:]:
        if view["cause"] == "death":
            print(f"death of a rank: noticed after {view['detect_ms']} ms, the others went on with step "
                  f"{view['first_step']} {view['recover_ms']} ms later ({view['world_size']} ranks)")
        else:
            print(f"{view['cause']}: {view['world_size']} ranks from step {view['first_step']} on, "
                  f"{view['recover_ms']} ms between two steps")
    for before, after in zip(views[1:], views[2:]):
        if before["cause"] == "death" and after["cause"] == "join":
            print(f"the world was whole again {after['ms'] - before['ms']} ms after it had recovered")
    print(f"steps redone by rank 0: {report['steps_redone']}, steps lost: {report['steps_lost']}")


def main():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--build", type=pathlib.Path, required=True)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--no-kill", action="store_true")
    options, options.rest = parser.parse_known_args()
    told = dict(zip(options.rest, options.rest[1:]))
    once = options.no_kill or told.get("--data") == "-" or "--data=-" in options.rest
    with tempfile.TemporaryDirectory() as folder:
        report, job = pathlib.Path(folder) / "report", pathlib.Path(folder) / "job"
        if options.ranks < 2 and not once:
            say("demo: one rank alone has nobody to survive it; training undisturbed")
            once = True
        if once:
            return train(options, report).wait()
        say(f"demo: training on {options.ranks} ranks, undisturbed")
        code = train(options, report, "--quiet").wait()
        if code != 0:
            return code
        undisturbed = json.loads(report.read_text())
        picture = options.build / "demo.svg"
        say(f"demo: the same again; one rank will be killed ({undisturbed['steps']} steps)")
        process = train(options, report, "--timeline", str(picture), job=job)
        kill_one(options, job, process, undisturbed["steps"])
        code = process.wait()
        if code != 0:
            return code
        disturbed = json.loads(report.read_text())
    print()
    tell_views(disturbed)
    print(f"throughput over time, as a picture: {picture}")
    same = undisturbed["state_hash"] == disturbed["state_hash"]
    print(f"state hash of the undisturbed run {undisturbed['state_hash']}: " +
          ("the same bits" if same else "NOT the same bits"))
    if len(disturbed["views"]) < 2:
        say("demo: the training was over before a rank could be killed; more data would show it (--data gen:1000000)")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
