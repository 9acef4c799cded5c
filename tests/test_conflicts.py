"""Conflicts: which keys are in one, and the delta that follows from it; without Redis or Flask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from luasession import SessionConflict, merge
from luasession.delta import KEEP, Check, Delta, Put
from luasession.ledger import Ledger
from luasession.outcome import Conflicting

from .images import write_id
from .test_ledger import CODEC, holding, ledger_of, raw, resolved


def contested(policy: Any, change: Callable[[Ledger], Any], **values: Any) -> tuple[Ledger, Delta]:
    ledger = ledger_of(holding(**values), policy)
    change(ledger)
    return ledger, ledger.delta()


def test_only_what_really_changed_is_a_conflict() -> None:
    """A key set back to its base by others, one that this request left alone, or metadata, is none."""
    ledger, ours = contested("raise", lambda ledger: ledger.set("a", ledger.get("a") + 1), a=1, b=1)
    assert ledger.conflicts.find(ours, {b"a": raw(1), b"b": raw(5), b"@p": b"x"}) == []
    [conflict] = ledger.conflicts.find(ours, {b"a": raw(5)})
    sides = conflict.base, conflict.theirs, conflict.ours, conflict.outcome
    assert (conflict.key, sides, conflict.policy) == ("a", (1, 5, 2, 2), "raise")
    [deleted] = ledger.conflicts.find(ours, {b"a": None})
    assert deleted.theirs is merge.MISSING


def test_raise_refuses_and_names_the_keys() -> None:
    """A strict key without a merge ends in a SessionConflict with the keys in conflict alone."""
    ledger, ours = contested("raise", lambda ledger: ledger.set("a", ledger.get("a") + 1), a=1)
    ours = ours._replace(sets={**ours.sets, b"blind": Put(raw(1))})
    with pytest.raises(SessionConflict) as raised:
        resolved(ledger, ours, {b"a": raw(5)})
    assert raised.value.keys == ("a",)
    with pytest.raises(SessionConflict) as raised:
        resolved(ledger, ours, {}, everything=True)
    assert raised.value.keys == ("a", "blind")


def test_a_read_that_changed_refuses() -> None:
    """Under serializable a key in conflict that this request only read is named as well."""
    ledger, ours = contested("serializable", lambda ledger: ledger.set("b", ledger.get("a")), a=1)
    with pytest.raises(SessionConflict) as raised:
        resolved(ledger, ours, {b"a": raw(5)})
    assert raised.value.keys == ("a",)


def test_a_merge_goes_on_top_of_theirs() -> None:
    """The next delta has their pair as its base, and the merged value, checked once more."""
    ledger, ours = contested(merge.add, lambda ledger: ledger.set("hits", ledger.get("hits") + 1), hits=1)
    merged = resolved(ledger, ours._replace(own=(write_id(1),)), {b"hits": raw(5)})
    assert merged.sets == {b"hits": Put(raw(6), Check.STRICT)}
    assert (merged.base, merged.own) == (holding(7).pair, ())
    # Moved again meanwhile: begun anew from what this request changed, not from what was merged.
    again = resolved(ledger, ours, {b"hits": raw(9)}, sent=merged)
    assert again.sets == {b"hits": Put(raw(10), Check.STRICT)}
    # Set back to the base: ours stands as it was.
    assert resolved(ledger, ours, {b"hits": raw(1)}, sent=merged).sets == ours.sets


def test_a_merge_may_delete_or_bring_back() -> None:
    """MISSING as an outcome deletes; a value where ours was a deletion sets."""
    ledger, ours = contested(
        lambda base, theirs, mine: merge.MISSING, lambda ledger: ledger.set("a", ledger.get("a") + 1), a=1
    )
    merged = resolved(ledger, ours, {b"a": raw(5)})
    assert (merged.sets, merged.deletes) == ({}, {b"a": Check.STRICT})
    ledger, ours = contested(lambda base, theirs, mine: theirs, lambda ledger: ledger.delete("a"), a=1)
    merged = resolved(ledger, ours, {b"a": raw(5)})
    assert (merged.sets, merged.deletes) == ({b"a": Put(raw(5), Check.STRICT, KEEP)}, {})


def test_types_that_do_not_fit_are_overwritten() -> None:
    """A merge function of other types leaves ours, and the conflict says that it was overwritten."""
    ledger, ours = contested(merge.add, lambda ledger: ledger.set("a", ledger.get("a") + 1), a=1)
    [conflict] = found = ledger.conflicts.find(ours, {b"a": raw("text")})
    conflicting = Conflicting(holding(7).pair, {b"a": raw("text")}, everything=False)
    merged = ledger.conflicts.resolve(ours, ours, conflicting, found)
    assert (conflict.policy, conflict.outcome) == ("overwrite", 2)
    assert CODEC.loads(merged.sets[b"a"].value) == 2


def test_what_does_not_decode_is_missing_to_a_merge() -> None:
    """A side that others stored in no known form is MISSING, as is none."""
    ledger = ledger_of(None)
    assert ledger.conflicts.stored("a", {}) is merge.MISSING
    assert ledger.conflicts.stored("a", {b"a": b"\xff"}) is merge.MISSING
    assert ledger.conflicts.stored("a", {b"a": raw([1])}) == [1]
