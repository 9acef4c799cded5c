"""The app that the chaos run loads: each request tells what the signals said of it.

Guards can be taken out of it, and of it alone, to see that the checker notices: ``LUASESSION_CHAOS_MUTATION``
names one of :data:`MUTATIONS`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import local
from typing import Any

from flask import Flask, request, session

import luasession.connections
import luasession.scripts
import luasession.store
from luasession import Session, SessionGone, merge, signals

from .web import SETTINGS

MUTATION = "LUASESSION_CHAOS_MUTATION"

#: What is replaced in commit.lua, by mutation; "replies" takes the proof of replies out of Python.
MUTATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "write id": (("if found then", "if false then"),),
    "existence": (
        ("if ended then", "if false then"),
        ("if create == (identity and true or false) then", "create = not identity\nif false then"),
    ),
    "replies": (),
}


def create_app() -> Flask:
    """Make the app that the workers serve; its settings come as JSON in the environment."""
    if mutation := os.environ.get(MUTATION):
        _mutate(mutation)
    _watch_calls()
    app = Flask(__name__)
    app.logger.disabled = True  # the answer has it
    app.config.update(json.loads(os.environ[SETTINGS]))
    app.config["SESSION_MERGE"] = {"list": merge.append, "sum": merge.add}
    Session(app)
    app.wsgi_app = _Told(app.wsgi_app)  # type: ignore[method-assign]
    app.add_url_rule("/ready", view_func=lambda: "ready")
    for name, view in _VIEWS.items():
        app.add_url_rule(f"/{name}", name, _timed(view))

    @app.errorhandler(SessionGone)
    def gone(error: SessionGone) -> tuple[str, int]:
        return "gone", 410

    @app.errorhandler(500)
    def failed(error: Any) -> tuple[str, int]:
        return "".join(traceback.format_exception(getattr(error, "original_exception", None) or error)), 500

    return app


def _timed(view: Callable[[str, str], Any]) -> Callable[[], dict[str, Any]]:
    """Run a view on the key and the value of the request, which may take a while after it has read."""

    def run() -> dict[str, Any]:
        if request.args.get("reads"):
            session.get(request.args.get("key"))
        time.sleep(float(request.args.get("pause", 0)))
        return {"result": view(request.args.get("key", ""), request.args.get("value", ""))}

    return run


def _put(key: str, value: str) -> None:
    session[key] = value


def _drop(key: str, value: str) -> dict[str, Any]:
    version = session.version  # type: ignore[attr-defined]
    return {"taken": session.pop(key, None), "version": version}


def _add(key: str, value: str) -> None:
    if key == "list":
        items = session.setdefault("list", [])
        time.sleep(float(request.args.get("pause", 0)))
        items.append(value)
    elif key == "sum":
        count = session.get("sum", 0)
        time.sleep(float(request.args.get("pause", 0)))
        session["sum"] = count + 1
    elif key == "tally":
        session.atomic_update("tally", lambda items: [*items, value], [])  # type: ignore[attr-defined]
    else:
        session.atomic_update("hits", lambda count: count + 1, 0)  # type: ignore[attr-defined]


def _rotate(key: str, value: str) -> None:
    session[key] = value
    session.regenerate(in_flight=not request.args.get("drops"))  # type: ignore[attr-defined]


def _logout(key: str, value: str) -> None:
    if value == "clear":
        session.clear()
    else:
        session.destroy()  # type: ignore[attr-defined]


def _read(key: str, value: str) -> dict[str, Any]:
    return {"seen": dict(session), "version": session.version}  # type: ignore[attr-defined]


_VIEWS: dict[str, Callable[[str, str], Any]] = {
    "start": _put,
    "put": _put,
    "late": _put,
    "drop": _drop,
    "add": _add,
    "rotate": _rotate,
    "logout": _logout,
    "read": _read,
}


#: What is told of the request that a thread is at.
_thread = local()


class _Told:
    """Sends what the signals said during a request along with its answer, and which calls it made."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        signals.session_created.connect(self._committed)
        signals.session_committed.connect(self._committed)
        signals.session_discarded.connect(self._discarded)

    def _committed(self, _app: Flask, handle: str, version: int, **_: Any) -> None:
        _thread.told["commits"].append((handle, version))

    def _discarded(self, _app: Flask, reason: str, **_: Any) -> None:
        _thread.told["discarded"] = reason

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        told: dict[str, Any] = {"commits": [], "discarded": "", "calls": []}
        _thread.told = told

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, ("X-Told", json.dumps(told))], *more)

        return self._app(environ, start)


def _watch_calls() -> None:
    """Have each call that this process sends told with the answer of its request, each try by itself."""
    exchange = luasession.connections.Connections.exchange

    def watched(self: Any, connection: Any, words: Any, *more: Any) -> Any:
        sent: list[bytes] = []
        came: Any = None
        began = time.monotonic()

        def noted() -> Any:
            sent.extend(words())
            return sent

        try:
            came = exchange(self, connection, noted, *more)
        except BaseException as error:
            came = error
            raise
        else:
            return came
        finally:
            if told := getattr(_thread, "told", None):
                milliseconds = (time.monotonic() - began) * 1000
                told["calls"].append(f"{_call(sent, came)} at {self} in {milliseconds:.0f} ms")

    luasession.connections.Connections.exchange = watched  # type: ignore[method-assign]


def _call(sent: list[bytes], came: Any) -> str:
    """Return what was sent, with the start of the handle and of the digest, and what came back."""
    name = sent[0].decode()
    if name in {"EVAL", "EVALSHA"}:
        scripts = map(luasession.scripts.script, ("load", "commit", "destroy", "index"))
        name = next((each.name for each in scripts if sent[1] in {each.sha, each.text}), name)
        # The call id stands before the digest; for how long one is open follows, packed or not.
        name = f"{name} {sent[3][-22:-16].decode()} {sent[5][:3].hex()}"
    elif name == "HGETALL":
        name = f"HGETALL {sent[1][-22:-16].decode()}"
    if isinstance(came, BaseException):
        return f"{name}: {type(came).__name__} {str(came)[:60]}"
    if name.startswith("HGETALL"):
        fields = came if isinstance(came, dict) else dict(zip(came[::2], came[1::2], strict=True))
        held = fields.get(b"@i", b"")[1:4].hex() or "nothing"
        return f"{name}: {held}"
    return f"{name}: {came[0].decode()}" if name[0].islower() else name


def _mutate(name: str) -> None:
    """Have this process run with a guard taken out."""
    folder = luasession.scripts._folder()
    copies = Path(tempfile.mkdtemp(dir=os.environ["XDG_RUNTIME_DIR"]))
    for script in ("load", "commit", "destroy", "index"):
        text = (folder / f"{script}.lua").read_text()
        for old, new in MUTATIONS[name] if script == "commit" else ():
            assert text.count(old) == 1, f"{name}: not once in {script}.lua: {old}"
            text = text.replace(old, new)
        (copies / f"{script}.lua").write_text(text)
    luasession.scripts._folder = lambda: copies
    luasession.scripts.script.cache_clear()
    if name == "replies":
        exchange = luasession.connections.Connections.exchange

        def gullible(self: Any, connection: Any, words: Any, accept: Any, *more: Any) -> Any:
            return exchange(self, connection, words, lambda reply: True, *more)

        luasession.connections.Connections.exchange = gullible  # type: ignore[method-assign]
        luasession.store.same_digest = lambda one, other: True
