#!/usr/bin/env python3
"""Checks what the ranks of a job wrote with `dlrm --ledger FILE`.

usage: ledger_check.py FILE [--like UNDISTURBED] [--steps N] [--samples N]

True of every sound job, whoever died in it: the files FILE.* together have steps 0 to the last one without a hole, all
copies of a step tell the same, and no two ranks had the same slice of it. --like: and every step had just the rows it
had in another job. Prints one line and ends with 0, or what is wrong and 1.
"""
import argparse
import glob
import sys


class Entry:
    """What all copies of a step must agree on, and the slices that each rank had."""

    def __init__(self, epoch, samples, rows):
        self.epoch, self.samples, self.rows = epoch, samples, rows
        self.slices = {}


def read_file(name, steps, wrong):
    last = -1
    with open(name, encoding="ascii") as file:
        text = file.read()
    lines = text.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # its rank was killed in the middle
    for line in lines:
        step, epoch, rank, first, count, samples, rows = line.split()
        step, rank, first, count = int(step), int(rank), int(first), int(count)
        if step <= last:
            wrong.append(f"{name}: step {step} after step {last}: it was committed twice")
        last = step
        entry = steps.setdefault(step, Entry(epoch, samples, rows))
        if (entry.epoch, entry.samples, entry.rows) != (epoch, samples, rows):
            wrong.append(f"{name}: step {step}: epoch {epoch}, {samples} samples, rows {rows}; another rank has epoch "
                         f"{entry.epoch}, {entry.samples} samples, rows {entry.rows}")
        for slice_ in range(first, first + count):
            owner = entry.slices.setdefault(slice_, rank)
            if owner != rank:
                wrong.append(f"{name}: step {step}: slice {slice_} was both rank {owner}'s and rank {rank}'s")


def read_ledger(prefix):
    """steps, what is wrong, number of files."""
    steps, wrong = {}, []
    names = sorted(glob.glob(glob.escape(prefix) + ".*"))
    for name in names:
        read_file(name, steps, wrong)
    if not names:
        wrong.append(f"there is no {prefix}.*")
    missing = sorted(set(range(max(steps, default=-1) + 1)) - set(steps))
    if missing:
        wrong.append(f"{len(missing)} steps are missing, the first is {missing[0]}")
    return steps, wrong, len(names)


def compare(steps, other, wrong):
    for step in sorted(set(steps) | set(other)):
        if step not in steps or step not in other:
            wrong.append(f"step {step} is in one of the ledgers only")
        elif (steps[step].samples, steps[step].rows) != (other[step].samples, other[step].rows):
            wrong.append(f"step {step} was trained on other rows: {steps[step].samples} samples, {steps[step].rows}, "
                         f"but undisturbed {other[step].samples} samples, {other[step].rows}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("ledger")
    parser.add_argument("--like", help="ledger of an undisturbed job on the same data")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--samples", type=int)
    options = parser.parse_args()
    steps, wrong, files = read_ledger(options.ledger)
    if options.like:
        other, wrong_there, _ = read_ledger(options.like)
        wrong += wrong_there
        compare(steps, other, wrong)
    samples = sum(int(entry.samples) for entry in steps.values())
    if options.steps is not None and len(steps) != options.steps:
        wrong.append(f"{len(steps)} steps, not {options.steps}")
    if options.samples is not None and samples != options.samples:
        wrong.append(f"{samples} samples, not {options.samples}")
    if wrong:
        print("\n".join(wrong[:20]), file=sys.stderr)
        sys.exit(1)
    views = len({entry.epoch for entry in steps.values()})
    print(f"{len(steps)} steps, {samples} samples, {views} views, {files} ranks")


if __name__ == "__main__":
    main()
