"""The scripts' headers say what the bodies do, and the bodies touch one key with few commands."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from luasession.scripts import Code, script

NAMES = ("load", "commit", "destroy", "index")
COMMANDS = {"HSET", "HGET", "HMGET", "HGETALL", "HDEL", "HLEN", "HSTRLEN", "PEXPIRE", "PTTL", "DEL", "TIME"}
# Of the principal's index, a key of its own.
INDEX_COMMANDS = {"ZADD", "ZREM", "ZRANGE", "ZSCORE", "PTTL", "PEXPIRE", "TIME"}


def parts(name: str) -> tuple[str, str]:
    text = script(name).text.decode()
    header = "\n".join(line for line in text.split("\n\nlocal ")[0].splitlines() if line.startswith("--"))
    return header, text.removeprefix(header)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_as_documented(name: str) -> None:
    """Each ARGV and KEYS of the header is used in the body, and each used one is in the header."""
    header, body = parts(name)
    for kind in ("ARGV", "KEYS"):
        documented = re.findall(rf"^-- {kind}\[(\d+)\]", header, re.MULTILINE)
        used = re.findall(rf"{kind}\[(\d+)\]", body)
        assert documented
        assert set(documented) == set(used)
        assert documented == [str(n + 1) for n in range(len(documented))]


def codes(name: str) -> tuple[set[str], set[str]]:
    header, body = parts(name)
    documented = set(re.findall(r"^--   ([a-z]+)  ", header, re.MULTILINE))
    known = {code.value.decode() for code in Code}
    return documented, {word for word in re.findall(r"'([a-z]+)'", body) if word in known}


@pytest.mark.parametrize("name", NAMES)
def test_reply_codes_are_as_documented(name: str) -> None:
    """The codes of the header are those that the body answers."""
    documented, answered = codes(name)
    assert documented == answered


def test_the_enum_has_exactly_the_codes() -> None:
    """The Python enum is the union of what the scripts answer."""
    assert set().union(*(codes(name)[0] for name in NAMES)) == {code.value.decode() for code in Code}


@pytest.mark.parametrize("name", NAMES)
def test_one_key_and_baseline_commands(name: str) -> None:
    """Every call but TIME is on KEYS[1], with commands that all servers know; no shebang, no cjson."""
    _, body = parts(name)
    calls = re.findall(r"redis\.p?call\('(\w+)'(?:, (\w+))?", body)
    assert len(calls) == len(re.findall(r"redis\.p?call\(", body))
    key = "index" if name == "index" else "session"
    assert {command for command, _ in calls} <= (INDEX_COMMANDS if name == "index" else COMMANDS)
    assert {key for command, key in calls if command != "TIME"} == {key}
    assert f"local {key} = KEYS[1]\n" in body
    assert not script(name).text.startswith(b"#!")
    assert "cjson" not in body


def test_the_package_carries_the_scripts() -> None:
    """The installed package, or the checkout that it runs from, holds the scripts and nothing else."""
    installed = files("luasession") / "lua"
    folder = installed if installed.is_dir() else Path(__file__).parents[1] / "lua"
    assert sorted(entry.name for entry in folder.iterdir()) == [f"{name}.lua" for name in sorted(NAMES)]
