"""Threads that share a request, by copy_current_request_context(): each change counts, once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from flask import Response, copy_current_request_context, session, stream_with_context

from luasession import SessionUnavailable, merge, session_created

from .conftest import MakeApp, TestApp


@contextmanager
def meanwhile(app: TestApp, what: str, work: Callable[[], Any]) -> Iterator[None]:
    """Do something in this thread's next commit or load, before it is sent or once it is answered.

    :param what: the name of the store's method, and "before" or "after".
    """
    name, when = what.split()
    store = app.flask.session_interface.store  # type: ignore[attr-defined]
    original, mine, done = getattr(store, name), threading.current_thread(), []

    def call(*args: Any, **named: Any) -> Any:
        is_first = threading.current_thread() is mine and not done
        if is_first:
            done.append(True)
        if is_first and when == "before":
            work()
        result = original(*args, **named)
        if is_first and when == "after":
            work()
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, name, call)
        yield
        assert done


@contextmanager
def lingering(app: TestApp, threads: list[threading.Thread]) -> Iterator[threading.Event]:
    """Have the first commit of these threads take its time once it is applied; give what is set by then."""
    store = app.flask.session_interface.store  # type: ignore[attr-defined]
    original, applied = store.commit, threading.Event()

    def commit(*args: Any, **named: Any) -> Any:
        result = original(*args, **named)
        if threading.current_thread() in threads and not applied.is_set():
            applied.set()
            time.sleep(0.1)  # until then the request has come to its end
        return result

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "commit", commit)
        yield applied
        for each in threads:
            each.join(10)


def thread(function: Callable[[], Any]) -> tuple[threading.Thread, threading.Event]:
    """Return a thread in a copy of the request's context, and what it waits for before it runs and ends."""
    go = threading.Event()

    @copy_current_request_context
    def run() -> None:
        assert go.wait(10)
        function()

    started = threading.Thread(target=run)
    started.start()
    return started, go


@pytest.mark.parametrize("policy", ["overwrite", "raise", merge.add])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("is_new", [False, True])
def test_a_thread_that_ends_while_its_request_is_saved(
    make_app: MakeApp, policy: Any, when: str, is_new: bool
) -> None:
    """The end of a copied context stores nothing that the request itself is just storing (G6)."""
    app = make_app(SESSION_CONFLICT=policy)
    created: list[str] = []
    session_created.connect(lambda _app, handle, **_: created.append(handle), app.flask, weak=False)
    browser = app.browser()
    if not is_new:
        browser.run(lambda: session.update(n=0))
    patches: list[Any] = []

    def view() -> None:
        started, go = thread(lambda: None)

        def end() -> None:
            go.set()
            # It waits for this thread, which is at it: time enough to go wrong, if it did not.
            started.join(0.1)

        session["n"] = session.get("n", 0) + 1
        patches.append(meanwhile(app, f"commit {when}", end))
        patches[0].__enter__()

    browser.run(view)
    patches[0].__exit__(None, None, None)
    assert browser.run(lambda: (session["n"], session.version)) == (1, 1 if is_new else 2)
    assert len(created) == 1


def test_what_a_thread_changes_while_its_request_is_saved(make_app: MakeApp) -> None:
    """What a thread sets when the delta of its request is already on its way is stored as its context ends."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    patches: list[Any] = []
    threads: list[threading.Thread] = []

    def view() -> None:
        started, go = thread(lambda: session.update(late=1))
        threads.append(started)

        def change() -> None:
            go.set()
            started.join(0.1)

        session["b"] = 2
        patches.append(meanwhile(app, "commit after", change))
        patches[0].__enter__()

    browser.run(view)
    patches[0].__exit__(None, None, None)
    threads[0].join(10)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "b": 2, "late": 1}


def test_a_request_that_is_saved_while_its_thread_commits(make_app: MakeApp) -> None:
    """A commit of a thread that is on its way is waited for at the end of the request, and both are stored."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    threads: list[threading.Thread] = []

    def commit() -> None:
        session["b"] = 2
        session.commit()

    def view() -> None:
        started, go = thread(commit)
        threads.append(started)
        go.set()
        assert applied.wait(10)
        session["c"] = 3

    with lingering(app, threads) as applied:
        browser.run(view)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "b": 2, "c": 3}
    assert app.stats()["discards"] == 0


def test_a_stream_that_ends_while_its_thread_is_saved_late(make_app: MakeApp) -> None:
    """What a streamed response changes last is stored though another thread's late changes are on their way."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    threads: list[threading.Thread] = []

    def view() -> Response:
        started, go = thread(lambda: session.update(b=2))
        threads.append(started)

        def generate() -> Iterator[str]:
            yield "begun,"
            go.set()
            assert applied.wait(10)
            session["c"] = 3
            yield "done"

        return Response(stream_with_context(generate()))

    with lingering(app, threads) as applied:
        browser.run(view)
        assert browser.response is not None
        assert browser.response.text == "begun,done"
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (lambda: session.update(n=2), {"n": 2, "gone": 1}),
        (lambda: session.pop("n"), {"gone": 1}),
        (lambda: session.update(gone=2), {"n": 1, "gone": 2}),
    ],
    ids=["set again", "deleted", "set, not deleted"],
)
def test_a_change_while_a_commit_is_on_its_way(
    make_app: MakeApp, changes: Callable[[], Any], expected: dict[str, int]
) -> None:
    """What one thread changes while another one's commit is on its way is stored at the end."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(gone=1))

    def view() -> None:
        started, go = thread(changes)
        session["n"] = 1
        if "gone" in expected and expected["gone"] == 2:
            del session["gone"]
        go_on = (go.set, lambda: started.join(0.1))
        with meanwhile(app, "commit after", lambda: [step() for step in go_on]):
            session.commit()
        started.join(10)

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: dict(session)) == expected


@pytest.mark.parametrize(
    ("first", "changes", "expected"),
    [
        (lambda: setattr(session, "principal", "ada"), lambda: setattr(session, "principal", None), None),
        (lambda: setattr(session, "label", "old"), lambda: setattr(session, "label", "new"), "new"),
        (lambda: session.clear(), lambda: session.clear(), None),
    ],
    ids=["principal", "label", "clear"],
)
def test_what_is_not_a_key_while_a_commit_is_on_its_way(
    make_app: MakeApp, first: Callable[[], Any], changes: Callable[[], Any], expected: str | None
) -> None:
    """What one thread changes beside the keys while another one's commit is on its way is stored at the end."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        started, go = thread(changes)
        first()
        session["b"] = 2
        go_on = (go.set, lambda: started.join(0.1))
        with meanwhile(app, "commit after", lambda: [step() for step in go_on]):
            session.commit()
        started.join(10)

    browser.run(view)
    seen = browser.twin(app.another()).run(lambda: (session.principal or session.label, sorted(session)))
    assert seen == (expected, [] if "clear" in first.__code__.co_names else ["a", "b"])


@pytest.mark.parametrize("ttl", [None, 0.3])
def test_a_list_set_while_a_commit_is_on_its_way(make_app: MakeApp, ttl: float | None) -> None:
    """A mutable value that is set meanwhile has the end that it was set with, and no other."""
    app = make_app()
    browser = app.browser()
    browser.run(lambda: session.update(a=1))

    def view() -> None:
        started, go = thread(lambda: session.set("k", [2], ttl))
        session.set("k", [1], None if ttl else 0.3)
        go_on = (go.set, lambda: started.join(0.1))
        with meanwhile(app, "commit after", lambda: [step() for step in go_on]):
            session.commit()
        started.join(10)

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session.get("k")) == [2]
    time.sleep(0.35)
    assert browser.twin(app.another()).run(lambda: session.get("k")) == (None if ttl else [2])


def test_a_change_while_a_merge_is_on_its_way(make_app: MakeApp) -> None:
    """What is set while a merged value is being stored takes its place in the end."""
    app = make_app(SESSION_MERGE={"n": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    twin = browser.twin()

    def view() -> None:
        started, go = thread(lambda: session.update(n=100))
        session["n"] += 1
        twin.run(lambda: session.update(n=10))

        def other() -> None:
            go.set()
            started.join(0.1)

        store = app.flask.session_interface.store  # type: ignore[attr-defined]
        original, calls = store.commit, []

        def call(*args: Any, **named: Any) -> Any:
            result = original(*args, **named)
            calls.append(result)
            if len(calls) == 2:
                other()
            return result

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(store, "commit", call)
            session.commit()
            started.join(10)
        assert len(calls) == 2

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: session["n"]) == 100


def test_a_thread_whose_merge_breaks_off(make_app: MakeApp) -> None:
    """A request that waited for a thread whose commit then broke off does not send the same once more (G6)."""
    app = make_app(SESSION_MERGE={"n": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(n=0))
    twin = browser.twin()
    store = app.flask.session_interface.store  # type: ignore[attr-defined]
    original, between, threads = store.commit, threading.Event(), []

    def call(*args: Any, **named: Any) -> Any:
        if threading.current_thread() not in threads:
            return original(*args, **named)
        if between.is_set():
            original(*args, **named)
            raise SessionUnavailable("the reply is lost")
        result = original(*args, **named)
        between.set()
        time.sleep(0.1)  # until then the request has come to its end, and waits
        return result

    def commit() -> None:
        with pytest.raises(SessionUnavailable):
            session.commit()

    def view() -> None:
        session["n"] += 1
        twin.run(lambda: session.update(n=10))
        started, go = thread(commit)
        threads.append(started)
        go.set()
        assert between.wait(10)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(store, "commit", call)
        browser.run(view)
        threads[0].join(10)
    assert browser.twin(app.another()).run(lambda: (session["n"], session.version)) == (11, 3)


def test_the_end_of_a_request_does_not_wait_for_ever(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a thread is at it for too long the request is answered 503, once, and stores nothing."""
    app = make_app(SESSION_REDIS_DEADLINE=0.1)
    monkeypatch.setattr("luasession.threads._LONGEST_COMMIT", 0.1)
    seen: list[int] = []

    def look(response: Response) -> Response:
        seen.append(response.status_code)
        return response

    app.flask.after_request(look)
    browser = app.browser()
    browser.run(lambda: session.update(a=1, n=0))
    seen.clear()
    begun, done = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def slow(n: int) -> int:
        begun.set()
        assert done.wait(10)
        return n + 1

    def view() -> None:
        started, go = thread(lambda: session.atomic_update("n", slow))
        threads.append(started)
        go.set()
        assert begun.wait(10)
        session["b"] = 2

    browser.run(view, status=503)
    done.set()
    threads[0].join(10)
    assert seen == [200, 503]
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"a": 1, "n": 1}


@pytest.mark.parametrize("how", ["commit", "reload", "atomic_update"])
def test_an_async_receiver_commits(make_valkey_app: MakeApp, how: str) -> None:
    """An async receiver of a signal, which runs in another thread, may use the session in every way."""
    app = make_valkey_app()

    async def receive(_app: Any, **_: Any) -> None:
        if how == "commit":
            session["more"] = 1
            session.commit()
        elif how == "reload":
            session.reload()
        else:
            session.atomic_update("more", lambda _: 1)

    browser = app.browser()
    with session_created.connected_to(receive, app.flask):
        browser.run(lambda: session.update(a=1))
    assert browser.run(lambda: dict(session)) == {"a": 1} | ({} if how == "reload" else {"more": 1})


def test_two_first_reads(make_app: MakeApp) -> None:
    """Two threads that read first at the same time read one version (G4), and a conflict is found on it."""
    app = make_app(SESSION_CONFLICT="raise", SESSION_CACHE_TTL=None)
    browser = app.browser()
    browser.run(lambda: session.update(n=1, u=1))
    twin = browser.twin()
    read: list[int] = []

    def view() -> None:
        started, go = thread(lambda: read.append(session["n"]))

        def other() -> None:
            # The other thread is answered first, and what this one is answered is newer.
            go.set()
            started.join(10)
            twin.run(lambda: session.update(n=50))

        with meanwhile(app, "load before", other):
            session["n"] += 1
        assert session["n"] == read[0] + 1

    browser.run(view, status=409)
    assert (read, browser.run(lambda: session["n"])) == ([1], 50)


def test_a_thread_does_not_wait_for_ever(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit that waits for a thread which commits itself ends: the second one is told so, and the first goes on."""
    app = make_app(SESSION_REDIS_DEADLINE=0.1)
    monkeypatch.setattr("luasession.threads._LONGEST_COMMIT", 0.1)
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    told: list[str] = []

    def commit() -> None:
        try:
            session.commit()
        except SessionUnavailable as error:
            told.append(str(error))

    def view() -> None:
        started, go = thread(commit)
        session["b"] = 2
        go_on = (go.set, lambda: started.join(10))
        with meanwhile(app, "commit before", lambda: [step() for step in go_on]):
            session.commit()

    browser.run(view)
    assert told == ["another thread of this request has been committing for too long"]
    assert browser.run(lambda: (dict(session), session.version)) == ({"a": 1, "b": 2}, 2)


def test_many_threads_of_many_requests(make_valkey_app: MakeApp) -> None:
    """At random: a counter that merges counts each request once, whenever its thread ends."""
    app = make_valkey_app(SESSION_MERGE={"hits": merge.add})
    browser = app.browser()
    browser.run(lambda: session.update(hits=0))
    chance = random.Random(5)
    threads: list[threading.Thread] = []

    def view() -> None:
        pause = chance.uniform(0, 0.0006)
        started, go = thread(lambda: time.sleep(pause))
        threads.append(started)
        go.set()
        session["hits"] += 1

    for _ in range(150):
        browser.run(view)
    for each in threads:
        each.join(10)
    assert browser.run(lambda: session["hits"]) == 150
