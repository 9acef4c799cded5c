"""Histories of requests, and the checker that reads them against what luasession promises.

A browser lives one *life* after another: it starts a session, works on it, logs out. Every value
that it stores begins with the name of the life, and none is stored twice. What a request came to is
taken from its answer and from the signals of its process (:class:`Record`). A change that was answered
must be there, exactly once; one that ended in 503 or in a broken connection may be there or not, now
or later, and not twice either.

The keys of a session, by prefix: ``k`` is set once and stays; ``r`` is a register, written by one
request of its browser at a time; ``list`` (merged) and ``tally`` (atomic) hold one item for each
change; ``sum`` (merged) and ``hits`` (atomic) count them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from textwrap import indent
from typing import Any

LISTS = ("list", "tally")
SUMS = ("sum", "hits")
#: Former digests that a session keeps, each for the grace time.
FORMERS = 4

# Requests of a life that a message shows, the last ones.
_SHOWN = 12


class Kind(Enum):
    """What a history can be guilty of."""

    LOST = "an acknowledged change is not there"
    DENIED = "a session that is there was taken for one that is not"
    DOUBLED = "a change was applied more than once"
    RETURNED = "what was dead or dropped is there"
    FOREIGN = "a session shows what is not its own"
    STALE = "a browser does not see what it wrote"
    VERSION = "versions do not grow"
    ERROR = "an answer that is no answer"
    #: No violation, and told apart: README has it among the limits.
    LIMIT = "a request began a session of its own or ended none, its id being one that is no longer known"


# How a change shows that a failover has taken it, beside reads that miss it.
_LOSSES = (Kind.LOST, Kind.RETURNED, Kind.VERSION)


@dataclass(frozen=True, eq=False)
class Record:
    """One request: what was asked, when, and what came back.

    :ivar op: ``start``, ``put`` and ``drop`` (of ``key``), ``add`` (to a list or a sum), ``rotate``,
        ``logout``, ``read``, ``late`` (a write under the id of a life that has ended).
    :ivar start: seconds, before the cookies were taken from the jar.
    :ivar end: seconds, after those of the answer were put there.
    :ivar status: of HTTP; 0 if there was no whole answer.
    :ivar commits: handles and versions, as the signals told them.
    :ivar seen: what a read showed of the session, None for other requests.
    :ivar version: of the session that a read or a drop saw, 0 for none.
    :ivar calls: what was sent to Redis for it, to which server, and what came back; each try by itself.
    :ivar blind: whether it wrote without having read.
    """

    life: str
    op: str
    start: float
    end: float
    status: int = 200
    key: str = ""
    value: Any = None
    commits: tuple[tuple[str, int], ...] = ()
    discarded: str = ""
    seen: dict[str, Any] | None = None
    version: int = 0
    text: str = ""
    calls: tuple[str, ...] = ()
    blind: bool = False

    @property
    def changes(self) -> bool:
        return self.op in {"start", "put", "drop", "add", "rotate", "late"}

    @property
    def unknown(self) -> bool:
        """Whether it may have been applied or not."""
        return self.status not in {200, 409, 410}

    @property
    def refused(self) -> bool:
        """Whether it said that it was not applied, or was told that there is no session."""
        return self.status in {409, 410} or bool(self.discarded) or self.found_nothing

    @property
    def found_nothing(self) -> bool:
        """Whether it read, and there was no session to read."""
        if self.status != 200 or self.commits or self.discarded:
            return False
        return self.seen == {} or (self.op == "drop" and self.version == 0)

    @property
    def applied(self) -> bool:
        return self.changes and self.status == 200 and not self.refused

    def __str__(self) -> str:
        what = f"{self.op} {self.key}".strip() + ("" if self.value is None else f" = {self.value!r}")
        told = [f"version {version} of {handle[:6]}" for handle, version in self.commits]
        told += [f"discarded: {self.discarded}"] if self.discarded else []
        told += [f"saw version {self.version}: {self.seen}"] if self.seen is not None else []
        told += [self.text] if self.text else []
        line = f"{self.start:9.3f} to {self.end:9.3f}  {self.status:3}  {self.life} {what}  {'; '.join(told)}"
        return "\n".join([line, *(f"{'':22}{call}" for call in self.calls)])


@dataclass(frozen=True, eq=False)
class Violation:
    """What is wrong, where, and the requests that show it."""

    kind: Kind
    life: str
    message: str
    records: tuple[Record, ...] = ()
    #: How many changes are concerned.
    count: int = 1

    def __str__(self) -> str:
        shown = "\n".join(map(str, self.records[-_SHOWN:]))
        return "\n".join([f"{self.kind.name}: {self.message}", *([indent(shown, "    ")] if shown else [])])


@dataclass
class History:
    """All requests of a run, and what Redis held at its end.

    :ivar stored: what each handle that is still a session holds, with its version.
    :ivar failovers: from when to when a replica took over, in seconds.
    :ivar waits: whether acknowledged changes had been replicated.
    :ivar trust: seconds for which another process may show a session that has ended.
    :ivar grace: seconds for which a session knows its former ids.
    """

    records: list[Record] = field(default_factory=list)
    stored: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    failovers: list[tuple[float, float]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    waits: bool = False
    trust: float = 2.0
    grace: float = 60.0

    def may_lose(self, records: Iterable[Record]) -> bool:
        """Whether a failover excuses what is missing of a life."""
        if self.waits or not self.failovers:
            return False
        last = max(end for _, end in self.failovers)
        return min(record.start for record in records) < last


@dataclass
class Report:
    """What a checker found."""

    violations: list[Violation]
    #: Acknowledged changes that a failover without ``SESSION_WAIT_REPLICAS`` took back.
    lost: list[Violation]
    #: What README says under "Limits", each with the requests that show that it is that.
    limits: list[Violation]
    requests: int
    acknowledged: int
    unknown: int
    #: The longest time that a request took, in seconds.
    longest: float

    def of(self, kind: Kind) -> list[Violation]:
        return [violation for violation in self.violations if violation.kind is kind]


def check(history: History) -> Report:
    """Read a whole history against the model."""
    lives: dict[str, list[Record]] = {}
    for record in sorted(history.records, key=lambda record: record.start):
        lives.setdefault(record.life, []).append(record)
    violations: list[Violation] = []
    lost: list[Violation] = []
    limits: list[Violation] = []
    for name, records in lives.items():
        # Once each, however many reads see it.
        life = _Life(name, records, history)
        first = {(each.kind, each.records[:1]): each for each in reversed([*life.check()])}
        found = list(reversed(first.values()))
        excused: set[Kind] = set()
        if history.may_lose(records):
            excused = {*_LOSSES, Kind.STALE}
            # Who was denied a session that has lost nothing was not denied it by a failover.
            if life.is_gone or any(violation.kind in _LOSSES for violation in found):
                excused.add(Kind.DENIED)
        for violation in found:
            if violation.kind is Kind.LIMIT:
                limits.append(violation)
            elif violation.kind not in excused:
                violations.append(violation)
            elif violation.kind is Kind.LOST:
                lost.append(violation)
    violations += _strangers(history, lives)
    return Report(
        violations,
        lost,
        limits,
        len(history.records),
        sum(record.applied for record in history.records),
        sum(record.unknown for record in history.records),
        max((record.end - record.start for record in history.records), default=0.0),
    )


class _Life:
    """One session of one browser."""

    def __init__(self, name: str, records: list[Record], history: History) -> None:
        self.name = name
        self.records = records
        self.history = history
        self.changes = [record for record in records if record.changes and record.op != "late"]
        starts = [record for record in records if record.op == "start" and record.commits]
        self.handle = starts[0].commits[0][0] if starts else ""
        self.by_key: dict[str, list[Record]] = {}
        for record in self.changes:
            self.by_key.setdefault(record.key, []).append(record)
        out = [record for record in records if record.op == "logout" and not record.refused]
        #: Log-outs whose id was no longer known: they have ended nothing.
        self.too_late = [record for record in out if self._found_none(record) and self._too_late(record)]
        self.logouts = [record for record in out if record not in self.too_late]

    @property
    def is_gone(self) -> bool:
        """Whether there is no such session at the end."""
        return self.handle not in self.history.stored

    def is_in(self, record: Record) -> bool:
        """Whether a change was acknowledged, to this session and to no other."""
        return record.applied and not self.is_elsewhere(record)

    def is_out(self, record: Record) -> bool:
        """Whether a change has no business in this session: it was dropped, or began another one."""
        return record.refused or self.is_elsewhere(record)

    def is_elsewhere(self, record: Record) -> bool:
        """Whether a change began a session of its own; whether it may is looked at by itself."""
        return bool(record.commits) and self.handle not in dict(record.commits)

    def fault(self, kind: Kind, message: str, *records: Record, count: int = 1) -> Violation:
        return Violation(kind, self.name, f"{self.name}: {message}", tuple(records), count)

    def check(self) -> Iterator[Violation]:
        for record in self.records:
            if record.status not in {0, 200, 409, 410, 503}:
                yield self.fault(Kind.ERROR, f"status {record.status}", record)
            if record.found_nothing:
                yield from self._check_nothing(record)
            elif record.seen is not None:
                yield from self._check_read(record)
        if not self.handle:
            return
        yield from self._check_commits()
        yield from self._check_end()
        for record in self.too_late:
            why, over = self._too_late(record), self._rotations_over(record)
            yield self.fault(Kind.LIMIT, f"a log-out ended nothing {why}", *over, record)

    # -- what the session is like at some time ------------------------------

    def _check_nothing(self, record: Record) -> Iterator[Violation]:
        # Under an id that was replaced meanwhile, or may have been, one sees nothing.
        if not self._has_moved(record):
            yield self.fault(Kind.DENIED, "the session is not there", *self.changes[:1], record)

    def _check_read(self, read: Record) -> Iterator[Violation]:
        assert read.seen is not None
        for out in self.logouts:
            if out.status == 200 and read.start > out.end + self.history.trust:
                yield self.fault(Kind.RETURNED, "read after the log-out", out, read)
                return
        if any(record.op == "late" and record.key in read.seen for record in self.records):
            return  # told by its commit
        yield from self._check_content(read.seen, read.start, read.end, read)
        for record in self.changes:
            for handle, version in record.commits:
                if record.end < read.start and handle == self.handle and version > read.version:
                    yield self.fault(Kind.VERSION, "a read of an older version", record, read)

    def _check_end(self) -> Iterator[Violation]:
        held = self.history.stored.get(self.handle)
        out = [out for out in self.logouts if out.status == 200]
        if held is None:
            if not self.logouts:
                done = [record for record in self.changes if self.is_in(record)]
                yield self.fault(Kind.LOST, "the session is gone at the end", *done, count=len(done))
            return
        if out:
            yield self.fault(Kind.RETURNED, f"logged out, and there is {held[1]}", out[0])
            return
        version, content = held
        yield from self._check_content(content, math.inf, math.inf, None)
        applied = sum(handle == self.handle for record in self.changes for handle, _ in record.commits)
        most = applied + sum(record.unknown for record in self.changes)
        if version > most:
            message = f"version {version} after {most} commits at most"
            yield self.fault(Kind.DOUBLED, message, *(r for r in self.changes if r.unknown or self.is_in(r)))
        elif version < applied:
            yield self.fault(Kind.VERSION, f"version {version} after {applied} commits")

    def _check_content(
        self, content: dict[str, Any], start: float, end: float, read: Record | None
    ) -> Iterator[Violation]:
        """Check what a session held at some moment between two."""
        shown = () if read is None else (read,)
        for key, value in content.items():
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, str) and not item.startswith(self.name + ":") for item in items):
                yield self.fault(Kind.FOREIGN, f"{key} = {value!r}", *shown)
                return
        for key, records in self.by_key.items():
            known = [record for record in records if record.start <= end]
            if key in LISTS:
                yield from self._check_list(key, content.get(key, []), known, start, shown)
            elif key in SUMS:
                yield from self._check_sum(key, content.get(key, 0), known, start, shown)
            elif known:
                yield from self._check_register(key, content.get(key), known, start, shown)
        for key in content.keys() - self.by_key.keys():
            yield self.fault(Kind.FOREIGN, f"nobody wrote {key} = {content[key]!r}", *shown)

    def _check_list(
        self, key: str, items: list[Any], known: list[Record], start: float, shown: tuple[Record, ...]
    ) -> Iterator[Violation]:
        counts = Counter(items)
        for record in known:
            number = counts.pop(record.value, 0)
            if number > 1:
                yield self.fault(Kind.DOUBLED, f"{record.value!r} is in {key} {number} times", record, *shown)
            elif number and self.is_out(record):
                yield self.fault(Kind.RETURNED, f"{record.value!r} was dropped", record, *shown)
            elif not number and self.is_in(record) and record.end < start:
                yield self.missing(record, shown)
        for value in counts:
            yield self.fault(Kind.FOREIGN, f"nobody put {value!r} into {key}", *shown)

    def _check_sum(
        self, key: str, value: int, known: list[Record], start: float, shown: tuple[Record, ...]
    ) -> Iterator[Violation]:
        least = sum(self.is_in(record) and record.end < start for record in known)
        most = sum(not self.is_out(record) for record in known)
        if value < least:
            kind = Kind.STALE if shown else Kind.LOST
            message = f"{key} is {value} after {least} increments"
            yield self.fault(kind, message, *known, *shown, count=least - value)
        elif value > most:
            yield self.fault(Kind.DOUBLED, f"{key} is {value} after {most} increments", *known, *shown)

    def _check_register(
        self, key: str, value: Any, known: list[Record], start: float, shown: tuple[Record, ...]
    ) -> Iterator[Violation]:
        last = max(
            (record for record in known if self.is_in(record) and record.end < start),
            key=lambda record: record.start,
            default=None,
        )
        # What was not answered may be applied at any later time, by a server that hung.
        allowed = [
            record for record in known if record.unknown or (self.is_in(record) and record.end >= start)
        ]
        if value in {None if last is None else last.value, *(record.value for record in allowed)}:
            return
        writer = next((record for record in self.by_key[key] if record.value == value), None)
        if value is not None and writer is None:
            yield self.fault(Kind.FOREIGN, f"nobody wrote {key} = {value!r}", *shown)
        elif writer is not None and self.is_out(writer):
            yield self.fault(Kind.RETURNED, f"{key} = {value!r} was dropped", writer, *shown)
        elif last is None and writer is not None:
            yield self.fault(Kind.FOREIGN, f"{key} = {value!r} before it was written", writer, *shown)
        elif last is not None and last.op == "drop":
            yield self.fault(Kind.RETURNED, f"{key} = {value!r} was deleted", *known, *shown)
        elif last is not None:
            yield self.missing(last, shown)

    def missing(self, record: Record, shown: tuple[Record, ...]) -> Violation:
        return self.fault(
            Kind.STALE if shown else Kind.LOST, f"{record.key} = {record.value!r} is missing", record, *shown
        )

    # -- what the answers say of each other ---------------------------------

    def _check_commits(self) -> Iterator[Violation]:
        for record in self.records:
            if record.op == "late" and self.handle in dict(record.commits):
                yield self.fault(Kind.RETURNED, "a write into the ended session", *self.logouts, record)
        for record in self.changes:
            if record.discarded and not self._has_moved(record):
                yield self.fault(Kind.DENIED, "dropped, and nothing had ended", record)
            if record.applied and not record.commits and record.op != "drop":
                yield self.fault(Kind.LOST, "answered, neither applied nor dropped", record)
            if any(handle != self.handle for handle, _ in record.commits):
                yield from self._check_beginning(record)
        yield from self._check_versions()

    def _has_moved(self, record: Record) -> bool:
        """Whether the id of a request may have been replaced, or its session ended."""
        return bool(self._rotations_over(record)) or self._has_ended(record)

    def _has_ended(self, record: Record) -> bool:
        """Whether the session may have ended before a request did."""
        return any(out.start < record.end for out in self.logouts)

    def _rotations_over(self, record: Record) -> list[Record]:
        """Return the rotations that may have replaced the id that a request carried.

        What had been answered before it began had put a newer id into the jar; what was not answered never
        does, and may be applied at any later time.
        """
        return [
            other
            for other in self.changes
            if other.op == "rotate"
            and other is not record
            and other.start < record.end
            and (other.unknown or (self.is_in(other) and other.end > record.start))
        ]

    def _check_beginning(self, record: Record) -> Iterator[Violation]:
        """Check a change that began a session of its own."""
        over = self._rotations_over(record)
        if self._has_ended(record) or (record.op == "rotate" and over):
            return
        # Who was open before all of them is told that there is a session, however many they were. A server knows
        # that to the transit of the call that it answers, which may be a long one twice.
        began = record.start + self._transit(record)
        began_late = any(other.start < began for other in over)
        if began_late and self._knew_nothing(record) and (why := self._too_late(record)):
            yield self.fault(Kind.LIMIT, f"{record.key} began a session of its own {why}", *over, record)
        else:
            message = f"a new session was begun under a live id, {len(over)} rotations later"
            yield self.fault(Kind.DENIED, message, *over, record)

    def _too_late(self, record: Record) -> str:
        """Return why the id of a request may be one that is no longer known; empty if it has to be."""
        over = self._rotations_over(record)
        if len(over) > FORMERS:
            return f"after {len(over)} rotations"
        if any(record.end > other.start + self.history.grace for other in over):
            return "after the grace of a rotation"
        return ""

    def _transit(self, record: Record) -> float:
        """Return the seconds of the last call that was answered that there is no session."""
        told = [call for call in record.calls if ": missing at " in call]
        return int(told[-1].split()[-2]) / 1000 if told else 0.0

    def _found_none(self, out: Record) -> bool:
        """Whether each sending of a log-out was answered that there is no such session."""
        told = [call.rpartition(" at ")[0] for call in out.calls if call.startswith("destroy ")]
        return out.status == 200 and bool(told) and all(call.endswith(": missing") for call in told)

    def _knew_nothing(self, record: Record) -> bool:
        """Whether a request had not been shown the session: who has seen it can tell that it is there."""
        read = [call.rpartition(" at ")[0] for call in record.calls if call.startswith("load ")]
        return record.blind or any(call.endswith(": missing") for call in read)

    def _check_versions(self) -> Iterator[Violation]:
        made: dict[int, Record] = {}
        own = [(r, v) for r in self.changes for handle, v in r.commits if handle == self.handle]
        by_end = sorted(own, key=lambda pair: pair[0].end)
        newest: Record | None = None
        at = highest = 0
        for record, version in own:  # by their starts
            if version in made:
                yield self.fault(Kind.VERSION, f"version {version} twice", made[version], record)
            made[version] = record
            while at < len(by_end) and by_end[at][0].end < record.start:
                if by_end[at][1] > highest:
                    newest, highest = by_end[at]
                at += 1
            if newest is not None and version < highest:
                yield self.fault(Kind.VERSION, f"version {version} after {highest}", newest, record)


def _strangers(history: History, lives: dict[str, list[Record]]) -> Iterator[Violation]:
    """Check the sessions that belong to no life: what was written under ids that had ended."""
    own = {
        record.commits[0][0]
        for records in lives.values()
        for record in records
        if record.op == "start" and record.commits
    }
    makers = {handle: r for rs in lives.values() for r in rs for handle, _ in r.commits if handle not in own}
    for handle, (_, content) in history.stored.items():
        if handle in own:
            continue
        texts = [
            text for value in content.values() for text in (value if isinstance(value, list) else [value])
        ]
        names = {text.partition(":")[0] for text in texts if isinstance(text, str)}
        if len(names) > 1:
            yield Violation(Kind.FOREIGN, "", f"{handle} holds values of {sorted(names)}: {content}")
            continue
        maker = makers.get(handle)
        name = maker.life if maker else next(iter(names), "")
        # A number does not say whose it is: it may be anybody's.
        theirs = lives.get(name, []) if name else [record for records in lives.values() for record in records]
        written = [r for r in theirs if r.changes and not r.refused]
        unknown = [record for record in written if record.unknown]
        if maker is None and not any(content == _alone(record) for record in unknown):
            message = f"nobody began {handle}: {content}"
            yield Violation(Kind.RETURNED, name, message, tuple(unknown))
        elif maker is not None:
            here = {record.key for record in written if record.unknown or handle in dict(record.commits)}
            if extra := content.keys() - here:
                message = f"{handle} was begun by {name} with what had ended: {sorted(extra)}"
                yield Violation(Kind.RETURNED, name, message, (maker,))


def _alone(record: Record) -> dict[str, Any]:
    """Return what a session holds that only this request wrote to."""
    if record.key in SUMS:
        return {record.key: 1}
    return {record.key: [record.value] if record.key in LISTS else record.value}
