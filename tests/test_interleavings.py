"""Every order of the steps of overlapping requests: what is stored, seen and told is always as specified.

The harness and the specification are in :mod:`tests.interleaving`; a failing order is shown as a timeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations, combinations_with_replacement, permutations, product
from typing import Any

import pytest

import luasession.cache
import luasession.store
from luasession import merge
from luasession.delta import Draft

from .conftest import MakeApp, TestApp
from .interleaving import (
    Model,
    Run,
    Scene,
    View,
    Violation,
    append,
    clear,
    clear_and_set,
    count,
    delete,
    destroy,
    every_order,
    read,
    rotate,
    rotate_and_count,
    rotate_and_drop,
    set_k,
    set_n,
    twice,
    update,
    x_from_y,
    y_from_x,
)
from .mutations import mutated

# The sessions are small, and what is to be enumerated are the ways of large ones, too: see "always read".
pytestmark = pytest.mark.usefixtures("nothing_is_small")

VIEWS: tuple[View, ...] = (
    read,
    set_k,
    set_n,
    delete,
    count,
    append,
    clear,
    clear_and_set,
    destroy,
    rotate,
    rotate_and_count,
    rotate_and_drop,
    update,
    twice,
)
#: One of each sort.
CORE: tuple[View, ...] = (set_k, count, append, clear_and_set, destroy, rotate)
#: Those, and those that differ from them in what they read.
MOST: tuple[View, ...] = (read, delete, *CORE, rotate_and_drop)
CHECKED: tuple[View, ...] = (*MOST, set_n, update, x_from_y, y_from_x)

#: How many schedules each test has run.
PLAYED: dict[str, int] = {}


@pytest.fixture
def play(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Play scenes in every order, and count the schedules."""
    played = 0

    def every(scenes: Iterator[Scene]) -> Iterator[Run]:
        nonlocal played
        for scene in scenes:
            for run in every_order(scene):
                played += 1
                yield run

    yield every
    PLAYED[request.node.name] = played


def pairs(views: Sequence[View], *processes: TestApp, **about: Any) -> Iterator[Scene]:
    """Each two of these requests; in both roles if their processes differ."""
    for pair in product(views, repeat=2) if len(processes) > 1 else combinations_with_replacement(views, 2):
        yield Scene(pair, processes, **about)


def serial_order(run: Run, *, reads: bool = True) -> tuple[str, ...] | None:
    """Return an order of the acknowledged requests, one after the other, that explains what there is.

    :param reads: whether it has to explain what they saw as well.
    """
    acknowledged = [request for request in run.requests if request.acknowledged]
    spec = run.specification
    for order in permutations(acknowledged):
        values: Mapping[str, Any] | None = run.scene.start
        for request in order:
            if values is None:
                break
            model = Model(values)
            seen = request.view(model, request.name)
            if reads and seen != request.seen:
                break
            values = None if model.ended or (model.cleared and not model.values) else model.values
        else:
            if values == (spec.values if spec.ended is None else None):
                return tuple(request.name for request in order)
    return None


@pytest.fixture
def make_valkey_app(make_valkey_app: MakeApp) -> MakeApp:
    """A machine that stalls is no part of a schedule: calls may take their time."""
    return partial(make_valkey_app, SESSION_REDIS_TIMEOUT=30, SESSION_REDIS_DEADLINE=30)


def check_explained(run: Run, *, reads: bool = True) -> None:
    if serial_order(run, reads=reads) is None:
        run.fail("no serial order explains it")


# Two requests, all pairs.


@pytest.mark.parametrize("cache", ["warm", "cold", "always asked", "always read", "none"])
def test_two_requests_under_overwrite(
    make_valkey_app: MakeApp, play: Any, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under "overwrite" each key is as its last commit has it, and the dead stay dead, whatever is cached."""
    if cache == "always read":
        monkeypatch.setattr(luasession.store, "SMALL", 2048)
    cache_ttl = {"always asked": 0, "always read": 0, "none": None}.get(cache, 2.0)
    app = make_valkey_app(SESSION_CACHE_TTL=cache_ttl)
    for run in play(pairs(VIEWS if cache == "warm" else MOST, app, cold=cache == "cold")):
        assert all(request.status == 200 for request in run.requests)


@pytest.mark.parametrize("policy", ["overwrite", "raise"])
def test_two_processes(make_valkey_app: MakeApp, play: Any, policy: str) -> None:
    """Two processes with warm caches of their own are as one, and show the browser all it has written."""
    app = make_valkey_app(SESSION_CONFLICT=policy)
    views = MOST if policy == "overwrite" else CORE
    assert sum(1 for _ in play(pairs(views, app, app.another()))) > 1


def test_two_requests_under_raise(make_valkey_app: MakeApp, play: Any) -> None:
    """Under "raise" a conflict is a key that was read and changed and has moved, and nothing else is one."""
    told = 0
    for run in play(pairs((*CHECKED, twice), make_valkey_app(SESSION_CONFLICT="raise"))):
        told += sum(request.status == 409 for request in run.requests)
        for request in run.requests:
            # Said without the specification of the scripts: what it read and changed was what it replaced.
            if request.acknowledged and request.view in (count, append, delete) and request.applied:
                key = {count: "n", append: "list", delete: "k"}[request.view]
                before = run.specification.history[request.applied[0] - 1]
                assert before.get(key) == request.base.get(key), run.timeline()
    assert told > 10


@pytest.mark.parametrize("cache", ["warm", "always asked"])
def test_two_requests_under_serializable(make_valkey_app: MakeApp, play: Any, cache: str) -> None:
    """Under "serializable" the acknowledged requests have an order that explains all they saw and left."""
    warm = cache == "warm"
    app = make_valkey_app(SESSION_CONFLICT="serializable", SESSION_CACHE_TTL=2.0 if warm else 0)
    refused = 0
    for run in play(
        pairs(CHECKED if warm else (count, append, set_k, clear_and_set, x_from_y, y_from_x), app)
    ):
        refused += sum(request.status == 409 for request in run.requests)
        check_explained(run)
    assert refused > 10


@pytest.mark.parametrize("policy", ["raise", "serializable"])
def test_every_kind_of_server(make_app: MakeApp, play: Any, policy: str) -> None:
    """One request of each sort against each other does the same on every server."""
    app = make_app(SESSION_CONFLICT=policy)
    for run in play(pairs(CORE, app)):
        if policy == "serializable":
            check_explained(run)


def test_replies_on_their_way(make_valkey_app: MakeApp, play: Any) -> None:
    """A reply that arrives after others' steps leaves nothing in the cache that was never so."""
    app = make_valkey_app()
    for cold in (False, True):
        assert (
            sum(
                1
                for _ in play(
                    pairs((read, set_k, count, clear_and_set, destroy), app, cold=cold, replies=True)
                )
            )
            > 1
        )
    assert sum(1 for _ in play(pairs((set_k, count), make_valkey_app(SESSION_CACHE_TTL=0), replies=True))) > 1


@pytest.mark.parametrize("patient", [True, False])
def test_a_commit_whose_reply_is_lost(make_valkey_app: MakeApp, play: Any, patient: bool) -> None:
    """Whatever comes between a commit and its second sending, it counts once; with no second one it is 503."""
    app = make_valkey_app(SESSION_CONFLICT="raise")
    for lost, other in product((set_k, count, rotate_and_count, update), CORE):
        lossy = 0
        for run in play(iter([Scene((lost, other), (app,), lose="A", patient=patient)])):
            lossy += run.requests[0].lost
            assert len(run.requests[0].applied) <= 1
        assert lossy > 0


def test_an_answer_to_a_second_sending_undoes_no_rotation(make_valkey_app: MakeApp, play: Any) -> None:
    """A clear that had to be sent twice does not repeat the id, which a rotation may have replaced meanwhile."""
    assert sum(1 for _ in play(iter([Scene((clear_and_set, rotate), (make_valkey_app(),), lose="A")]))) > 1


# Merges.

MERGED: dict[str, Any] = {
    "n": 5,
    "list": ["start", "more"],
    "tags": {"a", "b"},
    "tree": {"x": 1, "in": {"y": [1]}},
}
MERGES = {"n": merge.add, "list": merge.append, "tags": merge.union, "tree": merge.deep}


def add_ten(session: Any, _who: str) -> None:
    session["n"] = session.get("n", 0) + 10


def forget_n(session: Any, _who: str) -> None:
    session.pop("n", None)


def take_off(session: Any, _who: str) -> None:
    items = session.get("list", [])
    if "start" in items:
        items.remove("start")


def tag(session: Any, who: str) -> None:
    session["tags"] = session.get("tags", set()) | {who}


def untag(session: Any, _who: str) -> None:
    session["tags"] = session.get("tags", set()) - {"a"}


def grow(session: Any, who: str) -> None:
    session["tree"]["in"]["y"].append(who)
    session["tree"][who] = {}


def prune(session: Any, _who: str) -> None:
    session["tree"].pop("x", None)


MERGING: tuple[View, ...] = (count, add_ten, forget_n, append, take_off, tag, untag, grow, prune)


def test_two_requests_that_merge(make_valkey_app: MakeApp, play: Any) -> None:
    """Under the merge functions nobody is refused, and the result is that of some serial order."""
    app = make_valkey_app(SESSION_MERGE=MERGES)
    other = app.another()
    rounds = 0
    for scenes in (pairs(MERGING, app, start=MERGED), pairs(MERGING[:5], app, other, start=MERGED)):
        for run in play(scenes):
            assert all(request.status == 200 for request in run.requests)
            rounds += any("conflict" in text for _, text in run.rows)
            check_explained(run, reads=False)
    assert rounds > 50


@pytest.mark.parametrize(
    "views",
    [
        (count, add_ten, forget_n),
        (count, count, count),
        (append, take_off, append),
        (tag, untag, tag),
        (grow, prune, grow),
        (count, update, count),
    ],
    ids=lambda views: "-".join(view.__name__ for view in views),
)
def test_three_requests_that_merge(make_valkey_app: MakeApp, play: Any, views: tuple[View, ...]) -> None:
    """Three requests that merge, each as often as others come in between, end as in some serial order."""
    app = make_valkey_app(SESSION_MERGE=MERGES)
    for run in play(iter([Scene(views, (app,), start=MERGED)])):
        assert all(request.acknowledged or not request.answer for request in run.requests)
        check_explained(run, reads=False)


# Three requests.


def test_three_requests(make_valkey_app: MakeApp, play: Any) -> None:
    """Any three of the sorts that change data lose nothing they should not, whatever the policy."""
    views = (set_k, count, append, delete)
    app = make_valkey_app()
    assert sum(1 for _ in play(Scene(three, (app,)) for three in combinations(views, 3))) > 1
    app = make_valkey_app(SESSION_CONFLICT="serializable")
    threes = [*combinations(views, 3), (count, count, count), (count, count, set_k)]
    for run in play(Scene(three, (app,)) for three in threes):
        check_explained(run)


@pytest.mark.parametrize(
    "views",
    [
        (set_k, count, destroy),
        (set_k, clear_and_set, count),
        (clear_and_set, clear_and_set, set_k),
        (set_k, rotate, count),
        (rotate, clear_and_set, set_k),
        (rotate, destroy, set_k),
        (rotate, rotate, set_k),
        (rotate_and_drop, count, set_k),
    ],
    ids=lambda views: "-".join(view.__name__ for view in views),
)
def test_three_requests_and_an_end(make_valkey_app: MakeApp, play: Any, views: tuple[View, ...]) -> None:
    """Ends, clears and rotations among three requests: who was open then is treated so, whatever the order."""
    assert sum(1 for _ in play(iter([Scene(views, (make_valkey_app(),))]))) > 1


def test_counters(make_valkey_app: MakeApp, play: Any) -> None:
    """Three atomic updates count three, in every order of their rounds."""
    for run in play(iter([Scene((update, update, update), (make_valkey_app(),))])):
        assert run.specification.values["n"] == 8
        assert sorted(request.seen for request in run.requests) == [6, 7, 8]


# Write skew.


def cycle(session: Any, who: str, of: str, to: str) -> Any:
    seen = session.get(of)
    session[to] = f"{who} saw {seen}"
    return seen


def y_to_z(session: Any, who: str) -> Any:
    return cycle(session, who, "y", "z")


def z_to_x(session: Any, who: str) -> Any:
    return cycle(session, who, "z", "x")


@pytest.mark.parametrize("views", [(x_from_y, y_from_x), (y_from_x, y_to_z, z_to_x)], ids=["two", "three"])
def test_write_skew(make_valkey_app: MakeApp, play: Any, views: tuple[View, ...]) -> None:
    """Requests that each read what the next one writes: "raise" lets some orders skew, "serializable" none."""
    skewed = {"raise": 0, "serializable": 0}
    for policy in skewed:
        for run in play(iter([Scene(views, (make_valkey_app(SESSION_CONFLICT=policy),))])):
            skewed[policy] += serial_order(run) is None
    assert skewed["raise"] > 0
    assert skewed["serializable"] == 0


# What the harness is worth: it finds what is wrong.


@pytest.mark.parametrize(
    ("mutation", "policy", "views"),
    [
        ("conflict check", "raise", (count, count)),
        ("clear", "overwrite", (set_k, clear_and_set)),
        ("tombstone", "overwrite", (set_k, destroy)),
        ("former digest", "overwrite", (count, rotate)),
        ("age of a former digest", "overwrite", (set_k, rotate)),
        ("own write ids", "raise", (twice, set_k)),
    ],
)
def test_a_broken_script_is_found(
    make_valkey_app: MakeApp, play: Any, mutation: str, policy: str, views: tuple[View, ...]
) -> None:
    """With a guard taken out of a script there is an order that violates, and its timeline shows it."""
    with mutated(mutation), pytest.raises(Violation) as caught:
        assert sum(1 for _ in play(iter([Scene(views, (make_valkey_app(SESSION_CONFLICT=policy),))]))) > 1
    said = str(caught.value)
    assert "step | A: " in said
    assert "opens" in said or "reads v1" in said


def test_a_lost_ring_is_found(make_valkey_app: MakeApp, play: Any) -> None:
    """With the look into the ring taken out a commit sent twice counts twice, and that is found."""
    with mutated("write id in the ring"), pytest.raises(Violation):
        assert sum(1 for _ in play(iter([Scene((count, read), (make_valkey_app(),), lose="A")]))) > 1


def test_a_careless_cache_is_found(
    make_valkey_app: MakeApp, play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that lays a delta over whatever it holds is found by two processes and one read."""

    def advance(
        self: Any, handle: str, _replaced: Any, draft: Draft, metadata: Any, now_ms: int, sent: int
    ) -> Any:
        held = self._look(handle)
        snapshot = held and draft.over(held.entry.snapshot, *metadata, now_ms)
        if snapshot:
            self._store(handle, luasession.cache.Entry(snapshot, sent), held)
        return snapshot

    monkeypatch.setattr(luasession.cache.SnapshotCache, "advance", advance)
    app = make_valkey_app()
    with pytest.raises(Violation, match="as cached"):
        assert sum(1 for _ in play(iter([Scene((set_k, set_n), (app, app.another()))]))) > 1


def test_a_policy_that_forgets_the_reads_is_found(
    make_valkey_app: MakeApp, play: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With reads left out of "serializable" an order without a serial one is found, by that alone."""
    app = make_valkey_app(SESSION_CONFLICT="serializable")
    monkeypatch.setattr(app.flask.session_interface._policies, "serializable", False)  # type: ignore[attr-defined]
    runs = play(iter([Scene((x_from_y, y_from_x), (app,))]))
    assert any(serial_order(run) is None for run in runs)


def test_the_orders_are_all_there_are(make_valkey_app: MakeApp, play: Any) -> None:
    """Of two and of three requests with two steps each every order is played, each once."""
    app = make_valkey_app()
    for views, number in [((set_n, set_k), 2), ((count, append), 6), ((count, append, delete), 90)]:
        orders = [tuple(run.rows) for run in play(iter([Scene(views, (app,))]))]
        assert len(orders) == len(set(orders)) == number


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Show with ``-s`` how many schedules were played."""
    yield
    for name, played in PLAYED.items():
        print(f"{played:7} schedules  {name}")
    print(f"{sum(PLAYED.values()):7} in all")
