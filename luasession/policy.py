"""Policies: which one decides about a key in conflict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from . import merge

#: What to do about a conflict: ``"overwrite"``, ``"raise"``, ``"serializable"``, or a three-way merge
#: ``(base, theirs, ours) -> value``, whose missing sides are ``merge.MISSING``.
Policy: TypeAlias = str | Callable[[Any, Any, Any], Any]

# Flask keeps flashed messages in a list under this key: with any other policy messages would be lost.
_BUILT_IN: dict[str, Policy] = {"_flashes": merge.append}


class Policies:
    """The policies of an app.

    An exact name beats a pattern, a longer pattern a shorter one.

    :param default: ``SESSION_CONFLICT``.
    :param by_key: ``SESSION_MERGE``: names, or beginnings of names with a trailing ``*``.
    """

    def __init__(self, default: Policy, by_key: Mapping[str, Policy]) -> None:
        self.default = default
        #: Whether reads count as well as changes.
        self.serializable = default == "serializable"
        self._exact = {**_BUILT_IN, **{key: by_key[key] for key in by_key if not key.endswith("*")}}
        self._patterns = sorted(
            ((key[:-1], policy) for key, policy in by_key.items() if key.endswith("*")),
            key=lambda pattern: len(pattern[0]),
            reverse=True,
        )

    def of(self, key: str) -> Policy:
        """Return the policy of a key."""
        if key in self._exact:
            return self._exact[key]
        for beginning, policy in self._patterns:
            if key.startswith(beginning):
                return policy
        return self.default
