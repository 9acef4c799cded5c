"""Whoever can read Redis cannot become a user: nothing that is stored is, or makes, a cookie (G11)."""

from __future__ import annotations

import re
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterator
from itertools import product

import pytest
from flask import session

from luasession.ids import SessionId, parse_session_id

from .conftest import Browser, MakeApp, TestApp

_SECRET_BYTES, _SECRET_CHARS = 32, 43


def log_in(browser: Browser, user: str) -> None:
    def view() -> None:
        session["user"] = user
        session.principal = user
        session.label = "phone"
        session.regenerate()

    browser.run(view)


def scene(app: TestApp) -> list[Browser]:
    """Two users; sessions with all the metadata there is, former digests too, and one that has ended."""
    browsers = [app.browser() for _ in range(3)]
    for number, browser in enumerate(browsers):
        browser.run(lambda: session.update(cart=[1]))
        log_in(browser, f"user{number}")
        browser.run(lambda: session.regenerate())
        browser.run(lambda: session.set("token", "t", ttl=600))
    browsers[2].run(lambda: session.destroy())
    return browsers


def everything(app: TestApp) -> Iterator[bytes]:
    """All that a thief finds: names of keys and fields, values, members and scores."""
    assert app.server is not None
    with app.server.client() as client:
        for key in client.keys(app.prefix + "*"):
            yield key
            if client.type(key) == b"hash":
                for name, value in client.hgetall(key).items():
                    yield from (name, value)
            else:
                for member, score in client.zrange(key, 0, -1, withscores=True):
                    yield from (member, str(score).encode())


def secrets(stored: list[bytes]) -> set[str]:
    """Every text of a secret's length that the stored bytes hold, or are, in any of the usual spellings."""
    pool = [*stored, b"".join(stored), b"".join(reversed(stored))]
    found: set[str] = set()
    for raw in pool:
        spellings = [
            raw,
            raw.hex().encode(),
            raw.hex().upper().encode(),
            b64encode(raw),
            urlsafe_b64encode(raw),
        ]
        for start in range(max(len(raw) - _SECRET_BYTES + 1, 0)):
            window = raw[start : start + _SECRET_BYTES]
            found.add(urlsafe_b64encode(window).rstrip(b"=").decode())
            found.add(urlsafe_b64encode(window[::-1]).rstrip(b"=").decode())
        for spelling in spellings:
            text = spelling.decode("latin-1")
            found.update(
                text[start : start + _SECRET_CHARS] for start in range(max(len(text) - _SECRET_CHARS + 1, 0))
            )
        short = raw[:_SECRET_BYTES].ljust(_SECRET_BYTES, b"\0")
        found.add(urlsafe_b64encode(short).rstrip(b"=").decode())
    return {secret for secret in found if len(secret) == _SECRET_CHARS}


def cookies(stored: list[bytes]) -> set[str]:
    """All cookies that can be made of what is stored."""
    handles = {
        text for raw in stored for text in re.findall(r"(?<![\w-])[\w-]{22}(?![\w-])", raw.decode("latin-1"))
    }
    whole = {raw.decode("latin-1") for raw in stored}
    joined = {f"{one}.{other}" for one, other in product(whole, repeat=2)} | whole
    return joined | {f"{handle}.{secret}" for handle, secret in product(handles, secrets(stored))}


def opens(app: TestApp, cookie: str) -> bool:
    browser = app.browser_with_header(f"session={cookie}")
    return bool(browser.run(lambda: dict(session)))


def opening(app: TestApp) -> tuple[list[str], int]:
    """Try everything; return the cookies that open a session, and how many were well formed."""
    tried = [cookie for cookie in cookies(list(everything(app))) if parse_session_id(cookie, 32)]
    store = app.flask.session_interface._store  # type: ignore[attr-defined]
    live = {
        handle: store._here.calls._client and app.stored(handle).get(b"@i", b"")[1:33]
        for handle in {cookie.partition(".")[0] for cookie in tried}
    }
    matching = [c for c in tried if SessionId(*c.split(".")).digest == live[c.partition(".")[0]]]
    # A sample goes the whole way, over HTTP; the rest is judged by the one comparison there is.
    return [c for c in [*tried[:: max(len(tried) // 300, 1)], *matching] if opens(app, c)], len(tried)


def test_nothing_that_is_stored_opens_a_session(make_valkey_app: MakeApp) -> None:
    """Handles, digests current and former, write ids, moments, members of the index, cut at any byte and joined."""
    app = make_valkey_app(SESSION_CACHE_TTL=None)
    browsers = scene(app)
    found, tried = opening(app)
    assert found == []
    assert tried > 5000
    for browser, user in zip(browsers[:2], ("user0", "user1"), strict=True):
        assert browser.run(lambda: session["user"]) == user
        secret = browser.cookies["session"].partition(".")[2]
        stored = b"\n".join(everything(app))
        assert secret.encode() not in stored
        assert urlsafe_b64decode(secret + "=") not in stored


def test_the_search_would_find_a_stored_secret(
    make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the secret itself were stored in the digest's place, one of these cookies would be it."""

    def the_secret(self: SessionId) -> bytes:
        return urlsafe_b64decode(self.secret + "=") if self.secret else b""

    monkeypatch.setattr(SessionId, "digest", property(the_secret))
    app = make_valkey_app(SESSION_CACHE_TTL=None)
    scene(app)
    assert len(opening(app)[0]) >= 2


def test_an_id_counts_in_its_cookie_only(make_valkey_app: MakeApp) -> None:
    """The id counts in its own cookie only: not in the query, the path, a header or another cookie."""
    app = make_valkey_app()
    browser = app.browser()
    log_in(browser, "ada")
    sid = browser.cookies["session"]
    for path in (f"/run?session={sid}", f"/run?sid={sid}", f"/run;session={sid}"):
        stranger = app.browser()
        response = stranger.client.get(path)
        assert response.status_code in (404, 500)  # no view was given: the session is not asked for
        assert sid not in response.text
    for header in ({"X-Session": sid}, {"Authorization": f"Bearer {sid}"}, {"Cookie": f"sid={sid}"}):
        stranger = app.browser_with_header("")
        stranger.client.environ_base.update(
            {f"HTTP_{name.upper()}".replace("-", "_"): v for name, v in header.items()}
        )
        assert stranger.run(lambda: dict(session)) == {}
    assert app.browser().run(lambda: dict(session), path=f"/run?session={sid}") == {}
