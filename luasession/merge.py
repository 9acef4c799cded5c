"""Three-way merges: the functions that ``SESSION_MERGE`` may name for a key.

Each takes one key's value in three states: *base*, what this request read; *theirs*, what others
have stored since; *ours*, what this request wants to store. The result is what there would be if
this request had run after the others, as far as values can tell. Where a state has no such key
it is :data:`MISSING`, and a result of :data:`MISSING` deletes the key. Of all functions here:

- If one side changed nothing, the result is the other side, the very object, whatever its type.
  Types count and key order does not: ``1``, ``1.0`` and ``True`` differ, NaN is the same as NaN.
- Deleted on both sides is deleted.
- Types that do not fit give *ours*. :func:`outcome` tells that from a merge.
- When others store again, the merge is made again from the same base and the same *ours* with the
  new *theirs*: any number of requests then count once each.
- The sides are left as they are. A merged container is a new one, but what it holds are the
  sides' own objects: copy it before you change it in depth.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import wraps
from operator import itemgetter
from types import NoneType
from typing import Any, Final, TypeAlias
from uuid import UUID

from markupsafe import Markup

_Merge: TypeAlias = Callable[[Any, Any, Any], Any]


class MissingType(Enum):
    """The type of :data:`MISSING`; an enum, so that copies and pickles are the same object."""

    MISSING = "MISSING"

    def __repr__(self) -> str:
        return self.value

    def __bool__(self) -> bool:
        return False


#: A state without the key: never set, or deleted. False, so that ``theirs or []`` reads well.
MISSING: Final = MissingType.MISSING


class _Misfit(Exception):
    """The types do not fit."""


# Each public function, and the rule behind it that raises where the function falls back.
_RULES: Final[list[tuple[_Merge, _Merge]]] = []


def outcome(function: _Merge, base: Any, theirs: Any, ours: Any) -> tuple[Any, bool]:
    """Merge, and tell whether the types did fit: ``(value, fits)``.

    Without a fit the value is *ours*. A function from elsewhere always fits, also one that calls
    a function of this module, and what it raises is passed on.
    """
    # By identity: a callable from elsewhere need not be hashable, nor compare in a sane way.
    rule = next((rule for public, rule in _RULES if public is function), None)
    if rule is None:
        return function(base, theirs, ours), True
    if _same(theirs, base) or (theirs is MISSING and ours is MISSING):
        return ours, True
    if _same(ours, base):
        return theirs, True
    try:
        return rule(base, theirs, ours), True
    except _Misfit:
        return ours, False


def _falls_back(rule: _Merge) -> _Merge:
    @wraps(rule)
    def function(base: Any, theirs: Any, ours: Any) -> Any:
        return outcome(function, base, theirs, ours)[0]

    _RULES.append((function, rule))
    return function


@_falls_back
def add(base: Any, theirs: Any, ours: Any) -> Any:
    """Add up what both sides did to a number: ``ours + (theirs - base)``.

    For int, float and Decimal, not bool. A missing base counts as 0. Exact for ints; a float sum
    may differ in its last bits from the one that the requests would have reached one by one, and
    Decimals follow the context of the thread. A float does not fit a Decimal, and an infinity or
    a NaN fits nothing.

    Any number that a request stores counts as an increment, a reset to 0 too. A deletion is none:
    deleted by us, the key is gone, as if we had run last; deleted by them, we count up from 0.
    """
    kinds = _kinds(base, theirs, ours)
    if not (kinds <= {int, float} or kinds <= {int, Decimal}):
        raise _Misfit
    start, others, own = (0 if side is MISSING else side for side in (base, theirs, ours))
    try:
        # Only an infinity or a NaN leaves something when taken from itself.
        if any(number - number != 0 for number in (start, others, own)):
            raise _Misfit
        total = own + (others - start)
    except ArithmeticError as error:  # a Decimal's signal, or an int too large for a float
        raise _Misfit from error
    return MISSING if ours is MISSING else total


@_falls_back
def append(base: Any, theirs: Any, ours: Any) -> Any:
    """Let both sides' additions to a list, and their removals from it, count.

    Each element is in the result ``max(0, theirs + ours - base)`` times. So nothing is made up or
    doubled, an element that both sides remove goes once (of two equal ones each removes one), and
    what one removed does not come back from the other. Elements are compared as sides are, and
    may be unhashable. One changed in place was removed and another one added; one removed and
    added again was not touched.

    The order is theirs; of equal elements the first are removed, as by :meth:`list.remove`. What
    we added at the end comes last. What we inserted follows the element that it was inserted
    after, or the nearest before that which is still there, or stands first.

    A missing side is an empty list: deleting the key removes what the base held and no more. If
    nothing is left of a list that a side deleted, the result is :data:`MISSING`.
    """
    if _kinds(base, theirs, ours) != {list}:
        raise _Misfit
    return _lists(base, theirs, ours)


@_falls_back
def union(base: Any, theirs: Any, ours: Any) -> Any:
    """Let both sides' additions to a set, and their removals from it, count.

    The result is ``(theirs | ours) - (base - theirs) - (base - ours)``, so the order does not
    matter. Sets, or frozensets, but not both; as in any set ``1`` is ``True``. Missing sides and
    empty results are as in :func:`append`.
    """
    kinds = _kinds(base, theirs, ours)
    if kinds not in ({set}, {frozenset}):
        raise _Misfit
    kind = kinds.pop()
    start, others, own = (side or kind() for side in (base, theirs, ours))
    return _left((others | own) - (start - others) - (start - own), theirs, ours)


@_falls_back
def deep(base: Any, theirs: Any, ours: Any) -> Any:
    """Merge dicts key by key against the base, to any depth.

    A key that one side changed is as that side has it. Changed on both, dicts are merged in turn,
    lists as by :func:`append`, and of anything else ours stands, deletions and types that differ
    included. So changes to different paths all count, in any order. Their keys come first.

    A missing dict is an empty one: deleting it deletes each path that it had in the base. What
    the other side added stays, and what we changed while they deleted it; so a part of a record
    can outlive the record. Where a record must stay whole, take another policy. If nothing is
    left of a dict that a side deleted, the result is :data:`MISSING`.

    At the top a list fits too, and nothing else.
    """
    if _kinds(base, theirs, ours) not in ({dict}, {list}):
        raise _Misfit
    return _deep(base, theirs, ours)


def _deep(base: Any, theirs: Any, ours: Any) -> Any:
    if _same(theirs, base):
        return ours
    if _same(ours, base):
        return theirs
    kinds = _kinds(base, theirs, ours)
    if kinds == {list}:
        return _lists(base, theirs, ours)
    if kinds != {dict}:
        return ours
    start, others, own = (side or {} for side in (base, theirs, ours))
    merged = {}
    for key in others | own:
        value = _deep(*(side.get(key, MISSING) for side in (start, others, own)))
        if value is not MISSING:
            merged[key] = value
    return _left(merged, theirs, ours)


def _lists(base: Any, theirs: Any, ours: Any) -> Any:
    # Elements of the base not met in ours: in the end, those that we removed.
    removed = Counter(map(_form, base or ()))
    own = []
    tail = 0  # where the additions begin that nothing from the base follows
    for element in ours or ():
        form = _form(element)
        known = removed[form] > 0
        removed[form] -= known
        own.append((form, element, known))
        if known:
            tail = len(own)
    placed: list[tuple[int, Any]] = []
    places: defaultdict[Hashable, deque[int]] = defaultdict(deque)
    for element in theirs or ():
        form = _form(element)
        if removed[form] > 0:
            removed[form] -= 1
        else:
            placed.append((len(placed) + 1, element))
            places[form].append(len(placed))
    place, end = 0, len(placed)
    for number, (form, element, known) in enumerate(own):
        if not known:
            placed.append((place if number < tail else end, element))
        elif places[form]:
            place = places[form].popleft()
    # Sorting is stable: an addition comes behind the element whose place it shares.
    return _left([element for _, element in sorted(placed, key=itemgetter(0))], theirs, ours)


def _left(merged: Any, theirs: Any, ours: Any) -> Any:
    return MISSING if not merged and (theirs is MISSING or ours is MISSING) else merged


def _kinds(*sides: Any) -> set[type]:
    return {type(side) for side in sides if side is not MISSING}


@dataclass(frozen=True, slots=True)
class _Foreign:
    """A value of a type that only the app's own serializer knows; perhaps unhashable."""

    value: object = field(hash=False)


_PLAIN = frozenset({NoneType, bool, int, str, bytes, date, timedelta, UUID, Markup})


def _same(one: Any, other: Any) -> bool:
    return one is other or _form(one) == _form(other)


def _form(value: Any) -> Hashable:
    """Return what is equal for values that are alike in value and exact type, and for no others."""
    kind = type(value)
    form: Hashable
    if kind in _PLAIN:
        form = value
    elif kind is list or kind is tuple:
        form = tuple(map(_form, value))
    elif kind is dict:
        form = frozenset(zip(map(_form, value), map(_form, value.values()), strict=True))
    elif kind is set or kind is frozenset:
        form = frozenset(map(_form, value))
    elif kind is float or kind is Decimal:
        form = str(value)  # NaN equals nothing, -0.0 equals 0.0, Decimal("1.0") equals Decimal("1")
    elif kind is datetime or kind is time:
        form = (value.isoformat(), value.fold)  # equal moments may be of different zones
    else:
        form = _Foreign(value)
    return (kind, form)
