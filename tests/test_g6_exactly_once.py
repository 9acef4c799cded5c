"""G6: a commit that is sent again after a broken connection is applied once and answered as at first."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
import redis
from flask import session

import luasession.calls
import luasession.store
from luasession import SessionUnavailable
from luasession.delta import Delta, Put
from luasession.ids import SessionId, new_session_id
from luasession.outcome import Applied
from luasession.scripts import script
from luasession.snapshot import read_hash
from luasession.store import Store

from .conftest import Browser, MakeApp, TestApp
from .proxy import Proxy
from .servers import Server, eventually

#: More commits than the ring of a busy session can hold.
MORE_THAN_THE_RING = 260


def is_commit(words: list[bytes]) -> bool:
    """Match commits, by the script's SHA-1 or by its text."""
    commit = script("commit")
    return words[0] in (b"EVALSHA", b"EVAL") and words[1] in (commit.sha, commit.text)


def is_destroy(words: list[bytes]) -> bool:
    return words[0] == b"EVALSHA" and words[1] == script("destroy").sha


def store_of(app: TestApp) -> Store:
    store: Store = app.flask.session_interface._store
    return store


@dataclass
class Lossy:
    """An app behind a proxy, and the same sessions reached directly."""

    app: TestApp
    direct: TestApp
    proxy: Proxy

    def visitor(self, **values: Any) -> Browser:
        """Return a browser of the app behind the proxy, with a session that holds these values."""
        browser = self.app.browser()
        browser.run(lambda: session.update(values))
        return browser

    def foreign(self, handle: str, count: int) -> None:
        """Commit that often on another process's behalf, a new key each time."""
        store = store_of(self.direct)
        for _ in range(count):
            delta = Delta(sets={b"foreign" + uuid4().hex.encode(): Put(b"1")})
            caller = store.caller(time.monotonic_ns(), 3_600_000)
            assert isinstance(store.commit(SessionId.without_secret(handle), delta, caller), Applied)

    def version(self, handle: str) -> int:
        return read_hash(self.direct.stored(handle)).version


@pytest.fixture
def lossy(server: Server, proxy: Proxy, make_app: MakeApp) -> Lossy:
    app = make_app(SESSION_REDIS_URL=proxy.url, SESSION_REDIS_DEADLINE=20)
    return Lossy(app, app.another(SESSION_REDIS_URL=server.url), proxy)


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


def own(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what foreign commits have set."""
    return {key: value for key, value in values.items() if not key.startswith("foreign")}


def blind_set() -> None:
    session["new"] = 2


def read_and_set() -> None:
    session["n"] += 1


def delete() -> None:
    del session["drop"]


def clear_and_set() -> None:
    session.clear()
    session["after"] = 1


def rotate() -> None:
    session.regenerate()


def rotate_and_set() -> None:
    session["new"] = 2
    session.regenerate(in_flight=False)


START = {"n": 1, "drop": "x"}
UPDATES = {
    "blind set": (blind_set, {**START, "new": 2}),
    "read and set": (read_and_set, {**START, "n": 2}),
    "delete": (delete, {"n": 1}),
    "clear": (clear_and_set, {"after": 1}),
    "rotate": (rotate, START),
    "rotate and set": (rotate_and_set, {**START, "new": 2}),
}


@pytest.mark.parametrize("others", [0, 1, 40])
@pytest.mark.parametrize("update", UPDATES)
def test_a_commit_whose_reply_is_lost_is_applied_once(lossy: Lossy, update: str, others: int) -> None:
    """A commit whose reply is lost is applied once and answered right, foreign commits in between or not."""
    view, expected = UPDATES[update]
    browser = lossy.visitor(**START)
    handle, before = handle_of(browser), browser.cookies["session"]
    rule = lossy.proxy.drop_reply(is_commit, before_drop=lambda: lossy.foreign(handle, others))
    browser.run(view)
    assert rule.done == 1
    assert lossy.version(handle) == 2 + others
    assert browser.cookies["session_v"] == "2"
    assert (browser.cookies["session"] != before) == update.startswith("rotate")
    # The process that sent it twice, and one that knows nothing of that, see the same.
    for reader in (browser.twin(), browser.twin(lossy.direct)):
        seen = reader.run(lambda: dict(session))
        assert own(seen) == expected
        assert len(seen) == len(expected) + others
    assert lossy.app.stats()["commits"] == 2


@pytest.mark.parametrize("update", UPDATES)
def test_past_the_ring_nobody_can_tell(lossy: Lossy, update: str) -> None:
    """With more commits in between than the ring holds the answer is 503, and it was applied once all the same."""
    view, expected = UPDATES[update]
    browser = lossy.visitor(**START)
    handle = handle_of(browser)
    lossy.proxy.drop_reply(is_commit, before_drop=lambda: lossy.foreign(handle, MORE_THAN_THE_RING))
    browser.run(view, status=503)
    assert browser.response is not None
    assert "Retry-After" in browser.response.headers
    assert browser.set_cookies == {}
    assert lossy.version(handle) == 2 + MORE_THAN_THE_RING
    found = lossy.direct.stored(handle)
    fields = read_hash(found).fields
    assert {name.decode() for name in fields if not name.startswith(b"foreign")} == expected.keys()


@pytest.mark.parametrize("others", [0, 1, 40])
def test_a_creation_whose_reply_is_lost_makes_one_session(lossy: Lossy, others: int) -> None:
    """A new session whose reply is lost is there once, with the id that the browser gets."""

    def meanwhile() -> None:
        (key,) = lossy.direct.keys()
        lossy.foreign(key.decode().removeprefix(lossy.direct.prefix), others)

    browser = lossy.app.browser()
    rule = lossy.proxy.drop_reply(is_commit, before_drop=meanwhile)
    browser.run(lambda: session.update(START))
    assert rule.done == 1
    assert lossy.direct.keys() == [(lossy.direct.prefix + handle_of(browser)).encode()]
    assert browser.cookies["session_v"] == "1"
    assert lossy.version(handle_of(browser)) == 1 + others
    for reader in (browser.twin(), browser.twin(lossy.direct)):
        assert own(reader.run(lambda: dict(session))) == START


def test_a_log_out_whose_reply_is_lost_is_a_log_out(lossy: Lossy) -> None:
    """A destroy whose reply is lost is sent again, deletes the cookie, and leaves a tombstone."""
    browser = lossy.visitor(**START)
    handle, twin = handle_of(browser), browser.twin(lossy.direct)
    rule = lossy.proxy.drop_reply(is_destroy)
    browser.run(lambda: session.destroy())
    assert rule.done == 1
    assert browser.cookies == {}
    assert lossy.direct.stored(handle).keys() == {b"@t"}
    assert twin.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("change", ["permanent", "lifetime"])
def test_the_answer_to_a_resend_still_renews_the_cookie(lossy: Lossy, change: str) -> None:
    """A change of permanence or lifetime whose reply is lost still reaches the browser's cookie."""
    browser = lossy.visitor(**START)
    browser.run(lambda: setattr(session, "permanent", change == "lifetime"))
    lossy.proxy.drop_reply(is_commit)
    browser.run(lambda: setattr(session, change, 1000))
    assert "Expires=" in browser.set_cookies["session"]


@pytest.mark.parametrize("update", UPDATES)
def test_a_commit_cut_off_on_its_way_is_applied(lossy: Lossy, update: str) -> None:
    """A commit that never reached the server is sent again and applied once."""
    view, expected = UPDATES[update]
    browser = lossy.visitor(**START)
    rule = lossy.proxy.cut_request(is_commit, times=2)
    browser.run(view)
    assert rule.done == 2
    assert lossy.version(handle_of(browser)) == 2
    assert browser.run(lambda: dict(session)) == expected


@pytest.mark.parametrize("nbytes", [0, 1, 4, 12, 30, 100])
def test_a_truncated_reply_is_no_reply(lossy: Lossy, nbytes: int) -> None:
    """A reply that ends anywhere in its middle is taken for none, and the commit is answered right."""
    browser = lossy.visitor(**START)
    rule = lossy.proxy.truncate_reply(nbytes, is_commit, times=3)
    browser.run(read_and_set)
    assert rule.done == 3
    assert lossy.version(handle_of(browser)) == 2
    assert browser.run(lambda: dict(session)) == {**START, "n": 2}


def test_ten_lost_replies_in_a_row(lossy: Lossy) -> None:
    """However often the reply is lost within the deadline, the commit is applied once."""
    browser = lossy.visitor(**START)
    rule = lossy.proxy.drop_reply(is_commit, times=10)
    browser.run(read_and_set)
    assert rule.done == 10
    assert lossy.version(handle_of(browser)) == 2
    assert browser.run(lambda: dict(session)) == {**START, "n": 2}


def test_the_script_is_unknown_and_the_reply_to_its_text_is_lost(
    lossy: Lossy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that went as EVAL, since the server did not know the script, is applied once too."""
    browser = lossy.visitor(**START)
    # A script that no other test of the run has sent, so that nobody else's cache is flushed.
    original = luasession.calls.script
    changed = original("commit").text + b"\n-- " + uuid4().hex.encode()
    sha = uuid4().hex.encode() + b"00000000"
    monkeypatch.setattr(
        luasession.calls,
        "script",
        lambda name: original(name) if name != "commit" else luasession.scripts.Script(name, changed, sha),
    )
    rule = lossy.proxy.drop_reply(lambda words: words[0] == b"EVAL" and words[1] == changed)
    browser.run(read_and_set)
    assert rule.done == 1
    assert lossy.version(handle_of(browser)) == 2
    assert browser.run(lambda: dict(session)) == {**START, "n": 2}


def test_when_the_deadline_ends_the_sending(lossy: Lossy) -> None:
    """A commit whose replies are all lost ends in 503 without a cookie, and was applied once."""
    app = lossy.app.another(SESSION_REDIS_DEADLINE=0.1)
    browser = lossy.visitor(**START).twin(app)
    rule = lossy.proxy.drop_reply(is_commit, times=None)
    browser.run(read_and_set, status=503)
    rule.stop()
    assert rule.done > 1
    assert browser.set_cookies == {}
    assert lossy.version(handle_of(browser)) == 2
    assert browser.run(lambda: dict(session)) == {**START, "n": 2}


def test_an_explicit_commit_and_an_atomic_update(lossy: Lossy) -> None:
    """``commit()`` and ``atomic_update()`` inside a view are applied once too, each of them."""
    browser = lossy.visitor(**START)
    rule = lossy.proxy.drop_reply(is_commit, times=3)

    def view() -> None:
        session["n"] += 1
        session.commit()
        session.atomic_update("n", lambda n: n + 10)
        session["n"] += 100

    browser.run(view)
    assert rule.done == 3
    assert lossy.version(handle_of(browser)) == 4
    assert browser.run(lambda: session["n"]) == 112


def test_a_hung_server_runs_all_sendings(own_server: Server, own_proxy: Proxy) -> None:
    """A server that hangs gets a commit several times and then runs them all: one is applied."""
    app = TestApp(
        own_server,
        {"SESSION_REDIS_URL": own_proxy.url, "SESSION_REDIS_TIMEOUT": 0.05, "SESSION_REDIS_DEADLINE": 20},
    )
    browser = app.browser()
    browser.run(lambda: session.update(START))
    sendings: list[bytes] = []
    # Looks on and matches nothing.
    own_proxy.cut_request(lambda words: is_commit(words) and bool(sendings.append(words[4])))
    with own_server.counting() as commands, ThreadPoolExecutor(1) as pool:
        own_server.pause()
        try:
            request = pool.submit(browser.run, read_and_set)
            assert eventually(lambda: len(sendings) >= 4)
        finally:
            own_server.resume()
        request.result(20)
        assert len(set(sendings)) == 1
    assert commands.names.count("EVALSHA") >= 4
    assert read_hash(app.stored(handle_of(browser))).version == 2
    assert browser.run(lambda: dict(session)) == {**START, "n": 2}


@pytest.mark.parametrize("parts", [("drop",), ("drop", "cut", "truncate")])
def test_many_writers_over_a_bad_line(lossy: Lossy, parts: tuple[str, ...]) -> None:
    """Eight threads over a line that keeps breaking: each acknowledged write counts once and is there."""
    browser = lossy.visitor(n=0)
    chance = random.Random(6)
    if "drop" in parts:
        lossy.proxy.drop_every(5, is_commit, generator=chance)
    if "cut" in parts:
        lossy.proxy.cut_request(lambda words: is_commit(words) and chance.randrange(9) == 0, times=None)
    if "truncate" in parts:
        lossy.proxy.truncate_reply(9, lambda words: chance.randrange(9) == 0, times=None)

    def write(thread: int) -> None:
        mine = browser.twin()
        for i in range(15):
            mine.run(lambda: session.update({f"{thread}/{i}": i}))  # noqa: B023

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    lossy.proxy.clear()
    assert lossy.proxy.counts["dropped"] > 0
    assert lossy.version(handle_of(browser)) == 1 + 8 * 15
    assert lossy.app.stats()["commits"] == 1 + 8 * 15
    seen = browser.run(lambda: dict(session))
    assert seen == {"n": 0, **{f"{t}/{i}": i for t in range(8) for i in range(15)}}


def test_counters_over_a_bad_line(lossy: Lossy) -> None:
    """A counter that eight threads increment over a line that keeps breaking ends exact."""
    browser = lossy.visitor(n=0)
    lossy.proxy.drop_every(4, is_commit, generator=random.Random(66))

    def write(_thread: int) -> None:
        mine = browser.twin()
        for _ in range(6):
            mine.run(lambda: session.atomic_update("n", lambda n: n + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    lossy.proxy.clear()
    assert lossy.proxy.counts["dropped"] > 0
    assert browser.run(lambda: session["n"]) == 48


# The store and the script, called twice with one write id.


def version_of(reply: list[Any]) -> int:
    """The version that a commit made, from its reply."""
    version: int = reply[3]
    return version


@dataclass
class Raw:
    """One session, and commit.lua called on it with arguments of the test's own."""

    client: redis.Redis
    key: str
    digest: bytes

    def commit(
        self, write_id: bytes, *, resend_us: int = 0, create: bool = False, **about: bytes
    ) -> list[Any]:
        """Commit blindly, a counter of one value so far unseen.

        :param resend_us: microseconds since the first sending.
        """
        name = uuid4().hex.encode()
        packed = bytes(7) + len(name).to_bytes(4) + name + b"\0\0\0\x011"
        # The age is that of a request which opened just before its first sending.
        flags = int(create) | int(about.get("clear", b"0")) << 1 | 4
        numbers = (resend_us + 1).to_bytes(7) + resend_us.to_bytes(7) + flags.to_bytes(1)
        numbers += b"".join(number.to_bytes(6) for number in (3_600_000, 0, 60_000, 60_000))
        arguments: list[Any] = [write_id, self.digest, numbers + (1 << 20).to_bytes(4)]
        arguments += [
            about.get("sets", packed),
            b"",
            b"",
            b"",
            b"",
            about.get("digest", b""),
            b"",
            b"",
            b"",
            b"",
        ]
        reply = self.client.eval(script("commit").text, 1, self.key, *arguments)
        assert reply[1] == write_id
        return reply

    @property
    def version(self) -> int:
        return read_hash(self.client.hgetall(self.key)).version

    def pass_time(self, us: int) -> None:
        """Have all that was done to the session happen so much earlier."""
        state, old = self.client.hmget(self.key, "@v", "@r")
        committed = int.from_bytes(state[12:19]) - us
        self.client.hset(self.key, "@v", state[:12] + committed.to_bytes(7) + state[19:])
        if old:
            floors = [max(int.from_bytes(old[at : at + 7]) - us, 0) for at in (0, 7)]
            self.client.hset(self.key, "@r", b"".join(floor.to_bytes(7) for floor in floors) + old[14:])


@pytest.fixture
def raw(server: Server) -> Iterator[Raw]:
    with server.client() as client:
        raw = Raw(client, f"t{uuid4().hex[:8]}:raw", b"d" * 32)
        assert raw.commit(b"creation", create=True)[0] == b"applied"
        yield raw


@pytest.mark.parametrize("order", [(0, 5000), (5000, 0), (0, 0), (5000, 7000)])
@pytest.mark.parametrize("about", [{}, {"clear": b"1"}, {"digest": b"e" * 32}])
def test_one_write_id_twice_in_any_order(raw: Raw, order: tuple[int, int], about: dict[str, bytes]) -> None:
    """Of two sendings of one commit the server applies the one it runs first, and answers both alike."""
    first = raw.commit(b"write-id", resend_us=order[0], **about)
    stored = raw.client.hgetall(raw.key)
    second = raw.commit(b"write-id", resend_us=order[1], **about)
    assert first[0] == second[0] == b"applied"
    assert raw.client.hgetall(raw.key) == stored
    # The pair it replaced; @i and @v.
    assert first[4][:12] == second[4][:12]
    assert first[5:7] == second[5:7]
    assert version_of(second) == raw.version == 2


@pytest.mark.parametrize("resend_us", [0, 5000])
def test_one_creation_twice(raw: Raw, resend_us: int) -> None:
    """Of two sendings of one creation the second is answered as the first and changes nothing."""
    second = raw.commit(b"creation", resend_us=resend_us, create=True)
    assert second[0] == b"applied"
    assert version_of(second) == raw.version == 1


def test_a_session_of_one_commit_keeps_no_ring(raw: Raw) -> None:
    """Ring and journal are kept from the second commit on, and the creation is found in them as well."""
    assert raw.client.hgetall(raw.key).keys().isdisjoint({b"@r", b"@j"})
    created = raw.commit(b"creation", resend_us=5000, create=True)
    assert created[0] == b"applied"
    for number in range(2, 8):
        assert version_of(raw.commit(b"number-%d" % number)) == number
    assert raw.client.hgetall(raw.key).keys() >= {b"@r", b"@j"}
    stored = raw.client.hgetall(raw.key)
    again = raw.commit(b"creation", resend_us=5000, create=True)
    assert (again[0], version_of(again), again[4]) == (b"applied", version_of(created), bytes(12))
    assert raw.client.hgetall(raw.key) == stored


@pytest.mark.parametrize("field", [b"@r", b"@j"])
def test_a_session_that_has_lost_its_ring(raw: Raw, field: bytes) -> None:
    """After a second commit a session without ring or journal is not one: nothing is guessed."""
    raw.commit(b"number-2")
    raw.client.hdel(raw.key, field)
    stored = raw.client.hgetall(raw.key)
    assert raw.commit(b"number-3")[0] == b"corrupt"
    assert raw.client.hgetall(raw.key) == stored


def test_the_store_called_twice_with_one_write_id(app: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store gives the same result for the same write id, and the session counts one commit."""
    store, session_id = store_of(app), new_session_id(32)
    caller = store.caller(time.monotonic_ns(), 3_600_000)
    store.commit(session_id, Delta(sets={b"n": Put(b"1")}), caller, create=True)
    monkeypatch.setattr(luasession.store, "new_write_id", lambda: b"write-id")
    results = [store.commit(session_id, Delta(sets={b"n": Put(b"2")}), caller) for _ in range(2)]
    assert [(result.version, result.write_id) for result in results if isinstance(result, Applied)] == [
        (2, b"write-id")
    ] * 2
    assert results[0].replaced == results[1].replaced  # type: ignore[union-attr]


def test_write_ids_differ(app: TestApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commits of one request have write ids of their own, and both count."""
    made: list[bytes] = []
    original = luasession.store.new_write_id
    monkeypatch.setattr(luasession.store, "new_write_id", lambda: made.append(original()) or made[-1])
    browser = app.browser()

    def view() -> None:
        session["n"] = 1
        session.commit()
        session["n"] = 2

    browser.run(view)
    assert len(set(made)) == len(made) == 2
    assert all(len(write_id) == 8 for write_id in made)
    assert read_hash(app.stored(handle_of(browser))).version == 2


def test_at_every_depth_of_the_ring(raw: Raw) -> None:
    """After any number of later commits a resend is answered applied, with its own version, or unknown."""
    raw.commit(b"write-id")
    began = time.monotonic_ns()
    codes = []
    for later in range(MORE_THAN_THE_RING):
        reply = raw.commit(b"write-id", resend_us=(time.monotonic_ns() - began) // 1000 + 100_000)
        codes.append(reply[0])
        assert raw.version == 2 + later
        if reply[0] == b"applied":
            assert version_of(reply) == 2
        raw.commit(f"{later:8}".encode())
    # It holds at least 50 in a busy session, and once it has let go it does not find it again.
    depth = codes.index(b"unknown")
    assert depth >= 50
    assert codes == [b"applied"] * depth + [b"unknown"] * (MORE_THAN_THE_RING - depth)


@pytest.mark.parametrize("seed", range(6))
def test_resends_in_busy_and_quiet_times(raw: Raw, seed: int) -> None:
    """With bursts and pauses in any order a resend is never applied again: applied as at first, or unknown."""
    chance = random.Random(seed)
    # Moments, in microseconds of a clock that the test moves on, at which commits were first sent.
    sent: dict[bytes, tuple[int, int]] = {}
    moved = 0
    began = time.monotonic_ns()

    def now() -> int:
        return moved + (time.monotonic_ns() - began) // 1000

    seen = {b"applied": 0, b"unknown": 0}
    for step in range(150):
        if chance.random() < 0.2:
            pause = chance.choice([1_000_000, 6_000_000])
            raw.pass_time(pause)
            moved += pause
        write_id = f"{step:8}".encode()
        first = now()
        reply = raw.commit(write_id)
        assert reply[0] == b"applied"
        sent[write_id] = (first, version_of(reply))
        for resent in chance.choices(list(sent), k=2):
            first, version = sent[resent]
            before = raw.version
            reply = raw.commit(resent, resend_us=now() - first + 1)
            seen[reply[0]] += 1
            assert raw.version == before
            if reply[0] == b"applied":
                assert version_of(reply) == version
    assert min(seen.values()) > 10


def test_a_new_commit_is_never_unknown(raw: Raw) -> None:
    """A first sending is applied however many commits lie behind, and so is a resend from after the floor."""
    for n in range(MORE_THAN_THE_RING):
        assert raw.commit(f"{n:8}".encode())[0] == b"applied"
    assert raw.commit(b"first---")[0] == b"applied"
    raw.pass_time(1_000_000)
    assert raw.commit(b"resend--", resend_us=1)[0] == b"applied"
    assert raw.version == MORE_THAN_THE_RING + 3


def test_unknown_says_so(lossy: Lossy) -> None:
    """The error tells in its reason, for the log, that the commit may have been applied."""
    browser = lossy.visitor(**START)
    handle = handle_of(browser)
    lossy.proxy.drop_reply(is_commit, before_drop=lambda: lossy.foreign(handle, MORE_THAN_THE_RING))
    found: list[str] = []

    def view() -> None:
        session["n"] = 5
        try:
            session.commit()
        except SessionUnavailable as error:
            found.append(error.reason)
            raise

    browser.run(view, status=503)
    assert found == ["whether the commit was applied is no longer known"]
