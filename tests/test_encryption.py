"""Encryption at rest: values sealed one by one, bound to session and field, with keys that can be changed."""

from __future__ import annotations

import threading
from typing import Any
from uuid import uuid4

import pytest
from flask import session
from hypothesis import given
from hypothesis import strategies as st

from luasession import SessionConflict, merge, session_conflict, session_corrupt
from luasession.delta import Delta, Put
from luasession.vault import Vault

from .conftest import Browser, MakeApp, TestApp

KEY, OTHER = "k" * 32, b"another key, which is longer than 32 bytes"
HANDLE, HERS = "A" * 22, "B" * 22


@pytest.fixture
def app(make_app: MakeApp) -> TestApp:
    """An app that encrypts."""
    return make_app(SESSION_ENCRYPTION_KEYS=KEY)


def a_session(app: TestApp, **values: Any) -> tuple[Browser, str]:
    """Return a browser with a session, and its handle."""
    browser = app.browser()
    browser.run(lambda: session.update(values))
    return browser, browser.cookies["session"].partition(".")[0]


def put(app: TestApp, handle: str, **fields: bytes) -> None:
    """Write fields behind luasession's back."""
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, mapping=fields)


def read_of(browser: Browser, app: TestApp) -> dict[str, Any]:
    """Return what another process, with nothing cached, reads."""
    seen: dict[str, Any] = browser.twin(app.another()).run(lambda: dict(session))
    return seen


# -- the vault itself ---------------------------------------------------------


def sealed_in(vault: Vault, handle: str, name: bytes, value: bytes) -> bytes:
    return vault.seal(handle, Delta(sets={name: Put(value)})).sets[name].value


@given(value=st.binary(), name=st.binary(), handle=st.text("abc", min_size=1))
def test_what_is_sealed_opens(value: bytes, name: bytes, handle: str) -> None:
    """Any value opens again under its session and field, and does not show its bytes."""
    vault = Vault([KEY.encode()])
    sealed = sealed_in(vault, handle, name, value)
    assert vault.open(handle, name, sealed) == value
    assert len(value) < 4 or value not in sealed


@given(value=st.binary(max_size=40), place=st.integers(0), flip=st.integers(1, 255))
def test_a_changed_byte_does_not_open(value: bytes, place: int, flip: int) -> None:
    """Whatever single byte of it is changed, a value does not open any more."""
    vault = Vault([KEY.encode()])
    sealed = bytearray(sealed_in(vault, HANDLE, b"cart", value))
    sealed[place % len(sealed)] ^= flip
    with pytest.raises(ValueError, match="no key"):
        vault.open(HANDLE, b"cart", bytes(sealed))


@given(value=st.binary(max_size=60))
def test_what_was_never_sealed_does_not_open(value: bytes) -> None:
    """Bytes that no key has sealed do not pass for a value, short ones and none included."""
    with pytest.raises(ValueError, match="no key"):
        Vault([KEY.encode()]).open(HANDLE, b"cart", value)


def test_a_value_opens_in_its_own_place_only() -> None:
    """Moved to another session or another field, a value does not open."""
    vault = Vault([KEY.encode()])
    sealed = sealed_in(vault, HANDLE, b"cart", b"[]")
    for handle, name in ((HERS, b"cart"), (HANDLE, b"care"), (HANDLE, b""), (HANDLE + "c", b"art")):
        with pytest.raises(ValueError, match="no key"):
            vault.open(handle, name, sealed)


def test_the_same_value_is_sealed_differently_each_time() -> None:
    """Equal values cannot be told by their stored bytes: each has a nonce of its own."""
    vault = Vault([KEY.encode()])
    assert len({sealed_in(vault, HANDLE, b"cart", b"[]") for _ in range(500)}) == 500


def test_the_newest_key_seals_and_each_opens() -> None:
    """Keys are changed by adding one in front; the old one can go when nothing is left under it."""
    old, both, new = Vault([OTHER]), Vault([KEY.encode(), OTHER]), Vault([KEY.encode()])
    before = sealed_in(old, HANDLE, b"cart", b"[1]")
    assert both.open(HANDLE, b"cart", before) == b"[1]"
    after = sealed_in(both, HANDLE, b"cart", b"[2]")
    assert new.open(HANDLE, b"cart", after) == b"[2]"
    with pytest.raises(ValueError, match="no key"):
        new.open(HANDLE, b"cart", before)
    with pytest.raises(ValueError, match="no key"):
        old.open(HANDLE, b"cart", after)


def test_threads_share_a_vault() -> None:
    """Sealing and opening at once in many threads gives each its own value."""
    vault = Vault([KEY.encode()])
    gate = threading.Barrier(8)
    wrong: list[bytes] = []

    def work(number: int) -> None:
        gate.wait()
        for turn in range(300):
            value, handle = b"%d of %d" % (turn, number), f"session {turn % 7}"
            if vault.open(handle, b"n", sealed_in(vault, handle, b"n", value)) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# -- through a session ----------------------------------------------------------


def test_no_value_is_stored_in_the_clear(app: TestApp) -> None:
    """Neither a value nor a part of it is in Redis; names and metadata are, as the scripts need them."""
    browser, handle = a_session(app, word="open sesame", cart=["lamp", "carpet"])
    browser.run(lambda: session["cart"].append("ring"))
    stored = app.stored(handle)
    whole = b" ".join(stored) + b" ".join(stored.values())
    for text in (b"open sesame", b"lamp", b"carpet", b"ring"):
        assert text not in whole
    assert {b"word", b"cart"} <= set(stored)
    assert read_of(browser, app) == {"word": "open sesame", "cart": ["lamp", "carpet", "ring"]}


@pytest.mark.parametrize("ttl", [60.0, 0, None])
def test_unchanged_values_are_recognised(make_app: MakeApp, ttl: float | None) -> None:
    """What is set to the value that was read, or only looked at, is no change: nothing is sealed anew."""
    app = make_app(SESSION_ENCRYPTION_KEYS=KEY, SESSION_CACHE_TTL=ttl)
    browser, handle = a_session(app, word="w", cart=[1], tags={1, 2})
    before = app.stored(handle)

    def touch() -> None:
        session["word"] = session["word"]
        session["cart"].append(2)
        session["cart"].pop()
        session["tags"] = set(session["tags"])

    browser.run(touch)
    assert app.stored(handle) == before


def test_a_value_moved_within_a_session_reads_as_missing(app: TestApp) -> None:
    """Copied to another field, a value is like one that does not decode: told, missing, left as it is."""
    browser, handle = a_session(app, role="user", wish="admin")
    wish = app.stored(handle)[b"wish"]
    put(app, handle, role=wish)
    told: list[str] = []

    def note(_app: Any, key: str, **_: Any) -> None:
        told.append(key)

    with session_corrupt.connected_to(note):
        assert read_of(browser, app) == {"wish": "admin"}
    assert told == ["role"]
    assert app.stored(handle)[b"role"] == wish


def test_a_value_moved_to_another_session_reads_as_missing(app: TestApp) -> None:
    """Copied from somebody else's session, a value does not open."""
    _, hers = a_session(app, role="admin")
    browser, his = a_session(app, role="user", other=1)
    put(app, his, role=app.stored(hers)[b"role"])
    assert read_of(browser, app) == {"other": 1}


def test_a_value_in_the_clear_is_not_believed(app: TestApp) -> None:
    """Who can write to Redis and has no key cannot put in a value of his own."""
    browser, handle = a_session(app, role="user", other=1)
    put(app, handle, role=b'"admin"')
    assert read_of(browser, app) == {"other": 1}


def test_keys_are_changed_in_use(app: TestApp) -> None:
    """With a new key in front, old values read and new ones are under it; at the end the old key can go."""
    browser, _ = a_session(app, old=1, kept=[2])
    between = app.another(SESSION_ENCRYPTION_KEYS=[OTHER, KEY])
    twin = browser.twin(between)
    twin.run(lambda: session.update(old=3, kept=[*session["kept"], 4]))
    after = app.another(SESSION_ENCRYPTION_KEYS=OTHER)
    assert browser.twin(after).run(lambda: dict(session)) == {"old": 3, "kept": [2, 4]}
    assert browser.twin(app.another()).run(lambda: dict(session)) == {}


def test_merging_works(make_app: MakeApp) -> None:
    """A merge sees values, and what it makes is sealed; the signal tells values, too."""
    app = make_app(SESSION_ENCRYPTION_KEYS=KEY, SESSION_MERGE={"hits": merge.add})
    browser, _ = a_session(app, hits=1, cart=["a"])
    told: list[tuple[Any, ...]] = []

    def note(_app: Any, key: str, base: Any, theirs: Any, ours: Any, outcome: Any, **_: Any) -> None:
        told.append((key, base, theirs, ours, outcome))

    def outer() -> None:
        session["hits"] += 1
        session["cart"].append("b")
        browser.twin(app).run(lambda: (session.update(hits=session["hits"] + 5), session["cart"].append("c")))

    with session_conflict.connected_to(note):
        browser.run(outer)
    assert sorted(told) == [("cart", ["a"], ["a", "c"], ["a", "b"], ["a", "b"]), ("hits", 1, 6, 2, 7)]
    assert read_of(browser, app) == {"hits": 7, "cart": ["a", "b"]}


def test_set_to_the_same_by_both_is_no_conflict(make_app: MakeApp) -> None:
    """Somebody else's equal value, sealed differently, is not told as a conflict."""
    app = make_app(SESSION_ENCRYPTION_KEYS=KEY)
    browser, _ = a_session(app, word="old")
    told: list[str] = []

    def note(_app: Any, key: str, **_: Any) -> None:
        told.append(key)

    def outer() -> None:
        session["word"] = session["word"] + "er"
        browser.twin(app).run(lambda: session.update(word="old"))

    with session_conflict.connected_to(note):
        browser.run(outer)
    assert told == []


def test_raise_and_atomic_update(make_app: MakeApp) -> None:
    """The other policies go by values as well."""
    app = make_app(SESSION_ENCRYPTION_KEYS=KEY, SESSION_CONFLICT="raise")
    browser, _ = a_session(app, word="a", n=1)

    def outer() -> int:
        word = session["word"]
        browser.twin(app).run(lambda: session.update(word="theirs", n=10))
        total: int = session.atomic_update("n", lambda n: n + 1)
        session["word"] = word + "b"
        with pytest.raises(SessionConflict):
            session.commit()
        session.reload()
        return total

    assert browser.run(outer) == 11
    assert read_of(browser, app) == {"word": "theirs", "n": 11}


def test_a_second_click_takes_its_values_along(app: TestApp) -> None:
    """The session of its own that the second click of a double log-in gets is sealed for its new handle."""
    browser, handle = a_session(app, cart=["lamp"])
    second = browser.twin(app)

    def outer() -> None:
        assert session["cart"] == ["lamp"]
        browser.run(lambda: (session.regenerate(), session.update(user="first")))
        session["user"] = "second"
        session.regenerate()

    second.run(outer)
    assert second.cookies["session"].partition(".")[0] != handle
    assert read_of(second, app) == {"cart": ["lamp"], "user": "second"}
    assert second.run(lambda: session.version) == 1
    assert read_of(browser, app) == {"cart": ["lamp"], "user": "first"}


def test_set_again_after_a_commit(app: TestApp) -> None:
    """What a commit on top of somebody else's has stored is known to be stored."""
    browser, _ = a_session(app, n=1)

    def outer() -> None:
        assert "word" not in session
        browser.twin(app).run(lambda: session.update(other=1))
        session["word"] = "w"
        session.commit()
        session["word"] = "w"

    browser.run(outer)
    assert browser.twin(app).run(lambda: session.version) == 3


def test_edit_from_outside_of_a_request(app: TestApp) -> None:
    """``edit`` opens and seals like a request."""
    browser, handle = a_session(app, n=1)
    with app.flask.extensions["luasession"].edit(handle) as edited:
        edited["n"] += 1
    assert read_of(browser, app) == {"n": 2}


def test_no_key_is_shown(app: TestApp) -> None:
    """Neither the configuration nor what seals shows a key when it is printed."""
    store = app.flask.session_interface.store  # type: ignore[attr-defined]
    shown = f"{store!r} {store._config!r} {store.vault!r} {vars(store)}"
    assert KEY not in shown


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, make_app: MakeApp) -> None:
    """Where cryptography is not installed, the error says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "cryptography.exceptions", None)
    with pytest.raises(ImportError, match=r"pip install 'luasession\[crypto\]'"):
        make_app(SESSION_ENCRYPTION_KEYS=KEY, SESSION_KEY_PREFIX=f"t{uuid4().hex[:8]}:")


def test_too_large_once_sealed(make_app: MakeApp) -> None:
    """What sealing adds counts before anything has ended: destroy() and too much after it leave the session."""
    app = make_app(SESSION_ENCRYPTION_KEYS=KEY, SESSION_MAX_BYTES=1000)
    browser, handle = a_session(app, a=1)
    before = app.stored(handle)
    browser.run(lambda: (session.destroy(), session.update(user="x" * 985)), status=413)
    assert browser.set_cookies == {}
    assert app.stored(handle) == before
    browser.run(lambda: (session.destroy(), session.update(user="x" * (1000 - 29 - 2 - 4))))
    assert len(read_of(browser, app)["user"]) == 965
