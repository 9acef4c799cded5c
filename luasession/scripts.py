"""The Lua scripts: their text, their SHA-1, the codes that they answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


class Code(bytes, Enum):
    """The first item of every script's reply; the scripts' headers say what follows."""

    UNCHANGED = b"unchanged"
    CHANGED = b"changed"
    FULL = b"full"
    APPLIED = b"applied"
    CONFLICT = b"conflict"
    DESTROYED = b"destroyed"
    ENTRIES = b"entries"
    MISSING = b"missing"
    GONE = b"gone"
    STALE = b"stale"
    LARGE = b"large"
    UNKNOWN = b"unknown"
    CORRUPT = b"corrupt"


# A name of its own, as it is asked for at each commit: in Python 3.11 a look-up in an enumeration costs as
# much as a call.
APPLIED = Code.APPLIED


@dataclass(frozen=True, slots=True)
class Script:
    """One script: the name of its file without the suffix, its text, its SHA-1 in hex."""

    name: str
    text: bytes
    sha: bytes


def _folder() -> Traversable:
    # Installed as luasession/lua/; in a checkout, and so in an editable install, beside the package.
    installed = files("luasession") / "lua"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "lua"


@cache
def script(name: str) -> Script:
    """Read one script, once a process."""
    text = (_folder() / f"{name}.lua").read_bytes()
    # Redis names a script by its SHA-1; nothing is kept secret by it.
    return Script(name, text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())
