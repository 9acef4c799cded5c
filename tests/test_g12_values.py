"""G12: values come back as they went in, and what cannot be stored is refused by name."""

from __future__ import annotations

import datetime as dt
import logging
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from flask import session
from markupsafe import Markup

from luasession.signals import session_corrupt

from .conftest import MakeApp, TestApp

ZONE = dt.timezone(dt.timedelta(hours=5, minutes=30))
VALUES: dict[str, Any] = {
    "none": None, "bool": True, "int": 2**70, "float": -0.5, "str": "ü\x00", "bytes": b"\x00\xff",
    "list": [1, [2]], "tuple": (1, ("a",)), "dict": {"b": 1, "a": {" t": [1]}}, "set": {1, 2}, "frozenset": frozenset("ab"),
    "naive": dt.datetime(2026, 1, 2, 3, 4, 5, 678), "aware": dt.datetime(2026, 1, 2, tzinfo=ZONE), "date": dt.date(2026, 1, 2),
    "time": dt.time(1, 2, 3), "delta": dt.timedelta(days=-1, microseconds=5), "uuid": UUID(int=7), "decimal": Decimal("1.10"),
    "markup": Markup("<b>"), "@v": 1, "@": 2, "": 3, "nul\x00": 4, "k" * 3000: 5,
}  # fmt: skip


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
def test_every_type_and_key(make_app: MakeApp, serializer: str) -> None:
    """All types of the contract, under keys of all sorts, in a process that has not seen them."""
    app = make_app(SESSION_SERIALIZER=serializer)
    browser = app.browser()
    browser.run(lambda: session.update(VALUES))
    seen = browser.twin(app.another()).run(lambda: dict(session))
    assert seen == VALUES
    assert {key: type(value) for key, value in seen.items()} == {
        key: type(value) for key, value in VALUES.items()
    }


def test_a_type_error_names_key_and_type(app: TestApp, make_app: MakeApp) -> None:
    """The 500 handler sees a TypeError that names both; errorhandler(TypeError) may answer instead."""
    seen: list[Any] = []
    app.flask.register_error_handler(
        500, lambda error: (seen.append(error.original_exception), ("no", 500))[1]
    )
    app.browser().run(lambda: session.update(thing={"deep": object()}), status=500)
    assert "thing" in str(seen[0])
    assert "object" in str(seen[0])
    assert type(seen[0]) is TypeError
    other = make_app()
    other.flask.register_error_handler(TypeError, lambda error: ("mine", 422))
    other.browser().run(lambda: session.update(thing=object()), status=422)
    assert app.keys() == other.keys() == []


def test_a_key_that_is_no_str(app: TestApp) -> None:
    """A non-str key is a TypeError at the assignment."""

    def view() -> None:
        with pytest.raises(TypeError, match="int"):
            session[5] = 1  # type: ignore[index]

    app.browser().run(view)


def test_a_field_that_does_not_decode(app: TestApp, caplog: pytest.LogCaptureFixture) -> None:
    """It reads as missing, is told and logged without its value, and stays; the other keys work."""
    told: list[str] = []

    def receive(_sender: Any, key: str, **_about: Any) -> None:
        told.append(key)

    session_corrupt.connect(receive, app.flask, weak=False)
    caplog.set_level(logging.WARNING, "luasession")
    browser = app.browser()
    browser.run(lambda: session.update(a=1, b=2))
    handle = browser.run(lambda: session.handle)
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, "a", b"{secret-rubbish")
    fresh = browser.twin(app.another())
    told_by = fresh.app
    session_corrupt.connect(receive, told_by.flask, weak=False)

    def view() -> None:
        assert session.get("a") is None
        assert dict(session) == {"b": 2}
        assert len(session) == 1
        session["b"] = 3

    fresh.run(view)
    assert told == ["a"]
    assert handle in caplog.text
    assert "secret-rubbish" not in caplog.text
    assert app.stored(handle)[b"a"] == b"{secret-rubbish"
    assert app.stored(handle)[b"b"] == b"3"


def test_ten_thousand_keys_in_one_commit(app: TestApp) -> None:
    """Ten thousand keys are set in one commit and deleted in another; a value of 1 MB fits beside limits."""
    app = app.another(SESSION_MAX_BYTES=4 << 20)
    browser = app.browser()
    browser.run(lambda: session.update({f"key{n}": n for n in range(10_000)}))

    def delete() -> None:
        assert session.version == 1
        for key in list(session):
            del session[key]
        session["big"] = "x" * 1_000_000

    browser.run(delete)
    assert browser.twin(app.another()).run(lambda: {key: len(value) for key, value in session.items()}) == {
        "big": 1_000_000
    }
    assert browser.run(lambda: session.version) == 2
