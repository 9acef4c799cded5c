"""Conflicts: keys that two requests changed, and what becomes of them.

It knows neither Redis nor Flask, and nothing of how a request came to its changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import merge
from .delta import KEEP, Check, Delta, Put
from .errors import SessionConflict
from .outcome import Conflicting
from .policy import Policy
from .snapshot import Snapshot, field_name, session_key
from .values import Values


@dataclass(slots=True)
class Conflict:
    """One key in conflict, as ``session_conflict`` tells it."""

    key: str
    base: Any
    theirs: Any
    ours: Any
    outcome: Any
    #: What decided; ``"overwrite"`` where the types did not fit a merge function.
    policy: Policy


class Conflicts:
    """What to make of changes that others made of the same keys.

    :param opened: returns the bytes of a stored field as the serializer made them, None for none.
    :param policy: tells what decides about a key.
    :param base: the snapshot that this request's changes were made from.
    :param now_ms: the moment by which this request judges keys with an end of their own.
    """

    def __init__(
        self,
        values: Values,
        opened: Callable[[bytes, bytes | None], bytes | None],
        policy: Callable[[str], Policy],
        base: Snapshot | None,
        now_ms: int,
    ) -> None:
        self._values = values
        self._opened = opened
        self._policy = policy
        self._base = base
        self._now_ms = now_ms

    def find(self, ours: Delta, current: Mapping[bytes, bytes | None]) -> list[Conflict]:
        """Return the changed keys that others have really changed too, with what each side made of them.

        :param ours: what this request changed.
        :param current: what is stored now, or was until ours replaced it.
        """
        found = []
        for name, now in current.items():
            key = session_key(name)
            before = self._base.value(name, self._now_ms) if self._base else None
            if key is None or now == before or not (name in ours.sets or name in ours.deletes):
                continue
            base, theirs = self._opened(name, before), self._opened(name, now)
            if theirs is not None and theirs == base:  # encrypted twice, it is the same all the same
                continue
            put = ours.sets.get(name)
            value = self._values.decode(put.value if put else None)
            conflict = Conflict(
                key, self._values.decode(base), self._values.decode(theirs), value, value, self._policy(key)
            )
            found.append(conflict)
        return found

    def resolve(
        self, ours: Delta, delta: Delta, conflicting: Conflicting, found: Iterable[Conflict]
    ) -> Delta:
        """Return the delta that is to be sent next, on top of what is now stored.

        :param ours: what this request changed.
        :param delta: what was sent last: the same, or merged in an earlier round.
        :param found: the conflicts of this request's own delta with what is now stored.
        :raise SessionConflict: if a policy says so.
        """
        changed = delta.sets.keys() | delta.deletes.keys()
        refused = {
            session_key(name) or ""
            for name in conflicting.current
            if name not in changed or not self._may_go_on(name, delta)
        }
        if conflicting.everything:
            refused |= {session_key(name) or "" for name in changed}
        if refused:
            raise SessionConflict(refused)
        sets, deletes = dict(delta.sets), dict(delta.deletes)
        for name in conflicting.current:
            # Merged in an earlier round with what has moved again since: begin anew from ours.
            sets.pop(name, None)
            deletes.pop(name, None)
            if name in ours.sets:
                sets[name] = ours.sets[name]
            else:
                deletes[name] = ours.deletes[name]
        for conflict in found:
            self._merge(conflict, sets, deletes)
        return delta._replace(base=conflicting.pair, own=(), sets=sets, deletes=deletes)

    def _may_go_on(self, name: bytes, delta: Delta) -> bool:
        check = delta.sets[name].check if name in delta.sets else delta.deletes[name]
        return check is not Check.STRICT or callable(self._policy(session_key(name) or ""))

    def _merge(self, conflict: Conflict, sets: dict[bytes, Put], deletes: dict[bytes, Check]) -> None:
        name = field_name(conflict.key)
        if not callable(conflict.policy):
            return
        sides = conflict.base, conflict.theirs, conflict.ours
        conflict.outcome, fits = merge.outcome(conflict.policy, *sides)
        if not fits:
            conflict.policy = "overwrite"
        if conflict.outcome is merge.MISSING:
            sets.pop(name, None)
            deletes[name] = Check.STRICT
        else:
            ttl_ms = sets[name].ttl_ms if name in sets else KEEP
            deletes.pop(name, None)
            sets[name] = Put(self._values.encode(conflict.key, conflict.outcome), Check.STRICT, ttl_ms)

    def stored(self, key: str, current: Mapping[bytes, bytes | None]) -> Any:
        """Return a key's value out of stored fields, ``merge.MISSING`` for none or what does not decode."""
        name = field_name(key)
        return self._values.decode(self._opened(name, current.get(name)))
