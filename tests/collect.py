"""Adds up what `meson test` left in build folders, test case by test case, and shows what failed.

usage: collect.py BUILD_FOLDER ...

Programs that speak TAP count by their points, others as one case each. A program that dies, hangs or stops before the
end of its plan counts as one failed case besides the points it gave, and so does one that was planned
(meson-logs/planned.txt, from `meson test --list`) and did not run. The last line reads
"N passed, N failed, N skipped"; the status is 0 only when something passed and nothing failed.
"""
import collections
import json
import pathlib
import re
import sys

POINT = re.compile(r"^(?P<no>not )?ok\b\s*(?P<number>\d+)?\s*-?\s*(?P<what>[^#]*)"
                   r"(?:#\s*(?P<directive>\S+)(?P<why>.*))?")
SKIP_ALL = re.compile(r"^1\.\.0\s*#\s*skip\S*\s*(?P<why>.*)", re.IGNORECASE)
TAIL_LINES = 40


class Program:
    """One program's verdict: how many cases passed, and the failed and skipped ones by name."""

    def __init__(self, log):
        self.name = log["name"]
        self.result = log["result"]
        self.output = log.get("stdout", "")
        self.errors = log.get("stderr", "")
        self.passed, self.failed, self.skipped = 0, [], []
        if not self.read_tap():
            self.read_status()
        elif self.result not in ("OK", "SKIP") and (not self.failed or self.result in ("TIMEOUT", "INTERRUPT")):
            self.failed.append(f"the program itself ({self.result.lower()}, status {log['returncode']})")

    def read_tap(self):
        found = False
        for line in self.output.splitlines():
            point = POINT.match(line)
            skip_all = SKIP_ALL.match(line)
            if skip_all:
                self.skipped.append(("all of it", skip_all["why"].strip() or "no reason given"))
            elif point and (point["directive"] or "").lower().startswith("skip"):
                self.skipped.append((point["what"].strip(), point["why"].strip()))
            elif point and point["no"]:
                self.failed.append(point["what"].strip() or f"case {point['number']}")
            elif point:
                self.passed += 1
            found = found or bool(point or skip_all)
        return found

    def read_status(self):
        if self.result in ("OK", "EXPECTEDFAIL"):
            self.passed = 1
        elif self.result == "SKIP":
            reason = (self.output + self.errors).strip().splitlines()
            self.skipped.append(("all of it", reason[-1] if reason else "no reason given"))
        else:
            self.failed.append(self.result.lower())

    def show_failure(self, label):
        print(f"\n---- {label}: {self.name}: {len(self.failed)} failed")
        for case in self.failed:
            print(f"not ok: {case}")
        said = [line for line in self.output.splitlines() if not line.startswith(("ok ", "not ok ", "1.."))]
        for line in (said + self.errors.splitlines())[-TAIL_LINES:]:
            print(f"    {line}")


def read(folder):
    log = folder / "meson-logs" / "testlog.json"
    if not log.exists():
        return []
    with log.open(encoding="utf-8", errors="replace") as lines:
        return [Program(json.loads(line)) for line in lines]


def left_out(folder, programs):
    """Names of the tests that were planned and of which there is no result."""
    planned = folder / "meson-logs" / "planned.txt"
    ran = collections.Counter(program.name.rsplit(" / ", 1)[-1] for program in programs)
    names = planned.read_text().splitlines() if planned.exists() else []
    wanted = collections.Counter(name.rsplit(" / ", 1)[-1] for name in names)
    return sorted((wanted - ran).elements())


def show_skipped(programs):
    """One line for each reason in each program, with the case or how many there were."""
    reasons = collections.defaultdict(list)
    for label, program in programs:
        for case, reason in program.skipped:
            reasons[label, program.name, reason].append(case)
    for (label, name, reason), cases in reasons.items():
        which = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        print(f"skipped: {label}: {name}: {which}: {reason}")


def main(folders):
    folders = [pathlib.Path(folder) for folder in folders]
    programs = [(folder.name, program) for folder in folders for program in read(folder)]
    empty = [folder.name for folder in folders if folder.name not in {label for label, _ in programs}]
    missing = [(folder.name, name) for folder in folders if folder.name not in empty
               for name in left_out(folder, [program for label, program in programs if label == folder.name])]
    show_skipped(programs)
    for label, program in programs:
        if program.failed:
            program.show_failure(label)
    for label in empty:
        print(f"not ok: {label}: no test ran")
    for label, name in missing:
        print(f"not ok: {label}: {name} was to run and did not; see the log of meson test")
    passed = sum(program.passed for _, program in programs)
    failed = sum(len(program.failed) for _, program in programs) + len(empty) + len(missing)
    skipped = sum(len(program.skipped) for _, program in programs)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
