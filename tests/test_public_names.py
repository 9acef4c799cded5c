"""The public names: what the contract promises can be imported, and is what it says."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import MutableMapping
from datetime import UTC, datetime, timedelta
from typing import Any

import flask
import pytest
from flask import session
from flask.sessions import SessionInterface, SessionMixin

import luasession
from luasession import LuaSession, merge, signals, testing

from .conftest import MakeApp, TestApp

ERRORS = [
    "LuaSessionError",
    "ConfigurationError",
    "SessionUnavailable",
    "SessionConflict",
    "SessionGone",
    "SessionTooLarge",
    "CorruptSession",
]
SIGNALS = [
    "session_created",
    "session_committed",
    "session_conflict",
    "session_rotated",
    "session_destroyed",
    "session_discarded",
    "session_corrupt",
]
ATTRIBUTES = [
    *("handle", "sid", "version", "created_at", "new", "permanent", "modified", "accessed"),
    *("principal", "label", "lifetime"),
]
METHODS = ["regenerate", "clear", "destroy", "commit", "reload", "atomic_update", "set"]
COUNTERS = {
    *("loads", "cache_hits", "commits", "conflicts", "merges", "discards", "script_reloads", "bytes"),
}


@pytest.mark.parametrize(
    "name",
    [
        "Session",
        "Sessions",
        "SessionInfo",
        "LuaSession",
        "LuaSessionInterface",
        "retry_on_conflict",
        *ERRORS,
        *SIGNALS,
    ],
)
def test_importable(name: str) -> None:
    """Everything public is importable from luasession, and documented."""
    assert getattr(luasession, name).__doc__


def test_submodules() -> None:
    """luasession.merge and luasession.signals are public, with all that they promise."""
    assert luasession.merge is merge
    assert luasession.signals is signals
    for name in ("add", "append", "union", "deep"):
        assert list(inspect.signature(getattr(merge, name)).parameters) == ["base", "theirs", "ours"]
    assert not merge.MISSING
    assert "MISSING" in repr(merge.MISSING)
    for name in SIGNALS:
        assert getattr(luasession, name) is getattr(signals, name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("server", {}),
        (
            "open_session",
            {
                "app": inspect.Parameter.empty,
                "keys": None,
                "client": None,
                "principal": None,
                "label": None,
            },
        ),
        ("expire", {"client": inspect.Parameter.empty}),
    ],
)
def test_testing(name: str, parameters: dict[str, Any]) -> None:
    """What luasession.testing has is documented, and called by these names and defaults."""
    function = getattr(testing, name)
    assert inspect.getdoc(function)
    found = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    assert found == parameters


def test_the_map_names_each_module() -> None:
    """The package's docstring has all modules, each once, and none that is not there."""
    rows = re.findall(r"^([a-z]+(?:, [a-z]+)*)  ", luasession.__doc__ or "", re.MULTILINE)
    there = {module.name for module in pkgutil.iter_modules(luasession.__path__)} - {"__main__"}
    assert sorted(", ".join(rows).split(", ")) == sorted(there)


def test_nothing_else_is_public_in_testing() -> None:
    """Its names are those that it lists, the fixture among them."""
    assert sorted(testing.__all__) == ["expire", "luasession_server", "open_session", "server"]
    assert all(hasattr(testing, name) for name in testing.__all__)


def test_nothing_else_is_public() -> None:
    """No name without an underscore slips into the package by an import."""
    names = {name for name in vars(luasession) if not name.startswith("_")}
    modules = {name for name in names if inspect.ismodule(getattr(luasession, name))}
    assert names - modules == {
        *("Session", "Sessions", "LuaSession", "LuaSessionInterface", "retry_on_conflict", "SessionInfo"),
        *ERRORS,
        *SIGNALS,
    }


def test_what_a_session_is(app: TestApp) -> None:
    """flask.session is a LuaSession: a MutableMapping and Flask's SessionMixin."""
    assert issubclass(LuaSession, MutableMapping)
    assert issubclass(LuaSession, SessionMixin)
    assert isinstance(app.flask.session_interface, SessionInterface)
    kind = app.browser().run(lambda: type(flask.session._get_current_object()))  # type: ignore[attr-defined]
    assert kind is LuaSession


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    """What a session can do is there and documented."""
    assert inspect.getdoc(getattr(LuaSession, name))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("regenerate", {"in_flight": True}),
        (
            "atomic_update",
            {"key": inspect.Parameter.empty, "function": inspect.Parameter.empty, "default": None},
        ),
        ("set", {"key": inspect.Parameter.empty, "value": inspect.Parameter.empty, "ttl": None}),
    ],
)
def test_parameters(name: str, parameters: dict[str, Any]) -> None:
    """By these names and defaults the methods are called."""
    signature = inspect.signature(getattr(LuaSession, name))
    found = {key: value.default for key, value in signature.parameters.items() if key != "self"}
    assert found == parameters


def look() -> dict[str, Any]:
    """Return all attributes of the session."""
    return {name: getattr(session, name) for name in ATTRIBUTES}


def test_attributes_before_there_is_a_session(app: TestApp) -> None:
    """Without a session there is no id, version 0 and nobody it belongs to; looking starts none."""
    browser = app.browser()
    assert browser.run(look) == {
        **dict.fromkeys(["handle", "sid", "created_at", "principal", "label", "lifetime"]),
        "version": 0,
        "new": True,
        "permanent": False,
        "modified": False,
        "accessed": True,
    }
    assert browser.set_cookies == {}
    assert app.keys() == []

    def view() -> dict[str, Any]:
        session["a"] = 1
        return look()

    during = browser.run(view)
    assert (during["sid"], during["handle"], during["version"], during["new"]) == (None, None, 0, True)
    assert during["modified"] is True


def test_attributes_of_a_session(app: TestApp) -> None:
    """Afterwards they are what was set and stored, in whatever process reads them."""
    browser = app.browser()

    def start() -> None:
        session["a"] = 1
        session.principal = "ada"
        session.label = "Laptop ü"
        session.lifetime = 3600
        session.permanent = True

    before = datetime.now(UTC)
    browser.run(start)
    sid = browser.cookies["session"]
    for reader in (browser, browser.twin(app.another())):
        seen = reader.run(look)
        created = seen.pop("created_at")
        assert created.tzinfo is UTC
        assert abs(created - before) < timedelta(minutes=1)
        assert seen == {
            "sid": sid,
            "handle": sid.partition(".")[0],
            "version": 1,
            "new": False,
            "permanent": True,
            "modified": False,
            "accessed": True,
            "principal": "ada",
            "label": "Laptop ü",
            "lifetime": timedelta(hours=1),
        }


@pytest.mark.parametrize("name", ["handle", "sid", "version", "created_at", "new"])
def test_read_only(app: TestApp, name: str) -> None:
    """What the server decides cannot be assigned."""

    def view() -> None:
        with pytest.raises(AttributeError):
            setattr(session, name, 1)

    app.browser().run(view)


@pytest.mark.parametrize("name", ["principal", "label"])
def test_text_or_none(app: TestApp, name: str) -> None:
    """The principal and the label are a str or None: anything else is a TypeError at the assignment."""
    browser = app.browser()

    def view() -> None:
        with pytest.raises(TypeError, match=rf"session\.{name} must be a str or None, not int"):
            setattr(session, name, 5)
        setattr(session, name, "text")
        session["a"] = 1

    browser.run(view)
    assert browser.run(lambda: getattr(session, name)) == "text"
    browser.run(lambda: setattr(session, name, None))
    assert browser.run(lambda: (getattr(session, name), session.version)) == (None, 2)


def test_attributes_set_to_what_they_are(app: TestApp) -> None:
    """permanent, lifetime, label and principal set to what is stored are no commit."""
    browser = app.browser()

    def same() -> None:
        session.principal = "ada"
        session.label = None
        session.lifetime = timedelta(hours=1)
        session.permanent = True

    browser.run(lambda: (session.update(a=1), same()))
    browser.run(same)
    browser.twin(app.another()).run(same)
    assert browser.run(lambda: session.version) == 1


@pytest.mark.parametrize("name", ["principal", "label", "lifetime", "permanent"])
def test_only_a_principal_starts_a_session(make_app: MakeApp, name: str) -> None:
    """Of the attributes only principal creates a session by itself."""
    app = make_app()
    value = {"principal": "ada", "label": "x", "lifetime": 60, "permanent": True}[name]
    browser = app.browser()
    browser.run(lambda: setattr(session, name, value))
    assert bool(app.keys()) is ("session" in browser.cookies) is (name == "principal")


def test_clear_ends_the_attributes_too(app: TestApp) -> None:
    """clear() ends principal, label, lifetime and permanence; what is set after it stays."""
    browser = app.browser()

    def start() -> None:
        session["a"] = 1
        session.principal, session.label = "ada", "x"
        session.lifetime, session.permanent = 3600, True

    browser.run(start)
    browser.run(lambda: (session.clear(), session.update(b=1), setattr(session, "label", "y")))
    seen = browser.twin(app.another()).run(look)
    assert {name: seen[name] for name in ("principal", "label", "lifetime", "permanent")} == {
        "principal": None,
        "label": "y",
        "lifetime": None,
        "permanent": False,
    }


def test_no_text_form_shows_the_secret(app: TestApp) -> None:
    """The repr and str of a session name the handle at most."""
    browser = app.browser()
    browser.run(lambda: session.update(a="value"))
    sid = browser.cookies["session"]
    shown = browser.run(lambda: repr(session) + str(session) + f"{session}")
    assert sid.partition(".")[0] in shown
    assert sid.partition(".")[2] not in shown
    assert "value" not in shown


def test_stats(app: TestApp) -> None:
    """app.extensions["luasession"].stats() counts what happened in this process."""
    app = app.another(SESSION_CACHE_TTL=60.0)
    assert app.stats() == dict.fromkeys(COUNTERS, 0)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    browser.run(lambda: session["a"])
    first = app.stats()
    assert first.keys() == COUNTERS
    assert {name: first[name] for name in ("commits", "cache_hits", "loads")} == {
        "commits": 1,
        "cache_hits": 1,
        "loads": 0,
    }
    assert first["bytes"] > 0
    other, elsewhere = browser.twin(), app.another()

    def conflicting() -> None:
        session["a"] += 1
        other.run(lambda: session.update(a=10))

    browser.run(conflicting)

    def discarded() -> None:
        session["b"] = session["a"]
        browser.twin().run(lambda: session.destroy())

    browser.run(discarded)
    counts = app.stats()
    assert {name: counts[name] for name in ("commits", "conflicts", "merges", "discards")} == {
        "commits": 3,
        "conflicts": 1,
        "merges": 0,
        "discards": 1,
    }
    assert elsewhere.stats() == dict.fromkeys(COUNTERS, 0)
    counts["commits"] = 99
    assert app.stats()["commits"] == 3


def test_stats_count_loads_merges_and_script_reloads(make_app: MakeApp) -> None:
    """Reads that Redis answered, commits merged and sent again, scripts that a server no longer knew."""
    app = make_app(SESSION_CACHE_TTL=None, SESSION_MERGE={"n": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    other = browser.twin()

    def merging() -> None:
        session["n"] += 1
        other.run(lambda: session.update(n=session["n"] + 1))

    browser.run(merging)
    counts = app.stats()
    assert {name: counts[name] for name in ("loads", "cache_hits", "merges", "conflicts")} == {
        "loads": 2,
        "cache_hits": 0,
        "merges": 1,
        "conflicts": 1,
    }
    assert browser.run(lambda: session["n"]) == 3
