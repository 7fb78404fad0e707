"""What others see of covey: the header in every language standard, the symbols of both libraries, an installation that
an outside program builds against with pkg-config, and the programs printed in README.md."""
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
import unittest

import tap

ROOT = pathlib.Path(os.environ.get("SOURCE_ROOT", pathlib.Path(__file__).resolve().parent.parent))
BUILD = pathlib.Path(os.environ.get("BUILD_ROOT", ROOT / "build"))
PYTHON = os.environ.get("TEST_PYTHON", "python3")
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]


def run(*command, env=None, **options):
    """The finished process; a failure shows command and output."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300,
                            env={**os.environ, **(env or {})}, **options)
    if result.returncode != 0:
        raise AssertionError(f"{shlex.join(map(str, command))}\nstatus {result.returncode}\n"
                             f"{result.stdout[-4000:]}{result.stderr[-4000:]}")
    return result.stdout


def compile_text(compiler, language, standard, source, *flags):
    run(compiler, "-x", language, f"-std={standard}", *STRICT, *flags, "-fsyntax-only", "-", input=source)


class Header(unittest.TestCase):
    source = "#include <covey.h>\nint covey_user(void);\nint covey_user(void) { return (int) sizeof(covey_options); }\n"

    def check(self, language, standards):
        self.assertTrue(COMPILERS)
        for compiler in COMPILERS:
            for standard in standards:
                with self.subTest(f"{compiler} {standard}"):
                    compile_text(compiler, language, standard, self.source, f"-I{ROOT}/include")

    def test_c(self):
        self.check("c", ("c99", "c11", "c17"))

    def test_cplusplus(self):
        self.check("c++", ("c++98", "c++11", "c++17", "c++20"))

    def test_no_hidden_holes(self):
        """Every byte of every struct is named, so that bindings can describe them field by field."""
        compile_text("gcc", "c", "c11", self.source, f"-I{ROOT}/include", "-Wpadded")

    def test_headers_of_the_rooms_stand_alone(self):
        for header in sorted((ROOT / "lib").glob("*/*.h")):
            name = header.relative_to(ROOT / "lib")
            with self.subTest(str(name)):
                compile_text("gcc", "c", "gnu11", f'#include "{name}"\nint x;\n', f"-I{ROOT}/include", f"-I{ROOT}/lib",
                             "-D_GNU_SOURCE", "-DCV_LEVEL=plain", "-Wno-unused", "-Wno-pedantic")


class Symbols(unittest.TestCase):
    """nm's letters: lower case is local, U and w are wanted from others."""

    def defined(self, *nm):
        lines = (line.split() for line in run("nm", *nm).splitlines())
        return {parts[-1].split("@")[0] for parts in lines if len(parts) >= 2 and re.fullmatch("[A-TV-Z]", parts[-2])}

    def declared(self):
        return set(re.findall(r"COVEY_API [^;(]*?\b(covey_\w+)\(", (ROOT / "include/covey.h").read_text()))

    def test_shared_library_exports_the_header_and_nothing_else(self):
        exported = self.defined("-D", "--defined-only", BUILD / "lib" / "libcovey.so")
        self.assertEqual(exported ^ self.declared(), set(), "exported but not in covey.h, or the other way round")

    def test_globals_of_the_archive_carry_the_prefix(self):
        names = self.defined("--defined-only", BUILD / "lib" / "libcovey.a")
        self.assertGreaterEqual(names, self.declared())
        strangers = sorted(name for name in names if not name.startswith(("cv_", "covey_")))
        self.assertEqual(strangers, [])


class Installed(unittest.TestCase):
    """Installed into a folder of its own, then used as a stranger would."""
    expected = re.compile(r"covey \d+, rank 0 of 1, pooled 2 1, row 0\.5\n")

    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory(prefix="covey-install-")
        stage = pathlib.Path(cls.scratch.name)
        run("meson", "install", "-C", BUILD, "--no-rebuild", "--quiet", env={"DESTDIR": str(stage)})
        pc = next(stage.rglob("covey.pc"))
        text = pc.read_text()
        prefix = re.search(r"^prefix=(.*)$", text, re.MULTILINE)[1]
        pc.write_text(text.replace(f"prefix={prefix}", f"prefix={stage}{prefix}", 1))
        cls.pc, cls.lib, cls.scratch_path = pc, pc.parent.parent, stage

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def pkg_config(self, *flags):
        return shlex.split(run("pkg-config", *flags, "covey", env={"PKG_CONFIG_PATH": str(self.pc.parent)}))

    def build(self, compiler, *flags):
        program = self.scratch_path / "outside"
        run(compiler, "-std=c99", *STRICT, ROOT / "tests/outside/main.c", "-o", program, *flags)
        return program

    def test_files(self):
        names = {str(path.relative_to(self.scratch_path)).split("/")[-1] for path in self.scratch_path.rglob("*")}
        self.assertLessEqual({"covey.h", "covey.pc", "libcovey.so", "libcovey.so.0", "libcovey.a"}, names)
        self.assertIn("libcovey.so.0", run("objdump", "-p", self.lib / "libcovey.so"))

    def test_pc_asks_for_nothing_but_covey(self):
        self.assertEqual([flag for flag in self.pkg_config("--libs") if flag.startswith("-l")], ["-lcovey"])

    def test_outside_program_with_the_shared_library(self):
        for compiler in COMPILERS:
            with self.subTest(compiler):
                program = self.build(compiler, *self.pkg_config("--cflags", "--libs"))
                self.assertIn("libcovey.so.0", run("objdump", "-p", program))
                self.assertRegex(run(program, env={"LD_LIBRARY_PATH": str(self.lib)}), self.expected)

    def test_outside_program_with_the_archive(self):
        alone = self.scratch_path / "archive"
        alone.mkdir(exist_ok=True)
        shutil.copy(self.lib / "libcovey.a", alone)
        flags = [f"-L{alone}" if flag == f"-L{self.lib}" else flag
                 for flag in self.pkg_config("--cflags", "--libs", "--static")]
        program = self.build("cc", *flags)
        self.assertNotIn("libcovey", run("objdump", "-p", program))
        self.assertRegex(run(program), self.expected)


class Readme(unittest.TestCase):
    """The programs in README.md are what they claim to be: they build, run alone and on ranks, and are short."""

    def block(self, language, lines_max):
        text = (ROOT / "README.md").read_text()
        found = re.search(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        self.assertIsNotNone(found, f"README.md shows no {language} program")
        self.assertLessEqual(len(found[1].splitlines()), lines_max)
        return found[1]

    def in_both_worlds(self, command, env):
        """Alone and on two ranks each rank says what it has learned: 1. mpirun may join the lines of ranks anywhere."""
        for ranks, start in ((1, []), (2, [ROOT / "run", "ranks", 2])):
            with self.subTest(ranks=ranks):
                said = run(*start, *command, env={"LD_LIBRARY_PATH": str(BUILD / "lib"), **env})
                learned = re.findall(rf"rank (\d) of {ranks}: (?:1\.00|0\.99)", said)
                self.assertEqual(sorted(learned), [str(rank) for rank in range(ranks)], said)
                self.assertEqual(said.count("rank "), ranks, said)

    def test_c_program(self):
        with tempfile.TemporaryDirectory(prefix="covey-readme-") as folder:
            source = pathlib.Path(folder) / "readme.c"
            source.write_text(self.block("c", 25))
            program = pathlib.Path(folder) / "readme"
            run("cc", *STRICT, f"-I{ROOT}/include", source, "-o", program, f"-L{BUILD}/lib", "-lcovey")
            self.in_both_worlds([program], {})

    def test_python_program(self):
        if subprocess.run([PYTHON, "-c", "import numpy"], capture_output=True).returncode != 0:
            self.skipTest("numpy is not installed")
        with tempfile.TemporaryDirectory(prefix="covey-readme-") as folder:
            source = pathlib.Path(folder) / "readme.py"
            source.write_text(self.block("python", 12))
            self.in_both_worlds([PYTHON, source], {"PYTHONPATH": str(ROOT / "python-bindings"),
                                                   "COVEY_LIBRARY": str(BUILD / "lib" / "libcovey.so")})


if __name__ == "__main__":
    tap.main()
