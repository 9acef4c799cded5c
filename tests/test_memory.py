"""Memory: what a request made of a session is freed with the request, and thousands of them leave nothing."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Response, flash, get_flashed_messages, session, stream_with_context
from werkzeug.test import EnvironBuilder, run_wsgi_app

import luasession
from luasession import SessionConflict, merge, retry_on_conflict

from .conftest import MakeApp, TestApp

PACKAGE = str(Path(luasession.__file__).parent)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nobody refers to is freed: a cycle stays."""
    gc.disable()
    yield
    gc.enable()


class Wire:
    """Requests without a test client, which keeps the last one alive."""

    def __init__(self, app: TestApp) -> None:
        self.app = app
        self.cookies: dict[str, str] = {}
        self.status = ""

    def run(self, view: Callable[[], Any]) -> None:
        self.app.views["now"] = view
        header = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        environ = EnvironBuilder("/run", headers={"X-Token": "now", "Cookie": header}).get_environ()
        body, self.status, headers = run_wsgi_app(self.app.flask, environ)
        for _ in body:
            pass
        body.close()  # type: ignore[attr-defined]
        self.app.results.clear()
        for cookie in headers.getlist("Set-Cookie"):
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
            if not value:
                del self.cookies[name]

    def twin(self) -> Wire:
        twin = Wire(self.app)
        twin.cookies = dict(self.cookies)
        return twin


class Views:
    """What requests do, each on a session with a list and a number."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def start(self) -> None:
        session.update(cart=[1], hits=0)

    def untouched(self) -> None:
        pass

    def read(self) -> None:
        assert dict(session)

    def set_blindly(self) -> None:
        session["blind"] = {"nested": [1]}

    def change_in_place(self) -> None:
        session["cart"][0] += 1

    def commit_and_go_on(self) -> None:
        session["hits"] += 1
        session.commit()
        session["hits"] += 1

    def reload(self) -> None:
        session["hits"] = 5
        session.reload()

    def overlap(self) -> None:
        number = session["hits"]
        self.wire.twin().run(self.commit_and_go_on)
        session["hits"] = number + 1

    def contradict(self) -> None:
        assert session["strict"] == 0
        self.wire.twin().run(lambda: session.update(strict=1))
        session["strict"] = 2
        try:
            session.commit()
        except SessionConflict:
            session.reload()
            session["strict"] = 0

    def conflict_at_the_end(self) -> None:
        assert session["strict"] == 0
        self.wire.twin().run(lambda: session.update(strict=1))
        session["strict"] = 2

    def update_atomically(self) -> None:
        session.atomic_update("hits", lambda value: value + 1, 0)

    def retry(self) -> None:
        retry_on_conflict()(self.commit_and_go_on)()

    def rotate(self) -> None:
        session.regenerate()
        session["hits"] = 1

    def log_in(self) -> None:
        session.principal = "ada"
        session.permanent = True

    def flash(self) -> None:
        flash("hello")
        get_flashed_messages()

    def stream(self) -> Response:
        @stream_with_context
        def parts() -> Iterator[str]:
            yield "one"
            session["late"] = session["hits"]

        return Response(parts())

    def too_large(self) -> None:
        session["large"] = "x" * 5000

    def cannot_be_stored(self) -> None:
        session["odd"] = object()

    def fail(self) -> None:
        session["hits"] = 7
        raise ValueError("the view's own")

    def clear(self) -> None:
        session.clear()

    def destroy(self) -> None:
        session.destroy()


#: All of them, in an order in which each finds what it needs.
VIEWS = [name for name in vars(Views) if not name.startswith("_")]
STATUS = {"conflict_at_the_end": "409", "too_large": "413", "cannot_be_stored": "500", "fail": "500"}


@pytest.fixture
def wire(make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> Wire:
    app = make_valkey_app(SESSION_MERGE={"hits": merge.add, "strict": "raise"}, SESSION_MAX_BYTES=4000)
    # pytest keeps what is logged, and with it the frames of an error.
    monkeypatch.setattr(app.flask.logger, "disabled", True)
    wire = Wire(app)
    wire.run(lambda: session.update(cart=[1], hits=0, strict=0))
    return wire


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("name", VIEWS)
def test_a_session_dies_with_its_request(wire: Wire, name: str) -> None:
    """Session, visit, ledger and snapshot of a request are freed by their last reference, without the collector."""
    references: list[weakref.ref[Any]] = []
    view = getattr(Views(wire), name)

    def watched() -> Any:
        current: Any = session._get_current_object()  # type: ignore[attr-defined]
        references.extend(
            map(
                weakref.ref,
                (current, current._transaction.visit, current._transaction, current._transaction.ledger),
            )
        )
        return view()

    for _ in range(2):
        wire.run(watched)
        if name in STATUS:
            assert wire.status.startswith(STATUS[name])
        else:
            assert wire.status == "200 OK"
        assert len(references) >= 3
        if wire.status.startswith("500"):
            gc.collect()  # Flask's own cycle: its wsgi_app keeps the error, whose traceback has wsgi_app's frame
        assert [reference() for reference in references] == [None] * len(references)
        if name in ("clear", "destroy", "conflict_at_the_end"):
            wire.run(lambda: session.update(cart=[1], hits=0, strict=0))
        references.clear()


def round_trip(wire: Wire) -> None:
    views = Views(wire)
    for name in VIEWS:
        wire.run(getattr(views, name))
    wire.run(lambda: session.update(cart=[1], hits=0, strict=0))


def objects() -> Counter[str]:
    """Count what the collector knows of, by type."""
    return Counter(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())


def test_two_thousand_requests_leave_nothing(wire: Wire) -> None:
    """Two thousand requests of all sorts leave no more objects than a hundred, nor bytes of luasession's."""
    rounds = 2000 // (len(VIEWS) + 5)
    for _ in range(5):
        round_trip(wire)
    only = [tracemalloc.Filter(True, f"{PACKAGE}/*")]
    objects()  # the first look makes what it needs itself
    tracemalloc.start()
    try:
        round_trip(wire)
        gc.collect()
        before, bytes_before = objects(), tracemalloc.take_snapshot().filter_traces(only)
        for _ in range(rounds):
            round_trip(wire)
        gc.collect()
        after, bytes_after = objects(), tracemalloc.take_snapshot().filter_traces(only)
    finally:
        tracemalloc.stop()
    grown = {name: more for name, more in (after - before).items() if more > 20}
    assert grown == {}
    lines = bytes_after.compare_to(bytes_before, "lineno")
    assert sum(line.size_diff for line in lines) < 5 * 2000, [str(line) for line in lines[:5]]
    assert wire.app.stats()["commits"] > 1000
