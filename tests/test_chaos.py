"""Short runs of the load under each fault, and one without a guard, which is noticed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from .chaos import PREFIX, Browser, Outcome, Plan, run, stored_in
from .conftest import require
from .faults import FAULTS, world_of
from .history import History, Kind, Violation, check
from .web import serving


def short(
    fault: str, topology: str = "standalone", mutation: str = "", seed: int = 7, **settings: object
) -> Outcome:
    require("valkey-9.1")
    return run(
        Plan(
            topology=topology,
            fault=fault,
            seconds=1.0,
            seed=seed,
            browsers=24,
            threads=6,
            steps=(5, 20),
            hang=0.9,
            mutation=mutation,
            # What is asked for once it is no longer trusted is asked for sooner.
            settings={"SESSION_CACHE_TTL": 0.5, **settings},
        )
    )


def finding(fault: str, mutation: str, *kinds: Kind) -> tuple[Outcome, list[Violation]]:
    """Run without a guard until that is noticed: on a busy machine one second of load may be too little."""
    for seed in range(7, 12):
        outcome = short(fault, mutation=mutation, seed=seed)
        if found := [each for kind in kinds for each in outcome.report.of(kind)]:
            break
    return outcome, found


def all_is_well(outcome: Outcome) -> None:
    assert outcome.report.violations == [], outcome.story()
    assert outcome.report.lost == [], "\n".join(map(str, outcome.report.lost[:5]))
    assert outcome.report.acknowledged > 50, outcome
    assert outcome.history.events, "nothing was done to the servers"


@pytest.mark.parametrize("fault", FAULTS["standalone"])
def test_a_fault_of_one_server(fault: str) -> None:
    """Under load, nothing acknowledged is lost or doubled, nothing dead returns, nobody sees another's."""
    all_is_well(short(fault))


def test_a_kill_in_a_cluster() -> None:
    """A primary of a cluster is killed under load: what was waited for is there when its replica takes over."""
    all_is_well(short("kill", "cluster", SESSION_WAIT_REPLICAS=1, SESSION_WAIT_TIMEOUT=0.5))


def test_a_kill_behind_sentinels() -> None:
    """The primary behind sentinels is killed under load: what both replicas had is there afterwards."""
    all_is_well(short("kill", "sentinel", SESSION_WAIT_REPLICAS=2, SESSION_WAIT_TIMEOUT=0.5))


def test_without_the_write_id_the_run_finds_doubled_changes() -> None:
    """The run proves itself: with the look into the ring of write ids taken out, changes are found twice."""
    outcome, found = finding("drops", "write id", Kind.DOUBLED)
    assert found, outcome
    # Its history shows how: one of the requests sent a commit, got no reply, and sent it again.
    pairs = [pair for violation in found for record in violation.records for pair in pairwise(record.calls)]
    assert any(
        first.startswith("commit ")
        and ": ConnectionError" in first
        and second.partition(":")[0] == first.partition(":")[0]
        for first, second in pairs
    ), outcome.story()


def test_without_proof_of_replies_the_run_finds_foreign_values() -> None:
    """With replies taken for answers unproven, sessions show what is not their own, or versions that are not."""
    outcome, found = finding("crossed", "replies", Kind.FOREIGN, Kind.VERSION)
    assert found, outcome
    # Its history shows it: what another browser's session holds, or a number that another commit was given too.
    assert any(
        (violation.kind is Kind.FOREIGN and record.seen) or len(violation.records) == 2
        for violation in found
        for record in violation.records
    ), outcome.story()


def test_without_the_guard_of_existence_the_run_finds_what_came_back() -> None:
    """With tombstones overlooked and commits to missing sessions let through, what ended comes back."""
    outcome, found = finding("scripts", "existence", Kind.RETURNED)
    assert found, outcome
    # Its history shows it: a log-out that was answered, and a commit to the same session after it.
    stories = [[record.op for record in violation.records] for violation in found]
    assert any(story[-2:] == ["logout", "late"] for story in stories), outcome.story()


@pytest.mark.parametrize(("rotations", "reads"), [(4, ""), (5, ""), (5, "1")])
def test_an_id_that_is_replaced_again_and_again_while_it_is_used(rotations: int, reads: str) -> None:
    """A write over four rotations is stored, and one over five is dropped, whether it has read or not."""
    require("valkey-9.1")
    history = History()
    app = "tests.chaos_app:create_app()"
    with (
        world_of("standalone", "valkey-9.1", 0) as world,
        serving(None, app=app, workers=1, SESSION_REDIS_URL=world.url, SESSION_KEY_PREFIX=PREFIX) as web,
        ThreadPoolExecutor(1) as pool,
    ):
        browser = Browser(0, Plan(), web.port, history)
        browser.begin()
        browser.overtake(pool, rotations, reads)
        history.stored = stored_in(world)
    report = check(history)
    assert report.violations == []
    assert (len(history.records), len(report.limits)) == (2 + rotations, 0)
    write = next(record for record in history.records if record.op == "put")
    assert bool(write.commits) is (rotations < 5)


def test_an_old_id_takes_the_hints_of_its_own_session_alone() -> None:
    """Who comes back under an old id has seen what its session answered, and nothing of the one after it."""
    require("valkey-9.1")
    app = "tests.chaos_app:create_app()"
    with (
        world_of("standalone", "valkey-9.1", 0) as world,
        serving(None, app=app, workers=1, SESSION_REDIS_URL=world.url, SESSION_KEY_PREFIX=PREFIX) as web,
    ):
        browser = Browser(0, Plan(), web.port, History())
        browser.begin()
        old = dict(browser._jar.cookies)
        assert browser._send("put", old, key="k", value="v").status == 200
        assert old["session_v"] == "2"
        assert browser._send("logout", old, value="destroy").status == 200
        late = browser._send("late", old, key="k", value="v")
        assert late.commits[0][1] == 1, "a session of its own"
        assert old["session_v"] == "2"
