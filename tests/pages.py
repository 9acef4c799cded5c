"""A page that sends requests side by side: every order of sendings, steps, commits and answers.

Each request of a :class:`Page` has as steps its *sending*, with the cookies that the browser has then,
each function of its view, its *commit* at the end of the request, and its *answer*, whose Set-Cookie
headers reach the browser's jar. :func:`every_order` plays all orders of all steps, and leaves out those
that differ from another one only in two neighbouring sendings.

Whether a request was open before a rotation or an end is told by ages, which are exact to a call's
transit only. So who is open at such an event is made as old as the schedule says it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flask import session as flask_session
from greenlet import getcurrent, greenlet
from werkzeug.http import parse_cookie, parse_date

from .conftest import TestApp

#: A step of a view: it gets the session.
Step = Callable[[Any], Any]

_LONG_AGO_NS = 60_000_000_000
_APART = 0.005
_TRIES = 20


class _TooSlow(Exception):
    """Two moments that had to be apart came too close: the schedule has to run again."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of request.

    :param steps: what its view does; the last one and the commit are one step.
    :param event: whether its commit rotates, clears or ends the session.
    """

    name: str
    steps: tuple[Step, ...]
    event: bool = False

    def __str__(self) -> str:
        return self.name


@dataclass
class Jar:
    """A browser's cookies."""

    cookies: dict[str, str] = field(default_factory=dict)

    def header(self) -> str:
        """Return them as a Cookie header."""
        return "; ".join(f"{name}={value}" for name, value in self.cookies.items())

    def take(self, lines: Sequence[str]) -> None:
        """Apply the Set-Cookie headers of an answer."""
        for line in lines:
            first, _, attributes = line.partition(";")
            [(name, value)] = parse_cookie(first).items()
            options = {
                key.strip().lower(): text
                for key, _, text in (a.partition("=") for a in attributes.split(";"))
            }
            expires = parse_date(options["expires"]) if "expires" in options else None
            ended = expires is not None and expires.timestamp() <= time.time()
            if ended or options.get("max-age") == "0":
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value


class Flight:
    """One request on its way.

    :param jar: gives its cookies at its sending, and takes those of its answer.
    """

    def __init__(self, name: str, kind: Kind, app: TestApp, jar: Jar) -> None:
        self.name, self.kind, self.app, self.jar = name, kind, app, jar
        #: What each step of its view returned.
        self.seen: list[Any] = []
        self.status = 0
        self.set_cookies: list[str] = []
        self.sent_with = ""
        self._visit: Any = None
        self._events = 0
        self._runner = greenlet(self._run)

    @property
    def steps(self) -> list[str]:
        """The names of its steps."""
        return ["is sent", *(["reads"] * (len(self.kind.steps) - 1)), "commits", "is answered"]

    @property
    def open(self) -> bool:
        """Whether it has been sent and not committed."""
        return self._visit is not None and self.status == 0

    def send(self, events: int) -> None:
        """Send it with the cookies that the browser has now."""
        self._events = events
        self.sent_with = self.jar.cookies.get("session", "")
        self._runner.switch()

    def step(self) -> None:
        """Go on by one step."""
        self._runner.switch()

    def answer(self) -> None:
        """Let its answer arrive."""
        self.jar.take(self.set_cookies)

    def place(self, events: int) -> bool:
        """Be open before the event that comes now; tell whether that needs a pause before it."""
        if self._events < events:
            return True
        if self._events == 0:
            visit, long_ago = self._visit, time.monotonic_ns() - _LONG_AGO_NS
            visit._opened = long_ago
            if visit._caller is not None:
                visit._caller = visit._caller._replace(opened=long_ago)
        return False

    def _run(self) -> None:
        from uuid import uuid4

        token = uuid4().hex
        self.app.views[token] = self._view
        client = self.app.flask.test_client(use_cookies=False)
        response = client.get("/run", headers={"X-Token": token, "Cookie": self.jar.header()})
        self.status = response.status_code
        self.set_cookies = response.headers.getlist("Set-Cookie")

    def _view(self) -> None:
        current = flask_session._get_current_object()  # type: ignore[attr-defined]
        self._visit = current._transaction.visit
        hub = getcurrent().parent
        assert hub is not None
        hub.switch()
        for number, step in enumerate(self.kind.steps):
            if number:
                hub.switch()
            self.seen.append(step(current))


@dataclass
class Played:
    """One schedule that was played."""

    flights: list[Flight]
    jar: Jar
    rows: list[tuple[str, str]]

    def timeline(self) -> str:
        """Return it as a table, one column a request."""
        names = [flight.name for flight in self.flights]
        lines = ["".join(f"{flight.name} {flight.kind}".ljust(34) for flight in self.flights)]
        for name, text in self.rows:
            lines.append("".join((text if other == name else "").ljust(34) for other in names).rstrip())
        return "\n".join(lines)


def orders(lengths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every merging of so many steps each, but for the order of neighbouring sendings."""

    def go_on(taken: tuple[int, ...], done: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if done == tuple(lengths):
            yield taken
            return
        for number, length in enumerate(lengths):
            if done[number] == length:
                continue
            swapped = taken and done[number] == 0 and done[taken[-1]] == 1 and number < taken[-1]
            if not swapped:
                after = (*done[:number], done[number] + 1, *done[number + 1 :])
                yield from go_on((*taken, number), after)

    yield from go_on((), (0,) * len(lengths))


def play(order: Sequence[int], make: Callable[[], list[Flight]]) -> Played:
    """Play one order."""
    for _ in range(_TRIES):
        try:
            return _play(order, make())
        except _TooSlow:
            continue
    raise AssertionError("a transit took too long, time and again")


def _play(order: Sequence[int], flights: list[Flight]) -> Played:
    played = Played(flights, flights[0].jar, [])
    done = [0] * len(flights)
    events = 0
    paused = False
    for number in order:
        flight = flights[number]
        what = flight.steps[done[number]]
        done[number] += 1
        text = what
        if what == "is sent":
            flight.send(events)
            text = f"{what} with {flight.sent_with[-6:] or 'no id'}"
        elif what == "is answered":
            flight.answer()
            told = [line.partition(";")[0] for line in flight.set_cookies]
            text = f"{what} {flight.status} {' '.join(t[:9] + '..' + t[-6:] for t in told[:1])}"
        else:
            last = what == "commits"
            if last and flight.kind.event:
                others = [other for other in flights if other is not flight and other.open]
                pauses = [other.place(events) for other in others]
                if True in pauses:
                    time.sleep(_APART)
                    paused = True
            begun = time.monotonic()
            flight.step()
            if paused and time.monotonic() - begun > _APART / 2:
                for other in flights:
                    other._runner.throw()
                raise _TooSlow
            if last and flight.kind.event:
                events += 1
            if flight.seen:
                text = f"{what}, saw {flight.seen[-1]!r}"
        played.rows.append((flight.name, text))
    return played


def every_order(make: Callable[[], list[Flight]], most: int | None = None) -> Iterator[Played]:
    """Play every order of these requests, made anew for each.

    :param most: play so many of them instead, evenly spread over all.
    """
    lengths = [len(flight.steps) for flight in make()]
    every = list(orders(lengths))
    for order in every[:: -(-len(every) // most) if most else 1]:
        yield play(order, make)
