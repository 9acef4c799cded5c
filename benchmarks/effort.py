"""How much is measured: a full run, a quick one, and one that only shows that everything works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """The counts of one run."""

    name: str
    #: Rounds of the requests, and calls of each kind in a round, by the name of the shape.
    rounds: dict[str, tuple[int, int]]
    #: Calls of each single command.
    commands: int
    #: Sessions of the mix, and requests of it in this process for each peer.
    population: int
    mix: tuple[int, int]
    #: Rounds and seconds of each peer under gunicorn, whether that is all of them, and numbers of processes.
    system: tuple[int, float]
    all_systems: bool
    processes: tuple[int, ...]
    #: Parallel requests on one session, and rounds of each.
    parallel: tuple[int, ...]
    contention: int
    #: Rounds and calls for each point of the growth; numbers of sessions, and the same for each of them.
    growth: tuple[int, int]
    sessions: tuple[int, ...]
    among_many: tuple[int, int]
    #: Calls for one figure of the server's own time, and whether every server that is found is asked.
    server: int
    all_servers: bool
    #: Handles that are spread over the slots.
    handles: int


FULL = Effort(
    name="full",
    rounds={"8 x 40 B": (60, 20), "30 mixed": (20, 10), "100 x 1 KB": (30, 8), "1000 x 1 KB": (15, 5)},
    commands=4000,
    population=100_000,
    mix=(20, 500),
    system=(6, 0.7),
    all_systems=True,
    processes=(1, 2, 4),
    parallel=(1, 2, 4, 8, 16, 32, 64),
    contention=2,
    growth=(10, 8),
    sessions=(100, 1_000, 10_000, 100_000),
    among_many=(8, 200),
    server=1000,
    all_servers=True,
    handles=1_000_000,
)
QUICK = Effort(
    name="quick",
    rounds={"8 x 40 B": (6, 10), "30 mixed": (3, 5), "100 x 1 KB": (3, 5), "1000 x 1 KB": (2, 2)},
    commands=800,
    population=10_000,
    mix=(3, 100),
    system=(1, 0.4),
    all_systems=True,
    processes=(1, 2, 4),
    parallel=(1, 8, 16),
    contention=1,
    growth=(1, 4),
    sessions=(100, 1_000, 10_000),
    among_many=(2, 50),
    server=200,
    all_servers=True,
    handles=200_000,
)
SMOKE = Effort(
    name="smoke",
    rounds={"8 x 40 B": (1, 1), "30 mixed": (1, 1), "100 x 1 KB": (1, 1), "1000 x 1 KB": (1, 1)},
    commands=5,
    population=50,
    mix=(1, 5),
    system=(1, 0.1),
    all_systems=False,
    processes=(1, 2),
    parallel=(1, 2),
    contention=1,
    growth=(1, 1),
    sessions=(10, 50),
    among_many=(1, 5),
    server=5,
    all_servers=False,
    handles=20_000,
)
