"""The checker of histories: histories written by hand, right ones and one for each way to be wrong."""

from __future__ import annotations

from typing import Any

import pytest

from .history import History, Kind, Record, check

HANDLE = "H" * 22


def record(op: str, start: float, end: float, key: str = "", **more: Any) -> Record:
    """A request of the life ``a``; ``version`` is the one that it made, ``value`` without the name."""
    version = more.pop("version", 0)
    if op not in {"read", "logout"}:
        more.setdefault("value", None if op == "drop" else f"a:{more.pop('item', key)}")
        more.setdefault("commits", ((HANDLE, version),) if version else ())
    else:
        more["version"] = version
    return Record("a", op, start, end, key=key, **more)


START = record("start", 0, 1, "owner", version=1)


def held(version: int, **content: Any) -> dict[str, tuple[int, dict[str, Any]]]:
    return {HANDLE: (version, {"owner": "a:owner", **content})}


def kinds(history: History) -> list[Kind]:
    return [violation.kind for violation in check(history).violations]


def verdict(*records: Record, stored: dict[str, Any] | None = None, **more: Any) -> list[Kind]:
    return kinds(History([START, *records], stored or {}, **more))


def rotations(number: int) -> list[Record]:
    """Rotations one after another, from 2 on and each a second after the one before."""
    return [record("rotate", 2 + n, 2.5 + n, f"k{n}", version=2 + n) for n in range(number)]


def rotated(number: int) -> dict[str, Any]:
    return {f"k{n}": f"a:k{n}" for n in range(number)}


# A write that was open over rotations, and what it was answered if it read only then.
OVERTAKEN = record("put", 1.5, 9, "k9", commits=(("new", 1),), blind=True)
# The same, begun when the first rotation may have been applied.
BEGUN_LATE = record("put", 2.2, 9, "k9", commits=(("new", 1),), blind=True)
MISSED = (
    "HGETALL HHHHHH: 0a0b0c at 127.0.0.1:1 in 1 ms",
    "load HHHHHH 0d0e0f: missing at 127.0.0.1:1 in 1 ms",
)


RIGHT = {
    "a set": ([record("put", 2, 3, "k1", version=2)], held(2, k1="a:k1")),
    "a set that was not answered, applied": ([record("put", 2, 3, "k1", status=503)], held(2, k1="a:k1")),
    "a set that was not answered, not applied": ([record("put", 2, 3, "k1", status=0)], held(1)),
    "a set that was dropped over a rotation": (
        [record("rotate", 2, 5, "k1", version=2), record("put", 3, 4, "k2", discarded="stale")],
        held(2, k1="a:k1"),
    ),
    "an unanswered write that is applied after a later one": (
        [
            record("put", 2, 3, "r0", item="old", status=503),
            record("put", 4, 5, "r0", item="new", version=2),
            record("read", 6, 7, seen={"owner": "a:owner", "r0": "a:old"}, version=3),
        ],
        held(3, r0="a:old"),
    ),
    "a read beside a write": (
        [
            record("put", 2, 6, "r0", version=2),
            record("read", 3, 4, seen={"owner": "a:owner"}, version=1),
            record("read", 3, 5, seen={"owner": "a:owner", "r0": "a:r0"}, version=2),
        ],
        held(2, r0="a:r0"),
    ),
    "a list and a sum": (
        [
            record("add", 2, 3, "list", item="x", version=2),
            record("add", 2, 3, "list", item="y", status=503),
            record("add", 4, 5, "sum", version=4),
            record("add", 4, 5, "sum", status=0),
        ],
        held(4, list=["a:y", "a:x"], sum=1),
    ),
    "a log-out, and a write that came late": (
        [record("logout", 2, 3), record("late", 4, 5, "k2", commits=(("new", 1),)), record("read", 6, 7, seen={})],
        {"new": (1, {"k2": "a:k2"})},
    ),
    "a change beside a log-out that began a session of its own, and a read of another process within the trust": (
        [
            record("logout", 2, 4),
            record("add", 3, 4.5, "hits", commits=(("new", 1),)),
            record("add", 3, 4.5, "list", commits=(("other", 1),)),
            record("put", 3, 4.5, "k1", commits=(("third", 1),)),
            record("read", 5, 6, seen={"owner": "a:owner"}, version=1),
        ],
        {"new": (1, {"hits": 1}), "other": (1, {"list": ["a:list"]}), "third": (1, {"k1": "a:k1"})},
    ),
    "a second rotation that began a session of its own": (
        [record("rotate", 2, 5, "k1", version=2), record("rotate", 3, 6, "k2", commits=(("new", 1),))],
        {**held(2, k1="a:k1"), "new": (1, {"k2": "a:k2"})},
    ),
    "a read of another process within the trust": (
        [record("logout", 2, 3), record("read", 4, 5, seen={"owner": "a:owner"}, version=1)],
        {},
    ),
    "a read after a rotation whose answer was lost": (
        [record("rotate", 2, 3, "k1", status=0), record("read", 4, 5, seen={})],
        held(2, k1="a:k1"),
    ),
}  # fmt: skip

WRONG: dict[str, tuple[Kind, list[Record], dict[str, Any]]] = {
    "a set that is gone": (Kind.LOST, [record("put", 2, 3, "k1", version=2)], held(2)),
    "an item that is gone": (Kind.LOST, [record("add", 2, 3, "list", version=2)], held(2)),
    "an increment that is gone": (Kind.LOST, [record("add", 2, 3, "hits", version=2)], held(2)),
    "a session that is gone": (Kind.LOST, [record("put", 2, 3, "k1", version=2)], {}),
    "an answer that nothing came of": (Kind.LOST, [record("put", 2, 3, "k1")], held(1, k1="a:k1")),
    "dropped for no reason": (Kind.DENIED, [record("put", 2, 3, "k1", discarded="gone")], held(1)),
    "a live session that shows nothing": (Kind.DENIED, [record("read", 2, 3, seen={})], held(1)),
    "a new session under a live id": (
        Kind.DENIED,
        [record("put", 2, 3, "k1", commits=(("new", 1),))],
        {**held(1), "new": (1, {"k1": "a:k1"})},
    ),
    "a new session, and the change in the live one as well": (
        Kind.RETURNED,
        [record("logout", 2, 5), record("add", 3, 4, "list", commits=(("new", 1),)),
         record("read", 6, 7, seen={"owner": "a:owner", "list": ["a:list"]}, version=2)],
        {"new": (1, {"list": ["a:list"]})},
    ),
    "a new session after four rotations": (
        Kind.DENIED,
        [*rotations(4), OVERTAKEN],
        {**held(5, **rotated(4)), "new": (1, {"k9": "a:k9"})},
    ),
    "a new session after five rotations, by who was open before them": (
        Kind.DENIED,
        [*rotations(5), OVERTAKEN],
        {**held(6, **rotated(5)), "new": (1, {"k9": "a:k9"})},
    ),
    "a new session after five rotations, by who had read the one that there is": (
        Kind.DENIED,
        [*rotations(5), record("put", 2.2, 9, "k9", commits=(("new", 1),))],
        {**held(6, **rotated(5)), "new": (1, {"k9": "a:k9"})},
    ),
    "a new session after rotations that had been answered": (
        Kind.DENIED,
        [*rotations(5), record("put", 8, 9, "k9", commits=(("new", 1),), blind=True)],
        {**held(6, **rotated(5)), "new": (1, {"k9": "a:k9"})},
    ),
    "a new session after a rotation whose answer was lost, within its grace": (
        Kind.DENIED,
        [record("rotate", 2, 3, "k1", status=503), record("put", 61, 62, "k9", commits=(("new", 1),), blind=True)],
        {**held(2, k1="a:k1"), "new": (1, {"k9": "a:k9"})},
    ),
    "a new session after a rotation that was dropped": (
        Kind.DENIED,
        [record("rotate", 2, 3, "k1", discarded="gone"), record("put", 4, 5, "k9", commits=(("new", 1),), blind=True)],
        {**held(1), "new": (1, {"k9": "a:k9"})},
    ),
    "dropped long after the rotation": (
        Kind.DENIED,
        [*rotations(1), record("put", 4, 5, "k2", discarded="stale")],
        held(2, **rotated(1)),
    ),
    "nothing to see long after the rotation": (
        Kind.DENIED,
        [*rotations(1), record("read", 4, 5, seen={})],
        held(2, **rotated(1)),
    ),
    "an item twice": (
        Kind.DOUBLED,
        [record("add", 2, 3, "tally", version=2)],
        held(2, tally=["a:tally", "a:tally"]),
    ),
    "an unanswered item twice": (
        Kind.DOUBLED,
        [record("add", 2, 3, "list", status=503)],
        held(3, list=["a:list", "a:list"]),
    ),
    "an increment twice": (Kind.DOUBLED, [record("add", 2, 3, "hits", version=2)], held(2, hits=2)),
    "a commit too many": (Kind.DOUBLED, [record("put", 2, 3, "k1", version=2)], held(3, k1="a:k1")),
    "logged out and there": (Kind.RETURNED, [record("logout", 2, 3)], held(1)),
    "logged out and shown": (
        Kind.RETURNED,
        [record("logout", 2, 3), record("read", 5.5, 6, seen={"owner": "a:owner"}, version=1)],
        {},
    ),
    "a late write into what had ended": (
        Kind.RETURNED,
        [record("logout", 2, 3), record("late", 4, 5, "k2", version=2)],
        {},
    ),
    "old data in a new session": (
        Kind.RETURNED,
        [record("logout", 2, 3), record("late", 4, 5, "k2", commits=(("new", 1),))],
        {"new": (1, {"k2": "a:k2", "owner": "a:owner"})},
    ),
    "deleted and there": (
        Kind.RETURNED,
        [record("put", 2, 3, "r0", version=2), record("drop", 4, 5, "r0", version=3)],
        held(3, r0="a:r0"),
    ),
    "dropped and there": (
        Kind.RETURNED,
        [record("rotate", 2, 5, "k1", version=2), record("put", 3, 4, "k2", discarded="stale")],
        held(2, k1="a:k1", k2="a:k2"),
    ),
    "a value of another session": (Kind.FOREIGN, [], held(1, owner="b:owner")),
    "a read of another session": (Kind.FOREIGN, [record("read", 2, 3, seen={"owner": "b:owner"}, version=1)], held(1)),
    "a key that nobody wrote": (Kind.FOREIGN, [], held(1, k9="a:k9")),
    "two sessions in one": (Kind.FOREIGN, [], {**held(1), "new": (1, {"k1": "a:k1", "k2": "b:k2"})}),
    "a write that is not seen": (
        Kind.STALE,
        [
            record("put", 2, 3, "r0", item="old", version=2),
            record("put", 4, 5, "r0", item="new", version=3),
            record("read", 6, 7, seen={"owner": "a:owner", "r0": "a:old"}, version=3),
        ],
        held(3, r0="a:new"),
    ),
    "a sum that is not seen": (
        Kind.STALE,
        [record("add", 2, 3, "sum", version=2), record("read", 6, 7, seen={"owner": "a:owner"}, version=2)],
        held(2, sum=1),
    ),
    "a version twice": (
        Kind.VERSION,
        [record("put", 2, 3, "k1", version=2), record("put", 2, 3, "k2", version=2)],
        held(3, k1="a:k1", k2="a:k2"),
    ),
    "a version that falls": (
        Kind.VERSION,
        [record("put", 2, 3, "k1", version=3), record("put", 4, 5, "k2", version=2)],
        held(3, k1="a:k1", k2="a:k2"),
    ),
    "a read of an older version": (
        Kind.VERSION,
        [record("drop", 2, 3, "r0", version=2), record("read", 4, 5, seen={"owner": "a:owner"}, version=1)],
        held(2),
    ),
    "a failure of the app": (Kind.ERROR, [record("put", 2, 3, "k1", status=500)], held(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_history_is_right(name: str) -> None:
    """What luasession promises, and what a lost answer leaves open, is found right."""
    records, stored = RIGHT[name]
    assert verdict(*records, stored=stored) == []


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_history_is_found(name: str) -> None:
    """Each broken promise is found, and told by its kind."""
    kind, records, stored = WRONG[name]
    found = verdict(*records, stored=stored)
    assert kind in found, found
    assert set(found) <= {kind, Kind.STALE, Kind.VERSION}, found


def test_each_kind_is_among_the_wrong_ones() -> None:
    """No kind of violation is without a history that shows it."""
    assert {kind for kind, *_ in WRONG.values()} == set(Kind) - {Kind.LIMIT}


@pytest.mark.parametrize(
    ("before", "write", "version", "words"),
    [
        (rotations(5), BEGUN_LATE, 6, "after 5 rotations"),
        (
            rotations(6),
            record("drop", 2.2, 9, "k9", commits=(("new", 1),), calls=MISSED),
            7,
            "after 6 rotations",
        ),
        (
            [record("rotate", 2, 3, "k0", status=503)],
            record("put", 62.5, 63, "k9", commits=(("new", 1),), blind=True),
            2,
            "after the grace of a rotation",
        ),
    ],
)
def test_an_id_that_is_no_longer_known_is_a_limit(
    before: list[Record], write: Record, version: int, words: str
) -> None:
    """A session that begins under an id replaced too often or too long ago is told apart, with its evidence."""
    kept = rotated(version - 1)
    report = check(History([START, *before, write], {**held(version, **kept), "new": (1, {"k9": "a:k9"})}))
    assert report.violations == []
    (limit,) = report.limits
    assert limit.message == f"a: k9 began a session of its own {words}"
    assert limit.records == (*before, write)


@pytest.mark.parametrize(
    ("before", "end", "words"),
    [
        (rotations(5), 9.0, "after 5 rotations"),
        ([record("rotate", 2, 3, "k0", status=503)], 63.0, "after the grace of a rotation"),
    ],
)
def test_a_log_out_under_an_id_that_is_no_longer_known_is_a_limit(
    before: list[Record], end: float, words: str
) -> None:
    """It has ended nothing, as it was told; what comes after it is judged as if it had not been."""
    version, kept = 1 + len(before), rotated(len(before))
    out = record("logout", 1.5, end, calls=("destroy HHHHHH 0a0b0c: missing at a:1 in 1 ms",))
    read = record("read", end + 9, end + 9.5, seen={"owner": "a:owner", **kept}, version=version)
    report = check(History([START, *before, out, read], held(version, **kept)))
    assert report.violations == []
    (limit,) = report.limits
    assert limit.message == f"a: a log-out ended nothing {words}"
    assert limit.records == (*before, out)


def test_what_a_log_out_did_not_end_is_denied_to_nobody() -> None:
    """After one whose id was no longer known, a request under the newest id finds the session."""
    out = record("logout", 1.5, 9, calls=("destroy HHHHHH 0a0b0c: missing at a:1 in 1 ms",))
    read = record("read", 10, 11, seen={})
    assert verdict(*rotations(5), out, read, stored=held(6, **rotated(5))) == [Kind.DENIED]


@pytest.mark.parametrize(
    ("before", "calls"),
    [
        (rotations(4), ("destroy HHHHHH 0a0b0c: missing at a:1 in 1 ms",)),
        (rotations(5), ("destroy HHHHHH 0a0b0c: destroyed at a:1 in 1 ms",)),
        (
            rotations(5),
            (
                "destroy HHHHHH 0a0b0c: ConnectionError gone at a:1 in 7 ms",
                "destroy HHHHHH 0a0b0c: missing at a:1 in 1 ms",
            ),
        ),
        (rotations(5), ()),
    ],
    ids=["known", "ended", "asked-twice", "not-asked"],
)
def test_a_log_out_that_has_to_end_the_session_is_none(before: list[Record], calls: tuple[str, ...]) -> None:
    """Its id was still known, or it was not told by all that there is no session: then what stays has returned."""
    out = record("logout", 1.5, 9, calls=calls)
    kept = rotated(len(before))
    assert verdict(*before, out, stored=held(1 + len(before), **kept)) == [Kind.RETURNED]


def test_a_limit_excuses_nothing_else() -> None:
    """What such a request wrote is neither in the session that it was sent to, nor does it bring back any of it."""
    kept = rotated(5)
    began = {"new": (1, {"k9": "a:k9"})}
    assert verdict(*rotations(5), BEGUN_LATE, stored={**held(6, **kept, k9="a:k9"), **began}) == [
        Kind.RETURNED
    ]
    began = {"new": (1, {"k9": "a:k9", "owner": "a:owner"})}
    assert verdict(*rotations(5), BEGUN_LATE, stored={**held(6, **kept), **began}) == [Kind.RETURNED]
    assert verdict(*rotations(5), BEGUN_LATE, stored=began) == [Kind.LOST, Kind.RETURNED]


def test_a_failover_may_lose_what_was_not_waited_for() -> None:
    """What was acknowledged before a failover's end and is gone is counted; after it, it is a violation."""
    lost = record("put", 2, 3, "k1", version=2)
    history = History([START, lost], held(1), failovers=[(2.5, 4)])
    report = check(history)
    assert report.violations == []
    assert sum(violation.count for violation in report.lost) == 1
    history.waits = True
    assert Kind.LOST in kinds(history)
    assert Kind.LOST in kinds(History([START, lost], held(1), failovers=[(-3, -2)]))


def test_a_failover_excuses_nothing_else() -> None:
    """An item twice, or a value of another session, is a violation whatever failed over."""
    twice = record("add", 2, 3, "list", version=2)
    failovers = [(2.5, 4.0)]
    assert verdict(twice, stored=held(2, list=["a:list", "a:list"]), failovers=failovers) == [Kind.DOUBLED]
    assert verdict(stored=held(1, owner="b:owner"), failovers=failovers) == [Kind.FOREIGN]


def test_a_failover_excuses_no_new_session_beside_one_that_lost_nothing() -> None:
    """A new session under a live id is excused by what a failover took, and by a failover alone it is not."""
    wrote = record("put", 3, 4, "k1", commits=(("new", 1),))
    began = {"new": (1, {"k1": "a:k1"})}
    failovers = [(1.5, 5.0)]
    assert verdict(wrote, stored={**held(1), **began}, failovers=failovers) == [Kind.DENIED]
    assert verdict(wrote, stored=began, failovers=failovers) == []
    rotate = record("rotate", 1.6, 2, "k0", version=2)
    assert verdict(rotate, wrote, stored={**held(1), **began}, failovers=failovers) == []
    assert verdict(rotate, wrote, stored={**held(2, k0="a:k0"), **began}, failovers=failovers) == [
        Kind.DENIED
    ]


def test_a_report_counts() -> None:
    """Requests, acknowledged changes, unknown ones and the longest wait are counted."""
    put = record("put", 2, 4.5, "k1", version=2)
    unknown = record("add", 5, 6, "list", status=503)
    read = record("read", 7, 8, seen={"owner": "a:owner", "k1": "a:k1"}, version=2)
    report = check(History([START, put, unknown, read], held(2, k1="a:k1")))
    assert (report.requests, report.acknowledged, report.unknown, report.longest) == (4, 2, 1, 2.5)


def test_a_violation_reads_as_a_history() -> None:
    """Its text has the requests that show it, in order, each with its times, what it was told and its calls."""
    calls = ("commit HHHHHH 0a0b0c: ConnectionError gone in 7 ms", "commit HHHHHH 0a0b0c: applied in 1 ms")
    history = History([START, record("put", 2, 3, "k1", version=2, calls=calls)], held(2))
    (violation,) = check(history).violations
    assert str(violation).splitlines() == [
        "LOST: a: k1 = 'a:k1' is missing",
        "        2.000 to     3.000  200  a put k1 = 'a:k1'  version 2 of HHHHHH",
        "                          commit HHHHHH 0a0b0c: ConnectionError gone in 7 ms",
        "                          commit HHHHHH 0a0b0c: applied in 1 ms",
    ]
