"""No secret in anything that is logged, shown, signalled or answered, over the whole life of a session.

ASVS 5.0, 16.2.5: session ids are not logged. Looked for is each secret that there was, and its digest,
plain, percent-encoded, in hex and in base64; the handle alone may be shown.
"""

from __future__ import annotations

import gc
import io
import logging
import pprint
import traceback
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest
from flask import session

import luasession.signals
from luasession import CorruptSession, LuaSessionError, SessionGone, SessionUnavailable

from .conftest import Browser, MakeApp, TestApp
from .servers import Server, standalone


class Everything:
    """All that was logged, shown, signalled or answered, and all secrets that there were."""

    def __init__(self, app: TestApp) -> None:
        self.app = app
        self.seen: list[tuple[str, str]] = []
        self.sids: set[str] = set()
        self.told: set[str] = set()
        self.errors: list[type] = []
        for name in luasession.signals.__dict__:
            if name.startswith("session_"):
                getattr(luasession.signals, name).connect(self._receive(name), app.flask, weak=False)
        app.flask.register_error_handler(500, self._answer)

    def _receive(self, name: str) -> Callable[..., None]:
        def receive(sender: Any, **about: Any) -> None:
            self.told.add(name)
            self.note(f"signal {name}", about, *about.values())

        return receive

    def _answer(self, error: Any) -> tuple[str, int]:
        original = error.original_exception or error
        self.error("500", original)
        return f"{error!r} {error} {original!r} {original}", 500

    def error(self, where: str, error: BaseException) -> None:
        self.errors.append(type(error))
        self.note(f"{where}, {type(error).__name__}", error, error.args, vars(error))
        lines = traceback.TracebackException.from_exception(error, capture_locals=True, max_group_depth=3)
        # Of the locals: those of luasession's own frames, as a crash reporter shows them.
        own = [
            frame
            for frame in lines.stack
            if "luasession/" in frame.filename and "tests/" not in frame.filename
        ]
        self.note(f"traceback of {type(error).__name__}", *lines.format_exception_only())
        self.note("frames", *[frame.line for frame in own])

    def note(self, where: str, *things: Any) -> None:
        for thing in things:
            self.seen.append((where, f"{thing!r}\n{thing}\n{pprint.pformat(thing)}"))

    def run(self, browser: Browser, view: Callable[[], Any], status: int = 200) -> None:
        """Run a view, and note what it shows; the id cookie is the one place for a secret."""
        self.keep(browser)

        def watched() -> None:
            try:
                view()
            except LuaSessionError as error:
                self.error("view", error)
                raise
            finally:
                self.show()

        with suppress(AssertionError):
            browser.run(watched, status=status)
        assert browser.response is not None
        assert browser.response.status_code == status, browser.response.text
        headers = [(name, value) for name, value in browser.response.headers if name != "Set-Cookie"]
        self.note(f"answer {status}", browser.response.text, headers)
        for name, line in browser.set_cookies.items():
            if name != "session":
                self.note("hint cookie", line)
        self.keep(browser)

    def show(self) -> None:
        current = session._get_current_object()  # type: ignore[attr-defined]
        visit = current._transaction.visit
        store = visit._store
        things = [session, current, visit, visit.id, visit.seen, visit.issued, visit.standing]
        things += [
            store,
            store._here.cache,
            store._config,
            store._here.stats.counts(),
            current._transaction.ledger,
        ]
        self.note("shown", *things, [things], {"thing": current})

    def keep(self, browser: Browser) -> None:
        if "session" in browser.cookies:
            self.sids.add(browser.cookies["session"])

    def found(self) -> list[str]:
        """Return where a secret, or a digest, was seen."""
        needles = set()
        for sid in self.sids:
            secret = sid.partition(".")[2]
            assert secret
            digest = sha256(secret.encode()).digest()
            raw = urlsafe_b64decode(secret + "=")
            needles |= {secret, sid, quote(sid, safe=""), quote(secret, safe="")}
            needles |= {
                "".join(f"%{ord(c):02X}" for c in secret),
                secret.replace("-", "%2D").replace("_", "%5F"),
            }
            for value in (digest, raw):
                needles |= {
                    value.hex(),
                    value.hex().upper(),
                    repr(value)[2:-1],
                    quote_from_bytes(value, safe=""),
                }
                needles |= {b64encode(value).decode(), urlsafe_b64encode(value).decode().rstrip("=")}
        return sorted({where for where, text in self.seen for needle in needles if needle in text})


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    """All records of all loggers, formatted with their tracebacks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    named = [logging.getLogger(name) for name in ("redis", "werkzeug", "luasession", "flask.app", "testapp")]
    for logger in named:
        logger.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        for logger in named:
            logger.setLevel(logging.NOTSET)


def live(everything: Everything, server: Server) -> None:
    """The whole life of a session, with each error that there is."""
    app = everything.app
    browser = app.browser()
    run = everything.run

    def log_in() -> None:
        session.principal, session.label, session.permanent = "ada", "phone", True
        session.regenerate()

    def fail() -> None:
        session["n"] = 2
        raise RuntimeError("the app's own")

    def conflict() -> None:
        session["strict"] = session["strict"] + 1
        browser.twin().run(lambda: session.update(strict=10))

    def gone() -> None:
        session["n"] = session["n"] + 1
        late.run(lambda: session.destroy())

    def commit_gone() -> None:
        assert session["n"]
        late.run(lambda: session.destroy())
        session["n"] = 7
        session.commit()

    run(browser, lambda: session.update(n=1, strict=1, bad=1))
    run(browser, log_in)
    run(browser, lambda: (session.update(n=5), session.commit(), session.reload(), dict(session)))
    run(browser, fail, 500)
    run(browser, conflict, 409)
    run(browser, lambda: session.update(large="x" * 5000), 413)
    run(browser, lambda: session.update(odd=object()), 500)
    handle = browser.cookies["session"].partition(".")[0]
    with server.client() as client:
        client.hset(app.prefix + handle, "bad", b"{rubbish")
        app.flask.session_interface._store._here.cache.drop(handle)  # type: ignore[attr-defined]
        run(browser, lambda: dict(session))
        kept = client.hgetall(app.prefix + handle)
        client.hset(app.prefix + handle, "@i", b"\x09" + kept[b"@i"][1:])
        run(browser, lambda: session.reload(), 500)
        client.hset(app.prefix + handle, "@i", kept[b"@i"])
        dump = client.dump(app.prefix + handle)
        client.set(app.prefix + handle, "x")
        run(browser, lambda: session.update(n=2), 503)
        client.restore(app.prefix + handle, 0, dump, replace=True)
        client.config_set("maxmemory", "1")
        run(browser, lambda: session.update(n=3), 503)
        client.config_set("maxmemory", "0")
    outside = app.flask.extensions["luasession"]
    everything.note("outside", outside, outside.sessions_of("ada"), outside.stats())
    for wrong in (browser.cookies["session"], browser.cookies["session"].partition(".")[2]):
        with pytest.raises(ValueError, match="a handle is") as caught:
            outside.revoke(wrong)
        everything.error("revoke", caught.value)
    late = browser.twin()
    run(browser, gone)
    browser = app.browser()
    run(browser, lambda: session.update(n=1))
    late = browser.twin()
    run(browser, commit_gone, 500)
    browser = app.browser()
    run(browser, log_in)
    run(browser, lambda: session.regenerate())
    run(browser, lambda: session.destroy())
    browser = app.browser()
    run(browser, lambda: session.update(n=1))
    server.stop()
    run(browser, lambda: session.reload(), 503)
    run(browser, lambda: session.update(n=2), 503)


def test_no_secret_over_a_whole_life(log: io.StringIO, recwarn: pytest.WarningsRecorder) -> None:
    """Logs, warnings, reprs, errors, signals, answers and stats: none holds a secret or a digest."""
    settings = {
        "SESSION_MAX_BYTES": 4000,
        "SESSION_MERGE": {"strict": "raise"},
        "SESSION_REDIS_DEADLINE": 0.1,
    }
    with standalone("valkey-9.1") as server:
        everything = Everything(TestApp(server, settings))
        live(everything, server)
    everything.note("warnings", *[str(warning.message) for warning in recwarn.list])
    everything.note("log", log.getvalue())
    luasessions = [
        thing for thing in gc.get_objects() if str(type(thing).__module__).startswith("luasession")
    ]
    everything.note("objects", *map(repr, luasessions))
    assert everything.found() == []
    assert len(everything.sids) >= 6
    assert everything.told == {name for name in vars(luasession.signals) if name.startswith("session_")}
    assert {SessionGone, CorruptSession, SessionUnavailable, TypeError, ValueError} <= set(everything.errors)
    assert "does not decode" in log.getvalue()
    assert "Traceback" in log.getvalue()


@pytest.mark.parametrize("where", ["log", "repr", "percent-encoded", "digest"])
def test_the_search_finds(make_valkey_app: MakeApp, where: str) -> None:
    """A secret that is shown in any of these forms is found."""
    everything = Everything(make_valkey_app())
    browser = everything.app.browser()
    everything.run(browser, lambda: session.update(a=1))
    secret = browser.cookies["session"].partition(".")[2]
    shown = {
        "log": f"session {browser.cookies['session']}",
        "repr": repr({"secret": secret}),
        "percent-encoded": quote(secret + "%", safe=""),
        "digest": repr(sha256(secret.encode()).digest()),
    }
    assert everything.found() == []
    everything.note(where, shown[where])
    assert everything.found() == [where]
