"""Fuzz: whatever a browser sends and whatever stands in Redis, a clear error or an empty session, and no loss.

``LUASESSION_FUZZ_EXAMPLES=20000 pytest -s tests/test_fuzz.py`` runs longer, and prints what came of it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from flask import session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luasession import CorruptSession, SessionGone, SessionTooLarge, SessionUnavailable
from luasession.codec import make_serializer
from luasession.ids import parse_session_id

from .conftest import Browser, TestApp
from .servers import Server, standalone

EXAMPLES = int(os.environ.get("LUASESSION_FUZZ_EXAMPLES", "0"))
SERIALIZERS = ["json", "msgpack"]
#: A lifetime in milliseconds that may pass while a test on a busy machine looks what is left.
BRIEF_MS = 10_000
FOREIGN = "what belongs to somebody else"
COUNTS: dict[str, Counter[str]] = {}


def fuzzing(examples: int) -> Any:
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )


def count(test: str, outcome: str) -> None:
    COUNTS.setdefault(test, Counter())[outcome] += 1


class Target:
    """An app, a rich session in it, and another user's session."""

    def __init__(self, server: Server, serializer: str, **config: Any) -> None:
        self.app = TestApp(
            server,
            {
                "SESSION_KEY_PREFIX": f"t{uuid4().hex[:8]}:",
                "SESSION_SERIALIZER": serializer,
                "SESSION_REDIS_DEADLINE": 0.05,
                "SESSION_MAX_BYTES": 1 << 20,
                **config,
            },
        )
        self.errors: list[BaseException] = []
        self.app.flask.register_error_handler(500, self._answer)
        self.app.flask.register_error_handler(SessionUnavailable, self._unavailable)
        self.browser = self.app.browser()
        self.browser.run(self._start)
        self.browser.run(lambda: session.regenerate())
        self.browser.run(lambda: session.update(more=1))
        self.other = self.app.browser()
        self.other.run(lambda: session.update(mine=FOREIGN))
        self.handle, _, self.secret = self.browser.cookies["session"].partition(".")
        self.key = self.app.prefix + self.handle
        self.client = server.client()
        self.whole = self.client.hgetall(self.key)
        self.foreign = self.client.hgetall(self.app.prefix + self.other.cookies["session"].partition(".")[0])

    @staticmethod
    def _start() -> None:
        session.clear()
        session.update(a=1, b={"x": [1, 2, (3,)]}, c="text", n=2.5)
        session.set("token", "t", ttl=3600)
        session.principal, session.label, session.lifetime = "ada", "phone", 5000

    def _answer(self, error: Any) -> tuple[str, int]:
        original = error.original_exception or error
        self.errors.append(original)
        return f"{type(original).__name__}: {original}", 500

    def _unavailable(self, error: SessionUnavailable) -> tuple[str, int]:
        self.errors.append(error)
        return str(error), 503

    def put(self, fields: dict[bytes, bytes]) -> None:
        """Store a hash in the place of the session's."""
        self.client.delete(self.key)
        if fields:
            self.client.hset(self.key, mapping=fields)  # type: ignore[arg-type]
            self.client.pexpire(self.key, 60_000)

    def stored(self) -> dict[bytes, bytes]:
        return self.client.hgetall(self.key)

    def run(self, view: Callable[[], Any]) -> tuple[int, Any, Browser]:
        """Run a view with the session's cookie and no others; tell the status, what it saw, and the browser."""
        browser = self.app.browser()
        browser.client.set_cookie("session", f"{self.handle}.{self.secret}")
        token = uuid4().hex
        self.app.views[token] = view
        self.errors.clear()
        browser.response = browser.client.get("/run", headers={"X-Token": token})
        return browser.response.status_code, self.app.results.pop(token, None), browser

    def same_elsewhere(self) -> None:
        """Nobody else's session has changed, and its cookie opens it."""
        handle = self.other.cookies["session"].partition(".")[0]
        assert self.client.hgetall(self.app.prefix + handle) == self.foreign


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with standalone("valkey-9.1") as server:
        yield server


@pytest.fixture(scope="module", params=[*SERIALIZERS, "encrypted"])
def target(request: pytest.FixtureRequest, server: Server) -> Target:
    if request.param != "encrypted":
        return Target(server, request.param, SESSION_CACHE_TTL=None)
    target = Target(
        server, "json", SESSION_CACHE_TTL=None, SESSION_ENCRYPTION_KEYS="k" * 32, SESSION_RENEW_AFTER=3600
    )
    # A renewal is under way, too: a digest that was offered, and when.
    target.whole[b"@n"] = bytes(range(32)) + (time.time_ns() // 1_000_000).to_bytes(6)
    return target


# -- cookies ------------------------------------------------------------------------------------------


def near(sid: str) -> st.SearchStrategy[str]:
    """Strings that are nearly this one."""
    places = st.integers(0, len(sid) - 1)
    letters = st.characters(codec="latin-1", exclude_characters="\r\n")
    return st.one_of(
        st.builds(lambda at, letter: sid[:at] + letter + sid[at + 1 :], places, letters),
        st.builds(lambda at, letter: sid[:at] + letter + sid[at:], places, letters),
        st.builds(lambda at: sid[:at] + sid[at + 1 :], places),
        st.builds(lambda at: sid[at:] + sid[:at], places),
        st.just(sid.swapcase()),
    )


@fuzzing(200)
@given(data=st.data())
def test_cookies(target: Target, data: st.DataObject) -> None:
    """Cookie headers of any bytes, and ids that are nearly right: nothing read, written or set; 200."""
    target.put(target.whole)
    sid = f"{target.handle}.{target.secret}"
    any_text = st.text(st.characters(codec="latin-1", exclude_characters="\r\n"), max_size=200)
    value = data.draw(st.one_of(near(sid), any_text))
    tail = data.draw(
        st.sampled_from(["", "; session_v=99999999999999", "; session_v=\xb2", "; session_o=1", ";;="])
    )
    browser = target.app.browser_with_header("")
    browser.client.environ_base["HTTP_COOKIE"] = f"session={value}{tail}"
    seen = browser.run(lambda: dict(session))
    sent = parse_session_id(value.partition(";")[0].strip(), 32)
    own = sent is not None and sent.sid == sid
    assert (seen != {}) is own
    assert target.stored() == target.whole or own
    if not own:
        assert browser.set_cookies == {}
    count("cookies", "its own id" if own else "well formed" if sent else "malformed")


# -- what is stored -----------------------------------------------------------------------------------


def spoil(data: st.DataObject, value: bytes) -> bytes | None:
    how = data.draw(st.sampled_from(["cut", "longer", "flip", "other", "number", "empty", "gone"]))
    if how == "gone":
        return None
    if how == "cut":
        return value[: data.draw(st.integers(0, max(len(value) - 1, 0)))]
    if how == "longer":
        return value + data.draw(st.binary(min_size=1, max_size=20))
    if how == "flip" and value:
        at = data.draw(st.integers(0, len(value) * 8 - 1))
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        return bytes(flipped)
    if how == "other":
        return data.draw(st.binary(max_size=60))
    if how == "number":
        return str(data.draw(st.integers())).encode()
    return b""


def see() -> Any:
    return dict(session), session.principal, session.label, session.lifetime, session.version


def write() -> None:
    session["new"] = 1


def write_on() -> Any:
    seen = dict(session)
    session["new"] = 1
    return seen


def update() -> Any:
    return session.atomic_update("new", lambda n: 1, 0)


def rotate() -> None:
    session["new"] = 1
    session.regenerate()


VIEWS = [see, write, write_on, update, rotate]
ERRORS = (CorruptSession, SessionUnavailable, SessionGone, SessionTooLarge)


def users(fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {name: value for name, value in fields.items() if not name.startswith(b"@")}


@fuzzing(600)
@given(data=st.data())
def test_stored_hashes(target: Target, data: st.DataObject) -> None:
    """A hash of which any field is spoilt: words, or a session without it; no field that was not written is lost."""
    names = data.draw(
        st.lists(st.sampled_from(sorted(target.whole)), min_size=1, max_size=2, unique=True), label="fields"
    )
    fields = dict(target.whole)
    for name in names:
        spoilt = spoil(data, fields.pop(name))
        if spoilt is not None:
            fields[name] = spoilt
    target.put(fields)
    view = data.draw(st.sampled_from(VIEWS))
    status, seen, browser = target.run(view)
    assert status in (200, 413, 500, 503), target.errors
    assert FOREIGN not in repr(seen)
    left = target.stored()
    # Cut to a digit or two a lifetime is one of milliseconds, which may be over by now.
    lifetime = fields.get(b"@e", b"")
    over = left == {} and lifetime.isdigit() and int(lifetime) < BRIEF_MS
    if status != 200:
        # A spoilt count of bytes can make it too large; an answer in words, too.
        error = target.errors[0] if status != 413 else SessionTooLarge(0, 0)
        assert isinstance(error, ERRORS), repr(error)
        assert str(error), "no words"
        assert browser.set_cookies == {}
        # A read that came before it may have refreshed the TTL, whose moments are in @v.
        assert over or {**left, b"@v": b""} == {**fields, b"@v": b""}
        count("stored", f"{status} {type(error).__name__}")
        return
    # An end of its own may lie in the past, by a flipped bit: then the session, or the key, has ended.
    ended = over or (left == {} and {b"@i", b"@v"} & set(names))
    if not ended:
        expected = users(fields)
        for gone in (expected, left):
            gone.pop(b"new", None)
            gone.pop(b"token", None)
        assert users(left) == expected
    target.same_elsewhere()
    count("stored", "ended" if ended else "200")


@pytest.mark.parametrize("view", [see, write, write_on, rotate])
def test_a_newer_format_is_refused_with_words(target: Target, view: Callable[[], Any]) -> None:
    """A format number that this version does not know: CorruptSession, in words, and nothing is touched."""
    newer = {**target.whole, b"@i": b"\x02" + target.whole[b"@i"][1:]}
    target.put(newer)
    status, _, browser = target.run(view)
    assert status == 500
    assert isinstance(target.errors[0], CorruptSession)
    assert "format" in str(target.errors[0])
    assert target.stored() == newer
    assert browser.set_cookies == {}


@pytest.mark.usefixtures("nothing_is_small")
@pytest.mark.parametrize("lifetime", ["-5", "0", "x", "1e3", "", "9" * 15])
@pytest.mark.parametrize("view", [see, write])
def test_a_stored_lifetime_that_is_none(target: Target, view: Callable[[], Any], lifetime: str) -> None:
    """A lifetime that is no positive number is refused with words: below zero it would end the session."""
    spoilt = {**target.whole, b"@e": lifetime.encode()}
    target.put(spoilt)
    status, *_ = target.run(view)
    assert status == 500
    assert isinstance(target.errors[0], CorruptSession)
    assert target.stored() == spoilt
    # The same where only what changed is asked for.
    target.put(target.whole)
    asking = target.app.another(SESSION_CACHE_TTL=0)
    browser = asking.browser()
    browser.client.set_cookie("session", f"{target.handle}.{target.secret}")
    assert browser.run(lambda: session["a"]) == 1
    target.put(spoilt)
    browser.run(lambda: session["a"], status=500)
    assert target.stored() == spoilt


@pytest.mark.parametrize("kind", ["string", "list", "set", "zset", "stream"])
@pytest.mark.parametrize("view", [see, write, write_on, rotate, lambda: session.destroy()])
def test_a_key_of_another_type(target: Target, kind: str, view: Callable[[], Any]) -> None:
    """Something else than a hash under the key: 503 with the server's words, and it stays as it is."""
    client, key = target.client, target.key
    client.delete(key)
    make: dict[str, Callable[[], Any]] = {
        "string": lambda: client.set(key, "x"),
        "list": lambda: client.rpush(key, "x"),
        "set": lambda: client.sadd(key, "x"),
        "zset": lambda: client.zadd(key, {"x": 1}),
        "stream": lambda: client.xadd(key, {"x": "1"}),
    }
    make[kind]()
    before = client.dump(key)
    status, _, browser = target.run(view)
    assert status == 503
    assert "wrong kind" in str(target.errors[0]).lower() or "WRONGTYPE" in str(target.errors[0])
    assert client.dump(key) == before
    assert browser.set_cookies == {}
    client.delete(key)


# -- values -------------------------------------------------------------------------------------------


def bombs(serializer: str) -> dict[str, bytes]:
    deep = 1000
    if serializer == "json":
        return {
            "deep list": b"[" * deep + b"]" * deep,
            "deep dict": b'{"a":' * deep + b"1" + b"}" * deep,
            "deep tag": b'{" t":[' * deep + b"]}" * deep,
            "very deep": b"[" * 100_000 + b"]" * 100_000,
            "open": b"[" * 100_000,
            "long int": b"9" * 5000,
            "longest int": b"1" * 1_000_000,
            "long negative": b"-" + b"9" * 5000,
            "huge exponent": b"1e999999999",
            "small exponent": b"1e-999999999",
            "long decimal": b'{" n":"1e999999999"}',
            "decimal, quiet": b'{" n":"sNaN"}',
            "duplicate keys": b'{"a":1,"a":2}',
            "duplicate tags": b'{" t":[1]," t":[2]}',
            "nan": b"NaN",
            "infinity": b"-Infinity",
            "long hex": b'{" i":"' + b"f" * 100_000 + b'"}',
            "delta": b'{" td":[1e400,0,0]}',
            "delta, long": b'{" td":[' + b"9" * 4000 + b",0,0]}",
            "no set": b'{" s":[[1]]}',
            "date": b'{" d":"' + b"9" * 10_000 + b'"}',
            "surrogate": b'"\\ud800"',
            "bom": b'\xef\xbb\xbf"a"',
            "nul": b'"a"\x00',
            "empty": b"",
        }
    encode = msgspec.msgpack.encode
    return {
        "deep list": b"\x91" * deep + b"\xc0",
        "deep dict": b"\x81\xa1a" * deep + b"\xc0",
        "deep tag": b"\x81\xa2 t\x91" * deep + b"\xc0",
        "very deep": b"\x91" * 100_000 + b"\xc0",
        "claims a list of 4 billion": b"\xdd\xff\xff\xff\xff",
        "claims a map of 4 billion": b"\xdf\xff\xff\xff\xff",
        "claims text of 4 GB": b"\xdb\xff\xff\xff\xff",
        "extension": b"\xd4\x05a",
        "timestamp": b"\xd6\xff\x00\x00\x00\x00",
        "map with a list as a key": b"\x81\x91\x01\x01",
        "duplicate keys": b"\x82\xa1a\x01\xa1a\x02",
        "nan": encode(float("nan")),
        "long hex": encode({" i": "f" * 100_000}),
        "long decimal": encode({" n": "1e999999999"}),
        "delta": encode({" td": [1e300, 0, 0]}),
        "no set": encode({" s": [[1]]}),
        "cut": encode("x" * 100)[:50],
        "empty": b"",
    }


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_bombs(server: Server, serializer: str) -> None:
    """Values made to hurt: each reads as missing or as a value, within the request, and the others work."""
    target = Target(server, serializer, SESSION_CACHE_TTL=None)
    for name, bomb in bombs(serializer).items():
        with suppress(ValueError):  # and nothing else, RecursionError above all
            make_serializer(serializer).loads(bomb)
        fields = {**target.whole, b"bomb": bomb}
        target.put(fields)
        status, seen, _ = target.run(write_on)
        assert status == 200, (name, target.errors)
        assert seen["a"] == 1, name
        left = target.stored()
        assert left.pop(b"new")
        assert users(left) == users(fields), name
        # Given back in a view's hands it must do no harm either: it is shown, compared and deep-copied.
        status, *_ = target.run(lambda: session.get("bomb"))
        assert status == 200, (name, target.errors)


@fuzzing(600)
@given(data=st.data())
def test_values(target: Target, data: st.DataObject) -> None:
    """Bytes of any sort as a value: it reads as missing or as a value that can be stored again."""
    stored = st.sampled_from([value for name, value in target.whole.items() if not name.startswith(b"@")])
    bomb = st.sampled_from(
        sorted(bombs(str(target.app.flask.config["SESSION_SERIALIZER"])).values(), key=len)[:10]
    )
    raw = data.draw(st.one_of(st.binary(min_size=1, max_size=40), stored, bomb))
    raw = spoil(data, raw) or b"0"
    serializer = make_serializer(target.app.flask.config["SESSION_SERIALIZER"])
    try:
        value = serializer.loads(raw)
    except ValueError:
        count("values", "missing")
    else:
        try:
            again = serializer.loads(serializer.dumps(value))
        except ValueError:
            count("values", "a value nested too deeply to be stored again")
        else:
            assert repr(again) == repr(value)
            count("values", "a value")
    fields = {**target.whole, b"bomb": raw}
    target.put(fields)
    status, seen, _ = target.run(write_on)
    assert status == 200, target.errors
    assert seen["a"] == 1
    left = target.stored()
    left.pop(b"new")
    assert users(left) == users(fields)


def test_deep_values_are_refused_when_stored(target: Target) -> None:
    """A value nested a thousand deep is a ValueError that names the key, and nothing is stored."""
    target.put(target.whole)
    deep: Any = []
    for _ in range(1000):
        deep = [deep]

    def view() -> None:
        session["a"] = 2
        session["deep"] = deep

    status, *_ = target.run(view)
    assert status == 500
    assert isinstance(target.errors[0], ValueError)
    assert "session['deep']" in str(target.errors[0])
    assert "nested too deeply" in str(target.errors[0])
    assert target.stored() == target.whole


def test_the_counts() -> None:
    """So much was tried, and all outcomes were met; the table is shown with ``-s``."""
    print()
    for test, outcomes in COUNTS.items():
        for outcome, number in sorted(outcomes.items()):
            print(f"{number:8} {test}: {outcome}")
    assert json.dumps(COUNTS)
