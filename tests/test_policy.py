"""Policies: an exact name beats a pattern, a longer pattern a shorter one, and flashes are never lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luasession import merge
from luasession.policy import Policies

NAMES = st.text("ab_", max_size=4)


@pytest.mark.parametrize(
    ("key", "policy"),
    [
        ("cart", "exact"),
        ("carts", "cart"),
        ("car", "c"),
        ("c", "c"),
        ("dog", "default"),
        ("Cart", "default"),
        ("", "default"),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_the_closest_name_decides(key: str, policy: str, backwards: bool) -> None:
    """Exact names come first, then the longest pattern, whatever their order in the settings; then the default."""
    by_key = {"c*": "c", "cart*": "cart", "cart": "exact", "cat*": "cat"}
    if backwards:
        by_key = dict(reversed(by_key.items()))
    assert Policies("default", by_key).of(key) == policy


@given(by_key=st.dictionaries(st.tuples(NAMES, st.booleans()), st.integers(), max_size=8), key=NAMES)
def test_against_a_model(by_key: dict[tuple[str, bool], int], key: str) -> None:
    """The answer is that of the longest name that fits, with an exact one longer than any pattern."""
    settings: dict[str, Any] = {name + "*" * pattern: policy for (name, pattern), policy in by_key.items()}
    fitting = {
        (not pattern, len(name)): policy
        for (name, pattern), policy in by_key.items()
        if (key.startswith(name) if pattern else key == name)
    }
    expected = fitting[max(fitting)] if fitting else "default"
    assert Policies("default", settings).of(key) == expected


def test_flashes_are_appended() -> None:
    """Flashed messages have their merge without being asked; another default or a pattern leave it."""
    assert Policies("raise", {}).of("_flashes") is merge.append
    assert Policies("raise", {"*": "overwrite", "_fl*": "overwrite"}).of("_flashes") is merge.append
    assert Policies("raise", {"_flashes": "overwrite"}).of("_flashes") == "overwrite"
    assert Policies("raise", {}).of("_flash") == "raise"


def test_a_lone_star_is_for_all_others() -> None:
    """The shortest pattern fits every key."""
    policies = Policies("overwrite", {"*": "raise", "a*": merge.add})
    assert [policies.of(key) for key in ("a", "b", "")] == [merge.add, "raise", "raise"]


@pytest.mark.parametrize("default", ["overwrite", "raise", "serializable", merge.deep])
def test_serializable_is_for_all_keys(default: Any) -> None:
    """Whether reads count is a matter of the default alone, whatever single keys have."""
    assert Policies(default, {"a": "raise", "b*": merge.add}).serializable is (default == "serializable")


def test_the_settings_are_taken_as_they_were() -> None:
    """A dict that is changed after the app was set up changes no policy."""
    by_key = {"a": "raise"}
    policies = Policies("overwrite", by_key)
    by_key["a"] = by_key["b*"] = "overwrite"
    assert (policies.of("a"), policies.of("b")) == ("raise", "overwrite")
