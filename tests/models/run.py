"""The models of the protocol, searched by Spin: each of them whole, and mutants of them until the first error.

    run.py [--large] [WORD ...]      WORD: only points whose names have it

A point of a model is passed when the search was not truncated and found no error; a point of a mutant or a witness,
when it found one. --large: wider bounds, some of them by bitstate hashing, which does not visit every state and is
named so."""
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tap  # noqa: E402

MEMORY_MB = 2000
BITSTATE_MINUTES = 5 # then it stops where it is, and says so
DEPTH = 200000

# model: its defines, by the name of the search
MODELS = {
    "commit": {"2 steps, 2 deaths, 1 refusal": ""},
    "view": {"2 deaths, 2 attempts, 1 duel": "",
             "by majority, 1 death, 2 attempts, 1 duel": "MAJORITY CRASHES=1"},
    "join": {"3 steps, 2 deaths": ""},
    "zombie": {"2 or 3 members on 1 to 3 hosts": ""},
}
LARGE = {
    "commit": {"every store of an apply": "FINE", "a member without a vault": "VAULTLESS",
               "each view a new round": "BUMP=1", "3 steps": "STEPS=3",
               "3 steps, 2 refusals, every store, bitstate": "STEPS=3 REFUSALS=2 FINE"},
    "view": {"2 duels": "DUELS=2", "3 attempts, 2 duels, bitstate": "ATTEMPTS=3 DUELS=2",
             "links of 2": "LINK=2",
             "by majority, 3 attempts, 2 duels, bitstate": "MAJORITY CRASHES=1 ATTEMPTS=3 DUELS=2"},
    "join": {"4 steps": "STEPS=4"},
    "zombie": {},
}
# number: what is wrong, and defines that make it quick to find
MUTANTS = {
    "commit": {
        1: ("resume at the survivors' highest commit", ""),
        2: ("do not ask what the dead hold", ""),
        3: ("vote after the freeze", ""),
        4: ("a vault that is opened forgets what was applied last", ""),
        5: ("rounds not compared, where a drop leaves the seal and each view is a new round", ""),
        6: ("count REFUSE as READY", ""),
        7: ("seal before refusing", ""),
        8: ("apply again what is half applied, without rolling it back", ""),
        9: ("seal before the sums are whole", ""),
        10: ("a drop leaves the seal", ""),
        11: ("the adopter drops whatever it finds", ""),
    },
    "view": {
        1: ("forget the promise", ""),
        2: ("do not carry on what was accepted", ""),
        3: ("carry on what the lowest ballot accepted", "MAJORITY CRASHES=1 DUELS=2"),
        4: ("leave out somebody who is not proven dead", ""),
        5: ("count answers to an earlier ballot", "MAJORITY CRASHES=1 DUELS=2"),
        6: ("do not ask again after a link broke", ""),
        7: ("install what nobody else has accepted", ""),
        8: ("ask for a promise who has missed the last roster, and do not send it", ""),
    },
    "join": {
        1: ("begin the next step despite parting", ""),
        2: ("adopt before the barrier", ""),
        3: ("let go who still applies", ""),
        4: ("leave or enter in the middle of a step", ""),
        5: ("a joiner begins at the step of its welcome", ""),
        6: ("no view when the wish has gone", ""),
        7: ("only the owner holds the file of a vault", ""),
    },
    "zombie": {
        1: ("believe a suspicion", ""),
        2: ("believe in death when the kill is sent", ""),
        3: ("a minority goes on", "SCENE=4"),
        4: ("half of two goes on without proof", "SCENE=16"),
        5: ("go on beside dead who may have gone on before", "SCENE=2"),
        6: ("count votes of an old epoch", ""),
        7: ("a buddy acknowledges after its freeze", "SCENE=2"),
        8: ("vote after the promise", ""),
        9: ("leave out a neighbour", ""),
    },
}
# Not wrong: states that have to be reachable, or the search of the model says little.
WITNESSES = {
    "commit": {21: ("a step committed by promise", ""), 22: ("a half-applied vault rolled back", ""),
               23: ("commits after a refusal and a death", "")},
    "view": {21: ("an accepted roster carried on", ""), 22: ("three changes", "")},
    "join": {21: ("a joiner commits", "CRASHES=1"), 22: ("the leader leaves", "CRASHES=1"),
             23: ("a leave in the view of a death", "CRASHES=1")},
    "zombie": {21: ("a majority goes on", "SCENE=2"), 22: ("the last of one host goes on", "SCENE=1"),
               23: ("one of two hosts goes on with proof", "SCENE=16"),
               24: ("a zombie wakes up beside the new view", "SCENE=2")},
}


class Search(unittest.TestCase):
    """One point: a model under some defines."""

    def __init__(self, model, name, defines, wants_error, large=False):
        super().__init__("search")
        self.model, self.name, self.wants_error, self.large = model, name, wants_error, large
        self.defines = [f"-D{define}" for define in defines.split()]
        self.bitstate = "bitstate" in name

    def id(self):
        return f"{self.model}: {self.name}"

    def run_in(self, folder, *command):
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace")
        return done.returncode, done.stdout

    def build(self, folder):
        code, text = self.run_in(folder, "spin", "-a", *self.defines, HERE / f"{self.model}.pml")
        self.assertTrue(code == 0 and "rror:" not in text, text)
        memory = MEMORY_MB * (4 if self.large else 1)
        options = ["-DBITSTATE"] if self.bitstate else ["-DCOLLAPSE", "-DSFH"]
        code, text = self.run_in(folder, "gcc", "-w", "-O1" if self.wants_error else "-O2", "-DSAFETY", "-DNOCLAIM",
                                 f"-DMEMLIM={memory}", *options, "-o", "pan", "pan.c")
        self.assertEqual(code, 0, text)

    def search(self):
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="covey-models-") as folder:
            self.build(folder)
            bitstate = ["-w32", "-k3", f"-Q{BITSTATE_MINUTES}"]
            size = bitstate if self.bitstate else ["-w22" if self.wants_error else "-w25"]
            _, text = self.run_in(folder, "./pan", "-n", f"-m{DEPTH}", *size)
        self.judge(text, time.monotonic() - began)

    def judge(self, text, seconds):
        errors = re.search(r"errors: (\d+)", text)
        states = re.search(r"^\s*([\d.e+]+) states, stored", text, re.MULTILINE)
        memory = re.search(r"([\d.]+)\s+total actual memory usage", text)
        self.assertTrue(errors and states and memory, text)
        note = ""
        if self.bitstate:
            note = ", by bitstate hashing: not every state was visited"
            if "Search not completed" in text:
                note += f", and it was stopped after {BITSTATE_MINUTES} minutes"
        print(f"# {self.id()}: {float(states[1]):,.0f} states, {float(memory[1]):,.0f} MB, {seconds:.1f} s{note}",
              flush=True)
        if self.wants_error:
            self.assertGreater(int(errors[1]), 0, f"no error was found\n{text}")
            return
        self.assertEqual(int(errors[1]), 0, text)
        signs = ["max search depth too small", "out of memory", "MEMLIM", "aborted"]
        for sign in signs + ([] if self.bitstate else ["Search not completed"]):
            self.assertNotIn(sign, text, "the search was truncated")


def points(large):
    for model, searches in MODELS.items():
        for name, defines in searches.items():
            yield Search(model, name, defines, False)
    if large:
        for model, searches in LARGE.items():
            for name, defines in searches.items():
                yield Search(model, name, defines, False, True)
    for kind, table in (("mutant", MUTANTS), ("witness", WITNESSES)):
        for model, numbers in table.items():
            for number, (what, defines) in numbers.items():
                yield Search(model, f"{kind} {number}, {what}", f"MUTANT={number} {defines}", True)


def main():
    for tool in ("spin", "gcc"):
        if not shutil.which(tool):
            tap.skip_all(f"{tool} is not installed")
    words = [word for word in sys.argv[1:] if word != "--large"]
    suite = unittest.TestSuite(point for point in points("--large" in sys.argv[1:])
                               if not words or any(word in point.id() for word in words))
    result = tap.TapResult()
    suite.run(result)
    print(f"1..{result.printed}")
    sys.exit(0 if result.wasSuccessful() else 1)


if __name__ == "__main__":
    main()
