"""Several requests of one browser, in any order of their steps, against a model of plain dicts.

Requests open, read, change and close by turns, in two processes. The model keeps each session as the
history of its versions. It knows which version each request reads, decides at each close what the delta
has to do, and compares what is then stored.
"""

from __future__ import annotations

import os
import time
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from werkzeug.test import create_environ

from luasession import LuaSession
from luasession.snapshot import read_hash, session_key

from .conftest import MakeApp, TestApp

KEYS = st.sampled_from(["a", "b", "c"])
VALUES = st.one_of(st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2))
#: Ages are exact to a call's transit. So whoever opens is this much older than he seems, and opens this
#: much after the last end or clear.
MARGIN = 0.02


@dataclass
class Stored:
    """One session as it should be stored: the values of each version, the last being the current one."""

    history: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    #: The step at which it ended.
    ended: int | None = None
    #: The step and the version of the last clear.
    cleared: tuple[int, int] = (-1, 0)
    #: The newest version whose answer the browser has got.
    seen: int = 0

    @property
    def version(self) -> int:
        return len(self.history) - 1

    @property
    def values(self) -> dict[str, Any]:
        return self.history[-1]


@dataclass(eq=False)
class Open:
    """One open request: the real session, and what the model knows of it."""

    app: TestApp
    session: LuaSession
    handle: str | None
    opened: int
    required: int
    #: What it reads from; None until it reads, or where it has found no session.
    base: dict[str, Any] | None = None
    version: int = 0
    read: bool = False
    #: Whether it found that its session had ended while it was open.
    found_ended: bool = False
    reads: set[str] = field(default_factory=set)
    sets: dict[str, Any] = field(default_factory=dict)
    #: What was handed out of the base, as it is now.
    live: dict[str, Any] = field(default_factory=dict)
    deletes: set[str] = field(default_factory=set)
    cleared: bool = False
    destroyed: bool = False

    def view(self) -> dict[str, Any]:
        """Return what the session looks like to this request."""
        kept = {} if self.cleared or self.destroyed else {**(self.base or {}), **self.live}
        return {**{key: value for key, value in kept.items() if key not in self.deletes}, **self.sets}

    def forget(self) -> None:
        """Drop all that was changed and handed out."""
        for part in (self.sets, self.live, self.deletes):
            part.clear()


@dataclass(eq=False)
class Answer:
    """What is on its way to the browser."""

    cookies: list[str]
    handle: str | None = None
    #: The version that it tells of.
    version: int = 0


class Machine(RuleBasedStateMachine):
    """One browser."""

    #: Two processes on the same sessions.
    apps: tuple[TestApp, TestApp]
    #: How many requests were run to their ends, over all examples.
    closed = 0

    def __init__(self) -> None:
        super().__init__()
        self.jar: dict[str, str] = {}
        self.stored: dict[str, Stored] = {}
        self.requests: list[Open] = []
        self.answers: list[Answer] = []
        self.step = 0
        self.last_end = 0.0

    def _some(self, number: int) -> Open:
        self.step += 1
        return self.requests[number % len(self.requests)]

    @rule(process=st.integers(0, 1))
    @precondition(lambda self: len(self.requests) < 4)
    def open(self, process: int) -> None:
        """Open a request with the cookies of now."""
        self.step += 1
        time.sleep(max(self.last_end + 2 * MARGIN - time.monotonic(), 0))
        app = self.apps[process]
        cookies = "; ".join(f"{name}={value}" for name, value in self.jar.items())
        request = app.flask.request_class(create_environ(headers={"Cookie": cookies}))
        session = app.flask.session_interface.open_session(app.flask, request)
        assert isinstance(session, LuaSession)
        session._transaction.visit._opened -= int(MARGIN * 1e9)
        handle = self.jar.get("session", "").partition(".")[0] or None
        required = self.stored[handle].seen if handle else 0
        self.requests.append(Open(app, session, handle, self.step, required))

    def _load(self, request: Open) -> None:
        """Let the model learn which version a request that reads has got, and check that it may."""
        if request.read or request.cleared or request.destroyed:
            return
        request.read = True
        version = request.session.version
        stored = self.stored.get(request.handle or "")
        if version == 0:
            assert stored is None or stored.ended is not None, "a session that is there was not found"
            request.found_ended = stored is not None and (stored.ended or 0) > request.opened
            return
        assert stored is not None
        assert request.required <= version <= stored.version, "neither stale nor from the future"
        if request.app.flask.config["SESSION_CACHE_TTL"] in (0, None):
            assert stored.ended is None
            assert version == stored.version
        request.base, request.version = deepcopy(stored.history[version]), version

    @rule(number=st.integers(0, 3), key=KEYS)
    @precondition(lambda self: self.requests)
    def get(self, number: int, key: str) -> None:
        """Read a key."""
        request = self._some(number)
        if key not in request.sets and key not in request.deletes:
            self._load(request)
            if not request.cleared and not request.destroyed:
                request.reads.add(key)
        expected = request.view()
        got = request.session.get(key, "missing")
        assert got == expected.get(key, "missing")
        if key not in request.sets and isinstance(got, list):
            request.live[key] = deepcopy(got)

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.requests)
    def read_everything(self, number: int) -> None:
        """Read all keys."""
        request = self._some(number)
        self._load(request)
        expected = request.view()
        assert dict(request.session) == expected
        if not request.cleared and not request.destroyed:
            request.reads |= (request.base or {}).keys() - request.sets.keys() - request.deletes
        for key, value in expected.items():
            if key not in request.sets and isinstance(value, list):
                request.live[key] = deepcopy(value)

    @rule(number=st.integers(0, 3), key=KEYS)
    @precondition(lambda self: self.requests)
    def set_again(self, number: int, key: str) -> None:
        """Set a key to what it is."""
        self.get(number, key)
        request = self.requests[number % len(self.requests)]
        if key in request.view():
            self.set(number, key, request.view()[key])

    @rule(number=st.integers(0, 3), key=KEYS, value=VALUES)
    @precondition(lambda self: self.requests)
    def set(self, number: int, key: str, value: Any) -> None:
        """Set a key, read before or not."""
        request = self._some(number)
        request.session[key] = deepcopy(value)
        request.sets[key] = deepcopy(value)
        request.deletes.discard(key)
        request.live.pop(key, None)

    @rule(number=st.integers(0, 3), key=KEYS, value=st.integers(4, 6))
    @precondition(lambda self: self.requests)
    def append(self, number: int, key: str, value: int) -> None:
        """Change a list in place, one that was read or one that was set."""
        request = self._some(number)
        if key not in request.sets and key not in request.deletes:
            self._load(request)
            if not request.cleared and not request.destroyed:
                request.reads.add(key)
        expected = request.view().get(key)
        got = request.session.get(key)
        assert got == expected
        if not isinstance(got, list):
            return
        got.append(value)
        if key in request.sets:
            request.sets[key].append(value)
        else:
            request.live[key] = [*expected, value]

    @rule(number=st.integers(0, 3), key=KEYS)
    @precondition(lambda self: self.requests)
    def delete(self, number: int, key: str) -> None:
        """Delete a key."""
        request = self._some(number)
        if key not in request.sets and key not in request.deletes:
            self._load(request)
            if not request.cleared and not request.destroyed:
                request.reads.add(key)
        if key not in request.view():
            with pytest.raises(KeyError):
                del request.session[key]
            return
        del request.session[key]
        request.sets.pop(key, None)
        request.live.pop(key, None)
        if not request.cleared and not request.destroyed:
            request.deletes.add(key)

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.requests)
    def clear(self, number: int) -> None:
        """Delete everything; a request may go on and set keys."""
        request = self._some(number)
        request.session.clear()
        request.forget()
        request.cleared = True

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.requests)
    def destroy(self, number: int) -> None:
        """End the session; a request may go on and set keys of a new one."""
        request = self._some(number)
        request.session.destroy()
        request.forget()
        request.cleared = False
        request.destroyed = True

    @rule(number=st.integers(0, 3), late=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.requests)
    def close(self, number: int, late: bool) -> None:
        """End a request: its delta is applied, or not, as the model says."""
        request = self._some(number)
        self.requests.remove(request)
        response = request.app.flask.response_class()
        request.app.flask.session_interface.save_session(request.app.flask, request.session, response)
        assert response.status_code == 200
        answer = Answer(response.headers.getlist("Set-Cookie"))
        self.answers.append(answer)
        self._apply(request, answer)
        type(self).closed += 1
        for handle, stored in self.stored.items():
            self._compare(handle, stored)
        if not late:
            self._arrive(answer)

    @rule(number=st.integers(0, 3))
    @precondition(lambda self: self.answers)
    def arrive(self, number: int) -> None:
        """Let the browser get an answer, any of those on their way."""
        self.step += 1
        self._arrive(self.answers[number % len(self.answers)])

    def _arrive(self, answer: Answer) -> None:
        self.answers.remove(answer)
        for line in answer.cookies:
            name, _, rest = line.partition("=")
            if "Max-Age=0" in rest:
                self.jar.pop(name, None)
            else:
                self.jar[name] = rest.partition(";")[0]
        if answer.handle is not None:
            stored = self.stored[answer.handle]
            stored.seen = max(stored.seen, answer.version)

    def _changes(self, request: Open) -> tuple[dict[str, Any], set[str]]:
        """Return what a request has changed: keys set, and keys deleted."""
        if request.cleared or request.destroyed:
            return dict(request.sets), set()
        base = request.base or {}
        sets = {
            key: value
            for key, value in request.sets.items()
            # Set to what was read: no change. A key whose absence was read is not what it was.
            if not (key in request.reads and key in base and base[key] == value)
        }
        sets |= {key: value for key, value in request.live.items() if base[key] != value}
        # Set and deleted without having been read, a key is deleted from whatever is there.
        deletes = {key for key in request.deletes if key in base or not request.read}
        return sets, deletes

    def _apply(self, request: Open, answer: Answer) -> None:
        """Do to the model what the delta has to do."""
        sets, deletes = self._changes(request)
        stored = self.stored.get(request.handle or "")
        if request.destroyed or (request.cleared and not sets):
            # A request that has found nothing has nothing to end.
            was_there = stored is not None and stored.ended is None
            if stored is not None and was_there:
                stored.ended = self.step
                self.last_end = time.monotonic()
            if sets and (was_there or stored is None or request.opened > (stored.ended or 0)):
                self._begin(sets, answer)
        elif sets or deletes or request.cleared:
            if stored is not None and stored.ended is None:
                self._commit(stored, request, sets, deletes, answer)
            elif sets and self._may_begin(stored, request):
                self._begin(sets, answer)

    def _may_begin(self, stored: Stored | None, request: Open) -> bool:
        if request.base is not None or request.found_ended:
            return False
        return stored is None or request.read or request.opened > (stored.ended or 0)

    def _commit(
        self, stored: Stored, request: Open, sets: dict[str, Any], deletes: set[str], answer: Answer
    ) -> None:
        step, version = stored.cleared
        if not request.cleared and (
            request.version < version if request.base is not None else request.opened < step
        ):
            return
        before = {} if request.cleared else stored.values
        after = {key: value for key, value in {**before, **sets}.items() if key not in deletes}
        stored.history.append(deepcopy(after))
        answer.handle, answer.version = request.handle, stored.version
        if request.cleared:
            stored.cleared = (self.step, stored.version)
            self.last_end = time.monotonic()

    def _begin(self, values: dict[str, Any], answer: Answer) -> None:
        """Expect a new session, whose id is in the answer, before all else."""
        name, _, rest = answer.cookies[0].partition("=") if answer.cookies else ("", "", "")
        assert name == "session", "no new session was started"
        handle = rest.partition(".")[0]
        assert handle not in self.stored
        self.stored[handle] = Stored([{}, deepcopy(values)])
        answer.handle, answer.version = handle, 1

    def _compare(self, handle: str, stored: Stored) -> None:
        app = self.apps[0]
        found = app.stored(handle)
        if stored.ended is not None:
            assert set(found) <= {b"@t"}
            return
        snapshot = read_hash(dict(found))
        loads = app.flask.session_interface._values.load  # type: ignore[attr-defined]
        assert {session_key(name): loads(raw) for name, raw in snapshot.fields.items()} == stored.values
        assert snapshot.version == stored.version


@pytest.fixture
def two_processes(make_valkey_app: MakeApp, request: pytest.FixtureRequest) -> type[Machine]:
    cache_ttl, large = request.param
    if large:
        request.getfixturevalue("nothing_is_small")
    app = make_valkey_app(SESSION_CACHE_TTL=cache_ttl)
    return type("Browser", (Machine,), {"apps": (app, app.another())})


@pytest.mark.parametrize(
    "two_processes", [(60.0, False), (60.0, True), (0, False), (0, True), (None, False)], indirect=True
)
def test_requests_in_any_order(two_processes: type[Machine]) -> None:
    """Whatever overlapping requests do in whatever order, what is read and stored is what the model says."""
    run_state_machine_as_test(
        two_processes,
        settings=settings(
            max_examples=int(os.environ.get("LUASESSION_EXAMPLES", "200")),
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert two_processes.closed > 100
