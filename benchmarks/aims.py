"""The aims: what was wished for, what came out, and whether that is it. Misses stand with the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .contention import LOCKED, TUNED
from .peers import (
    BARE_CHANGE,
    BARE_COMMIT,
    BARE_CONFIRMATION,
    BARE_MIX,
    BARE_READ,
    CACHED,
    CHECKED,
    COLD,
    COOKIE,
    DEFAULTS,
    FLOOR,
    LOADED,
    ONE_HGETALL,
    ONE_HSET,
    RIVAL,
    VALIDATING,
)
from .samples import Row
from .server import BARE, COMMIT, IN_A_ROW
from .web import GTHREAD, PROCESSES
from .workloads import HUGE, LARGE, SMALL

#: The server whose own time and memory the aims are about, if it was found.
_SERVER = "redis-7.0"
# Who does least for a workload: one command, or by hand, whichever comes out lower.
_READ = (ONE_HGETALL, BARE_READ)
_WRITE = (ONE_HSET, BARE_COMMIT)
_CHANGE = (ONE_HSET, BARE_CHANGE)


def find(rows: list[Row], **names: Any) -> Row:
    """Return the row with these names.

    :raise LookupError: if there is none.
    """
    for row in rows:
        if all(row.get(key) == value for key, value in names.items()):
            return row
    raise LookupError(f"nothing was measured for {names}")


class _Measured:
    """Figures of a result, as the aims need them."""

    def __init__(self, result: dict[str, Any]) -> None:
        self._result = result

    def above(self, peer: str, workload: str, shape: str = SMALL) -> float:
        """Return the microseconds of P50 above the floor."""
        rows, names = self._result["requests"], {"workload": workload, "shape": shape}
        floor: float = find(rows, peer=FLOOR, **names)["p50"]
        return float(find(rows, peer=peer, **names)["p50"]) - floor

    def ratio(self, peer: str, to: str, workload: str, shape: str = SMALL) -> float:
        """Return the ratio of two peers above the floor."""
        return self.above(peer, workload, shape) / max(0.1, self.above(to, workload, shape))

    def least(self, peers: Sequence[str], workload: str, shape: str = SMALL) -> float:
        """Return the microseconds above the floor of that one of some apps that does least for a workload."""
        return min(self.above(peer, workload, shape) for peer in peers)

    def limit(self, command: str) -> float:
        """Return P50 of one command."""
        return float(find(self._result["limits"], command=command)["p50"])

    def served(self, peer: str, what: str) -> float:
        """Return a figure from under gunicorn, with threads."""
        names = {"worker_class": GTHREAD, "processes": PROCESSES}
        return float(find(self._result["system"], peer=peer, **names)[what])

    def is_served(self, peer: str) -> bool:
        """Whether a peer was measured under gunicorn; the smallest runs leave some out."""
        return any(row["peer"] == peer for row in self._result["system"])

    def burst(self, peer: str, pause: int) -> Row:
        """Return the row of most parallel writers."""
        rows = self._result["contention"]
        many = max(row["parallel"] for row in rows)
        return find(rows, kind="own", parallel=many, pause_ms=pause, peer=peer)

    @property
    def server(self) -> str:
        """Which server the aims are about."""
        kinds = [row["server"] for row in self._result["server"]]
        return _SERVER if _SERVER in kinds else kinds[0]

    def commit(self, what: str) -> float:
        """Return the server's own time for a commit, or for what is the least of one."""
        return float(find(self._result["server"], server=self.server, what=what, shape=SMALL)["mean"])

    def memory(self, listpack: str, when: str) -> float:
        """Return the ratio of one session's bytes to Flask-Session's."""
        names = {"server": self.server, "listpack": listpack, "shape": SMALL}
        ours, theirs = (find(self._result["memory"], peer=peer, **names)[when] for peer in (COLD, RIVAL))
        return float(ours / theirs)


def judge(result: dict[str, Any]) -> list[Row]:
    """Return the table: what, aim, measured, met, and the least that anybody could have reached, where known.

    That is what an app takes that does one thing for one workload; see :mod:`benchmarks.least`.
    """
    m = _Measured(result)
    rows: list[Row] = []

    def at_most(
        what: str, aim: float, measured: float, unit: str = "", *, least: float | None = None
    ) -> None:
        best = "" if least is None else f"{least:.2f}{unit}"
        rows.append(_row(what, f"at most {aim:g}{unit}", f"{measured:.2f}{unit}", measured <= aim, best))

    def at_least(what: str, aim: float, measured: float, *, most: float | None = None) -> None:
        best = "" if most is None else f"{most:.2f}"
        rows.append(_row(what, f"at least {aim:g}", f"{measured:.2f}", measured >= aim, best))

    us = " µs"
    rival = "to Flask-Session, no refresh"
    read, write, change = "read one key", "write blind", "read, change"
    at_most("untouched, above the floor", 8, m.above(CACHED, "untouched"), us)
    at_most("cached read to the signed cookie", 0.5, m.ratio(CACHED, COOKIE, read))
    hgetall, hset = m.limit("HGETALL"), m.limit("HSET")
    at_most(
        "cold read above HGETALL",
        45,
        m.above(COLD, read) - hgetall,
        us,
        least=m.least(_READ, read) - hgetall,
    )
    at_most(
        f"cold read {rival}",
        0.75,
        m.ratio(COLD, RIVAL, read),
        least=m.least(_READ, read) / m.above(RIVAL, read),
    )
    at_most(
        "validating read of 100 KB to a small one",
        1.15,
        m.above(VALIDATING, read, LARGE) / m.above(VALIDATING, read),
    )
    at_most(
        f"validating read of 100 KB {rival}",
        0.5,
        m.ratio(VALIDATING, RIVAL, read, LARGE),
        least=m.ratio(BARE_CONFIRMATION, RIVAL, read, LARGE),
    )
    at_most(
        "blind write above HSET",
        50,
        m.above(CACHED, write) - hset,
        us,
        least=m.least(_WRITE, write) - hset,
    )
    at_most(
        f"blind write {rival}",
        0.4,
        m.ratio(CACHED, RIVAL, write),
        least=m.least(_WRITE, write) / m.above(RIVAL, write),
    )
    for peer, aim, words in ((RIVAL, 0.45, rival), (LOADED, 0.35, "to Flask-Session")):
        at_most(
            f"read and change, cached, {words}",
            aim,
            m.ratio(CACHED, peer, change),
            least=m.least(_CHANGE, change) / m.above(peer, change),
        )
    at_most(
        "read and change, cached, 1 MB to small",
        1.2,
        m.above(CACHED, change, HUGE) / m.above(CACHED, change),
    )
    at_most(f"read and change of 1 MB, cached, {rival}", 0.1, m.ratio(CACHED, RIVAL, change, HUGE))
    at_most(
        f"cold read of 1 MB, one key used, {rival}",
        1.1,
        m.ratio(COLD, RIVAL, read, HUGE),
        least=m.least(_READ, read, HUGE) / m.above(RIVAL, read, HUGE),
    )
    at_most("conflict-checked commit to an unchecked one", 1.1, m.ratio(CHECKED, CACHED, change))
    at_least(
        "requests/s under gunicorn to Flask-Session",
        2,
        m.served(DEFAULTS, "rate_to_flask_session"),
        most=m.served(BARE_MIX, "rate_to_flask_session") if m.is_served(BARE_MIX) else None,
    )
    at_most("P99 under gunicorn to Flask-Session", 1, m.served(DEFAULTS, "p99") / m.served(LOADED, "p99"))
    for pause in (0, 10):
        ours = m.burst(CACHED, pause)
        many = ours["parallel"]
        kept, everything = ours["kept_least"], ours["kept_least"] == many
        rows.append(
            _row(f"{many} parallel writers kept, views of {pause} ms", f"{many}", f"{kept}", everything)
        )
        for lock in (TUNED, LOCKED):
            at_least(
                f"their rate to {lock.removeprefix('Flask-Session under ')}, views of {pause} ms",
                5,
                m.burst(lock, pause)["seconds"] / ours["seconds"],
            )
    for way, words in (("", ", one in a while"), (IN_A_ROW, IN_A_ROW)):
        spent, commands = m.commit(COMMIT + way), m.commit(BARE + way)
        at_most(f"{m.server}'s own time for a commit{words}", 10, spent, us, least=commands)
    for when, words in (("new", "a new session"), ("worn", "after 20 quick writes")):
        at_most(f"memory {rival}, {words}", 1.5, m.memory("default", when))
        at_most(f"the same with hash-max-listpack-value 1024, {words}", 1.2, m.memory("1024", when))
    return rows


def _row(what: str, aim: str, measured: str, met: bool, least: str = "") -> Row:
    return {"what": what, "aim": aim, "measured": measured, "met": met, "least": least}
