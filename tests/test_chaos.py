"""Short runs of the load under each fault, and one without a guard, which is noticed."""

from __future__ import annotations

import pytest

from .chaos import Outcome, Plan, run
from .conftest import require
from .faults import FAULTS
from .history import Kind


def short(fault: str, topology: str = "standalone", mutation: str = "", **settings: object) -> Outcome:
    require("valkey-9.1")
    return run(
        Plan(
            topology=topology,
            fault=fault,
            seconds=1.0,
            seed=7,
            browsers=24,
            threads=6,
            steps=(5, 20),
            hang=0.9,
            mutation=mutation,
            settings=settings,
        )
    )


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
    outcome = short("drops", mutation="write id")
    assert outcome.report.of(Kind.DOUBLED), outcome


def test_without_proof_of_replies_the_run_finds_foreign_values() -> None:
    """With replies taken for answers unproven, sessions show what is not their own, or versions that are not."""
    outcome = short("crossed", mutation="replies")
    assert {Kind.FOREIGN, Kind.VERSION} & {each.kind for each in outcome.report.violations}, outcome


def test_without_the_guard_of_existence_the_run_finds_what_came_back() -> None:
    """With tombstones overlooked and commits to missing sessions let through, what ended comes back."""
    outcome = short("scripts", mutation="existence")
    assert outcome.report.of(Kind.RETURNED), outcome
