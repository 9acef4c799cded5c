"""The workloads: what a request does with its session, and what the session holds."""

from __future__ import annotations

import time
from itertools import count
from typing import TYPE_CHECKING, Any

from flask import Flask, session

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Paths by the names of the workloads, on a session that is there.
STANDING = {
    "untouched": "/untouched",
    "read one key": "/read",
    "read all": "/all",
    "write blind": "/write",
    "read, change": "/change",
    "nested change": "/nested",
}
#: The same, each on a session of its own: a new visitor has none, the others one that was just made.
FRESH = {"new visitor": "/start", "login": "/login", "logout": "/logout"}

_MIXED: list[Any] = [
    7,
    3.25,
    "a short text",
    [1, 2, 3, 4, 5],
    {"name": "Ada", "age": 36, "tags": ["x", "y"]},
    None,
]

#: What a session holds, by the name of its shape; beside it each has a number and a small cart to
#: change, except where memory is measured.
SHAPES: dict[str, dict[str, Any]] = {
    "8 x 40 B": {f"key{n}": "v" * 38 for n in range(8)},
    "30 mixed": {f"key{n}": _MIXED[n % len(_MIXED)] for n in range(30)},
    "100 x 1 KB": {f"key{n}": "v" * 1022 for n in range(100)},
    "1000 x 1 KB": {f"key{n}": "v" * 1022 for n in range(1000)},
}
SMALL, MIXED, LARGE, HUGE = SHAPES


def _read() -> str:
    return str(session.get("key1"))[:1]


def _read_all() -> str:
    return str(len(dict(session)))


def _change() -> str:
    session["count"] = session.get("count", 0) + 1
    return "x"


def _nested() -> str:
    session.setdefault("cart", {"changes": 0})["changes"] += 1
    session.modified = True  # the others see a nested change only so
    return "x"


def _logout() -> str:
    session.clear()
    return "x"


def install(app: Flask, data: Mapping[str, Any]) -> None:
    """Give an app the views, for sessions that hold this data to begin with."""
    numbers = count()
    rotate = getattr(app.session_interface, "regenerate", None)

    def start() -> str:
        session.update(data, count=0, cart={"items": [1, 2, 3], "changes": 0})
        return "x"

    def plain() -> str:
        session.update(data)
        return "x"

    def write() -> str:
        session["key1"] = f"{next(numbers):038}"
        return "x"

    def login() -> str:
        if rotate is not None:  # a signed cookie has no id that could be replaced
            rotate(session)
        session["user"] = "ada"
        return "x"

    for path, view in {
        "/untouched": lambda: "x",
        "/start": start,
        "/plain": plain,
        "/read": _read,
        "/all": _read_all,
        "/write": write,
        "/change": _change,
        "/nested": _nested,
        "/login": login,
        "/logout": _logout,
    }.items():
        app.add_url_rule(path, path, view)
    _install_overlaps(app)


def _install_overlaps(app: Flask) -> None:
    """Add the views of requests that meet others on the same session."""

    def own(key: str, pause: int) -> str:
        time.sleep(pause / 1000)
        session[key] = 1
        return "x"

    def counter(key: str, pause: int) -> str:
        value = session.get("count", 0)
        time.sleep(pause / 1000)
        session["count"] = value + 1
        return "x"

    def overlap() -> str:
        value = session["count"]
        app.config["BETWEEN"]()  # somebody else's request
        session["count"] = value + 1
        return "x"

    def kept() -> str:
        return f"{sum(key.startswith('own') for key in session)} {session.get('count', 0)}"

    for path, view in {
        "/own/<key>/<int:pause>": own,
        "/counter/<key>/<int:pause>": counter,
        "/overlap": overlap,
        "/kept": kept,
    }.items():
        app.add_url_rule(path, path, view)
