"""G3: the same key changed by two requests: the policy decides, and says so."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Response, session

from luasession import SessionConflict, merge
from luasession.signals import session_conflict

from .conftest import MakeApp, TestApp


def collect(app: TestApp) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def receive(_sender: Any, **about: Any) -> None:
        told.append({key: value for key, value in about.items() if not key.startswith("_")})

    session_conflict.connect(receive, app.flask, weak=False)
    return told


def overlap(app: TestApp, theirs: Any, ours: Any, status: int = 200) -> dict[str, Any]:
    """Run ``theirs`` inside a request that has read key and then does ``ours``; return the session."""
    browser = app.browser()
    browser.run(lambda: session.update(key=["base"], count=5))
    other = browser.twin()

    def outer() -> None:
        dict(session)
        other.run(theirs)
        ours()

    browser.run(outer, status=status)
    result: dict[str, Any] = browser.twin().run(lambda: dict(session))
    return result


def test_the_last_writer_wins_and_the_signal_tells(app: TestApp) -> None:
    """By default ours is stored, and session_conflict carries base, theirs, ours and outcome, once."""
    told = collect(app)
    after = overlap(app, lambda: session.update(key=["theirs"]), lambda: session["key"].append("ours"))
    assert after["key"] == ["base", "ours"]
    [about] = told
    assert about["key"] == "key"
    assert about["base"] == ["base"]
    assert about["theirs"] == ["theirs"]
    assert about["ours"] == about["outcome"] == ["base", "ours"]
    assert about["policy"] == "overwrite"
    assert app.stats()["conflicts"] == 1


def test_a_blind_write_is_never_a_conflict(make_app: MakeApp) -> None:
    """A key that was set without being read is stored under every policy, and nothing is told."""
    app = make_app(SESSION_CONFLICT="raise")
    told = collect(app)
    browser = app.browser()
    browser.run(lambda: session.update(key=1))
    other = browser.twin()

    def outer() -> None:
        other.run(lambda: session.update(key=2))
        session["key"] = 3

    browser.run(outer)
    assert browser.run(lambda: session["key"]) == 3
    assert told == []


def test_raise_stores_nothing_and_answers_409(make_app: MakeApp) -> None:
    """Under "raise" nothing of the delta is stored and the response becomes a 409 without cookies."""
    app = make_app(SESSION_CONFLICT="raise")

    def ours() -> None:
        session["key"] = ["ours"]
        session["more"] = 1

    after = overlap(app, lambda: session.update(key=["theirs"]), ours, status=409)
    assert after == {"key": ["theirs"], "count": 5}


@pytest.mark.parametrize("handled", [SessionConflict, 409])
def test_the_apps_handler_answers(make_app: MakeApp, handled: Any) -> None:
    """errorhandler(SessionConflict) or errorhandler(409) makes the answer, and sees the keys."""
    app = make_app(SESSION_CONFLICT="raise")
    seen: list[Any] = []

    @app.flask.errorhandler(handled)
    def answer(error: Any) -> Response:
        seen.append(error.keys)
        return Response("mine", 409)

    overlap(app, lambda: session.update(key=["theirs"]), lambda: session["key"].append(1), status=409)
    assert seen == [("key",)]


def test_a_delete_counts_as_a_change(make_app: MakeApp) -> None:
    """A key deleted by one and changed by the other is in conflict."""
    app = make_app(SESSION_CONFLICT="raise")
    after = overlap(app, lambda: session.pop("key"), lambda: session["key"].append(1), status=409)
    assert after == {"count": 5}


def test_merges_count_both(make_app: MakeApp) -> None:
    """Increments, appended elements and a function of one's own keep both sides' work."""
    app = make_app(SESSION_MERGE={"count": merge.add, "k*": merge.append})

    def theirs() -> None:
        session["count"] += 10
        session["key"].append("theirs")

    def ours() -> None:
        session["count"] += 1
        session["key"].append("ours")

    assert overlap(app, theirs, ours) == {"count": 16, "key": ["base", "theirs", "ours"]}


def test_types_that_do_not_fit_a_merge_are_told(make_app: MakeApp) -> None:
    """A merge function that cannot merge stores ours, and the signal names "overwrite" as what decided."""
    app = make_app(SESSION_MERGE={"key": merge.append, "count": merge.add})
    told = collect(app)

    def ours() -> None:
        session["key"].append("ours")
        session["count"] += 1

    after = overlap(app, lambda: session.update(key="a text", count=7), ours)
    assert after == {"key": ["base", "ours"], "count": 8}
    by_key = {about["key"]: (about["theirs"], about["outcome"], about["policy"]) for about in told}
    assert by_key == {"key": ("a text", ["base", "ours"], "overwrite"), "count": (7, 8, merge.add)}


def test_write_skew_under_raise_and_serializable(make_app: MakeApp) -> None:
    """Each reads what the other writes: "raise" lets both pass, "serializable" stops the second."""

    def skew(policy: str, status: int) -> dict[str, Any]:
        return overlap(
            make_app(SESSION_CONFLICT=policy),
            lambda: session.update(count=len(session["key"])),
            lambda: session.update(key=[session["count"]]),
            status,
        )

    assert skew("raise", 200) == {"key": [5], "count": 1}
    assert skew("serializable", 409) == {"key": ["base"], "count": 1}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("policy", "status"), [("raise", 200), ("serializable", 409)])
def test_write_skew_with_an_atomic_update(make_app: MakeApp, policy: str, status: int, whole: bool) -> None:
    """Under "serializable" an atomic update counts what else was read, one key or all, and then refuses."""
    app = make_app(SESSION_CONFLICT=policy)
    browser = app.browser()
    browser.run(lambda: session.update(a=0, n=0))
    other = browser.twin()

    def theirs() -> None:
        session["a"] += 1 if session["n"] == 0 else 100

    def ours() -> None:
        assert (dict(session)["a"] if whole else session["a"]) == 0
        other.run(theirs)
        session.atomic_update("n", lambda n: n + 1)

    browser.run(ours, status=status)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "n": int(status == 200)}


@pytest.mark.parametrize("read", ["nothing", "the key", "another key"])
def test_a_serializable_atomic_update_goes_on_by_itself(make_app: MakeApp, read: str) -> None:
    """Where nothing else that it has read was changed, it runs again until it is stored on what it was given."""
    app = make_app(SESSION_CONFLICT="serializable")
    browser = app.browser()
    browser.run(lambda: session.update(n=0, a=1))
    other = browser.twin()
    given: list[int] = []

    def increment(n: int) -> int:
        given.append(n)
        if len(given) < 3:
            other.run(lambda: session.atomic_update("n", lambda n: n + 10))
        return n + 1

    def view() -> Any:
        if read != "nothing":
            assert session["n" if read == "the key" else "a"] in (0, 1)
        return session.atomic_update("n", increment)

    assert browser.run(view) == 21
    assert given == [0, 10, 20]
    assert browser.twin(app.another()).run(lambda: session["n"]) == 21


def test_overlapping_flashes_all_arrive(app: TestApp) -> None:
    """Messages flashed by overlapping requests are all shown, each once."""
    from flask import flash, get_flashed_messages

    browser = app.browser()
    browser.run(lambda: flash("first"))
    other = browser.twin()

    def outer() -> None:
        flash("second")
        other.run(lambda: flash("third"))

    browser.run(outer)
    assert sorted(browser.run(get_flashed_messages)) == ["first", "second", "third"]
    assert browser.run(get_flashed_messages) == []


def test_the_creation_is_in_the_journal(make_app: MakeApp) -> None:
    """What was read of a session that had just been created is known to be unchanged by a second commit elsewhere."""
    app = make_app(SESSION_CONFLICT="raise")
    after = overlap(app, lambda: session.update(other=1), lambda: session["key"].append("ours"))
    assert after == {"key": ["base", "ours"], "count": 5, "other": 1}


def test_a_conflict_beyond_the_journal_is_still_one(make_app: MakeApp) -> None:
    """A base that the journal no longer reaches counts as changed under "raise"."""
    app = make_app(SESSION_CONFLICT="raise")

    def theirs() -> None:
        for n in range(150):
            session[f"some-longer-name-{n}"] = n
            session.commit()
        session["key"] = ["theirs"]

    after = overlap(app, theirs, lambda: session["key"].append("ours"), status=409)
    assert after["key"] == ["theirs"]


def test_a_conflict_behind_other_commits_is_found(make_app: MakeApp) -> None:
    """However many commits of others lie between, the one that changed the key is found in the journal."""
    app = make_app(SESSION_CONFLICT="raise")

    def theirs() -> None:
        for n in range(3):
            session[f"other{n}"] = n
            session.commit()
        session["key"] = ["theirs"]
        session.commit()
        session["last"] = 1

    after = overlap(app, theirs, lambda: session["key"].append("ours"), status=409)
    assert after["key"] == ["theirs"]


def test_an_own_commit_is_no_conflict(make_app: MakeApp) -> None:
    """What a request has committed itself is not in the way of its next commit, whoever came in between."""
    app = make_app(SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(n=0, k=0))
    other = browser.twin()

    def view() -> None:
        session["n"] += 1
        other.run(lambda: session.update(k=1))
        session.commit()
        session["n"] += 1

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"n": 2, "k": 1}


def test_a_base_of_a_lost_future_is_a_conflict(make_app: MakeApp) -> None:
    """A base that a failover has lost counts as changed, though there is a version of its number."""
    app = make_app(SESSION_CONFLICT="raise")
    browser = app.browser()
    browser.run(lambda: session.update(key="old"))
    handle, other = browser.run(lambda: session.handle), browser.twin(app.another())
    assert app.server is not None
    with app.server.client() as client:
        kept = client.dump(app.prefix + handle)
        browser.run(lambda: session.update(key="lost"))

        def view() -> None:
            assert session["key"] == "lost"
            client.restore(app.prefix + handle, 0, kept, replace=True)
            for n in range(3):
                other.run(lambda: session.update({f"other{n}": n}))  # noqa: B023
            session["key"] += " and found"

        browser.run(view, status=409)
    assert other.run(lambda: session["key"]) == "old"
