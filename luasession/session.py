"""The session that a view works with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Self

from flask.sessions import SessionMixin

from .delta import Change
from .errors import ConfigurationError
from .readers import milliseconds
from .transaction import Transaction

if TYPE_CHECKING:
    from .policy import Policies
    from .snapshot import Snapshot
    from .values import Values
    from .visit import Visit


class LuaSession(SessionMixin):
    """A Flask session that sends what one request changed.

    A mapping with str keys. It is lazy: opening it costs nothing, setting a key
    reads nothing, and the first read loads one snapshot, which all later reads
    of the request are served from. A mutable value that was handed out is
    compared with what it was, so ``session["cart"].append(1)`` counts without
    ``session.modified = True``.
    """

    _modified: bool | None = None

    def __init__(self, visit: Visit, values: Values, policies: Policies) -> None:
        self._transaction = Transaction(visit, values, policies)

    # -- the mapping --------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        return self._transaction.ledger.get(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise _not_a_key(key)
        self._transaction.set(key, value)

    def __delitem__(self, key: str) -> None:
        self._transaction.delete(key)

    def __iter__(self) -> Iterator[str]:
        return self._transaction.ledger.keys()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._transaction.visit.presented_handle or 'new'}>"

    def set(self, key: str, value: Any, ttl: float | timedelta | None = None) -> None:
        """Set a key that disappears by itself.

        :param ttl: seconds or a timedelta after which it does; None for never.
            Setting the key again without one makes it stay.
        :raise TypeError: if the key is not a str.
        :raise ValueError: if ``ttl`` is not a positive time.
        """
        if not isinstance(key, str):
            raise _not_a_key(key)
        ttl_ms = 0 if ttl is None else _milliseconds(ttl, "ttl", at_least=1)
        self._transaction.set(key, value, ttl_ms)

    def popitem(self) -> tuple[str, Any]:
        """Take one key out and return it with its value, the last one as in a dict.

        :raise KeyError: if there is none.
        """
        for key in reversed(list(self)):
            return key, self.pop(key)
        raise KeyError("the session is empty")

    def copy(self) -> dict[str, Any]:
        """Return the keys and their values as a dict, which changes nothing here by itself."""
        return dict(self)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return deepcopy(dict(self), memo)

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other} if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self} if isinstance(other, Mapping) else NotImplemented

    # As a dict's, it takes pairs too.
    def __ior__(self, other: Any) -> Self:  # type: ignore[misc]
        self.update(other)
        return self

    def clear(self) -> None:
        """Delete all keys; ends principal, label, lifetime and permanence too.

        With nothing set after it the session is destroyed at the end of the request.
        """
        self._transaction.clear()

    # -- attributes ---------------------------------------------------------

    @property
    def _snapshot(self) -> Snapshot | None:
        return self._transaction.ledger.snapshot()

    @property
    def sid(self) -> str | None:
        """The session id that the cookie carries; secret. None until the session exists."""
        visit = self._transaction.visit
        return visit.id.sid if visit.has_browser and self._snapshot and visit.id else None

    @property
    def handle(self) -> str | None:
        """The name of the session, which may be logged; None until the session exists."""
        return self._transaction.handle if self._snapshot else None

    @property
    def version(self) -> int:
        """How many commits the session has seen; 0 until it exists."""
        return self._snapshot.version if self._snapshot else 0

    @property
    def created_at(self) -> datetime | None:
        """When the session was created, in UTC; None until it exists."""
        if self._snapshot is None:
            return None
        return datetime.fromtimestamp(self._snapshot.created_ms / 1000, UTC)

    @property
    def new(self) -> bool:  # type: ignore[override]
        """Whether there was no session when this request began."""
        return self._transaction.created or self._snapshot is None

    @property
    def modified(self) -> bool:
        """Whether this request changed anything, nested values included.

        Assigning it changes only what it reads back.
        """
        return self._transaction.modified if self._modified is None else self._modified

    @modified.setter
    def modified(self, value: bool) -> None:
        self._modified = value

    @property
    def permanent(self) -> bool:
        """Whether the browser keeps the session over its own end."""
        permanent: bool | None = self._transaction.changes.get("permanent")
        if permanent is not None:
            return permanent
        return self._snapshot.permanent if self._snapshot else self._transaction.visit.config.permanent

    @permanent.setter
    def permanent(self, value: bool) -> None:
        self._transaction.change("permanent", bool(value))

    @property
    def lifetime(self) -> timedelta | None:
        """The idle lifetime of this session, None where ``PERMANENT_SESSION_LIFETIME`` counts.

        Takes seconds too.
        """
        lifetime_ms = self._transaction.changes.get("lifetime_ms")
        if lifetime_ms is None and self._snapshot:
            lifetime_ms = self._snapshot.lifetime_ms
        return timedelta(milliseconds=lifetime_ms) if lifetime_ms else None

    @lifetime.setter
    def lifetime(self, value: float | timedelta | None) -> None:
        lifetime_ms = 0 if value is None else _milliseconds(value, "lifetime", at_least=1)
        self._transaction.change("lifetime_ms", lifetime_ms)

    @property
    def principal(self) -> str | None:
        """The user that the session belongs to, for "log out everywhere"."""
        change: Change | None = self._transaction.changes.get("principal")
        if change:
            return change.value
        return self._snapshot.principal if self._snapshot else None

    @principal.setter
    def principal(self, value: str | None) -> None:
        if value is not None:
            self._transaction.may_still_start()
        self._transaction.change("principal", Change(_text(value, "principal")))

    @property
    def label(self) -> str | None:
        """What the app calls this session, say the name of a device."""
        change: Change | None = self._transaction.changes.get("label")
        if change:
            return change.value
        return self._snapshot.label if self._snapshot else None

    @label.setter
    def label(self, value: str | None) -> None:
        self._transaction.change("label", Change(_text(value, "label")))

    # -- what is done to the session ----------------------------------------

    def regenerate(self, in_flight: bool = True) -> None:
        """Replace the secret at the end of the request; the data stays.

        To be done whenever rights change, against session fixation (OWASP Session
        Management Cheat Sheet, "Renew the Session ID After Any Privilege Level Change").

        :param in_flight: whether requests that are open now may still commit.
        :raise RuntimeError: once the response has been sent, and outside of a request.
        """
        self._transaction.rotate(in_flight)

    def destroy(self) -> None:
        """End the session on the server and in the browser, at the end of the request.

        What is set afterwards starts a new session.
        """
        self._transaction.destroy()

    def commit(self) -> None:
        """Apply the delta now, and go on.

        If it is refused, nothing of it is stored, now or at the end of the request; what is changed
        afterwards is, by itself. :meth:`reload` and do it anew, or let the error be answered.

        :raise SessionConflict: if a policy says so.
        :raise SessionGone: if the session has ended, or was rotated away.
        :raise SessionUnavailable: if Redis does not answer within the deadline.
        :raise TypeError: if a value is of a type that cannot be stored.
        """
        self._transaction.commit()

    def reload(self) -> None:
        """Forget local changes and read the newest snapshot.

        Values that were handed out before are detached: changing them has no effect.
        """
        self._transaction.reload()

    def atomic_update(self, key: str, function: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace a value by what a function makes of it, exactly, under any concurrency.

        The function runs again until its result was stored on the very value that it
        was given, so it must do nothing but compute. It is stored at once. A key with an
        end of its own (``ttl``) keeps that.

        :param default: what the function gets where the key is missing.
        :return: the value stored.
        :raise SessionConflict: if it did not succeed within ``SESSION_REDIS_DEADLINE``; under
            ``"serializable"`` also if another key that this request has read was changed.
        :raise SessionGone: if the session has ended, or was rotated away.
        """
        if not isinstance(key, str):
            raise _not_a_key(key)
        return self._transaction.atomic_update(key, function, default)


# Functions, since whatever is an attribute of a session hides a key of that name from templates.
#: Returns what this request changes, on its way to the store.
transaction_of: Callable[[LuaSession], Transaction] = attrgetter("_transaction")
#: Returns what this request has had to do with the store.
visit_of: Callable[[LuaSession], Visit] = attrgetter("_transaction.visit")


def _not_a_key(key: object) -> TypeError:
    return TypeError(f"a session key must be a str, not {type(key).__name__}: {key!r}")


def _milliseconds(value: float | timedelta, name: str, at_least: int) -> int:
    try:
        return milliseconds(value, name, at_least)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def _text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"session.{name} must be a str or None, not {type(value).__name__}")
    return value
