"""``SESSION_RENEW_AFTER``: a secret that is due is renewed in two phases, so that no lost answer logs anybody out."""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
from flask import session, stream_with_context

from luasession import ConfigurationError

from .conftest import Browser, MakeApp, TestApp

HOUR = 3600
MINUTE = 60


def age(app: TestApp, handle: str, seconds: float) -> None:
    """Let a session have been there for so much longer: all of its moments lie so much further back."""
    ms = int(seconds * 1000)
    stored = app.stored(handle)
    identity = bytearray(stored[b"@i"])
    identity[33:39] = (int.from_bytes(identity[33:39]) - ms).to_bytes(6)
    fields = {b"@i": bytes(identity)}
    state = bytearray(stored[b"@v"])
    state[19:25] = (int.from_bytes(state[19:25]) - ms).to_bytes(6)
    fields[b"@v"] = bytes(state)
    if b"@f" in stored:
        entries = []
        for at in range(0, len(stored[b"@f"]), 46):
            entry = bytearray(stored[b"@f"][at : at + 46])
            entry[32:39] = (int.from_bytes(entry[32:39]) - ms * 1000).to_bytes(7)
            entry[39:45] = (int.from_bytes(entry[39:45]) - ms).to_bytes(6)
            entries.append(bytes(entry))
        fields[b"@f"] = b"".join(entries)
    if b"@n" in stored:
        digest, moment = struct.unpack(">32s6s", stored[b"@n"])
        fields[b"@n"] = digest + (int.from_bytes(moment) - ms).to_bytes(6)
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, mapping=fields)


@pytest.fixture
def app(make_app: MakeApp) -> TestApp:
    """An app that renews ids after an hour, and asks Redis each time."""
    return make_app(SESSION_RENEW_AFTER=HOUR, SESSION_CACHE_TTL=0, PERMANENT_SESSION_LIFETIME=30 * HOUR)


def begin(app: TestApp, seconds: float = 2 * HOUR, **values: Any) -> tuple[Browser, str]:
    """Return a browser with a session of a certain age, and its handle."""
    browser = app.browser()
    browser.run(lambda: session.update({"user": "ann"} | values))
    handle = browser.cookies["session"].partition(".")[0]
    age(app, handle, seconds)
    return browser, handle


def user(browser: Browser) -> str | None:
    """Return whom the session says that this browser is."""
    found: str | None = browser.run(lambda: session.get("user"))
    return found


def deaf(browser: Browser) -> Browser:
    """Return a browser with the same cookies, whose answers this one never gets."""
    return browser.twin()


# -- the first phase: an offer ------------------------------------------------------


@pytest.mark.parametrize("way", ["read", "write", "blind write", "empty delta"])
def test_a_due_id_is_renewed(app: TestApp, way: str) -> None:
    """Whatever first uses a session that is due gets a new id, which works, and the data stays."""
    browser, handle = begin(app)
    old = browser.cookies["session"]
    views = {
        "read": lambda: session.get("user"),
        "write": lambda: session.update(n=len(session)),
        "blind write": lambda: session.update(n=1),
        "empty delta": lambda: session.update(user=session["user"]),
    }
    browser.run(views[way])
    assert browser.cookies["session"] != old
    assert browser.cookies["session"].partition(".")[0] == handle
    assert user(browser) == "ann"
    assert user(browser.twin(app.another())) == "ann"


@pytest.mark.parametrize("ttl", [60.0, None])
def test_a_due_id_is_renewed_under_any_cache(make_app: MakeApp, ttl: float | None) -> None:
    """With a trusted snapshot, and with no cache at all, the offer rides on a commit, or on the touch of a read."""
    app = make_app(SESSION_RENEW_AFTER=HOUR, SESSION_CACHE_TTL=ttl)
    for view in (lambda: session.get("user"), lambda: session.update(n=len(session))):
        browser, _ = begin(app)
        twin = browser.twin(app.another())  # a process that has nothing cached from before
        twin.run(view)
        assert twin.cookies["session"] != browser.cookies["session"]
        assert user(twin) == "ann"


def test_a_young_id_is_left_alone(app: TestApp) -> None:
    """Before its time an id is not renewed, and the time counts anew with each new id."""
    browser, handle = begin(app, HOUR - MINUTE)
    user(browser)
    assert "session" not in browser.set_cookies
    age(app, handle, 2 * MINUTE)
    user(browser)
    assert "session" in browser.set_cookies
    user(browser)  # presents it
    age(app, handle, HOUR - MINUTE)
    user(browser)
    assert "session" not in browser.set_cookies
    age(app, handle, 2 * MINUTE)
    user(browser)
    assert "session" in browser.set_cookies


@pytest.mark.parametrize("blind", [False, True])
def test_a_rotation_counts_as_a_renewal(app: TestApp, blind: bool) -> None:
    """After an explicit rotation the time counts anew."""
    browser, handle = begin(app, HOUR - MINUTE)
    browser.run(lambda: session.regenerate())
    age(app, handle, 2 * MINUTE)
    browser.run(lambda: session.update(n=1) if blind else session.get("user"))
    assert "session" not in browser.set_cookies


def test_nothing_is_offered_once_the_response_is_out(app: TestApp) -> None:
    """A session that is first used while the response is sent gets no offer, which could not travel any more."""
    browser, handle = begin(app)

    def stream() -> Any:
        def body() -> Iterator[str]:
            yield "a"
            session["late"] = 1

        return app.flask.response_class(stream_with_context(body()))

    browser.run(stream)
    assert browser.response is not None
    assert browser.response.text == "a"
    stored = app.stored(handle)
    assert b"late" in stored
    assert b"@n" not in stored


def test_what_does_not_use_the_session_is_offered_nothing(app: TestApp) -> None:
    """A request that does not touch the session sends no cookie, however old its id is."""
    browser, _ = begin(app)
    browser.get("/untouched")
    assert browser.set_cookies == {}


def test_the_offer_goes_first_and_alone(app: TestApp) -> None:
    """The answer that carries a new id carries it once, first, with the attributes of any id cookie."""
    browser, _ = begin(app)
    browser.run(lambda: session.update(n=1))
    assert browser.response is not None
    lines = browser.response.headers.getlist("Set-Cookie")
    assert [line.partition("=")[0] for line in lines].count("session") == 1
    assert lines[0].startswith("session=")
    assert "HttpOnly; Path=/" in lines[0]


def test_renewal_must_be_longer_than_the_grace(make_app: MakeApp) -> None:
    """A time within the grace is refused with words."""
    with pytest.raises(ConfigurationError, match=r"SESSION_RENEW_AFTER \(60 s\) must be longer"):
        make_app(SESSION_RENEW_AFTER=60)


# -- lost answers ---------------------------------------------------------------------


def test_a_lost_answer_logs_nobody_out(app: TestApp) -> None:
    """The old id stays in force as long as nobody has presented the new one, however long that takes."""
    browser, handle = begin(app)
    for _ in range(5):
        assert user(deaf(browser)) == "ann"
        age(app, handle, 3 * HOUR)
    assert browser.run(lambda: (session.update(n=1), session["user"])[1]) == "ann"
    assert user(browser) == "ann"


def test_an_offer_is_made_once_in_a_grace(app: TestApp) -> None:
    """Within the grace no second id is offered, so that parallel answers do not race each other."""
    browser, handle = begin(app)
    first = deaf(browser)
    user(first)
    assert "session" in first.set_cookies
    second = deaf(browser)
    user(second)
    assert "session" not in second.set_cookies
    age(app, handle, 2 * MINUTE)
    third = deaf(browser)
    user(third)
    assert "session" in third.set_cookies
    assert user(third) == "ann"


def test_the_old_id_is_in_force_for_the_grace(app: TestApp) -> None:
    """Once the new id was presented, the old one reads and writes for the grace, and then is unknown."""
    browser, handle = begin(app)
    old = deaf(browser)
    user(browser)
    user(browser)
    assert old.run(lambda: (session.update(late=1), session["user"])[1]) == "ann"
    assert "session" not in old.set_cookies
    assert browser.run(lambda: session["late"]) == 1
    age(app, handle, 2 * MINUTE)
    assert user(old) is None
    old.run(lambda: session.get("x"))
    assert "session" not in old.set_cookies
    assert user(browser) == "ann"


@pytest.mark.parametrize("permanent", [False, True])
def test_a_cookie_refresh_does_not_undo_a_renewal(make_app: MakeApp, permanent: bool) -> None:
    """While an offer is out, no answer under the old id brings that id back to the browser."""
    app = make_app(
        SESSION_RENEW_AFTER=HOUR,
        SESSION_CACHE_TTL=0,
        SESSION_PERMANENT=permanent,
        SESSION_TOUCH_INTERVAL=0,
    )
    browser, _ = begin(app)
    late = deaf(browser)
    user(browser)
    for view in (lambda: session.get("user"), lambda: session.update(n=1)):
        late.run(view)
        assert "session" not in late.set_cookies
    user(browser)
    late.run(lambda: session.update(n=2))
    assert "session" not in late.set_cookies


# -- what else ends or replaces an id ---------------------------------------------------


def test_an_explicit_rotation_cancels_an_offer(app: TestApp) -> None:
    """A rotation ends the old id and what was offered: neither reads what comes after."""
    browser, _ = begin(app)
    offered = deaf(browser)
    user(offered)
    old = deaf(browser)
    browser.run(lambda: (session.regenerate(), session.update(secret="after the log-in")))
    for other in (offered, old):
        assert other.run(lambda: dict(session)) == {}
        assert "session" not in other.set_cookies
    assert browser.run(lambda: session["secret"]) == "after the log-in"


@pytest.mark.parametrize("way", ["blind write", "write", "clear and set", "rotate"])
def test_a_cancelled_offer_logs_nobody_out(app: TestApp, way: str) -> None:
    """What comes under an offered id that a log-in has cancelled sets no cookie over that of the log-in.

    Unless it rotates itself, and then has a session of its own, as under any former id.
    """
    browser, _ = begin(app)
    offered = deaf(browser)
    user(offered)
    browser.run(lambda: (session.regenerate(), session.update(secret=1)))
    views = {
        "blind write": lambda: session.update(planted=1),
        "write": lambda: session.update(planted=len(session)),
        "clear and set": lambda: (session.clear(), session.update(planted=1)),
        "rotate": lambda: (session.regenerate(), session.update(planted=1)),
    }
    offered.run(views[way])
    assert ("session" in offered.set_cookies) is (way == "rotate")
    assert browser.run(lambda: dict(session)) == {"user": "ann", "secret": 1}


@pytest.mark.parametrize("way", ["destroy", "clear"])
def test_a_cancelled_offer_still_logs_out(app: TestApp, way: str) -> None:
    """A log-out under an offered id that a rotation has cancelled ends the session, as under any former id."""
    browser, _ = begin(app)
    offered = deaf(browser)
    user(offered)
    browser.run(lambda: (session.regenerate(), session.update(secret=1)))
    offered.run(lambda: session.destroy() if way == "destroy" else session.clear())
    assert browser.run(lambda: dict(session)) == {}


@pytest.mark.parametrize("in_flight", [True, False])
def test_a_request_under_an_offer_over_its_rotation(app: TestApp, in_flight: bool) -> None:
    """Open before the rotation that cancelled its offered id, a request commits, unless that says otherwise."""
    browser, _ = begin(app)
    offered = deaf(browser)
    user(offered)

    def view() -> None:
        session["mine"] = 1
        time.sleep(0.05)  # ages are exact to a call's transit
        browser.run(lambda: session.regenerate(in_flight=in_flight))

    offered.run(view)
    assert "session" not in offered.set_cookies
    assert browser.run(lambda: session.get("mine")) == (1 if in_flight else None)


def test_a_rotation_ends_what_a_renewal_left_in_force(app: TestApp) -> None:
    """An id that was in force for the grace after a renewal is not in force over a rotation."""
    browser, _ = begin(app)
    old = deaf(browser)
    user(browser)
    user(browser)
    assert user(old) == "ann"
    browser.run(lambda: (session.regenerate(), session.update(secret=1)))
    assert old.run(lambda: dict(session)) == {}
    old.run(lambda: session.update(planted=1))
    assert browser.run(lambda: dict(session)) == {"user": "ann", "secret": 1}


@pytest.mark.parametrize("user", [None, "bob"], ids=["may commit", "is dropped"])
def test_an_offer_that_a_rotation_has_cancelled_is_not_sent(app: TestApp, user: str | None) -> None:
    """A request that has read an offer, and finds by its commit that a rotation came after it, sends no id."""
    browser, _ = begin(app)
    late = deaf(browser)

    def log_in() -> None:
        session.regenerate()
        session["user"] = "bob"
        session.principal = user

    def view() -> None:
        session.get("n")
        time.sleep(0.05)  # ages are exact to a call's transit; this is well over it
        browser.run(log_in)
        session["n"] = 1

    late.run(view)
    assert "session" not in late.set_cookies
    # Whatever else the late answer carries, the browser stays where the log-in has put it.
    for name, line in late.set_cookies.items():
        browser.client.set_cookie(name, line.partition("=")[2].partition(";")[0])
    assert browser.run(lambda: (session["user"], session.get("n"))) == ("bob", None if user else 1)


@pytest.mark.parametrize("error", ["type", "conflict", "large"])
def test_an_offer_goes_with_no_error(make_app: MakeApp, error: str) -> None:
    """An offer that was met while reading is not sent with an error response; the old id stays in force."""
    app = make_app(
        SESSION_RENEW_AFTER=HOUR, SESSION_CACHE_TTL=0, SESSION_CONFLICT="raise", SESSION_MAX_BYTES=1000
    )
    browser, handle = begin(app, n=1)

    def view() -> None:
        session["n"] += 1
        if error == "conflict":
            with app.flask.extensions["luasession"].edit(handle) as edited:
                edited["n"] = 5
        if error == "type":
            session["n"] = object()
        if error == "large":
            session["n"] = "x" * 2000

    browser.run(view, status={"type": 500, "conflict": 409, "large": 413}[error])
    assert browser.set_cookies == {}
    assert user(browser) == "ann"
    age(app, handle, 2 * MINUTE)
    assert user(browser) == "ann"
    assert "session" in browser.set_cookies


@pytest.mark.parametrize("in_flight", [True, False])
def test_in_flight_over_a_rotation_after_a_renewal(app: TestApp, in_flight: bool) -> None:
    """Open under the id from before the renewal, a request may commit over a rotation if that lets it."""
    browser, _ = begin(app)
    old = deaf(browser)
    user(browser)
    user(browser)

    def late() -> None:
        session["late"] = 1
        browser.run(lambda: session.regenerate(in_flight=in_flight))

    old.run(late)
    assert browser.run(lambda: "late" in session) is in_flight


def test_an_id_still_in_force_can_rotate(app: TestApp) -> None:
    """A log-in under the old id, right after a renewal, is one of this very session."""
    browser, handle = begin(app)
    old = deaf(browser)
    user(browser)
    user(browser)
    old.run(lambda: (session.regenerate(), session.update(user="bob")))
    assert old.cookies["session"].partition(".")[0] == handle
    assert user(old) == "bob"
    assert user(browser) is None


@pytest.mark.parametrize("how", ["destroy", "clear"])
@pytest.mark.parametrize("under", ["old, offered", "offered", "old, presented", "new"])
def test_a_logout_that_overlaps_a_renewal_logs_out(app: TestApp, how: str, under: str) -> None:
    """Under whichever of the ids it comes, a log-out ends the session for all of them."""
    browser, handle = begin(app)
    old = deaf(browser)
    user(browser)
    if "presented" in under or under == "new":
        user(browser)
    leaving = old if under.startswith("old") else browser
    leaving.run(lambda: session.destroy() if how == "destroy" else session.clear())
    assert set(app.stored(handle)) == {b"@t"}
    for each in (old, browser):
        assert user(each) is None


def test_a_clear_keeps_the_offer(app: TestApp) -> None:
    """Cleared and filled anew, a session is still found under an id that is on its way to the browser."""
    browser, _ = begin(app)
    offered = deaf(browser)
    user(offered)
    browser.run(lambda: (session.clear(), session.update(user="bob")))
    assert user(offered) == "bob"


def test_it_rotates_when_it_presents(app: TestApp) -> None:
    """A request may present a new id for the first time and rotate at once."""
    browser, _ = begin(app)
    old = deaf(browser)
    user(browser)
    browser.run(lambda: (session.regenerate(), session.update(user="bob")))
    assert user(browser) == "bob"
    assert user(old) is None


@pytest.mark.parametrize("way", ["read", "blind write", "rotation"])
def test_a_write_presents_as_well_as_a_read(app: TestApp, way: str) -> None:
    """Whatever first comes under the new id puts it in force: afterwards the old one is a former one."""
    browser, handle = begin(app)
    user(browser)
    assert b"@n" in app.stored(handle)
    views = {
        "read": lambda: session.get("user"),
        "blind write": lambda: session.update(n=1),
        "rotation": lambda: session.regenerate(),
    }
    browser.run(views[way])
    stored = app.stored(handle)
    assert b"@n" not in stored
    assert len(stored[b"@f"]) == 46 * (2 if way == "rotation" else 1)


def test_nobody_guesses_an_offer(app: TestApp) -> None:
    """What is stored of an offer is a digest: presented as an id it is nothing."""
    browser, handle = begin(app)
    user(browser)
    digest = app.stored(handle)[b"@n"][:32]
    for secret in (digest.hex(), browser.cookies["session"].partition(".")[2][::-1]):
        assert app.browser_with_header(f"session={handle}.{secret}").run(lambda: dict(session)) == {}


def test_edit_renews_nothing(app: TestApp) -> None:
    """Work from outside of a request has no browser to give an id to."""
    browser, handle = begin(app)
    with app.flask.extensions["luasession"].edit(handle) as edited:
        edited["n"] = 1
    assert b"@n" not in app.stored(handle)
    assert user(browser) == "ann"


def test_a_renewal_where_nothing_can_be_written(app: TestApp) -> None:
    """Where the server has no memory left, reads go on under the ids that there are."""
    browser, _ = begin(app)
    old = deaf(browser)
    user(browser)
    assert app.server is not None
    with app.server.client() as client:
        before = client.config_get("maxmemory")["maxmemory"]
        client.config_set("maxmemory", 1)
        try:
            assert user(browser) == "ann"
            assert user(old) == "ann"
        finally:
            client.config_set("maxmemory", before)
    assert user(browser) == "ann"


# -- every order of answers ---------------------------------------------------------------


def orders(requests: int) -> Iterator[list[tuple[str, int]]]:
    """Yield every order in which requests are sent, served and answered; they are sent in their order."""
    steps = [(step, number) for number in range(requests) for step in ("send", "serve", "answer")]
    for order in itertools.permutations(steps):
        place = {step: at for at, step in enumerate(order)}
        if all(place["send", n] < place["serve", n] < place["answer", n] for n in range(requests)) and all(
            place["send", n] < place["send", n + 1] for n in range(requests - 1)
        ):
            yield list(order)


def test_in_every_order_the_browser_stays_logged_in(make_valkey_app: MakeApp) -> None:
    """Whatever the order of sending, serving and answering, with some answers lost, the last id works."""
    app = make_valkey_app(SESSION_RENEW_AFTER=HOUR, SESSION_CACHE_TTL=0)
    views = [lambda: session.get("user"), lambda: session.update(n=1), lambda: session.update(m=len(session))]
    schedules = 0
    for order in orders(3):
        for lost in (None, 0, 1, 2):
            browser, handle = begin(app)
            sent: dict[int, Browser] = {}
            for step, number in order:
                if step == "send":
                    sent[number] = browser.twin()
                elif step == "serve":
                    before = sent[number].cookies
                    sent[number].run(views[number])
                    new = {k: v for k, v in sent[number].cookies.items() if before.get(k) != v}
                    sent[number].set_later = new  # type: ignore[attr-defined]
                elif number != lost:
                    for name, value in sent[number].set_later.items():  # type: ignore[attr-defined]
                        browser.client.set_cookie(name, value)
            assert user(browser) == "ann", f"logged out by {order}, answer {lost} lost"
            age(app, handle, 2 * MINUTE)
            assert user(browser) == "ann", f"logged out after the grace by {order}, answer {lost} lost"
            schedules += 1
    assert schedules == 4 * len(list(orders(3)))


def test_parallel_requests_over_a_renewal_lose_nothing(make_valkey_app: MakeApp) -> None:
    """Requests under the old, the offered and the presented id write side by side, and all of it is kept."""
    app = make_valkey_app(SESSION_RENEW_AFTER=HOUR, SESSION_CACHE_TTL=0)
    browser, _ = begin(app)
    old = deaf(browser)
    user(browser)

    def outer() -> None:
        session["a"] = 1
        browser.run(lambda: session.update(b=2))
        old.twin().run(lambda: session.update(c=3))
        time.sleep(0.002)

    old.run(outer)
    assert browser.run(lambda: dict(session)) == {"user": "ann", "a": 1, "b": 2, "c": 3}


def test_nothing_is_left_of_a_session_at_its_absolute_end(make_app: MakeApp) -> None:
    """A load at the very end, touch and renewal due, finds no session, and writes no field that nothing would end."""
    app = make_app(
        SESSION_RENEW_AFTER=HOUR,
        SESSION_CACHE_TTL=0,
        SESSION_ABSOLUTE_LIFETIME=3 * HOUR,
        SESSION_TOUCH_INTERVAL=0,
        PERMANENT_SESSION_LIFETIME=30 * HOUR,
    )
    browser, handle = begin(app)
    stored = app.stored(handle)
    ended = stored[b"@i"][:39] + (int(time.time() * 1000) - 1).to_bytes(6)
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, "@i", ended)
        assert browser.run(lambda: dict(session)) == {}
        assert client.hgetall(app.prefix + handle) in ({}, stored | {b"@i": ended})
        assert client.ttl(app.prefix + handle) != -1
