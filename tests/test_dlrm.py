"""The trainer as a user starts it: the same bits on any number of ranks, its report, and its answers to bad input."""
import gzip
import json
import lzma
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

import tap

DLRM = os.environ["DLRM"]
RUN = str(pathlib.Path(os.environ["SOURCE_ROOT"]) / "run")
LONG = 300  # seconds after which a run counts as hanging
FIELDS = {"version": str, "world_size": int, "wire": str, "mode": str, "steps": int, "samples": int, "seconds": float,
          "samples_per_second": float, "loss": float, "auc": float, "auc_last_quarter": float,
          "logloss_last_quarter": float, "ne": float, "state_hash": str, "bytes": dict, "unique_ids": int, "ids": int,
          "views": list, "host": dict, "bad_rows": int, "settings": dict}


def start(arguments, ranks=0, **more):
    """Runs the trainer, under mpirun where ranks are given."""
    command = ([RUN, "ranks", str(ranks)] if ranks else []) + [DLRM, "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=LONG, **more)


def make_rows(count):
    """Rows of which a sixth are clicks, told by C1; some cells are missing."""
    lines = []
    for i in range(count):
        label = int(i % 6 == 0)
        integers = [str((i * k) % 97 - 1) if (i + k) % 5 else "" for k in range(13)]
        ids = [f"{i * (f + 1) % 251:08x}" if (i + f) % 7 else "" for f in range(26)]
        ids[0] = f"{label * 1000 + i % 3:010x}"
        lines.append("\t".join([str(label), *integers, *ids]) + "\n")
    return lines


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def train(self, *arguments, ranks=0, **more):
        """The report of a run that must succeed."""
        path = self.folder / "report.json"
        done = start([*arguments, "--report", path], ranks, **more)
        self.assertEqual(done.returncode, 0, done.stderr.decode(errors="replace"))
        return json.loads(path.read_text())

    def refuse(self, *arguments, ranks=0, code=1, **more):
        """What a run that must fail says."""
        done = start(arguments, ranks, **more)
        said = done.stderr.decode(errors="replace")
        if ranks:
            self.assertNotEqual(done.returncode, 0, said)
        else:
            self.assertEqual(done.returncode, code, said)
        return said

    def write(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else "".join(content).encode())
        return path


class SameBits(Case):
    """Exact mode: one state_hash, whatever the world."""
    data = ["--data", "gen:5300"]  # the last batch is short, and does not divide by the slices

    def hash(self, *arguments, **more):
        return self.train(*self.data, *arguments, **more)["state_hash"]

    def test_numbers_of_ranks(self):
        hashes = {n: self.hash("--threads", n) for n in (1, 2, 3, 4, 5, 8, 11)}
        self.assertEqual(len(set(hashes.values())), 1, hashes)
        self.assertNotEqual(hashes[1], self.hash("--seed", 2))

    def test_wires(self):
        hashes = {(wire, n): self.hash("--wire", wire, ranks=n) for wire in ("shm", "mpi") for n in (1, 3, 4)}
        hashes["alone"] = self.hash()
        self.assertEqual(len(set(hashes.values())), 1, hashes)

    def test_depths_of_prefetching(self):
        expected = self.hash("--prefetch", 0)
        for depth in (1, 2, 3):
            with self.subTest(depth=depth):
                self.assertEqual(self.hash("--prefetch", depth, ranks=3), expected)
                self.assertEqual(self.hash("--prefetch", depth, "--threads", 2), expected)

    def test_vector_levels(self):
        flags = set(pathlib.Path("/proc/cpuinfo").read_text().split())
        levels = ["plain"] + [name for name, flag in (("avx2", "avx2"), ("avx512", "avx512bw")) if flag in flags]
        hashes = {level: self.hash("--vector", level, "--threads", 2) for level in levels}
        self.assertEqual(len(set(hashes.values())), 1, hashes)

    def test_optimizers(self):
        for optimizer in ("sgd", "momentum", "adagrad", "rowwise_adagrad", "adam", "lamb", "ftrl"):
            with self.subTest(optimizer=optimizer):
                settings = ("--optimizer", optimizer, "--lr", 0.01, "--dense-optimizer", "sgd")
                alone, three = (self.train(*self.data, *settings, "--threads", n) for n in (1, 3))
                self.assertEqual(alone["state_hash"], three["state_hash"])
                self.assertTrue(math.isfinite(alone["loss"]))

    def test_other_shapes(self):
        for shape in (["--dim", 5], ["--dim", 40], ["--slices", 1], ["--slices", 32, "--batch", 100], ["--batch", 3]):
            with self.subTest(shape=shape):
                settings = [*shape, "--steps", 9]
                self.assertEqual(self.hash(*settings), self.hash(*settings, "--threads", 3))

    def test_fast_mode_learns_the_same_but_for_rounding(self):
        exact, fast = (self.train(*self.data, "--mode", mode, "--threads", 3) for mode in ("exact", "fast"))
        self.assertEqual(fast["mode"], "fast")
        self.assertAlmostEqual(exact["loss"], fast["loss"], delta=1e-3)


class Reading(Case):
    def test_every_way_in_is_the_same(self):
        rows = self.write("plain.tsv", make_rows(1500))
        text = rows.read_bytes()
        packed = [self.write("a", gzip.compress(text)), self.write("b", lzma.compress(text))]
        if shutil.which("zstd"):
            packed.append(self.write("c", subprocess.run(["zstd", "-c", rows], capture_output=True).stdout))
        expected = self.train("--data", rows)["state_hash"]
        for path in packed:
            self.assertEqual(self.train("--data", path, "--threads", 2)["state_hash"], expected)
            with open(path, "rb") as file:
                self.assertEqual(self.train("--data", "-", stdin=file)["state_hash"], expected)
        self.assertEqual(self.train("--data", rows, ranks=3)["state_hash"], expected)

    def test_epochs_with_and_without_a_cache(self):
        rows = self.write("clicks.tsv", make_rows(1100))
        reports = [self.train("--data", rows, "--epochs", 3, "--cache", mib) for mib in (0, 1)]
        self.assertEqual(reports[0]["state_hash"], reports[1]["state_hash"])
        self.assertEqual([r["samples"] for r in reports], [3300, 3300])
        with open(rows, "rb") as file:
            again = self.train("--data", "-", "--epochs", 3, stdin=file)
        self.assertEqual(again["state_hash"], reports[0]["state_hash"])
        with open(rows, "rb") as file:
            self.assertIn("cannot be read a second time",
                          self.refuse("--data", "-", "--epochs", 2, "--cache", 0, stdin=file))

    def test_a_bad_row_is_named_once_on_any_number_of_ranks(self):
        rows = make_rows(2000)
        rows[1200] = rows[1200].replace("\t", "\tletters", 3)
        path = self.write("clicks.tsv", rows)
        for more in ({}, {"ranks": 3}):
            said = self.refuse("--data", path, **more)
            self.assertEqual(said.count("clicks.tsv, line 1201, column 2 (I1), 'letters"), 1, said)
        threads = self.refuse("--data", path, "--threads", 4)
        self.assertEqual(threads.count("line 1201, column 2"), 1, threads)

    def test_bad_rows_can_be_left_out(self):
        rows = make_rows(1000)
        without = self.train("--data", self.write("good.tsv", rows[:300] + rows[301:800] + rows[801:]))
        rows[300], rows[800] = "not a row\n", rows[800][:40] + "\n"
        with_bad = self.train("--data", self.write("bad.tsv", rows), "--skip-bad-rows", "--epochs", 1, "--threads", 2)
        self.assertEqual(with_bad["bad_rows"], 2)
        self.assertEqual(with_bad["samples"], 998)
        self.assertEqual(with_bad["state_hash"], without["state_hash"])

    def test_what_cannot_be_read(self):
        self.assertIn("cannot open /no/such/file: No such file", self.refuse("--data", "/no/such/file", "--threads", 2))
        self.assertIn("No such file", self.refuse("--data", "/no/such/file", ranks=2))
        self.assertIn("holds no rows", self.refuse("--data", self.write("empty.tsv", b"")))
        cut = lzma.compress("".join(make_rows(3000)).encode())
        said = self.refuse("--data", self.write("cut.xz", cut[:len(cut) // 2]))
        self.assertIn("the xz data is damaged after line", said)

    def test_an_input_that_stands_still(self):
        ours, theirs = os.pipe()
        try:
            said = self.refuse("--data", "-", "--threads", 2, "--timeout-ms", 400, stdin=ours)
        finally:
            os.close(ours)
            os.close(theirs)
        self.assertIn("does the input stand still?", said)


class Report(Case):
    def test_fields(self):
        report = self.train("--data", "gen:20000", "--threads", 4, "--curve", 5)
        for name, kind in FIELDS.items():
            self.assertIsInstance(report[name], kind, name)
        self.assertEqual((report["world_size"], report["wire"], report["mode"]), (4, "local", "exact"))
        self.assertEqual((report["samples"], report["steps"], len(report["curve"])), (20000, 40, 5))
        self.assertEqual(report["views"], [{"epoch": 0, "world_size": 4, "first_step": 0, "cause": "start"}])
        self.assertEqual(set(report["bytes"]), {"ids", "rows", "gradients", "dense", "vote", "collective"})
        self.assertTrue(all(report["bytes"][phase] > 0 for phase in ("ids", "rows", "gradients", "dense")))
        self.assertEqual(len(report["state_hash"]), 32)
        self.assertTrue(0 < report["unique_ids"] < report["ids"] <= 20000 * 26)
        self.assertTrue(0.5 < report["auc"] < report["auc_best"] < 1)
        self.assertGreater(report["auc_last_quarter"], report["auc"])
        self.assertTrue({"cpu", "blas", "blas_core", "blas_threads", "topology"} <= set(report["host"]))
        self.assertEqual(report["host"]["blas_threads"], 1)
        self.assertEqual(report["settings"]["lr"], 0.05)

    def test_metrics_do_not_depend_on_the_world(self):
        alone, three = (self.train("--data", "gen:6000", *more) for more in ([], ["--threads", 3]))
        for name in ("loss", "auc", "auc_last_quarter", "logloss_last_quarter", "ne", "auc_best", "steps", "samples"):
            self.assertEqual(alone[name], three[name], name)
        self.assertEqual(sum(alone["bytes"].values()), 0)

    def test_steps(self):
        report = self.train("--data", "gen:100000000", "--steps", 3, "--batch", 100)
        self.assertEqual((report["steps"], report["samples"]), (3, 300))

    def test_it_replaces_the_old_one_or_leaves_it(self):
        quick = ["--data", "gen:600"]
        path = self.write("report.json", b"old")
        self.train(*quick)
        self.assertIn("samples", json.loads(path.read_text()))
        self.assertEqual(os.listdir(self.folder), ["report.json"])
        said = self.refuse(*quick, "--report", "/dev/full", "--threads", 2)
        self.assertIn("cannot write the report /dev/full: No space left on device", said)
        self.assertIn("No such file", self.refuse(*quick, "--report", "/no/such/folder/r.json"))

    def test_a_full_disk_leaves_the_old_one(self):
        script = '''mount -t tmpfs -o size=8k none "$1" && echo old > "$1/r" && head -c 4k /dev/zero > "$1/f" || exit 77
                    "$2" --quiet --data gen:600 --report "$1/r"; code=$?
                    [ "$(cat "$1/r")" = old ] && ls "$1" && exit $code'''
        done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", self.folder, DLRM], capture_output=True,
                              text=True, timeout=LONG)
        if done.returncode == 77 or "unshare" in done.stderr:
            self.skipTest("a small file system cannot be mounted here")
        self.assertEqual((done.returncode, done.stdout), (1, "f\nr\n"), done.stderr)
        self.assertIn("No space left on device", done.stderr)


class RealClicks(Case):
    def test_auc_of_the_last_quarter(self):
        """COVEY_CLICKS names a file of real clicks on which one pass should reach COVEY_CLICKS_AUC."""
        data = os.environ.get("COVEY_CLICKS")
        if not data:
            self.skipTest("COVEY_CLICKS names no file of real clicks")
        auc = [self.train("--data", data, "--seed", seed, ranks=4)["auc_last_quarter"] for seed in (1, 2, 3)]
        self.assertGreaterEqual(sum(auc) / 3, float(os.environ.get("COVEY_CLICKS_AUC", 0.71)), auc)


class Options(Case):
    def test_help_names_every_option(self):
        done = subprocess.run([DLRM, "--help"], capture_output=True, text=True, timeout=LONG)
        self.assertEqual(done.returncode, 0)
        for name in ("data", "epochs", "steps", "batch", "slices", "dim", "optimizer", "lr", "dense-lr", "seed", "mode",
                     "wire", "report", "skip-bad-rows"):
            self.assertIn(f"--{name} ", done.stdout)

    def test_wrong_options_are_named(self):
        for arguments, expected in ((["--nonsense"], "--nonsense is not an option"), (["data"], "is not an option"),
                                    (["--lr"], "--lr needs a value"), (["--lr", "fast"], "not 'fast'"),
                                    (["--dim", "1.5"], "whole number"), (["--batch=0"], "from 1"),
                                    (["--slices", "3"], "power of two"), (["--mode=quick"], "exact|fast"),
                                    (["--quiet=1"], "not an option"), (["--data", "gen:"], "gen:ROWS")):
            with self.subTest(arguments=arguments):
                self.assertIn(expected, self.refuse(*arguments, code=2))

    def test_equals_sign_and_space_mean_the_same(self):
        self.assertEqual(self.train("--data=gen:600", "--seed=7")["state_hash"],
                         self.train("--data", "gen:600", "--seed", "7")["state_hash"])

    def test_a_model_that_breaks_is_refused_with_the_reason(self):
        said = self.refuse("--data", "gen:20000", "--dense-optimizer", "sgd", "--dense-lr", 1e6, "--threads", 3)
        self.assertIn("is not a number", said)
        self.assertIn("was refused by rank", said)

    def test_the_summary_is_for_people(self):
        done = subprocess.run([DLRM, "--data", "gen:3000", "--threads", "2", "--progress"], capture_output=True,
                              text=True, timeout=LONG)
        for text in ("samples/s", "log loss", "AUC", "best possible", "moved between ranks", "C26", "state hash"):
            self.assertIn(text, done.stdout)
        self.assertIn("[####", done.stderr)


if __name__ == "__main__":
    tap.main()
