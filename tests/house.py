"""The rules of the house, kept by reading the source: who includes whom, names, settings, versions, plain habits."""
import os
import pathlib
import re
import subprocess
import unittest

import tap

ROOT = pathlib.Path(os.environ.get("SOURCE_ROOT", pathlib.Path(__file__).resolve().parent.parent))

# Who may include whom, besides itself; the order is from the floor up. docs/ARCHITECTURE.md gives the reasons.
ROOMS = {
    "base": set(),
    "diag": {"base"},
    "plan": {"base"},
    "world": {"base"},
    "wire": {"diag", "base"},
    "dense": {"wire", "world", "diag", "base"},
    "sparse": {"wire", "world", "plan", "diag", "base"},
    "state": {"sparse", "wire", "world", "diag", "base"},
    "elastic": {"wire", "plan", "world", "diag", "base"},
    "api": {"base", "diag", "plan", "world", "wire", "dense", "sparse", "state", "elastic"},
}
# Libraries that stay behind one door.
DOORS = {
    "mpi.h": {"lib/world/bootstrap.c", "lib/wire/mpi.c"},
    "hwloc.h": {"lib/world/topology.c"},
    "xxhash.h": {"lib/base/hash.c"},
    "uv.h": {"lib/elastic/link_inside.h", "lib/elastic/watch_inside.h"},
    "sodium.h": {"lib/elastic/link.c", "lib/elastic/link_frame.c"},
}
# Pure files: events in, actions out. What they may not name: clock, environment, input and output.
PURE = ["lib/world/view.c", "lib/world/tree.c", "lib/sparse/optimizer.c",
        "lib/world/roster.c", "lib/elastic/step.c", "lib/elastic/detector.c", "lib/elastic/membership.c",
        "lib/elastic/ballot.c", "lib/elastic/change.c", "lib/elastic/message.c", "lib/elastic/link_frame.c",
        "lib/plan/machine.c", "lib/plan/bytes.c", "lib/plan/predict.c", "lib/plan/choose.c", "lib/plan/hot.c"]
IMPURE = r"\b(cv_now_ns|clock_gettime|time|getenv|cv_setting|cv_log|f?open|f?read|f?write|f?printf|socket)\s*\("


def tracked():
    """Files git knows or would know; without git, all that is not a build folder."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not re.match(r"(build|\.git)", name) and "__pycache__" not in name]
    return sorted(name for name in names if (ROOT / name).is_file())


def text(name):
    return (ROOT / name).read_text(encoding="utf-8", errors="replace")


def code(name):
    """The text with comments blanked out, line numbers kept."""
    blank = lambda match: re.sub(r"[^\n]", " ", match[0]) if match[0][0] == "/" else match[0]
    return re.sub(r'"(?:\\.|[^"\\\n])*"|/\*.*?\*/|//[^\n]*', blank, text(name), flags=re.DOTALL)


def lines_with(pattern, name, content):
    for number, line in enumerate(content.splitlines(), 1):
        for match in re.finditer(pattern, line):
            yield f"{name}:{number}", match


FILES = tracked()
C_FILES = [name for name in FILES if name.endswith((".c", ".h"))]
LIB = [name for name in C_FILES if name.startswith("lib/")]


class House(unittest.TestCase):
    def nothing(self, found, rule):
        if found:
            self.fail(f"{rule}:\n" + "\n".join(found))

    def test_every_room_is_declared(self):
        rooms = {name.split("/")[1] for name in LIB}
        self.assertTrue(rooms)
        self.nothing(sorted(rooms - set(ROOMS)), "rooms of lib/ that the include rules do not know")

    def test_rooms_include_only_what_stands_below_them(self):
        found = []
        for name in LIB:
            room = name.split("/")[1]
            for where, match in lines_with(r'^\s*#\s*include\s*"([^"]+)"', name, text(name)):
                parts = match[1].split("/")
                if len(parts) != 2:
                    found.append(f'{where}: "{match[1]}" is not written "room/file.h"')
                elif parts[0] != room and parts[0] not in ROOMS.get(room, set()):
                    found.append(f"{where}: {room} may not include {match[1]}")
        self.nothing(found, "includes against the rules")

    def test_outside_programs_use_the_public_header_alone(self):
        found = []
        for name in C_FILES:
            if name.startswith(("examples/", "tests/outside/", "include/")):
                for where, match in lines_with(r'^\s*#\s*include\s*"([^"]+)"', name, text(name)):
                    if match[1].split("/")[0] in ROOMS:
                        found.append(f"{where}: {match[1]}")
        self.nothing(found, "the inside of the library used from outside")

    def test_libraries_stay_behind_their_doors(self):
        found = []
        for name in LIB:
            for where, match in lines_with(r"^\s*#\s*include\s*<([^>]+)>", name, text(name)):
                if name not in DOORS.get(match[1], {name}):
                    found.append(f"{where}: <{match[1]}> belongs to {' and '.join(sorted(DOORS[match[1]]))}")
        self.nothing(found, "libraries outside their rooms")

    def test_pure_files_touch_neither_clock_nor_environment_nor_files(self):
        found = []
        for name in PURE:
            self.assertIn(name, LIB)
            found += [f"{where}: {match[1]}()" for where, match in lines_with(IMPURE, name, code(name))]
        self.nothing(found, "pure files that are not")

    def test_settings_are_declared_once_and_used(self):
        declared = re.findall(r'\{\s*"(COVEY_[A-Z0-9_]+)"', text("lib/base/settings.c"))
        self.assertTrue(declared)
        self.assertEqual(len(declared), len(set(declared)), "a setting is declared twice")
        read = (r'(?:cv_setting(?:_\w+)?|getenv)\s*\(\s*"(COVEY_[A-Z0-9_]+)"'
                r'|environ(?:\.get\(|\[)\s*"(COVEY_[A-Z0-9_]+)"')
        used, found = set(), []
        for name in (name for name in FILES if name.endswith((".c", ".h", ".py"))):
            for where, match in lines_with(read, name, text(name)):
                setting = match[1] or match[2]
                used.add(setting)
                home = "docs/HACKING.md" if name.startswith(("tests/", "bench/")) else "lib/base/settings.c"
                if setting not in declared and setting not in text(home):
                    found.append(f"{where}: {setting} is not in {home}")
        found += [f"lib/base/settings.c: nobody reads {setting}" for setting in declared if setting not in used]
        self.nothing(found, "settings")

    def test_the_environment_is_read_in_two_places(self):
        allowed = {"lib/base/settings.c", "lib/world/bootstrap.c"}
        found = [where for name in LIB if name not in allowed
                 for where, _ in lines_with(r"\b(secure_)?getenv\s*\(", name, code(name))]
        self.nothing(found, "getenv outside settings and bootstrap")

    def test_names_begin_with_the_prefix(self):
        """Functions that a header shows; what the objects export is checked on the built library by install.py."""
        found = []
        for name in (name for name in LIB if name.endswith(".h")):
            for where, match in lines_with(r"^(?!static|typedef|#|\s)[\w\s*]+?\b(\w+)\s*\([^;{]*$", name, code(name)):
                if not match[1].startswith(("cv_", "CV_", "covey_")):
                    found.append(f"{where}: {match[1]}")
        self.nothing(found, "names without cv_")

    def test_header_guards_differ(self):
        owner, found = {}, []
        for name in (name for name in C_FILES if name.endswith(".h")):
            guard = re.search(r"^#ifndef (\w+)\n#define \1$", text(name), re.MULTILINE)
            if not guard:
                found.append(f"{name} has none")
            elif owner.setdefault(guard[1], name) != name:
                found.append(f"{name} and {owner[guard[1]]} share {guard[1]}")
        self.nothing(found, "include guards")

    def test_sources_are_all_built(self):
        built = {f"lib/{room}/{file}" for room in ROOMS if (ROOT / "lib" / room / "meson.build").exists()
                 for file in re.findall(r"'([\w.]+\.c)'", text(f"lib/{room}/meson.build"))}
        built |= {f"lib/{file}" for file in re.findall(r"'(\w+/\w+\.c)'", text("lib/meson.build"))}
        sources = {name for name in LIB if name.endswith(".c")}
        self.nothing(sorted(sources - built), "sources that nobody builds")

    def test_tests_are_all_run(self):
        meson = text("tests/meson.build")
        found = []
        for name in (name for name in C_FILES if re.match(r"tests/test_\w+\.c$", name)):
            stem = pathlib.Path(name).stem
            if not re.search(rf"'(test_)?{stem[5:]}(\.c)?'", meson):
                found.append(name)
        self.nothing(found, "tests that nobody runs")

    def test_versions_agree(self):
        header = text("include/covey.h")
        version = ".".join(re.search(rf"COVEY_VERSION_{part} (\d+)", header)[1] for part in ("MAJOR", "MINOR", "PATCH"))
        places = {"meson.build": r"^\s*version: '([\d.]+)'",
                  "python-bindings/pyproject.toml": r'^version = "([\d.]+)"'}
        for name, pattern in places.items():
            with self.subTest(name):
                found = re.search(pattern, text(name), re.MULTILINE)
                self.assertIsNotNone(found, f"{name} names no version")
                self.assertEqual(found[1], version)

    def test_no_machine_is_named(self):
        pattern = r"(?<![\w.$}{])/(?:home|root|work|Users|mnt|workspace)/\w"
        found = []
        for name in FILES:
            content = text(name)
            found += [where for where, _ in lines_with(pattern, name, content)]
            if len(str(ROOT)) > 4 and str(ROOT) + "/" in content:
                found.append(f"{name}: names this checkout")
        self.nothing(found, "absolute paths of a machine")

    def test_plain_habits(self):
        unfinished = r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b"
        found = []
        for name in FILES:
            if not name.endswith((".c", ".h", ".py", ".build")) and name not in ("run", ".ci/run"):
                continue
            content = text(name)
            found += [f"{where}: {match[0]}" for where, match in lines_with(unfinished, name, content)]
            found += [f"{where}: a tab" for where, _ in lines_with(r"\t", name, content)]
            found += [f"{where}: space at the end" for where, _ in lines_with(r"[ \t]+$", name, content)]
            found += [f"{where}: longer than 120" for where, _ in lines_with(r"^.{121}", name, content)]
            if content and not content.endswith("\n"):
                found.append(f"{name}: no newline at the end")
        self.nothing(found, "habits")

    def test_float_rules(self):
        """Nothing that would let a compiler or a library choose the bits of a row."""
        meson = "".join(text(name) for name in FILES if name.endswith("meson.build"))
        self.assertIn("-ffp-contract=off", meson)
        found = [flag for flag in ("-ffast-math", "-Ofast", "-funsafe-math", "-fassociative-math") if flag in meson]
        for name in LIB:
            found += [f"{where}: {match[0]}" for where, match in
                      lines_with(r"\b_mm\d*_(?:rsqrt|rcp|fmadd|fmsub|fnmadd)\w*|\bfmaf?\s*\(", name, code(name))]
        self.nothing(found, "float operations whose bits differ between machines")

    def test_the_licence_is_the_licence(self):
        licence = text("LICENSE")
        for phrase in ("Apache License", "Version 2.0, January 2004", "TERMS AND CONDITIONS FOR USE",
                       "END OF TERMS AND CONDITIONS"):
            self.assertIn(phrase, licence)

    def test_shell_scripts_are_clean(self):
        try:
            check = subprocess.run(["shellcheck", "run", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            self.skipTest("shellcheck is not installed")
        self.assertEqual(check.returncode, 0, check.stdout)


if __name__ == "__main__":
    tap.main()
