"""Calls: what is sent when an answer is not to be believed at once."""

from __future__ import annotations

from typing import Any

import pytest

import luasession.calls
from luasession.calls import Caller, Calls
from luasession.client import Patience
from luasession.config import Config
from luasession.stats import Stats

NOW = 1_700_000_000_000_000
CALL = b"call-id!"


class Client:
    """Answers each call with what it was given, after sendings of which all but the last broke off."""

    def __init__(
        self, clock: Clock, *answers: tuple[bytes, int], doubts: bool = True, sendings: int = 1
    ) -> None:
        self.clock = clock
        self.answers = list(answers)
        self.doubts = doubts
        self.sendings = sendings
        self.doubted = 0
        self.clock_offset: int | None = None

    def call(self, words: Any, *_about: Any) -> tuple[int, list[Any], Client]:
        code, taken = self.answers.pop(0)
        first = self.clock.now + 1_000_000
        for _ in range(self.sendings):
            self.clock.now += 1_000_000
            words(self.clock.now, first, True)
        sent = self.clock.now
        self.clock.now += taken
        return sent, [code, CALL, NOW], self

    def doubt(self, _server: Client) -> bool:
        self.doubted += 1
        return self.doubts


class Clock:
    now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(luasession.calls, "now_ns", clock)
    return clock


def resends_of(client: Client, clock: Clock, name: str = "commit") -> tuple[bytes, list[int]]:
    """Run a script; return the code that counted, and what each sending said of the time since the first."""
    calls = Calls(Config(), "test", Stats())
    calls._client = client  # type: ignore[assignment]
    told: list[int] = []

    def arguments(_age: int, resend: int) -> tuple[bytes, ...]:
        told.append(resend)
        return ()

    _, reply = calls.run(name, "handle", CALL, Caller(clock.now, 1000, Patience(1)), arguments)
    return reply[0], told


SLOW, QUICK = 60_000_000, 1_000_000


@pytest.mark.parametrize(
    ("first", "asked_again"),
    [((b"missing", SLOW), True), ((b"missing", QUICK), False), ((b"applied", SLOW), False)],
)
def test_a_slow_missing_is_asked_again(clock: Clock, first: tuple[bytes, int], asked_again: bool) -> None:
    """Only what says slowly that there is no session is sent once more, marked as sent before; then it is believed."""
    client = Client(clock, first, (b"missing", SLOW))
    code, told = resends_of(client, clock)
    assert code == first[0]
    assert client.doubted == asked_again
    assert [resend > 0 for resend in told] == [False, True][: 1 + asked_again]


@pytest.mark.parametrize(("sendings", "asked_again"), [(2, False), (60, True)])
def test_what_is_quick_at_last_is_as_slow(clock: Clock, sendings: int, asked_again: bool) -> None:
    """It counts from the first sending: a server that hung until that one broke off answers the next at once."""
    client = Client(clock, (b"missing", QUICK), (b"missing", QUICK), sendings=sendings)
    resends_of(client, clock)
    assert client.doubted == asked_again


@pytest.mark.parametrize(("name", "asked_again"), [("load", True), ("commit", True), ("destroy", False)])
def test_where_there_is_no_other_server(clock: Clock, name: str, asked_again: bool) -> None:
    """A single server is asked once more where the age of the request counts, and believed where it does not."""
    client = Client(clock, (b"missing", SLOW), (b"missing", SLOW), doubts=False)
    code, told = resends_of(client, clock, name)
    assert code == b"missing"
    assert len(told) == 1 + asked_again


def test_what_was_sent_before_a_doubt_counts(clock: Clock) -> None:
    """The time since the first sending of all goes on over the doubt: what broke off then may have been applied."""
    client = Client(clock, (b"missing", SLOW), (b"applied", QUICK), sendings=2)
    code, told = resends_of(client, clock)
    assert code == b"applied"
    # In microseconds: two sendings a millisecond apart, and two more after the slow answer.
    assert told == [0, 1000, 62000, 63000]
