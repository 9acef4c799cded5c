"""Each signal is sent once, when what it tells has happened, by the app, and without a secret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import current_app, session

from luasession import merge, retry_on_conflict, signals

from .conftest import Browser, MakeApp, TestApp

NAMES = [
    "session_created",
    "session_committed",
    "session_conflict",
    "session_rotated",
    "session_destroyed",
    "session_discarded",
    "session_corrupt",
]


class Ears:
    """What an app's signals have told since the last :meth:`take`."""

    def __init__(self, app: TestApp) -> None:
        self.app = app
        self.told: list[tuple[str, dict[str, Any]]] = []
        self._receivers: list[Callable[..., None]] = []
        for name in NAMES:
            getattr(signals, name).connect(self._receiver(name), app.flask)

    def _receiver(self, name: str) -> Callable[..., None]:
        def receive(sender: Any, **about: Any) -> None:
            assert sender is self.app.flask
            about.pop("_async_wrapper", None)
            self.told.append((name, about))

        self._receivers.append(receive)
        return receive

    def take(self) -> list[tuple[str, dict[str, Any]]]:
        told, self.told = self.told, []
        return told


def handle_of(browser: Browser) -> str:
    handle: str = browser.cookies["session"].partition(".")[0]
    return handle


def started(app: TestApp, **values: Any) -> tuple[Browser, str]:
    """Return a browser with a session, and its handle."""
    browser = app.browser()
    browser.run(lambda: session.update(values or {"a": 1}))
    return browser, handle_of(browser)


def test_created_and_committed(app: TestApp) -> None:
    """The first commit tells session_created, each later one session_committed, with the version."""
    ears = Ears(app)
    browser, handle = started(app)
    assert ears.take() == [("session_created", {"handle": handle, "version": 1})]
    browser.run(lambda: session.update(a=2))
    assert ears.take() == [("session_committed", {"handle": handle, "version": 2})]

    def twice() -> None:
        session["a"] = 3
        session.commit()
        session["a"] = 4

    browser.run(twice)
    assert ears.take() == [("session_committed", {"handle": handle, "version": n}) for n in (3, 4)]


def test_nothing_happened_nothing_told(app: TestApp) -> None:
    """Reads, changes that change nothing and requests that do not touch the session send no signal."""
    browser, _ = started(app, a=[1])
    ears = Ears(app)
    browser.run(lambda: dict(session))
    browser.run(lambda: session.update(a=list(session["a"])))
    browser.get("/untouched")
    app.browser().run(lambda: session.get("a"))
    app.browser().run(lambda: session.clear())
    app.browser().run(lambda: session.destroy())
    assert ears.take() == []


def test_rotated(app: TestApp) -> None:
    """A rotation tells session_rotated after the commit that it rode on, once however often it was asked."""
    browser, handle = started(app)
    ears = Ears(app)

    def view() -> None:
        session["a"] = 2
        session.regenerate()
        session.regenerate()

    browser.run(view)
    about = {"handle": handle, "version": 2}
    assert ears.take() == [("session_committed", about), ("session_rotated", about)]


def test_a_first_session_is_not_rotated(app: TestApp) -> None:
    """regenerate() in the request that creates a session tells of the creation alone."""
    ears = Ears(app)
    browser = app.browser()
    browser.run(lambda: (session.update(a=1), session.regenerate()))
    assert [name for name, _ in ears.take()] == ["session_created"]


@pytest.mark.parametrize("how", ["never was", "ended"])
def test_a_session_in_the_place_of_a_dead_one_is_not_rotated(app: TestApp, how: str) -> None:
    """Nor where the browser came with an id that names nothing: its session is a first one."""
    browser, _ = started(app)
    late = browser.twin()
    browser.run(lambda: session.destroy())
    if how == "never was":
        late.client.set_cookie("session", "x" * 22 + "." + "y" * 43)
    ears = Ears(app)
    late.run(lambda: (session.update(a=1), session.regenerate()))
    assert [name for name, _ in ears.take()] == ["session_created"]


@pytest.mark.parametrize("how", ["clear", "destroy"])
def test_destroyed(app: TestApp, how: str) -> None:
    """destroy(), and clear() with nothing after it, tell session_destroyed, once."""
    browser, handle = started(app)
    late = browser.twin()
    ears = Ears(app)
    browser.run(lambda: getattr(session, how)())
    assert ears.take() == [("session_destroyed", {"handle": handle})]
    # The id of a session that is no more names nothing that could end.
    late.run(lambda: getattr(session, how)())
    assert ears.take() == []


def test_destroyed_and_begun_anew(app: TestApp) -> None:
    """What is set after destroy() starts another session: both are told, in order."""
    browser, handle = started(app)
    ears = Ears(app)
    browser.run(lambda: (session.destroy(), session.update(b=1)))
    told = ears.take()
    assert [name for name, _ in told] == ["session_destroyed", "session_created"]
    assert told[0][1]["handle"] == handle
    assert told[1][1] == {"handle": handle_of(browser), "version": 1}
    assert handle_of(browser) != handle


def test_cleared_and_filled_again(app: TestApp) -> None:
    """clear() followed by new keys is a commit of the same session."""
    browser, handle = started(app)
    ears = Ears(app)
    browser.run(lambda: (session.clear(), session.update(b=1)))
    assert ears.take() == [("session_committed", {"handle": handle, "version": 2})]


@pytest.mark.parametrize("how", ["read", "blind"])
def test_discarded(app: TestApp, how: str) -> None:
    """A delta that finds its session ended tells session_discarded, once, and why."""
    browser, handle = started(app)
    other = browser.twin()
    ears = Ears(app)

    def view() -> None:
        if how == "read":
            assert session["a"] == 1
        other.run(lambda: session.destroy())
        session["b"] = 1

    browser.run(view)
    assert ears.take() == [
        ("session_destroyed", {"handle": handle}),
        ("session_discarded", {"handle": handle, "reason": "gone"}),
    ]


@pytest.mark.parametrize("error", ["type", "large", "conflict", "retries"])
def test_an_error_is_told_by_itself(make_app: MakeApp, error: str) -> None:
    """What an exception has told is not told as a discard, too: the request was answered with the error."""
    app = make_app(SESSION_MAX_BYTES=1000, SESSION_CONFLICT="overwrite" if error == "retries" else "raise")
    browser, _ = started(app, n=1)
    other = browser.twin()
    ears = Ears(app)

    def view() -> None:
        session["n"] += 1
        if error in ("conflict", "retries"):
            other.run(lambda: session.update(n=session["n"] + 10))
        if error == "type":
            session["a"] = object()
        if error == "large":
            session["a"] = "x" * 2000

    wrapped = retry_on_conflict(attempts=2, backoff=0)(view) if error == "retries" else view
    browser.run(wrapped, status={"type": 500, "large": 413}.get(error, 409))
    assert "session_discarded" not in [name for name, _ in ears.take()]
    assert app.stats()["discards"] == 0


def test_discarded_after_a_rotation(app: TestApp) -> None:
    """A delta that a rotation with in_flight=False shut out is told as stale."""
    browser, handle = started(app)
    other = browser.twin()

    def view() -> None:
        assert session["a"] == 1
        other.run(lambda: session.regenerate(in_flight=False))
        session["b"] = 1

    ears = Ears(app)
    browser.run(view)
    assert ears.take()[-1] == ("session_discarded", {"handle": handle, "reason": "stale"})


def test_a_reader_of_a_dead_session_discards_nothing(app: TestApp) -> None:
    """Nothing was changed, so nothing was dropped."""
    browser, _ = started(app)
    other = browser.twin()
    ears = Ears(app)
    browser.run(lambda: (session["a"], other.run(lambda: session.destroy()), dict(session)))
    assert [name for name, _ in ears.take()] == ["session_destroyed"]


def test_conflict_once_a_key(app: TestApp) -> None:
    """Each key in conflict is told once, with what every side made of it, beside the commit."""
    browser, handle = started(app, a=1, b=[1], c=1, gone=1, mine=1)
    other = browser.twin()
    ears = Ears(app)

    def view() -> None:
        session["a"] += 1
        session["b"].append("ours")
        session["c"] += 1
        session.pop("mine")
        assert session.pop("gone") == 1
        assert "new" not in session
        session["new"] = "ours"

        def theirs() -> None:
            session.update(a=10, b=["theirs"], mine="theirs", new="theirs")
            session.pop("gone")

        other.run(theirs)

    browser.run(view)
    told = ears.take()
    conflicts = {about.pop("key"): about for name, about in told if name == "session_conflict"}
    assert [name for name, _ in told if name != "session_conflict"] == ["session_committed"] * 2
    assert len(told) == 2 + len(conflicts)
    missing = merge.MISSING
    expected = {
        "a": (1, 10, 2),
        "b": ([1], ["theirs"], [1, "ours"]),
        "mine": (1, "theirs", missing),
        "new": (missing, "theirs", "ours"),
        "gone": (1, missing, missing),
    }
    # Deleted by both is a change by both; that there is nothing to choose between needs no telling.
    expected = {key: sides for key, sides in expected.items() if key != "gone" or key in conflicts}
    assert conflicts == {
        key: {
            "handle": handle,
            "base": base,
            "theirs": theirs,
            "ours": ours,
            "outcome": ours,
            "policy": "overwrite",
        }
        for key, (base, theirs, ours) in expected.items()
    }


def test_conflict_refused(make_app: MakeApp) -> None:
    """Under "raise" the conflict is told with theirs as the outcome, and no commit is."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, handle = started(app, a=1)
    other = browser.twin()

    def view() -> None:
        session["a"] += 1
        other.run(lambda: session.update(a=10))

    ears = Ears(app)
    browser.run(view, status=409)
    assert [name for name, _ in ears.told] == ["session_committed", "session_conflict"]
    about = ears.take()[1][1]
    assert (about["handle"], about["key"], about["outcome"], about["policy"]) == (handle, "a", 10, "raise")


def test_conflict_merged(make_app: MakeApp) -> None:
    """Merged, the outcome is what was stored, told once however many rounds it took."""
    app = make_app(SESSION_MERGE={"a": merge.add})
    browser, _ = started(app, a=1)
    other = browser.twin()

    def view() -> None:
        session["a"] += 1
        other.run(lambda: session.update(a=10))

    ears = Ears(app)
    browser.run(view)
    [conflict] = [about for name, about in ears.take() if name == "session_conflict"]
    assert (conflict["base"], conflict["theirs"], conflict["ours"], conflict["outcome"]) == (1, 10, 2, 11)
    assert conflict["policy"] is merge.add


def test_corrupt(app: TestApp) -> None:
    """A value that does not decode is told once a request, with key and error."""
    browser, handle = started(app)
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, "a", b"{rubbish")
    other = browser.twin(app.another())
    ears = Ears(other.app)
    for _ in range(2):
        other.run(lambda: [session.get("a"), session.get("a"), dict(session)])
        [(name, about)] = ears.take()
        assert (name, about["handle"], about["key"]) == ("session_corrupt", handle, "a")
        assert isinstance(about["error"], Exception)


def test_only_the_app_concerned_is_told(app: TestApp) -> None:
    """A receiver for one app hears nothing of another, even on the same sessions."""
    other = app.another()
    ears, others = Ears(app), Ears(other)
    browser, _ = started(app)
    browser.twin(other).run(lambda: session.update(a=2))
    assert [name for name, _ in ears.take()] == ["session_created"]
    assert [name for name, _ in others.take()] == ["session_committed"]


def words(value: Any) -> Iterator[str]:
    """Yield all text in what a signal carries, that of attributes too."""
    yield repr(value)
    yield str(value)
    if isinstance(value, Exception):
        yield from map(repr, value.args)
    if hasattr(value, "__dict__") and not callable(value):
        yield repr(vars(value))


def test_no_secret_in_any_signal(app: TestApp) -> None:
    """None of them carries a session id or a secret, old or new, nor its digest."""
    ears = Ears(app)
    browser, handle = started(app, a=1, bad=1)
    sids = [browser.cookies["session"]]
    other = browser.twin()

    def conflicting() -> None:
        session["a"] += 1
        other.run(lambda: session.update(a=10))

    browser.run(conflicting)
    assert app.server is not None
    with app.server.client() as client:
        client.hset(app.prefix + handle, "bad", b"{rubbish")
    browser.run(lambda: (session.update(n=1), session.reload(), dict(session), session.regenerate()))
    sids.append(browser.cookies["session"])

    def discarding() -> None:
        session["x"] = session["a"]
        browser.twin().run(lambda: session.destroy())

    browser.run(discarding)
    fresh = browser.twin(app)
    fresh.run(lambda: dict(session))
    told = ears.take()
    assert {name for name, _ in told} >= {*NAMES} - {"session_corrupt"}
    secrets = {sid.partition(".")[2] for sid in sids}
    assert len(secrets) == 2
    for name, about in told:
        assert "handle" in about, name
        assert about["handle"] == handle
        for value in about.values():
            for text in words(value):
                assert not any(secret in text for secret in secrets), (name, text)


def test_a_receiver_may_use_the_session(app: TestApp) -> None:
    """A receiver runs in the request: it reads the session, and current_app is the sender."""
    seen: list[Any] = []

    def receive(sender: Any, **_about: Any) -> None:
        seen.append((session["a"], session.version, current_app._get_current_object() is sender))

    signals.session_created.connect(receive, app.flask)
    started(app)
    assert seen == [(1, 1, True)]


def test_the_names() -> None:
    """All signals of the contract are there, each with a name of its own."""
    assert {name for name in vars(signals) if name.startswith("session_")} == set(NAMES)
    assert len({getattr(signals, name).name for name in NAMES}) == len(NAMES)


def test_a_receiver_that_fails_keeps_no_other_signal_back(make_app: MakeApp) -> None:
    """What has happened is told, whatever the receiver of something else raises; and that is raised."""
    app = make_app(PROPAGATE_EXCEPTIONS=False)
    told: list[str] = []

    def fail(_app: Any, **_: Any) -> None:
        raise RuntimeError

    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        session.destroy()
        session["x"] = 1

    with (
        signals.session_destroyed.connected_to(fail, app.flask),
        signals.session_created.connected_to(lambda _app, **_: told.append("created"), app.flask),
    ):
        browser.run(view, status=500)
    assert told == ["created"]
    assert browser.run(lambda: dict(session)) == {"x": 1}


def test_a_receiver_that_is_killed(make_app: MakeApp) -> None:
    """A greenlet that is killed in a receiver ends so; what else has happened is told before."""

    class Killed(BaseException):
        pass

    app = make_app()
    told: list[str] = []

    def kill(_app: Any, **_: Any) -> None:
        raise Killed

    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        session.regenerate()
        session["b"] = 1

    with (
        signals.session_committed.connected_to(kill, app.flask),
        signals.session_rotated.connected_to(lambda _app, **_: told.append("rotated"), app.flask),
        pytest.raises(Killed),
    ):
        browser.run(view)
    assert told == ["rotated"]


def test_a_receiver_of_a_conflict_that_fails(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    """The conflict is answered as ever, and the receiver's failure is logged."""
    app = make_app(SESSION_CONFLICT="raise")

    def fail(_app: Any, **_: Any) -> None:
        raise RuntimeError("mine")

    browser = app.browser()
    browser.run(lambda: session.update(n=1))
    twin = browser.twin()

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=10))

    with signals.session_conflict.connected_to(fail, app.flask):
        browser.run(view, status=409)
    assert "RuntimeError: mine" in caplog.text
