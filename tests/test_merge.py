"""The algebra of the merge functions, against requests that run one after another."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import partial, reduce
from itertools import permutations
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from luasession import merge
from luasession.merge import MISSING

FUNCTIONS = [merge.add, merge.append, merge.union, merge.deep]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)

Request = Callable[[Any], Any]


def for_all(**strategies: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """Hypothesis' given, without a deadline that a busy machine would miss."""
    return lambda test: settings(deadline=None)(given(**strategies)(test))


def look(value: Any) -> Any:
    """What a value looks like, types included; sets and dicts without their order."""
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(look, value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(map(repr, value))]
    if isinstance(value, dict):
        return ["dict", *sorted((repr(key), repr(look(item))) for key, item in value.items())]
    return repr(value)


def count(value: Any, elements: Any) -> int:
    """How often a value is in a list, or not in what is missing."""
    return sum(look(element) == look(value) for element in elements or ())


def one_by_one(requests: Iterable[Request], base: Any) -> Any:
    """Run requests one after another, on a value of their own."""
    return reduce(lambda value, request: request(value), requests, copy.deepcopy(base))


def overlapping(function: Any, requests: Iterable[Request], base: Any) -> Any:
    """Run requests that all read the same base, and merge them in the order in which they end."""
    stored = copy.deepcopy(base)
    for request in requests:
        stored = function(copy.deepcopy(base), stored, request(copy.deepcopy(base)))
    return stored


# Values that Python takes for one another are close together here, so that they meet often.
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.sampled_from([-1.0, -0.0, 0.0, 1.0, math.inf, math.nan]),
    st.sampled_from(["", "1", "a", Markup("a"), b"a", b""]),
    st.sampled_from([Decimal(1), Decimal("1.0"), Decimal("NaN"), UUID(int=1)]),
    st.sampled_from([date(2024, 1, 1), timedelta(1), time(1), time(1, fold=1)]),
    st.sampled_from(
        [
            datetime(2024, 1, 1, 12, tzinfo=UTC),
            datetime(2024, 1, 1, 13, tzinfo=timezone(timedelta(hours=1))),
        ]
    ),
)
sets = st.one_of(st.sets(scalars, max_size=3), st.frozensets(scalars, max_size=3))
keys = st.sampled_from("abc")
values = st.recursive(
    scalars | sets,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)
states = values | st.just(MISSING)
elements = st.one_of(
    st.sampled_from(["x", "y", 1, True, 1.0, math.nan]),
    st.builds(lambda number: {"n": number}, st.sampled_from([1, True])),
    st.tuples(st.just("message"), st.sampled_from("xy")),
)
lists = st.lists(elements, max_size=6)
three = st.permutations(range(3))


# -- the missing side ------------------------------------------------------------------------


def test_missing_is_one_object() -> None:
    """MISSING stays itself through copies and pickles, and shows as MISSING."""
    assert copy.copy(MISSING) is MISSING
    assert copy.deepcopy([MISSING])[0] is MISSING
    assert pickle.loads(pickle.dumps(MISSING)) is MISSING
    assert repr(MISSING) == "MISSING"
    assert isinstance(MISSING, merge.MissingType)


def test_missing_is_false() -> None:
    """A function of one's own may write ``theirs or []``."""
    assert not MISSING
    assert (MISSING or []) == []


# -- what all functions have in common -------------------------------------------------------


@each_function
@for_all(base=states, other=states)
def test_one_side_changed(function: Any, base: Any, other: Any) -> None:
    """If one side changed nothing, the result is the other side itself, of whatever type."""
    untouched = copy.deepcopy(base)
    assert merge.outcome(function, base, untouched, other) == (other, True)
    assert function(base, untouched, other) is other
    assume(look(other) != look(base))
    assert function(base, other, untouched) is other
    assert merge.outcome(function, base, other, untouched)[1]


@each_function
@pytest.mark.parametrize(
    ("base", "alike"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("a", Markup("a")),
        (Decimal(1), Decimal("1.0")),
        ([1], [True]),
        ({"a": 1}, {"a": 1.0}),
        ({1}, {True}),
        ({1}, frozenset({1})),
        ((1,), [1]),
        (time(1), time(1, fold=1)),
        (
            datetime(2024, 1, 1, 12, tzinfo=UTC),
            datetime(2024, 1, 1, 13, tzinfo=timezone(timedelta(hours=1))),
        ),
        ([], MISSING),
    ],
)
def test_types_count(function: Any, base: Any, alike: Any) -> None:
    """What Python takes for equal, or for nothing, is still a change if it is of another type."""
    assert function(base, alike, copy.deepcopy(base)) is alike
    assert function(base, copy.deepcopy(base), alike) is alike


@each_function
@for_all(base=states, theirs=states, ours=states)
def test_sides_are_left_alone(function: Any, base: Any, theirs: Any, ours: Any) -> None:
    """A merge changes none of its sides."""
    before = look([base, theirs, ours])
    function(base, theirs, ours)
    assert look([base, theirs, ours]) == before


@each_function
@for_all(base=states)
def test_deleted_on_both_sides(function: Any, base: Any) -> None:
    """What both sides deleted is deleted, of whatever type it was."""
    assert merge.outcome(function, base, MISSING, MISSING) == (MISSING, True)


@each_function
@for_all(base=states, theirs=states, ours=states)
def test_outcome_agrees(function: Any, base: Any, theirs: Any, ours: Any) -> None:
    """outcome() gives the value that the function itself gives, and ours where nothing fits."""
    value, fits = merge.outcome(function, base, theirs, ours)
    assert look(value) == look(function(base, theirs, ours))
    assert fits or value is ours


MISFITS = [
    (merge.add, 1, "2", 3),
    (merge.add, 1, 2, "3"),
    (merge.add, None, 2, 3),
    (merge.add, 1, True, 3),
    (merge.add, False, 2, 3),
    (merge.add, 1.0, 2.0, Decimal(3)),
    (merge.add, Decimal(1), Decimal(2), 3.0),
    (merge.add, 0, 10**400, 0.5),
    (merge.add, 0.0, math.inf, 1.0),
    (merge.add, 0.0, 1.0, math.nan),
    (merge.add, Decimal(0), Decimal("Infinity"), Decimal(1)),
    (merge.add, Decimal(0), Decimal(1), Decimal("sNaN")),
    (merge.add, 1, [2], MISSING),
    (merge.append, [1], (1, 2), [1, 3]),
    (merge.append, [1], [1, 2], "3"),
    (merge.append, None, [2], [3]),
    (merge.append, MISSING, {2}, [3]),
    (merge.append, (1,), (1, 2), (1, 3)),
    (merge.union, {1}, {1, 2}, [3]),
    (merge.union, {1}, {1, 2}, frozenset({1, 3})),
    (merge.union, None, {2}, {3}),
    (merge.deep, {"a": 1}, {"a": 2}, [3]),
    (merge.deep, {"a": 1}, None, {"a": 3}),
    (merge.deep, "a", {"a": 2}, {"a": 3}),
    (merge.deep, 1, 2, 3),
]


@pytest.mark.parametrize(("function", "base", "theirs", "ours"), MISFITS)
def test_types_that_do_not_fit(function: Any, base: Any, theirs: Any, ours: Any) -> None:
    """Types that do not fit fall back to ours, and outcome() says so."""
    assert function(base, theirs, ours) is ours
    value, fits = merge.outcome(function, base, theirs, ours)
    assert value is ours
    assert fits is False


def test_foreign_functions_always_fit() -> None:
    """A function from elsewhere is called as it is, and what it raises is passed on."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return True

        def __call__(self, base: Any, theirs: Any, ours: Any) -> Any:
            return [base, theirs, ours]

    assert merge.outcome(Unhashable(), 1, 1, MISSING) == ([1, 1, MISSING], True)
    assert merge.outcome(Mock(return_value=4), 1, 2, 3) == (4, True)
    assert merge.outcome(partial(merge.add), 1, 2, "3") == ("3", True)
    with pytest.raises(ZeroDivisionError):
        merge.outcome(lambda base, theirs, ours: 1 // 0, 1, 2, 3)


@each_function
def test_functions_explain_themselves(function: Any) -> None:
    """Each function keeps its own name and docstring, for help() and for error messages."""
    assert getattr(merge, function.__name__) is function
    assert function.__module__ == "luasession.merge"
    assert "result" in function.__doc__ or "``" in function.__doc__


class Money:
    """A type of an app with a serializer of its own: compared by value, not hashable."""

    def __init__(self, amount: int) -> None:
        self.amount = amount

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and self.amount == other.amount

    __hash__ = None  # type: ignore[assignment]


def test_types_of_the_app() -> None:
    """Values that only the app's serializer knows are compared as they compare themselves."""
    base, theirs, ours = [Money(1), Money(2)], [Money(2), Money(3)], [Money(1), Money(2), Money(4)]
    assert merge.append(base, theirs, ours) == [Money(2), Money(3), Money(4)]
    assert merge.deep({"m": Money(1)}, {"m": Money(2)}, {"m": Money(1), "n": 1}) == {"m": Money(2), "n": 1}


def nested(depth: int, innermost: Any) -> Any:
    return reduce(lambda inner, _: {"d": inner}, range(depth), innermost)


def test_depth() -> None:
    """As deep as a value can be stored, it can be merged."""
    base, theirs, ours = nested(199, {}), nested(199, {"a": 1}), nested(199, {"b": 2})
    assert merge.deep(base, theirs, ours) == nested(199, {"a": 1, "b": 2})
    assert merge.append([base], [theirs], [ours]) == [theirs, ours]


# -- add -------------------------------------------------------------------------------------


def plus(step: Any) -> Request:
    """A request that counts up, or deletes the counter."""
    return lambda value: MISSING if step is MISSING else (value or 0) + step


# Halves are exact in floats as long as they are small, so that their sums can be compared.
halves = st.integers(-100, 100).map(lambda number: number / 2)
cents = st.decimals(-100, 100, places=2)


@pytest.mark.parametrize("numbers", [st.integers(), halves | st.integers(-9, 9), cents | st.integers(-9, 9)])
@for_all(data=st.data())
def test_add_counts_every_increment(numbers: st.SearchStrategy[Any], data: st.DataObject) -> None:
    """Three overlapping increments count as they would one by one, in whichever order they end."""
    base = data.draw(numbers | st.just(MISSING))
    requests = [plus(step) for step in data.draw(st.lists(numbers.filter(bool), min_size=3, max_size=3))]
    for order in permutations(requests):
        assert overlapping(merge.add, order, base) == one_by_one(order, base)


@for_all(base=st.integers(), steps=st.lists(st.integers().filter(bool) | st.just(MISSING), max_size=5))
def test_add_with_deletions(base: int, steps: list[Any]) -> None:
    """A deletion among the increments has the effect that it has one by one, in the order of the ends."""
    requests = [plus(step) for step in steps]
    assert overlapping(merge.add, requests, base) == one_by_one(requests, base)


@for_all(base=st.integers(), theirs=st.integers(), ours=st.integers())
def test_add_is_symmetric(base: int, theirs: int, ours: int) -> None:
    """Who comes last does not matter to integers of any size."""
    assert merge.add(base, theirs, ours) == merge.add(base, ours, theirs) == theirs + ours - base


@for_all(base=st.floats(-1e9, 1e9), theirs=st.floats(-1e9, 1e9), ours=st.floats(-1e9, 1e9))
def test_add_floats(base: float, theirs: float, ours: float) -> None:
    """A sum of floats is as good as floats are."""
    assert merge.add(base, theirs, ours) == pytest.approx(math.fsum([theirs, ours, -base]), abs=1e-5)


@pytest.mark.parametrize(
    ("base", "theirs", "ours", "expected"),
    [
        (5, 6, 7, 8),
        (MISSING, 1, 1, 2),
        (5, MISSING, 6, 1),
        (5, 6, MISSING, MISSING),
        (5, 0, 6, 1),
        (1, 2.5, 3, 4.5),
        (Decimal("0.10"), Decimal("0.30"), 1, Decimal("1.20")),
        (MISSING, Decimal("0.1"), Decimal("0.2"), Decimal("0.3")),
        (10**30, 10**30 + 1, 10**30 + 2, 10**30 + 3),
    ],
)
def test_add_by_example(base: Any, theirs: Any, ours: Any, expected: Any) -> None:
    """Both increments count; a missing base is 0; a deletion starts anew and is no increment."""
    assert look(merge.add(base, theirs, ours)) == look(expected)


# -- append ----------------------------------------------------------------------------------


@for_all(base=lists | st.just(MISSING), theirs=lists | st.just(MISSING), ours=lists | st.just(MISSING))
def test_append_counts_each_element(base: Any, theirs: Any, ours: Any) -> None:
    """Nothing is made up, doubled, lost or brought back: the count of each element is the formula's."""
    result, fits = merge.outcome(merge.append, base, theirs, ours)
    assert fits
    for element in [*(base or ()), *(theirs or ()), *(ours or ())]:
        expected = max(0, count(element, theirs) + count(element, ours) - count(element, base))
        assert count(element, result) == expected
    for element in result or ():
        assert count(element, theirs) + count(element, ours) > 0


@for_all(base=lists, theirs=lists, ours=lists)
def test_append_keeps_the_order_of_theirs(base: list[Any], theirs: list[Any], ours: list[Any]) -> None:
    """What stays of theirs stays in their order, whatever we did around it."""
    assume(look(theirs) != look(base))
    result = list(map(look, merge.append(base, theirs, ours)))
    rest = list(map(look, theirs))
    for element in base:
        for _ in range(count(element, base) - count(element, ours)):
            if look(element) in rest and rest.count(look(element)) > result.count(look(element)):
                rest.remove(look(element))
    remaining = iter(result)
    assert all(element in remaining for element in rest)


Step = tuple[str, Any]


def sound(requests: list[list[Step]], base: list[Any]) -> list[list[Step]]:
    """Leave out what one state of a list cannot tell: removals of what the base does not hold, and
    additions of what is removed as well, by any of the requests given.
    """
    removed = [element for steps in requests for name, element in steps if name == "remove"]
    kept: list[list[Step]] = []
    for steps in requests:
        own: list[Any] = []
        kept.append([])
        for name, element in steps:
            if name == "remove" and count(element, own) < count(element, base):
                own.append(element)
                kept[-1].append((name, element))
            elif name == "append" and not count(element, removed):
                kept[-1].append((name, element))
    return kept


def steps_on(base: list[Any]) -> st.SearchStrategy[list[Step]]:
    """Removals of what the base holds, and additions, in any order."""
    additions = st.tuples(st.just("append"), elements)
    removals = st.tuples(st.just("remove"), st.sampled_from(base)) if base else st.nothing()
    return st.lists(additions | removals, max_size=5)


def edits(steps: list[Step], delete_if_empty: bool = False) -> Request:
    """A request that takes these steps; what is no longer there cannot be removed again."""

    def request(value: Any) -> Any:
        result = list(value or ())
        for name, element in steps:
            if name == "append":
                result.append(element)
                continue
            for index, held in enumerate(result):
                if look(held) == look(element):
                    del result[index]
                    break
        return MISSING if delete_if_empty and not result else result

    return request


@for_all(data=st.data(), base=lists, order=three)
def test_append_equals_one_by_one(data: st.DataObject, base: list[Any], order: list[int]) -> None:
    """Overlapping additions and removals give the very list that they give one by one, order included."""
    requests = [edits(sound([data.draw(steps_on(base))], base)[0]) for _ in order]
    ordered = [requests[number] for number in order]
    assert look(overlapping(merge.append, ordered, base)) == look(one_by_one(ordered, base))


@for_all(data=st.data(), base=lists)
def test_append_holds_the_same_in_any_order(data: st.DataObject, base: list[Any]) -> None:
    """Whoever ends first, the same elements are there in the end, as often as each should be.

    Unless a removal of the last one meets an addition of the same: there the order tells.
    """
    requests = sound([data.draw(steps_on(base)) for _ in range(3)], base)
    results = [overlapping(merge.append, map(edits, order), base) for order in permutations(requests)]
    assert len({repr(sorted(map(repr, map(look, result)))) for result in results}) == 1


@for_all(data=st.data(), base=st.lists(elements, min_size=1, max_size=6), order=three)
def test_append_with_deletions(data: st.DataObject, base: list[Any], order: list[int]) -> None:
    """A request that deletes the key when it took the last element out leaves what others added."""
    requests = [edits(sound([data.draw(steps_on(base))], base)[0], delete_if_empty=True) for _ in order]
    requests[0] = edits([("remove", element) for element in base], delete_if_empty=True)
    ordered = [requests[number] for number in order]
    result = overlapping(merge.append, ordered, base)
    # Where several emptied it together, none of them may have seen that it had to be deleted.
    assert look(result or MISSING) == look(one_by_one(ordered, base))


@pytest.mark.parametrize(
    ("base", "theirs", "ours", "expected"),
    [
        # Additions: theirs, then ours.
        (MISSING, ["t"], ["o"], ["t", "o"]),
        (["a"], ["a", "t"], ["a", "o"], ["a", "t", "o"]),
        (["a"], ["a", "x"], ["a", "x"], ["a", "x", "x"]),
        # Removals: once each, and nothing comes back.
        (["a", "b"], ["a"], ["b"], []),
        (["x", "x"], ["x"], ["x"], []),
        (["x"], [], ["x", "o"], ["o"]),
        (["x"], [], [], []),
        (["x", "x", "x"], ["x", "x"], ["x", "x"], ["x"]),
        (["x"], [], ["x", "x"], ["x"]),
        (["x", "y", "x"], ["x", "y", "x", "t"], ["y", "x"], ["y", "x", "t"]),
        # A key deleted takes with it what it held, and no more.
        (["a"], ["a", "t"], MISSING, ["t"]),
        (["a"], MISSING, ["a", "o"], ["o"]),
        (["a", "b"], ["a"], MISSING, MISSING),
        (["a", "b"], MISSING, ["a"], MISSING),
        (["a"], [], MISSING, MISSING),
        # An element changed in place was removed, and another one added.
        ([{"n": 1}, "b"], [{"n": 1}, "b", "t"], [{"n": 2}, "b"], [{"n": 2}, "b", "t"]),
        ([{"n": 1}], [{"n": 2}], [{"n": 3}], [{"n": 2}, {"n": 3}]),
        # Equal in Python, but of different types.
        ([1], [1, True], [1, 1.0], [1, True, 1.0]),
    ],
)
def test_append_by_example(base: Any, theirs: Any, ours: Any, expected: Any) -> None:
    """Both sides' additions and removals count."""
    assert look(merge.append(base, theirs, ours)) == look(expected)


@pytest.mark.parametrize(
    ("base", "theirs", "ours", "expected"),
    [
        ("abc", "tabc", "oabc", "otabc"),
        ("abc", "tab", "oab", "otab"),
        ("abc", "abct", "aobc", "aobct"),
        ("abc", "bct", "aobc", "obct"),
        ("abc", "act", "abopc", "aopct"),
        ("abc", "abct", "abcop", "abctop"),
        ("abc", "abct", "oabcp", "oabctp"),
        ("abc", "abct", "op", "top"),
        ("abc", "act", "cbao", "acto"),
        ("aba", "abat", "aboa", "aboat"),
        ("ab", "xyab", "aob", "xyaob"),
        ("xyxz", "xyxzt", "xyxoz", "xyxozt"),
        ("xyxz", "xyxzt", "xoyxz", "xoyxzt"),
    ],
)
def test_append_keeps_places(base: str, theirs: str, ours: str, expected: str) -> None:
    """What we inserted follows what it followed, or stands first; what we added at the end comes last."""
    assert "".join(merge.append(list(base), list(theirs), list(ours))) == expected


@for_all(
    base=st.lists(elements, min_size=1, max_size=4),
    added=st.lists(st.lists(st.integers(7, 9), max_size=3), min_size=3, max_size=3),
)
def test_append_newest_first(base: list[Any], added: list[list[Any]]) -> None:
    """Lists that grow at their front merge as they would one by one."""
    requests: list[Request] = [partial(lambda own, value: own + value, own) for own in added]
    assert look(overlapping(merge.append, requests, base)) == look(one_by_one(requests, base))


def flashing(shown: bool, messages: Sequence[str]) -> Request:
    """A request that shows the flashed messages, or not, and flashes some, as Flask does both."""

    def request(value: Any) -> Any:
        kept: Any = MISSING if shown else value
        return [*(kept or []), *(("message", text) for text in messages)] if messages else kept

    return request


@for_all(
    base=st.integers(0, 3), shown=st.lists(st.booleans(), min_size=3, max_size=3), number=st.integers(0, 2)
)
def test_append_flashed_messages(base: int, shown: list[bool], number: int) -> None:
    """All messages flashed meanwhile arrive, and none that a request has shown comes back."""
    stored: Any = [("message", f"old {index}") for index in range(base)] or MISSING
    requests = [
        flashing(show, [f"{name} {index}" for index in range(number)])
        for name, show in zip("abc", shown, strict=True)
    ]
    result = overlapping(merge.append, requests, stored)
    new = [("message", f"{name} {index}") for name in "abc" for index in range(number)]
    left = [*([] if any(shown) else stored or []), *new]
    assert result == (left or MISSING)
    assert all(type(element) is tuple for element in result or ())


# -- union -----------------------------------------------------------------------------------

members = st.sets(st.integers(0, 5))


def toggles(added: set[int], removed: set[int]) -> Request:
    """A request that adds and discards; one that leaves nothing deletes the key."""
    return lambda value: type(value or added)(((value or set()) | added) - removed) or MISSING


@pytest.mark.parametrize("kind", [set, frozenset])
@for_all(base=members, changes=st.lists(st.tuples(members, members), min_size=3, max_size=3))
def test_union_equals_one_by_one(kind: type, base: set[int], changes: list[Any]) -> None:
    """Overlapping additions and removals give the set that they give one by one, in any order."""
    start = kind(base) or MISSING
    requests = [toggles(kind(added - base), kind(removed & base)) for added, removed in changes]
    expected = one_by_one(requests, start)
    for order in permutations(requests):
        result = overlapping(merge.union, order, start)
        # Where several emptied it together, none of them saw that it had to be deleted.
        assert look(result or MISSING) == look(expected)


@for_all(base=members, theirs=members, ours=members)
def test_union_member_by_member(base: set[int], theirs: set[int], ours: set[int]) -> None:
    """Each member is as the side has it that changed it."""
    result = merge.union(base, theirs, ours)
    for member in range(6):
        moved = (member in theirs) != (member in base)
        assert (member in result) == (member in (theirs if moved else ours))


@pytest.mark.parametrize(
    ("base", "theirs", "ours", "expected"),
    [
        (MISSING, {1}, {2}, {1, 2}),
        ({1}, MISSING, {1, 2}, {2}),
        ({1}, {1, 2}, MISSING, {2}),
        ({1, 2}, {1}, MISSING, MISSING),
        ({1, 2}, {1}, {2}, set()),
        (frozenset({1}), frozenset({1, 2}), MISSING, frozenset({2})),
        (set(), {1}, frozenset(), frozenset()),
    ],
)
def test_union_by_example(base: Any, theirs: Any, ours: Any, expected: Any) -> None:
    """A deleted set takes with it what it held; the kind of set stays."""
    assert look(merge.union(base, theirs, ours)) == look(expected)


# -- deep ------------------------------------------------------------------------------------

paths = st.tuples(keys, keys, keys)


def at_path(path: tuple[str, ...], step: Any) -> Request:
    """A request that sets a leaf, appends to a list there, or deletes what is there."""

    def request(value: Any) -> Any:
        *way, last = path
        inner = value
        for key in way:
            if step is MISSING and key not in inner:
                return value
            inner = inner.setdefault(key, {})
        if step is MISSING:
            inner.pop(last, None)
        elif isinstance(step, list):
            inner.setdefault(last, []).extend(step)
        else:
            inner[last] = step
        return value

    return request


def in_turn(requests: Iterable[Request]) -> Request:
    """One request that takes the steps of several."""
    steps = list(requests)
    return lambda value: reduce(lambda held, step: step(held), steps, value)


def tree(leaves: dict[tuple[str, ...], Any]) -> Any:
    return in_turn(at_path(path, leaf) for path, leaf in leaves.items())({})


@for_all(
    base=st.dictionaries(paths, scalars, max_size=6),
    changes=st.dictionaries(
        paths, st.tuples(st.integers(0, 2), scalars | st.just(MISSING)), min_size=1, max_size=9
    ),
)
def test_deep_disjoint_paths(base: dict[Any, Any], changes: dict[Any, Any]) -> None:
    """Overlapping changes to different paths give what they give one by one, in any order."""
    start = tree(base)
    requests = [
        in_turn(at_path(path, step) for path, (who, step) in changes.items() if who == number)
        for number in range(3)
    ]
    expected = look(one_by_one(requests, start))
    for order in permutations(requests):
        assert look(overlapping(merge.deep, order, start)) == expected


@for_all(
    base=st.dictionaries(paths, st.lists(elements, max_size=3), max_size=4),
    added=st.lists(
        st.dictionaries(paths, st.lists(elements, min_size=1, max_size=2), max_size=3), min_size=3, max_size=3
    ),
    order=three,
)
def test_deep_lists(base: dict[Any, Any], added: list[dict[Any, Any]], order: list[int]) -> None:
    """Lists at any depth merge as append does, those that several requests made at once included."""
    start = tree(base)
    requests = [in_turn(at_path(path, step) for path, step in added[number].items()) for number in order]
    assert look(overlapping(merge.deep, requests, start)) == look(one_by_one(requests, start))


flat = st.dictionaries(keys, scalars)


@for_all(base=flat, theirs=flat, ours=flat)
def test_deep_key_by_key(base: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Of one leaf, deletions included, ours counts if we changed it, and theirs if not."""
    result = merge.deep(base, theirs, ours)
    for key in "abc":
        was, other, own = (side.get(key, MISSING) for side in (base, theirs, ours))
        assert look(result.get(key, MISSING)) == look(other if look(own) == look(was) else own)


@for_all(base=states, theirs=states, ours=states)
def test_deep_on_any_values(base: Any, theirs: Any, ours: Any) -> None:
    """Below the top anything goes, and every leaf of the result comes from one of the sides."""
    result, fits = merge.outcome(merge.deep, {"k": base}, {"k": theirs}, {"k": ours})
    assert fits

    def leaves(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set().union(*map(leaves, value.values()))
        if type(value) is list:
            return {repr(look(element)) for element in value}
        return {repr(look(value))}

    assert leaves(result) <= leaves(theirs) | leaves(ours)


@pytest.mark.parametrize(
    ("base", "theirs", "ours", "expected"),
    [
        # One leaf, two changes: ours.
        ({"a": 1}, {"a": 2}, {"a": 3}, {"a": 3}),
        ({"a": 1}, {}, {"a": 3}, {"a": 3}),
        ({"a": 1}, {"a": 2}, {}, {}),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, {"a": 3}, {"a": 3}),
        ({"a": 1}, {"a": {"b": 2}}, {"a": {"c": 3}}, {"a": {"c": 3}}),
        ({"a": (1,)}, {"a": (1, 2)}, {"a": (1, 3)}, {"a": (1, 3)}),
        ({"a": {1}}, {"a": {1, 2}}, {"a": {1, 3}}, {"a": {1, 3}}),
        ({"a": 1}, {"a": 2}, {"a": 1, "b": 1}, {"a": 2, "b": 1}),
        # Both made the same dict or list.
        (MISSING, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({}, {"k": {"a": 1}}, {"k": {"b": 2}}, {"k": {"a": 1, "b": 2}}),
        ({}, {"k": [1]}, {"k": [2]}, {"k": [1, 2]}),
        # A dict deleted: what it held goes, what the other side added stays.
        ({"a": 1}, {"a": 1, "b": 2}, MISSING, {"b": 2}),
        ({"a": 1}, MISSING, {"a": 1, "b": 2}, {"b": 2}),
        ({"a": 1}, {"a": 2}, MISSING, MISSING),
        ({"a": 1, "c": 1}, MISSING, {"a": 2, "c": 1}, {"a": 2}),
        ({"k": {"a": 1}}, {"k": {"a": 2}}, {}, {}),
        ({"k": {"a": 1}}, {}, {"k": {"a": 1, "b": 2}}, {"k": {"b": 2}}),
        ({"k": [1]}, {"k": [1, 2]}, {}, {"k": [2]}),
        ({"k": {"a": 1}}, {}, {"k": {}}, {}),
        # Both emptied it, neither deleted it.
        ({"a": 1, "b": 2}, {"a": 1}, {"b": 2}, {}),
        # A list at the top.
        ([1], [1, 2], [1, 3], [1, 2, 3]),
    ],
)
def test_deep_by_example(base: Any, theirs: Any, ours: Any, expected: Any) -> None:
    """Dicts go key by key, lists as append, and of anything else ours counts."""
    value, fits = merge.outcome(merge.deep, base, theirs, ours)
    assert look(value) == look(expected)
    assert fits


@for_all(base=values, other=values)
def test_deep_one_side_a_key(base: Any, other: Any) -> None:
    """A key that one side changed is that side's own object, in a dict that both changed."""
    result = merge.deep({"k": base}, {"k": copy.deepcopy(base), "t": 1}, {"k": other, "o": 1})
    assert result.get("k") is other
    assume(look(other) != look(base))
    result = merge.deep({"k": base}, {"k": other, "t": 1}, {"k": copy.deepcopy(base), "o": 1})
    assert result.get("k") is other


def test_deep_keeps_the_order_of_keys() -> None:
    """Their keys come first, in their order, then ours."""
    assert list(merge.deep({"b": 1}, {"t": 2, "b": 1}, {"o": 3, "b": 1})) == ["t", "b", "o"]
