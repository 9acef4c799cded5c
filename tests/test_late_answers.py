"""Late answers: whatever overlaps a log-in, a rotation or a log-out, the browser ends where it should.

Played in every order of sendings, reads, commits and answers, with the browser's jar as part of it: see
:mod:`tests.pages`. The page holds an anonymous session when it begins; parallel *first* requests and the
cookie refresh of a permanent session are limits that the contract states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask import session

from luasession.answer import Answer

from .conftest import Browser, MakeApp, TestApp
from .mutations import mutated
from .pages import Flight, Jar, Kind, Played, every_order, orders

PLAYED: dict[str, int] = {}


def log_in(current: Any) -> None:
    current["user"] = "ada"
    current.principal = "ada"
    current.regenerate()


def log_in_afresh(current: Any) -> None:
    current.clear()
    log_in(current)


def log_in_plainly(current: Any) -> None:
    current["user"] = "ada"
    current.regenerate()


def rotate(current: Any) -> None:
    current.regenerate()


def see(current: Any) -> Any:
    return current.get("user")


def write(current: Any) -> None:
    current["blind"] = 1


def write_permanent(current: Any) -> None:
    current.permanent = True
    current["blind"] = 1


def write_on(current: Any) -> None:
    current["n"] = current.get("n", 0) + 1


def drop_key(current: Any) -> None:
    current.pop("cart", None)


def commit_midway(current: Any) -> None:
    from luasession import SessionGone

    current["blind"] = 1
    try:
        current.commit()
    except SessionGone:
        current["again"] = 1


def read_afresh(current: Any) -> Any:
    current.reload()
    return current.get("user")


def end(current: Any) -> None:
    current.destroy()


def empty(current: Any) -> None:
    current.clear()


LOG_INS = [
    Kind("logs in", (log_in,), event=True),
    Kind("reads, logs in", (see, log_in), event=True),
    Kind("clears, logs in", (log_in_afresh,), event=True),
    Kind("logs in without a principal", (log_in_plainly,), event=True),
]
OTHERS = [
    Kind("reads", (see,)),
    Kind("writes", (write,)),
    Kind("reads, writes", (see, write_on)),
    Kind("deletes", (drop_key,)),
    Kind("commits midway", (commit_midway,)),
    Kind("reads, reads afresh", (see, read_afresh)),
]
LOG_OUTS = [Kind("logs out", (end,), event=True), Kind("reads, clears", (see, empty), event=True)]
ROTATION = Kind("rotates", (rotate,), event=True)


class World:
    """A page of a browser with an anonymous session, served by one process or by two."""

    def __init__(self, app: TestApp, *kinds: Kind, processes: int = 1, start: Any = None) -> None:
        self.apps = [app, *(app.another() for _ in range(processes - 1))]
        self.kinds = kinds
        self.start = start or (lambda: session.update(cart=1))

    def make(self) -> list[Flight]:
        browser = self.apps[0].browser()
        browser.run(self.start)
        jar = Jar(dict(browser.cookies))
        for app in self.apps:  # warm caches
            browser.twin(app).run(lambda: session.get("cart"))
        apps = self.apps
        return [Flight("ABC"[n], kind, apps[n % len(apps)], jar) for n, kind in enumerate(self.kinds)]

    def play(self, most: int | None = None) -> Iterator[Played]:
        """Play all orders, or as many as that, evenly spread over all."""
        for played in every_order(self.make, most):
            name = shown(self.kinds)
            PLAYED[name] = PLAYED.get(name, 0) + 1
            for flight in played.flights:
                assert flight.status == 200, played.timeline()
            yield played

    def sees(self, played: Played) -> dict[str, Any]:
        """What the next request of the browser sees, in a process that knows nothing."""
        browser = Browser(self.fresh)
        for name, value in played.jar.cookies.items():
            browser.client.set_cookie(name, value)
        found: dict[str, Any] = browser.run(lambda: dict(session))
        return found

    @property
    def fresh(self) -> TestApp:
        app = self.apps[0]
        if not hasattr(self, "_fresh"):
            self._fresh = app.another(SESSION_CACHE_TTL=None)
        return self._fresh


def shown(kinds: tuple[Kind, ...]) -> str:
    return " + ".join(map(str, kinds))


@pytest.mark.parametrize("log_in_kind", LOG_INS, ids=str)
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_who_logs_in_ends_logged_in(make_valkey_app: MakeApp, log_in_kind: Kind, other: Kind) -> None:
    """A page that logs in beside another request ends logged in, in every order, over two processes."""
    world = World(make_valkey_app(), log_in_kind, other, processes=2)
    for played in world.play():
        assert world.sees(played).get("user") == "ada", played.timeline()


@pytest.mark.parametrize("other", OTHERS[:3], ids=str)
def test_what_a_parallel_request_wrote(make_valkey_app: MakeApp, other: Kind) -> None:
    """Beside a log-in that changes the principal a request's write is whole, or dropped; never in between."""
    world = World(make_valkey_app(), LOG_INS[0], other)
    outcomes = set()
    for played in world.play():
        found = world.sees(played)
        assert found.pop("user") == "ada", played.timeline()
        assert found.pop("cart") == 1, played.timeline()
        outcomes.add(tuple(found))
    assert len(outcomes) == (1 if other is OTHERS[0] else 2)


def test_three_at_once(make_valkey_app: MakeApp) -> None:
    """A log-in, a writer and another writer: logged in, in every order."""
    world = World(make_valkey_app(), LOG_INS[0], OTHERS[1], OTHERS[1], processes=2)
    for played in world.play():
        assert world.sees(played).get("user") == "ada", played.timeline()


def test_the_cookie_refresh_is_the_only_way_back(make_valkey_app: MakeApp) -> None:
    """What the contract allows is all there is: the old id comes back by an answer that refreshes the expiry alone."""
    permanent = Kind("writes, permanent", (write_permanent,))
    world = World(make_valkey_app(), LOG_INS[0], permanent)
    lost = 0
    for played in world.play():
        if world.sees(played).get("user") != "ada":
            lost += 1
            late = played.flights[1]
            assert played.rows[-1] == ("B", played.rows[-1][1]), played.timeline()
            assert any("Expires=" in line and late.sent_with in line for line in late.set_cookies)
    assert 0 < lost < 14


@pytest.mark.parametrize("log_in_kind", [LOG_INS[0], LOG_INS[1], LOG_INS[2]], ids=str)
def test_a_double_click(make_valkey_app: MakeApp, log_in_kind: Kind) -> None:
    """A double-clicked log-in ends logged in, in every order, whichever answers the browser drops but the last."""
    world = World(make_valkey_app(), log_in_kind, log_in_kind)
    for played in world.play():
        assert world.sees(played).get("user") == "ada", played.timeline()
        # The browser drops the answer to the first click when it sends the second one.
        for kept in played.flights:
            if not kept.set_cookies:
                continue
            other = Played(played.flights, Jar({"session": kept.sent_with}), played.rows)
            other.jar.take(kept.set_cookies)
            if kept is last_sent(played):
                assert world.sees(other).get("user") == "ada", played.timeline()


def last_sent(played: Played) -> Flight:
    sent = [name for name, text in played.rows if text.startswith("is sent")]
    return next(flight for flight in played.flights if flight.name == sent[-1])


def test_the_second_click_after_a_dropped_answer(make_valkey_app: MakeApp) -> None:
    """A click whose first answer never comes, and a second one after it with the old cookie, ends logged in."""
    app = make_valkey_app()
    browser = app.browser()
    browser.run(lambda: session.update(cart=1))
    dropped, second = browser.twin(), browser.twin()
    dropped.run(lambda: log_in(session))
    second.run(lambda: log_in(session))
    assert second.twin(app.another()).run(lambda: session["user"]) == "ada"
    assert second.run(lambda: session.handle) != dropped.run(lambda: session.handle)


@pytest.mark.parametrize("out", LOG_OUTS, ids=str)
def test_a_log_out_over_a_rotation(make_valkey_app: MakeApp, out: Kind) -> None:
    """A log-out that overlaps a rotation logs out, in every order, whichever of them is answered last."""
    start: Callable[[], Any] = lambda: session.update(cart=1, user="ada")  # noqa: E731
    world = World(make_valkey_app(), out, ROTATION, processes=2, start=start)
    for played in world.play():
        assert world.sees(played) == {}, played.timeline()


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("late", OTHERS[:3], ids=str)
def test_two_rotations_within_the_grace(make_valkey_app: MakeApp, late: Kind, reads: bool) -> None:
    """Two rotations of a logged-in session and a request beside them: still logged in, in every order."""
    kind = Kind("reads, rotates", (see, rotate), event=True) if reads else ROTATION
    world = World(make_valkey_app(), kind, kind, late, start=lambda: session.update(cart=1, user="ada"))
    for played in world.play(most=250):
        assert world.sees(played).get("user") == "ada", played.timeline()


def test_writers_over_a_rotation_lose_nothing(make_valkey_app: MakeApp) -> None:
    """Two writers beside a rotation that lets open requests go on: what was open at it is kept."""
    a = Kind("writes a", (lambda current: current.update(a=1),))
    b = Kind("reads, writes b", (see, lambda current: current.update(b=1)))
    world = World(make_valkey_app(), ROTATION, a, b)
    outcomes = set()
    for played in world.play(most=700):
        found = world.sees(played)
        assert found["cart"] == 1, played.timeline()
        rows = played.rows
        rotated = rows.index(next(row for row in rows if row[0] == "A" and row[1].startswith("commits")))
        for flight, key in ((played.flights[1], "a"), (played.flights[2], "b")):
            sent = next(n for n, row in enumerate(rows) if row[0] == flight.name)
            answered = rows.index(next(r for r in rows if r[0] == "A" and r[1].startswith("is answered")))
            assert (key in found) is (sent < rotated or sent > answered), played.timeline()
        outcomes.add(frozenset(found))
    assert len(outcomes) == 4


@pytest.mark.parametrize("reads", [True, False])
def test_a_log_out_over_two_rotations(make_valkey_app: MakeApp, reads: bool) -> None:
    """Two overlapping rotations can leave two sessions, and a log-out ends one; log out everywhere ends both.

    That is the price of a second click that keeps what it had read (G8): its session is one of its own.
    """
    kind = Kind("reads, rotates", (see, rotate), event=True) if reads else ROTATION

    def start() -> None:
        session.update(user="ada")
        session.principal = "ada"

    app = make_valkey_app()
    world = World(app, kind, kind, LOG_OUTS[0], start=start)
    left = 0
    for played in world.play(most=300):
        if world.sees(played):
            left += 1
            copies = [
                flight.set_cookies[0].partition(".")[0] for flight in played.flights[:2] if flight.set_cookies
            ]
            assert len(set(copies)) == 2, played.timeline()
            app.flask.extensions["luasession"].revoke_all("ada")
            assert world.sees(played) == {}, played.timeline()
    assert bool(left) is reads


def repeat_the_id(*_about: Any) -> bool:
    return True


@pytest.mark.parametrize("guard", ["log-out under a former digest", "id in ordinary writes"])
def test_a_guard_taken_out_is_found(
    make_valkey_app: MakeApp, monkeypatch: pytest.MonkeyPatch, guard: str
) -> None:
    """Without the guards that these tests are about they fail, with a timeline."""
    if guard == "id in ordinary writes":
        monkeypatch.setattr(Answer, "_is_id_due", staticmethod(repeat_the_id))
        with pytest.raises(AssertionError, match="is sent with"):
            test_who_logs_in_ends_logged_in(make_valkey_app, LOG_INS[0], OTHERS[1])
    else:
        with mutated(guard), pytest.raises(AssertionError, match="is sent with"):
            test_a_log_out_over_a_rotation(make_valkey_app, LOG_OUTS[0])


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Show with ``-s`` how many orders were played."""
    yield
    for name, played in PLAYED.items():
        print(f"{played:7} orders  {name}")
    print(f"{sum(PLAYED.values()):7} in all")


def test_the_orders() -> None:
    """Every merging of the steps is there, each once, but for neighbouring sendings."""
    assert list(orders([1, 1])) == [(0, 1)]
    assert list(orders([2, 1])) == [(0, 0, 1), (0, 1, 0)]
    assert len(list(orders([3, 3]))) == len(set(orders([3, 3]))) == 14
