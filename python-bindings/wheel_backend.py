"""Builds the wheel of a package that is nothing but Python files, with nothing but the standard library (PEP 517, 660).

pip builds in an empty environment and would download setuptools into it; the package must install where there is no
network. A wheel of plain files is a zip with three files of metadata, so that is all there is here.
"""
import base64
import hashlib
import pathlib
import tarfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
STEM = f"{PROJECT['name']}-{PROJECT['version']}"


def _metadata() -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {PROJECT['name']}", f"Version: {PROJECT['version']}",
             f"Summary: {PROJECT['description']}", f"License: {PROJECT['license']['text']}",
             f"Requires-Python: {PROJECT['requires-python']}"]
    return "\n".join(lines + [f"Requires-Dist: {need}" for need in PROJECT["dependencies"]]) + "\n"


def _write_wheel(folder: str, files: dict[str, bytes]) -> str:
    name = f"{STEM}-py3-none-any.whl"
    info = f"{STEM}.dist-info"
    files[f"{info}/METADATA"] = _metadata().encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: wheel_backend\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(content)}\n"
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\n").encode()
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
    return name


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    package = ROOT / "covey"
    return _write_wheel(wheel_directory, {f"covey/{path.name}": path.read_bytes() for path in sorted(package.iterdir())
                                          if path.suffix == ".py" or path.name == "py.typed"})


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _write_wheel(wheel_directory, {"covey.pth": f"{ROOT}\n".encode()})


def build_sdist(sdist_directory, config_settings=None):
    name = f"{STEM}.tar.gz"
    with tarfile.open(pathlib.Path(sdist_directory) / name, "w:gz") as sdist:
        for path in [ROOT / "pyproject.toml", ROOT / "wheel_backend.py", *sorted((ROOT / "covey").glob("*.py")),
                     ROOT / "covey" / "py.typed"]:
            sdist.add(path, f"{STEM}/{path.relative_to(ROOT)}")
    return name
