"""Every order of the steps of two or three requests on one session, on a real server.

Scripts are atomic, so what overlapping requests can do to each other is decided by the order of a few
steps: a request opens its session, reads (from the cache of its process or from Redis), commits, and
commits once more after each merge. :class:`Scene` says which requests, :func:`every_order` runs them as
greenlets that stop right before each call to Redis, once for each order there is.

What each call answered and what is stored after it is compared with :class:`Specification`, which says
in plain Python what the scripts are to do; what a request saw and was told is checked when all have
ended. A :class:`Violation` shows the order as a timeline.

Whether a request was open before another one ended, cleared or rotated the session is told by ages, and
those are exact to a call's transit only, while the steps here are as close as that. So the age is chosen
at each sending to say what the schedule says: :class:`Placed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import redis
from flask import session as flask_session
from greenlet import getcurrent, greenlet
from werkzeug.test import create_environ

import luasession.rounds
import luasession.turns
from luasession import SessionGone, SessionUnavailable, merge
from luasession.client import Patience
from luasession.delta import Delta, Put
from luasession.errors import LuaSessionError
from luasession.ids import SessionId, new_session_id
from luasession.policy import Policies
from luasession.scripts import script
from luasession.signals import session_conflict, session_discarded
from luasession.snapshot import field_name, read_hash, session_key
from luasession.store import Caller

from .conftest import TestApp

#: What the session holds when the requests begin.
START: dict[str, Any] = {"n": 5, "k": "start", "list": ["start"], "x": 1, "y": 1}

#: A request, as a function on a session, or on a :class:`Model` of one: it returns what it saw.
View = Callable[[Any, str], Any]

_EVERYTHING = "everything"
_MARGIN_US = 20
_TRIES = 50
_LONG_AGO_NS = 60_000_000_000


class Violation(AssertionError):
    """A schedule in which something went otherwise than specified."""


class Inexact(Exception):
    """The age that was sent did not come out as the schedule has it: it has to run again."""


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: deepcopy(value) if isinstance(value, (list, dict, set)) else value
        for key, value in values.items()
    }


class Model(MutableMapping[str, Any]):
    """What a view does to a session of these values, if nobody else is there."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.base = values
        self.values = _copied(values)
        self.reads: set[str] = set()
        self.ended = self.cleared = False
        #: For each commit the keys changed, with their values, MISSING for a deleted one.
        self.commits: list[dict[str, Any]] = []
        self.updates: dict[str, tuple[Callable[[Any], Any], Any]] = {}
        self._assigned: set[str] = set()
        self._mark: Mapping[str, Any] = values

    def __getitem__(self, key: str) -> Any:
        if key not in self._assigned and not self.cleared:
            self.reads.add(key)
        return self.values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._assigned.add(key)
        self.values[key] = value

    def __delitem__(self, key: str) -> None:
        self[key]
        self._assigned.discard(key)
        del self.values[key]

    def __iter__(self) -> Iterator[str]:
        self.reads.add(_EVERYTHING)
        return iter(list(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def clear(self) -> None:
        self.values.clear()
        self._assigned.clear()
        self.cleared = True

    def destroy(self) -> None:
        self.clear()
        self.ended = True

    def regenerate(self, in_flight: bool = True) -> None:
        pass

    def atomic_update(self, key: str, function: Callable[[Any], Any], default: Any) -> Any:
        self.updates[key] = (function, default)
        self.values[key] = function(self.get(key, default))
        self._assigned.add(key)
        self.commit()
        return self.values[key]

    def before(self, at: int) -> dict[str, Any]:
        """Return what it goes on from after so many commits."""
        values = dict(self.base)
        for changed in self.commits[:at]:
            values.update(changed)
        return values

    def commit(self) -> None:
        """Note what has changed since the last time."""
        changed = {
            key: self.values.get(key, merge.MISSING)
            for key in self._mark.keys() | self.values.keys()
            if self._mark.get(key, merge.MISSING) != self.values.get(key, merge.MISSING)
            or (key in self._assigned and key not in self.reads)
        }
        if changed or self.cleared:
            self.commits.append(_copied(changed))
        self._mark = _copied(self.values)
        self._assigned.clear()


@dataclass(frozen=True, slots=True)
class Scene:
    """What overlaps.

    :param views: the requests, all of one browser, called A, B, C.
    :param processes: which serve them in turn; the cache of each is warm.
    :param cold: whether the caches hold nothing instead.
    :param replies: whether a reply on its way is a step of its own.
    :param lose: the request whose first commit is applied and never answered.
    :param patient: whether what was not answered is sent again.
    """

    views: tuple[View, ...]
    processes: tuple[TestApp, ...]
    start: Mapping[str, Any] = field(default_factory=lambda: START)
    cold: bool = False
    replies: bool = False
    lose: str = ""
    patient: bool = True

    def __str__(self) -> str:
        return " | ".join(view.__name__ for view in self.views)


class Request:
    """One request of a schedule, and all that is known of it."""

    def __init__(self, name: str, view: View, app: TestApp, *, free: bool) -> None:
        self.name = name
        self.view = view
        self.app = app
        #: Whether it goes on through its next stop.
        self.free = free
        #: How many events (ends, clears, rotations) had happened when it opened; how many steps.
        self.events = 0
        self.opened_ns = 0
        #: Whether it was said to have opened between two events.
        self.is_between = False
        self.base: dict[str, Any] = {}
        self.read_version: int | None = None
        #: What Redis said to its last call about this session: a load's answer, a commit's.
        self.standing = ""
        self.answer = ""
        #: Whether its last commit had a base.
        self.based = False
        self.applied: list[int] = []
        self.destroyed = False
        self.created: SessionId | None = None
        self.rotated_to: SessionId | None = None
        self.lost = False
        #: Whether its view was told of a conflict, and not its end.
        self.raised = False
        self.doing: tuple[str, Delta | None, SessionId | None] = ("", None, None)
        self.expected_version: int | None = None
        #: What came of it.
        self.seen: Any = None
        self.error: BaseException | None = None
        self.status = 0
        self.discarded: list[str] = []
        self.told: set[str] = set()
        self.to_be_told: set[str] = set()
        self.cookies: list[str] = []
        self._model: Model | None = None

    def model(self) -> Model:
        """Return what it does, by what it read."""
        if self._model is None or self._model.base is not self.base:
            self._model = Model(self.base)
            self.view(self._model, self.name)
            self._model.commit()
        return self._model

    @property
    def acknowledged(self) -> bool:
        """Whether it changed this session and was told so."""
        return bool(self.applied or self.destroyed) and self.status == 200 and not self.discarded


@dataclass
class _Rotated:
    event: int
    in_flight: bool


class Specification:
    """What the scripts are to do with one session, in plain Python, one call after the other."""

    def __init__(self, values: Mapping[str, Any], digest: bytes, policies: Policies) -> None:
        self.values = dict(values)
        self.version = 1
        #: The values of each version, for what was read of it.
        self.history = {1: self.values}
        self.digest = digest
        self._policies = policies
        self._formers: dict[bytes, _Rotated] = {}
        self._touched: dict[int, set[str]] = {1: {_EVERYTHING}}
        self._by: dict[int, str] = {}
        self._ring: dict[bytes, int] = {}
        self._cleared: tuple[int, int] | None = None
        self.ended: int | None = None
        #: How many ends, clears and rotations there have been.
        self.events = 0

    def load(self, request: Request, digest: bytes) -> str:
        """Say how the request stands to the session."""
        if self.ended is not None:
            return "gone" if request.events <= self.ended else "missing"
        if digest == self.digest:
            return "live"
        former = self._formers[digest]
        return "former" if request.events <= former.event and former.in_flight else "stale"

    def commit(self, request: Request, write_id: bytes, digest: bytes, delta: Delta) -> str:
        """Say what becomes of a commit; it is not applied yet."""
        if write_id in self._ring and self.ended is None:
            return "applied"
        standing = self.load(request, digest)
        if standing in ("gone", "missing", "stale") or (standing == "former" and delta.rotation):
            return "stale" if standing == "former" else standing
        base = delta.base and int.from_bytes(delta.base[:4])
        if self._cleared and not delta.cleared:
            version, event = self._cleared
            if (base < version) if base else (request.events <= event):
                return "gone"
        if base and self.conflicts(request, base):
            return "conflict"
        return "applied"

    def conflicts(self, request: Request, base: int) -> set[str]:
        """Return the keys that stop a commit on this base, by the policies."""
        model = request.model()
        # A policy of its own per key says what stops; reads without a change do so for one policy alone.
        changed = model.commits[len(request.applied)] if model.commits else {}
        checked = {
            key
            for key in changed
            if key in model.updates
            or (not model.cleared and key in model.reads and self._policies.of(key) != "overwrite")
        }
        if self._policies.serializable and not model.updates:
            checked |= model.reads
        return {key for key in checked if self.moved(key, base, request.name)}

    def moved(self, key: str, base: int, but: str) -> bool:
        """Whether somebody else changed a key after a version."""
        return any(
            _EVERYTHING in (key, *self._touched[version]) or key in self._touched[version]
            for version in range(base + 1, self.version + 1)
            if self._by[version] != but
        )

    def apply(self, request: Request, write_id: bytes, delta: Delta, rotated_to: bytes | None) -> bool:
        """Apply a commit, and tell whether it is an event."""
        if write_id in self._ring:
            return False
        model = request.model()
        at = len(request.applied)
        changed = model.commits[at] if at < len(model.commits) else {}
        values = {} if delta.cleared else self.values
        after = dict(values)
        for key, ours in changed.items():
            after[key] = self._decided(key, ours, values, model, model.before(at))
            if after[key] is merge.MISSING:
                del after[key]
        self.version += 1
        self.values = self.history[self.version] = _copied(after)
        self._touched[self.version] = {_EVERYTHING} if delta.cleared else set(changed)
        self._by[self.version] = request.name
        self._ring[write_id] = self.version
        if delta.cleared:
            self._cleared = (self.version, self.events)
        if rotated_to and delta.rotation:
            for former in self._formers.values():
                former.in_flight &= delta.rotation.in_flight
            self._formers[self.digest] = _Rotated(self.events, delta.rotation.in_flight)
            self.digest = rotated_to
        event = delta.cleared or delta.rotation is not None
        self.events += event
        return event

    def replaced(self, request: Request, delta: Delta) -> set[str]:
        """Return the keys that a commit, were it applied now, takes from somebody else (G3)."""
        model, at = request.model(), len(request.applied)
        if delta.base is None or model.cleared or model.updates or at >= len(model.commits):
            return set()
        base = int.from_bytes(delta.base[:4])
        return {
            key
            for key in model.commits[at].keys() & model.reads
            if self.moved(key, base, request.name)
            and self.values.get(key, merge.MISSING) != model.before(at).get(key, merge.MISSING)
        }

    def _decided(
        self, key: str, ours: Any, values: Mapping[str, Any], model: Model, before: Mapping[str, Any]
    ) -> Any:
        theirs = values.get(key, merge.MISSING)
        if model.cleared:
            return ours
        if key in model.updates:
            function, default = model.updates[key]
            return function(default if theirs is merge.MISSING else theirs)
        policy = self._policies.of(key)
        base = before.get(key, merge.MISSING)
        if callable(policy) and key in model.reads and theirs != base:
            return policy(base, theirs, ours)
        return ours

    def destroy(self) -> bool:
        """End it, and tell whether it was there."""
        if self.ended is not None:
            return False
        self.ended = self.events
        self.events += 1
        return True


class Placed(Caller):
    """A caller whose age says at each sending what the schedule says.

    A request that no event has overtaken is as old as it is: what came before it has been answered
    before it opened. One that was open before all events is as old as can be. One that opened between
    two is placed in the middle between their moments, which are known from the replies. The script works
    with its own clock, so whether it came out like that is seen in the reply; where a slow transit has
    moved it past an event, the schedule is run again.
    """

    request: Request
    run: Run

    @property
    def opened(self) -> int:  # type: ignore[override]
        return self.run.opened(self.request)


class _Persistent(Patience):
    """Sends again at once, or never."""

    def __init__(self, *, patient: bool) -> None:
        super().__init__(0)
        self._patient = patient

    def wait(self, error: Exception, failed_after: float, server: str = "") -> None:
        if not self._patient:
            raise SessionUnavailable(str(error)) from error


class Run:
    """One schedule: a scene, played once in one order."""

    def __init__(self, scene: Scene, order: Sequence[int]) -> None:
        self.scene = scene
        #: The choices made so far, each with how many there were.
        self.taken: list[tuple[int, int]] = []
        self._order = order
        self._offset_us = 0
        self.rows: list[tuple[str, str]] = []
        self.moments: list[int] = []
        self.running: Request | None = None
        self._hub = getcurrent()
        self._store = scene.processes[0].flask.session_interface._store
        self._codec = scene.processes[0].flask.session_interface._values
        policies = scene.processes[0].flask.session_interface._policies
        self._id = new_session_id(32)
        raw = {field_name(key): Put(self._codec.encode("", value)) for key, value in scene.start.items()}
        self._store.commit(self._id, Delta(sets=raw), self._now(), create=True)
        for app in scene.processes:
            store = app.flask.session_interface._store
            if scene.cold:
                store._here.cache.drop(self._id.handle)
            elif store is not self._store:
                store.load(self._id, self._now())
        self.jar = {"session": self._id.sid, "session_v": "1"}
        self.specification = Specification(scene.start, self._id.digest, policies)
        eventful = [view in EVENTFUL for view in scene.views]
        self.requests = [
            # Whether opening is a step of its own plays a part only if another request makes an event.
            Request(
                "ABC"[number],
                view,
                scene.processes[number % len(scene.processes)],
                free=not any(eventful[:number] + eventful[number + 1 :]),
            )
            for number, view in enumerate(scene.views)
        ]

    def _now(self) -> Caller:
        return Caller(time.monotonic_ns(), 3_600_000, Patience(2))

    # -- the schedule -------------------------------------------------------

    def play(self) -> None:
        """Run all requests to their ends, one step of one of them at a time."""
        greenlets = [(request, greenlet(self._serve)) for request in self.requests]
        for process in self.scene.processes:
            _harness(process).run = self
        try:
            while ready := [pair for pair in greenlets if not pair[1].dead]:
                request, body = ready[self._choose(len(ready))]
                self.running = request
                body.switch(request)
                self.running = None
                if isinstance(request.error, (Violation, Inexact)):
                    raise request.error
                if request.error is not None:
                    self.fail(f"{request.name} failed: {request.error!r}")
            self._check_end()
        finally:
            self.running = None
            for process in self.scene.processes:
                _harness(process).run = None
            for _, body in greenlets:
                if body:
                    body.throw()

    def _choose(self, ready: int) -> int:
        at = len(self.taken)
        self.taken.append((self._order[at] if at < len(self._order) else 0, ready))
        return self.taken[-1][0]

    def pause(self, request: Request) -> None:
        """Let steps of others happen here."""
        if request.free:
            request.free = False
            return
        self._hub.switch()

    def _serve(self, request: Request) -> None:
        try:
            self._answer(request)
        except BaseException as error:  # noqa: BLE001 - a greenlet's own goes on to the hub
            request.error = error

    def _answer(self, request: Request) -> None:
        app = request.app.flask
        with app.request_context(_environ(self.jar)):
            session = flask_session._get_current_object()  # type: ignore[attr-defined]
            request.opened_ns = time.monotonic_ns()
            request.events = self.specification.events
            if not request.free:
                self.row(request, "opens")
                self._hub.switch()
                request.free = True
            response = app.response_class()
            try:
                request.seen = request.view(session, request.name)
            except SessionGone:
                pass  # it was signalled, too
            except LuaSessionError as error:
                request.raised = True
                response = app.make_response(app.handle_user_exception(error))
            response = app.process_response(response)
        request.status = response.status_code
        request.cookies = response.headers.getlist("Set-Cookie")
        self.row(request, f"is answered {request.status}" + (", discarded" if request.discarded else ""))

    # -- ages ---------------------------------------------------------------

    def opened(self, request: Request) -> int:
        """Return the monotonic nanosecond that puts the request's opening where the schedule has it."""
        if request.events >= len(self.moments):
            return request.opened_ns
        if request.events == 0:
            return request.opened_ns - _LONG_AGO_NS
        middle = (self.moments[request.events - 1] + self.moments[request.events]) // 2
        request.is_between = True
        return (middle - self._offset_us) * 1000

    def _check_age(self, request: Request, arguments: Sequence[Any], now_us: int) -> None:
        if not request.is_between:
            return
        request.is_between = False
        came_out = now_us - int.from_bytes(arguments[6][:7])
        before, after = self.moments[request.events - 1], self.moments[request.events]
        if not before + _MARGIN_US <= came_out < after - _MARGIN_US:
            raise Inexact

    # -- each step ----------------------------------------------------------

    def exchange(self, request: Request, original: Callable[..., Any], *about: Any) -> Any:
        """One step: one command that Redis executes."""
        _, arguments, *_ = about
        sent_us = time.monotonic_ns() // 1000
        reply = original(*about)
        name = "HGETALL" if arguments[0] == b"HGETALL" else _name_of(arguments[1])
        ours = arguments[1 if name == "HGETALL" else 3] == self._store.calls.key(self._id.handle)
        if name != "HGETALL":
            # The server's clock when it runs what is sent here, less the clock here then.
            self._offset_us = reply[2] - sent_us
            self._check_age(request, arguments, reply[2])
        if ours:
            getattr(self, f"_{name.lower()}")(request, arguments, reply)
        else:
            self.row(request, f"{name} on a session of its own: {reply[0].decode()}")
        if name == "commit" and request.name == self.scene.lose and not request.lost:
            request.lost = True
            self.row(request, "does not get the reply")
            raise redis.ConnectionError("lost")
        return reply

    def _hgetall(self, request: Request, _arguments: Sequence[Any], reply: Any) -> None:
        live = self.specification.load(request, request.doing[2].digest) == "live"  # type: ignore[union-attr]
        request.expected_version = self.specification.version if live else None
        if live:
            request.standing = "live"
        self.row(request, f"reads, finds v{self.specification.version}" if live else "reads, finds nothing")

    def _load(self, request: Request, arguments: Sequence[Any], reply: list[Any]) -> None:
        expected = self.specification.load(request, arguments[5])
        code = reply[0].decode()
        if code in ("unchanged", "changed", "full"):
            code = "former" if reply[5] else "live"
            request.expected_version = self.specification.version
        self.row(request, f"loads: {code}, v{self.specification.version}")
        self._same("load.lua answers", code, expected)
        request.standing = code

    def _commit(self, request: Request, arguments: Sequence[Any], reply: list[Any]) -> None:
        _, delta, rotate_to = request.doing
        assert delta is not None
        write_id, digest, code = arguments[4], arguments[5], reply[0].decode()
        base = f"on v{int.from_bytes(delta.base[:4])}" if delta.base else "blind"
        self.row(request, f"commits {_told(delta)} {base}: {code}")
        spec = self.specification
        expected = spec.commit(request, write_id, digest, delta)
        self._same("commit.lua answers", code, expected)
        request.answer, request.based = code, delta.base is not None
        if code in ("applied", "conflict"):
            request.to_be_told |= spec.replaced(request, delta)
        if code != "applied":
            return
        before = spec.version
        if spec.apply(request, write_id, delta, rotate_to and rotate_to.digest):
            self.moments.append(reply[2])
        if spec.version > before:
            request.applied.append(spec.version)
        self._check_stored()
        self.rows[-1] = (request.name, f"{self.rows[-1][1]} as v{spec.version} {_shown(spec.values)}")
        self._same("the version told is", reply[3], request.applied[-1])

    def _destroy(self, request: Request, _arguments: Sequence[Any], reply: list[Any]) -> None:
        code = reply[0].decode()
        self.row(request, f"destroys: {code}")
        expected = "destroyed" if self.specification.destroy() else "missing"
        self._same("destroy.lua answers", code, expected)
        if code == "destroyed":
            request.destroyed = True
            self.moments.append(reply[2])
        self._check_stored()

    def loaded(self, request: Request, snapshot: Any, *, cached: bool) -> None:
        """Check a snapshot that a request goes on from: all of one version, the newest unless cached."""
        if snapshot is None:
            return
        if cached:
            self.row(request, f"reads v{snapshot.version} from the cache")
            request.standing = "live"
        else:
            self._same("the version read is", snapshot.version, request.expected_version)
        request.read_version = snapshot.version
        request.base = self.specification.history[snapshot.version]
        self._same(f"v{snapshot.version} as read is", self._decoded(snapshot.fields), request.base)

    def _check_stored(self) -> None:
        stored = self._ask(b"HGETALL", self._store.calls.key(self._id.handle))
        stored = stored if isinstance(stored, dict) else dict(zip(stored[::2], stored[1::2], strict=True))
        if self.specification.ended is not None:
            self._same("what is left is", set(stored), {b"@t"})
            return
        snapshot = read_hash(stored)
        self._same("what is stored is", self._decoded(snapshot.fields), self.specification.values)
        self._same("the version is", snapshot.version, self.specification.version)
        size = sum(len(name) + len(value) for name, value in snapshot.fields.items())
        self._same("the bytes counted are", snapshot.size, size)
        self._same("the fields counted are", int.from_bytes(snapshot.state[37:41]), len(snapshot.fields))

    def _ask(self, *words: bytes) -> Any:
        running, self.running = self.running, None
        try:
            return self._store.calls.client.call(lambda *_: words, lambda _: True, Patience(0))[1]
        finally:
            self.running = running

    def _decoded(self, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
        return {session_key(name) or "": self._codec.load(raw) for name, raw in fields.items()}

    # -- the end ------------------------------------------------------------

    def _check_end(self) -> None:
        for request in self.requests:
            self._check_request(request)
        self._check_caches()
        self._check_cookies()

    def _check_request(self, request: Request) -> None:
        say = f"{request.name} is"
        if request.lost and not self.scene.patient:
            self._same(say, request.status, 503)
            self._same(f"{request.name}'s cookies are", request.cookies, [])
            return
        self._same(say, request.status, 409 if request.answer == "conflict" or request.raised else 200)
        # Where Redis refused it, or it knew from its read, and it would have changed something.
        refused = request.answer or request.standing
        wants = bool(request.model().commits) or request.view in ROTATING
        ends = request.model().ended or (request.model().cleared and not request.model().values)
        gone = refused in ("gone", "stale") or (refused == "missing" and request.based)
        discarded = gone and wants and not ends and request.created is None
        self._same(f"{request.name} is discarded:", bool(request.discarded), discarded)
        self._same(f"{request.name} is told of", request.told, request.to_be_told)
        if (discarded or request.status == 409) and not request.applied:
            self._same(f"{request.name}'s cookies are", request.cookies, [])

    def _check_caches(self) -> None:
        for app in self.scene.processes:
            snapshot = app.flask.session_interface._store._here.cache.peek(self._id.handle)
            if snapshot is not None:
                held = self._decoded(snapshot.fields)
                version = snapshot.version
                self._same(f"v{version} as cached is", held, self.specification.history[version])

    def _check_cookies(self) -> None:
        """Whatever the order of the answers, the browser is left with an id that holds.

        In the order in which they came it sees all that is stored, whatever process it asks (G9).
        """
        spec = self.specification
        # Whoever is never told of his rotation cannot know the new id: an answer that says 503 changes no cookie.
        untold = any(request.status == 503 and request.rotated_to for request in self.requests)
        if spec.ended is None and not untold:
            sids = {request.created.sid for request in self.requests if request.created} | {self.sid}
            for answers in permutations(request.cookies for request in self.requests):
                held = _jar(self.jar, answers).get("session")
                self._same("the browser's id is one in force:", held in sids, True)
        jar = _jar(self.jar, [request.cookies for request in self.finished])
        if jar.get("session") != self.sid:
            return
        for app in self.scene.processes:
            flask = app.flask
            seen = dict(flask.session_interface.open_session(flask, flask.request_class(_environ(jar))))
            self._same("the next request sees", seen, spec.values if spec.ended is None else {})

    @property
    def finished(self) -> list[Request]:
        """The requests in the order in which they were answered."""
        last = {name: number for number, (name, _) in enumerate(self.rows)}
        return sorted(self.requests, key=lambda request: last[request.name])

    @property
    def sid(self) -> str:
        """The id that is in force."""
        sid = self._id.sid
        for request in self.requests:
            if request.rotated_to and request.rotated_to.digest == self.specification.digest:
                sid = request.rotated_to.sid
        return sid

    # -- telling ------------------------------------------------------------

    def row(self, request: Request, text: str) -> None:
        """Add a line to the timeline."""
        self.rows.append((request.name, text))

    def _same(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            self.fail(f"{what} {found!r}, expected {expected!r}")

    def fail(self, what: str) -> None:
        """Raise a violation, with the timeline."""
        raise Violation(f"{what}\n{self.timeline()}")

    def timeline(self) -> str:
        """Return the schedule as a table: a column for each request, a row for each step."""
        names = [request.name for request in self.requests]
        heads = [f"{request.name}: {request.view.__name__}" for request in self.requests]
        widths = [
            max([len(head), *(len(text) for who, text in self.rows if who == name)])
            for head, name in zip(heads, names, strict=True)
        ]
        lines = ["step | " + " | ".join(map(str.ljust, heads, widths))]
        lines.append("-----+-" + "-+-".join("-" * width for width in widths))
        for number, (who, text) in enumerate(self.rows, 1):
            cells = [(text if who == name else "").ljust(w) for name, w in zip(names, widths, strict=True)]
            lines.append(f"{number:4} | " + " | ".join(cells))
        return "\n".join([f"v1 is {_shown(self.scene.start)}", *(line.rstrip() for line in lines)])


class _Harness:
    """Has the calls of one process's store be steps of the run that it takes part in."""

    def __init__(self, app: TestApp) -> None:
        self.run: Run | None = None
        session_discarded.connect(self._discarded, app.flask)
        session_conflict.connect(self._conflict, app.flask)
        store = app.flask.session_interface._store  # type: ignore[attr-defined]
        client = store.calls.client
        for owner, name in [
            (client._connections, "take"),
            (client._connections, "_exchange"),
            (client, "call"),
            (store, "caller"),
            (store, "trusted"),
            (store, "load"),
            (store, "commit"),
        ]:
            setattr(owner, name, partial(self._step, getattr(self, name), getattr(owner, name)))

    def _step(self, ours: Callable[..., Any], original: Callable[..., Any], *about: Any, **more: Any) -> Any:
        if self.run is None or self.run.running is None:
            return original(*about, **more)
        return ours(self.run, self.run.running, original, *about, **more)

    def take(self, run: Run, request: Request, original: Callable[..., Any]) -> Any:
        """Stop before a connection is taken: the age of the request counts up to the sending after it."""
        run.pause(request)
        return original()

    def _exchange(self, run: Run, request: Request, original: Callable[..., Any], *about: Any) -> Any:
        return run.exchange(request, original, *about)

    def call(self, run: Run, request: Request, original: Callable[..., Any], *about: Any) -> Any:
        """Stop when the reply is there, if it is on its way for so long."""
        answer = original(*about)
        if run.scene.replies:
            run.pause(request)
        return answer

    def caller(self, run: Run, request: Request, _original: Any, opened: int, lifetime_ms: int) -> Caller:
        """Return one whose age is as the schedule has it."""
        placed = Placed(opened, lifetime_ms, _Persistent(patient=run.scene.patient))
        placed.request, placed.run = request, run
        return placed

    def trusted(self, run: Run, request: Request, original: Callable[..., Any], *about: Any) -> Any:
        """Stop before the cache is looked into."""
        run.pause(request)
        snapshot = original(*about)
        run.loaded(request, snapshot, cached=True)
        # What is not there is asked for in the same step: the look changed nothing.
        request.free = snapshot is None
        return snapshot

    def load(self, run: Run, request: Request, original: Callable[..., Any], *about: Any) -> Any:
        """Check what was read."""
        request.doing = ("load", None, about[0])
        loaded = original(*about)
        run.loaded(request, loaded.snapshot, cached=False)
        return loaded

    def commit(
        self, _run: Run, request: Request, original: Callable[..., Any], *about: Any, **more: Any
    ) -> Any:
        """Note what is sent, or the session of its own that it is to make."""
        if more.get("create"):
            request.created = about[0]
            return original(*about, **more)
        rotate_to = more.get("rotate_to")
        request.doing = ("commit", about[1], rotate_to)
        request.rotated_to = rotate_to or request.rotated_to
        return original(*about, **more)

    def _discarded(self, _sender: Any, **about: Any) -> None:
        if self.run is not None and self.run.running is not None:
            self.run.running.discarded.append(about["reason"])

    def _conflict(self, _sender: Any, **about: Any) -> None:
        if self.run is not None and self.run.running is not None:
            self.run.running.told.add(about["key"])


def _harness(app: TestApp) -> _Harness:
    harness: _Harness = app.flask.extensions.setdefault("interleaving", None) or _Harness(app)
    app.flask.extensions["interleaving"] = harness
    return harness


_ENVIRON = create_environ("/")


def _environ(jar: Mapping[str, str]) -> dict[str, Any]:
    return {**_ENVIRON, "HTTP_COOKIE": "; ".join(f"{name}={value}" for name, value in jar.items())}


def _jar(jar: Mapping[str, str], answers: Sequence[Sequence[str]]) -> dict[str, str]:
    after = dict(jar)
    for cookies in answers:
        for cookie in cookies:
            name, _, rest = cookie.partition("=")
            if "Max-Age=0" in rest:
                after.pop(name, None)
            else:
                after[name] = rest.partition(";")[0]
    return after


def _name_of(sha: bytes) -> str:
    return next(name for name in ("load", "commit", "destroy", "index") if script(name).sha == sha)


def _told(delta: Delta) -> str:
    words = ["clear"] if delta.cleared else []
    words += [f"{name.decode()}={put.value.decode()}" for name, put in delta.sets.items()]
    words += [f"-{name.decode()}" for name in delta.deletes]
    if delta.rotation:
        words.append("rotation" if delta.rotation.in_flight else "rotation that drops what is open")
    return " ".join(words)


def _shown(values: Mapping[str, Any]) -> str:
    return "{" + " ".join(f"{key}={value!r}" for key, value in sorted(values.items())) + "}"


def every_order(scene: Scene) -> Iterator[Run]:
    """Play a scene in each order of its steps, and yield each run when it has ended.

    :raise Violation: as soon as something is not as specified.
    """
    # Between two rounds of a merge a request waits a little; here others are let in by the schedule.
    # Nor does it wait for a turn, as other processes' requests do not either.
    unhurried = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: None)
    order: list[int] = []
    while True:
        with (
            patch.object(luasession.rounds, "time", unhurried),
            patch.object(luasession.turns, "_LONGEST_WAIT", 0),
        ):
            run = _play(scene, order)
        yield run
        # The next order: the last choice that had another one takes it, and what follows begins anew.
        taken = list(run.taken)
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        order = [choice for choice, _ in taken]
        order[-1] += 1


def _play(scene: Scene, order: Sequence[int]) -> Run:
    for _ in range(_TRIES):
        run = Run(scene, order)
        try:
            run.play()
        except Inexact:
            continue
        return run
    raise AssertionError("no age came out as the schedule has it; is the machine that busy?")


# -- what requests do ---------------------------------------------------------


def read(session: Any, _who: str) -> Any:
    return dict(session)


def set_k(session: Any, who: str) -> None:
    session["k"] = who


def set_n(session: Any, _who: str) -> None:
    session["n"] = 100


def delete(session: Any, _who: str) -> Any:
    return session.pop("k", None)


def count(session: Any, _who: str) -> Any:
    seen = session.get("n", 0)
    session["n"] = seen + 1
    return seen


def append(session: Any, who: str) -> Any:
    seen = list(session.get("list", ()))
    if "list" in session:
        session["list"].append(who)
    else:
        session["list"] = [who]
    return seen


def clear(session: Any, _who: str) -> None:
    session.clear()


def clear_and_set(session: Any, who: str) -> None:
    session.clear()
    session["k"] = who


def destroy(session: Any, _who: str) -> None:
    session.destroy()


def rotate(session: Any, _who: str) -> None:
    session.regenerate()


def rotate_and_count(session: Any, who: str) -> Any:
    session.regenerate()
    return count(session, who)


def rotate_and_drop(session: Any, _who: str) -> None:
    session.regenerate(in_flight=False)


def update(session: Any, _who: str) -> Any:
    return session.atomic_update("n", lambda n: n + 1, 0)


def twice(session: Any, _who: str) -> Any:
    seen = session.get("n", 0)
    session["n"] = seen + 1
    session.commit()
    session["n"] = seen + 2
    return seen


def x_from_y(session: Any, who: str) -> Any:
    seen = session.get("y")
    session["x"] = f"{who} saw {seen}"
    return seen


def y_from_x(session: Any, who: str) -> Any:
    seen = session.get("x")
    session["y"] = f"{who} saw {seen}"
    return seen


#: What others must know to have happened before or after they opened.
EVENTFUL = frozenset({clear, clear_and_set, destroy, rotate, rotate_and_count, rotate_and_drop})
ROTATING = frozenset({rotate, rotate_and_count, rotate_and_drop})
