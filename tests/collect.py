"""Adds up what `meson test` left in build folders, test case by test case, and shows what failed.

usage: collect.py BUILD_FOLDER ...

Programs that speak TAP count by their points, others as one case each. A program that dies, hangs or stops before the
end of its plan counts as one failed case besides the points it gave. The last line reads
"N passed, N failed, N skipped"; the status is 0 only when something passed and nothing failed.
"""
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
                self.skipped.append(skip_all["why"].strip() or "no reason given")
            elif point and (point["directive"] or "").lower().startswith("skip"):
                self.skipped.append(f"{point['what'].strip()}: {point['why'].strip()}")
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
            self.skipped.append(reason[-1] if reason else "no reason given")
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
        print(f"\n---- {folder.name}: no test ran (no {log.name})")
        return []
    with log.open(encoding="utf-8", errors="replace") as lines:
        return [Program(json.loads(line)) for line in lines]


def main(folders):
    passed = failed = skipped = 0
    for folder in map(pathlib.Path, folders):
        programs = read(folder)
        failed += not programs
        for program in programs:
            passed += program.passed
            failed += len(program.failed)
            skipped += len(program.skipped)
            for case in program.skipped:
                print(f"skipped: {folder.name}: {program.name}: {case}")
            if program.failed:
                program.show_failure(folder.name)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
