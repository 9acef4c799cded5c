"""A visit: which cookies it finds, what it asks the store, and what the response has to carry; without a server."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY, Mock, call

import pytest

from luasession import CorruptSession, SessionUnavailable, visit
from luasession.client import Patience
from luasession.config import Config
from luasession.delta import Change, Delta, Put
from luasession.errand import Errand
from luasession.ids import SessionId
from luasession.outcome import Applied, Conflicting, Loaded, Refused, Standing
from luasession.snapshot import Snapshot
from luasession.store import Caller, Store
from luasession.visit import Visit, now_ns

from .images import NOW_MS, identity, image, state, write_id

ID = SessionId("AQIDBAUGBwgJCgsMDQ4PEA", "s" * 43)
SETTINGS = {"PERMANENT_SESSION_LIFETIME": 3600}
WRITE = Delta(sets={b"a": Put(b"1")})


def store_with(**answers: Any) -> Any:
    """Return a stand-in for a store that answers so, and has nothing in its cache."""
    store = Mock(spec=Store)
    store.caller.side_effect = lambda opened, lifetime_ms: Caller(opened, lifetime_ms, Patience(0))
    store.now_ms.return_value = NOW_MS
    store.trusted.return_value = None
    for name, answer in answers.items():
        getattr(store, name).configure_mock(
            **({"side_effect": answer} if isinstance(answer, Exception) else {"return_value": answer})
        )
    return store


def visit_to(store: Any, cookie: str | None = None, name: str = "session", **config: Any) -> Visit:
    cookies = f"session={ID.sid}" if cookie is None else cookie
    return Visit(store, Config(**config), cookies, name, SETTINGS, now_ns(), Mock())


def applied(version: int, *, former: bool = False, **more: Any) -> Applied:
    values: dict[str, Any] = {
        "version": version,
        "write_id": write_id(version),
        "replaced": image(version - 1).pair,
        "snapshot": None,
        "former": former,
        "identity": identity(),
        "state": state(version),
        "touched": False,
        "expiry_changed": False,
        "now_ms": NOW_MS,
        "report": {},
    }
    return Applied(**{"stored": Delta(), "offered": False} | values | more)


def creations(store: Mock) -> list[Any]:
    """Return the commits that were to make a session."""
    return [each for each in store.commit.call_args_list if each.kwargs.get("create")]


# Cookies.


@pytest.mark.parametrize(
    "cookie",
    [
        f"session={ID.sid}",
        f"other=1; session={ID.sid}; more=2",
        f"other=1;session={ID.sid};more=2",
        f"xsession=1; session_x=2; sessio=3; session={ID.sid}",
        f"session={ID.sid}; session=second",
        f"session= {ID.sid} ",
    ],
)
def test_the_id_is_found(cookie: str) -> None:
    """Wherever it stands among other cookies the id is found, and the first of a name counts."""
    visit = visit_to(store_with(), cookie)
    assert visit.id is not None
    assert visit.id.sid == ID.sid
    assert visit.presented_handle == ID.handle


@pytest.mark.parametrize(
    "cookie", ["", "session=", f"Session={ID.sid}", f"session={ID.handle}", "session_v=3"]
)
def test_without_an_id_nobody_is_asked(cookie: str) -> None:
    """No id, or one of the wrong form, is no session: reading costs no call (G11)."""
    store = store_with()
    visit = visit_to(store, cookie)
    assert (visit.load(), visit.reload(), visit.id, visit.destroy()) == (None, None, None, False)
    assert visit.standing is Standing.MISSING
    assert store.method_calls == []


@pytest.mark.parametrize("name", ["s.d", "s+", "a|b", "$"])
def test_a_name_is_no_pattern(name: str) -> None:
    """The cookie's name is meant as it stands."""
    visit = visit_to(store_with(), f"sxd=x; {name}={ID.sid}", name)
    assert visit.id is not None
    assert visit_to(store_with(), f"sxd={ID.sid}; ss={ID.sid}; a={ID.sid}", name).id is None


@pytest.mark.parametrize(
    ("hints", "version"),
    [
        ("", 0),
        ("; session_v=7", 7),
        ("; session_v= 7 ", 7),
        ("; session_v=9999999999", 9_999_999_999),
        ("; session_v=10000000000", 0),
        ("; session_v=-1", 0),
        ("; session_v=²", 0),
        ("; session_v=٣".encode().decode("latin1"), 0),
    ],
)
def test_the_hint_goes_to_the_cache(hints: str, version: int) -> None:
    """A snapshot is trusted from the hint's version on; a hint that is none counts as 0 (G9)."""
    store = store_with(trusted=image(9))
    visit = visit_to(store, f"session={ID.sid}{hints}")
    assert visit.load() == image(9)
    assert store.trusted.call_args.args[1] == version
    store.load.assert_not_called()


def test_others_writing_means_asking() -> None:
    """While the other hint is there no cached snapshot is trusted, however new."""
    store = store_with(trusted=image(9), load=Loaded(Standing.LIVE, image(10)))
    assert visit_to(store, f"session={ID.sid}; session_o=1").load() == image(10)
    store.trusted.assert_not_called()


def test_a_hint_above_what_is_stored_is_reset() -> None:
    """After a failover took versions back the response carries the version that is there."""
    visit = visit_to(store_with(load=Loaded(Standing.LIVE, image(3))), f"session={ID.sid}; session_v=8")
    visit.load()
    assert visit.made == 3


# Loads.


@pytest.mark.parametrize("standing", [Standing.MISSING, Standing.GONE, Standing.STALE])
def test_what_is_absent_stays_absent(standing: Standing) -> None:
    """Once Redis has said so it is not asked again, and nothing of it is read."""
    store = store_with(load=Loaded(standing))
    visit = visit_to(store)
    assert [visit.load(), visit.load(), visit.reload()] == [None] * 3
    assert store.load.call_count == 1
    assert (visit.id is None) == (standing is Standing.MISSING)


def test_a_failed_load_spoils_the_visit() -> None:
    """What could not be read cannot be built on: the error goes through, and the visit says so."""
    visit = visit_to(store_with(load=SessionUnavailable("down")))
    with pytest.raises(SessionUnavailable):
        visit.load()
    assert visit.failed


# Commits.


def test_a_commit_on_top_of_what_was_seen() -> None:
    """The next version after the hint sets the hint alone; a later one tells that others wrote (G9)."""
    visit = visit_to(store_with(commit=applied(8)), f"session={ID.sid}; session_v=7")
    visit.commit(WRITE)
    assert (visit.made, visit.others_wrote, visit.issued) == (8, False, None)
    visit = visit_to(store_with(commit=applied(9)), f"session={ID.sid}; session_v=7")
    visit.commit(WRITE)
    assert (visit.made, visit.others_wrote) == (9, True)


@pytest.mark.parametrize("standing", [Standing.GONE, Standing.STALE])
def test_an_ended_session_is_not_written(standing: Standing) -> None:
    """Known to have ended it is not even asked for, and starts no new one (G7)."""
    store = store_with(load=Loaded(standing))
    visit = visit_to(store)
    visit.load()
    assert visit.commit(WRITE) == Refused(standing)
    store.commit.assert_not_called()


def test_missing_is_gone_to_whoever_read_it() -> None:
    """A delta with a base starts no session; a blind one does, under an id of its own."""
    store = store_with()
    store.commit.side_effect = [Refused(Standing.MISSING), Refused(Standing.MISSING), applied(1)]
    based = visit_to(store)
    assert based.commit(WRITE._replace(base=image(1).pair)) == Refused(Standing.GONE)
    assert based.issued is None
    blind = visit_to(store)
    assert blind.commit(WRITE) == applied(1)
    assert creations(store) == [call(blind.issued, ANY, ANY, create=True, meanwhile=None)]
    assert blind.issued is not None
    assert blind.issued.handle != ID.handle
    assert blind.id is blind.issued


@pytest.mark.parametrize("delta", [Delta(), Delta(label=Change("x")), Delta(cleared=True)], ids=repr)
def test_not_every_delta_starts_a_session(delta: Delta) -> None:
    """Without a field or a principal nothing is made; once the response is on its way that is an error (G15)."""
    store = store_with()
    assert visit_to(store, "").commit(delta) == Refused(Standing.MISSING)
    closed = visit_to(store, "")
    closed.close()
    with pytest.raises(RuntimeError, match="the response has been sent"):
        closed.commit(WRITE)
    assert creations(store) == []


@pytest.mark.parametrize("permanent", [None, True, False])
def test_permanence_of_a_new_session(permanent: bool | None) -> None:
    """It is the delta's, and where that says nothing the setting's."""
    store = store_with(commit=applied(1))
    visit_to(store, "", permanent=True).commit(WRITE._replace(permanent=permanent))
    assert creations(store)[0].args[1].permanent is (permanent is not False)


def test_a_conflict_changes_nothing_of_the_visit() -> None:
    """Handed on as it is, with no cookie in its train."""
    conflicting = Conflicting(image(2).pair, {}, everything=False)
    visit = visit_to(store_with(commit=conflicting))
    assert visit.commit(WRITE) is conflicting
    assert (visit.made, visit.issued, visit.standing) == (None, None, None)


# Principals.


def test_the_index_comes_first() -> None:
    """A log-in is entered before the session says whose it is, and the former principal's entry goes after."""
    theirs = image(1)._replace(principal="bob")
    store = store_with(load=Loaded(Standing.LIVE, theirs), commit=applied(2))
    visit = visit_to(store)
    visit.load()
    visit.commit(Delta(base=theirs.pair, principal=Change("ada")))
    names = [call[0] for call in store.method_calls if call[0] in ("enter", "commit", "index.leave")]
    assert names == ["enter", "commit", "index.leave"]
    assert store.enter.call_args.args[:2] == ("ada", ID.handle)
    assert store.index.leave.call_args.args[:2] == ("bob", [ID.handle])


@pytest.mark.parametrize(("seconds", "entries"), [(3.9, 1), (4.1, 2)])
def test_an_entry_that_has_grown_old_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, seconds: float, entries: int
) -> None:
    """A log-in that is tried again later than a call may take is entered again, before the session says so."""
    delta = Delta(base=image(1).pair, principal=Change("ada"))
    conflicting = Conflicting(image(2).pair, {}, everything=False)
    store = store_with()
    store.commit.side_effect = [conflicting, applied(3)]
    moment = [0]
    monkeypatch.setattr(visit, "now_ns", lambda: moment[0])
    log_in = visit_to(store)
    assert log_in.commit(delta) is conflicting
    moment[0] += int(seconds * 1e9)
    log_in.commit(delta)
    names = [call[0] for call in store.method_calls if call[0] in ("enter", "commit")]
    assert names == ["enter", "commit", *["enter"] * (entries - 1), "commit"]
    assert {call.args[:2] for call in store.enter.call_args_list} == {("ada", ID.handle)}


def test_a_stale_entry_fails_no_log_out() -> None:
    """The session ends although its entry cannot be taken out."""
    theirs = image(1)._replace(principal="bob")
    store = store_with(load=Loaded(Standing.LIVE, theirs), destroy=True)
    store.index.leave.side_effect = SessionUnavailable("down")
    visit = visit_to(store)
    visit.load()
    assert visit.destroy()
    assert (visit.ended, visit.id, visit.load()) == (True, None, None)


# Touches.


def touched_by(snapshot: Snapshot, **answers: Any) -> tuple[Visit, Any]:
    store = store_with(trusted=snapshot, **answers)
    visit = visit_to(store)
    visit.load()
    visit.touch(snapshot)
    return visit, store


@pytest.mark.parametrize(("ago", "calls"), [(59_999, 0), (60_000, 1)])
def test_a_refresh_when_it_is_due(ago: int, calls: int) -> None:
    """From the interval on it is asked for, once in a request."""
    snapshot = Snapshot(identity(ID.secret), state(1, touched_ms=NOW_MS - ago), {})
    visit, store = touched_by(snapshot, confirm=Loaded(Standing.LIVE, snapshot, touched=True))
    visit.touch(snapshot)
    assert store.confirm.call_count == calls
    assert visit.refreshed is bool(calls)


@pytest.mark.parametrize("error", [SessionUnavailable("down"), CorruptSession("spoiled")], ids=repr)
def test_a_refresh_that_fails_fails_nothing(error: Exception) -> None:
    """A read stays a read where the server cannot be asked, or answers with what is no session any more."""
    old = Snapshot(identity(ID.secret), state(1, touched_ms=0), {})
    visit, store = touched_by(old, confirm=error)
    assert store.confirm.call_count == 1
    assert (visit.refreshed, visit.failed) == (False, False)


@pytest.mark.parametrize("standing", [Standing.FORMER, Standing.LIVE])
def test_a_refresh_under_a_former_secret(standing: Standing) -> None:
    """A request that was rotated away meanwhile has refreshed the session, and not the id in its browser."""
    old = Snapshot(identity(ID.secret), state(1, touched_ms=0), {})
    visit, _ = touched_by(old, confirm=Loaded(standing, image(2), touched=True))
    assert (visit.standing, visit.seen) == (standing, image(2))
    assert visit.refreshed is (standing is Standing.LIVE)


# From outside of a request.


def test_an_errand_keeps_nothing_alive() -> None:
    """It means whatever secret is current, is no use of the session, and starts none."""
    store = store_with(load=Loaded(Standing.LIVE, image(1)), commit=Refused(Standing.MISSING))
    errand = Errand(store, Config(), ID.handle, SETTINGS, Mock())
    assert errand.load() == image(1)
    asked: SessionId = store.load.call_args.args[0]
    assert (asked.handle, asked.digest) == (ID.handle, b"")
    assert not store.load.call_args.args[1].uses
    assert errand.commit(WRITE) == Refused(Standing.MISSING)
    assert not errand.has_browser
    assert creations(store) == []
