"""The settings of luasession: read once, checked, and brought to one unit each.

:func:`read_config` turns ``app.config`` into a :class:`Config` when the
extension is set up, so that a wrong value stops the app at its start and not a
user at some request. What Flask itself reads at each request
(``SESSION_COOKIE_*``, ``PERMANENT_SESSION_LIFETIME``) is not kept here.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from types import MappingProxyType
from typing import Any

from flask import Flask

from . import readers
from .errors import ConfigurationError
from .policy import Policy
from .readers import milliseconds

_DEFAULT_CACHE_TTL = 2.0
_TOUCH_MS = 60_000
# Windows of a default take this part of the lifetime, so two of them never fill it.
_LIFETIME_PART = 20
# Catches a letter or an underscore that is off, and leaves SESSION_COOKIE_AGE alone.
_CLOSE = 0.86


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of one app, in the units that the code works in.

    Its defaults are those of the settings; only :func:`read_config` checks.
    """

    #: A ready client, or None to build one from :attr:`redis_url`.
    redis: Any | None = field(default=None, repr=False)
    #: Where Redis is; may hold a password, so it stays out of :func:`repr`.
    redis_url: str = field(default="redis://localhost:6379/0", repr=False)
    #: What a session key starts with, before the handle.
    key_prefix: str = "session:"
    #: Bytes of the secret, 16 to 128.
    id_length: int = 32
    #: Seconds that one call may take, over 0.
    redis_timeout: float = 1.0
    #: Seconds that a request waits in all for Redis to come back; 0: not at all.
    redis_deadline: float = 2.0
    #: Permanence of a new session.
    permanent: bool = False
    #: Seconds that a cached snapshot is trusted, at most; 0: always ask Redis; None: no cache.
    cache_ttl: float | None = _DEFAULT_CACHE_TTL
    #: Whether ``SESSION_CACHE_TTL`` was set; see :meth:`trust_seconds`.
    cache_ttl_set: bool = False
    #: Bytes that all cached snapshots of one process may take.
    cache_bytes: int = 32 * 2**20
    #: What to do about a conflict in a key that :attr:`merge` does not name.
    conflict: Policy = "overwrite"
    #: Policies by session key: the exact name, or its beginning and one trailing ``*``.
    merge: Mapping[str, Policy] = field(default_factory=lambda: MappingProxyType({}))
    #: Milliseconds from creation to a session's end, however much it is used; None: no such end.
    absolute_ms: int | None = None
    #: Milliseconds after which a session rotates by itself; None: never.
    renew_after_ms: int | None = None
    #: Milliseconds that former digests and tombstones are kept.
    grace_ms: int = 60_000
    #: Milliseconds between refreshes of the TTL; 0: at each use; None: see :meth:`touch_ms`.
    touch_interval_ms: int | None = None
    #: Bytes that one session may have, names and values.
    max_bytes: int = 2**20
    #: ``"json"``, ``"msgpack"``, or an object with ``dumps`` and ``loads``.
    serializer: Any = "json"
    #: Keys to encrypt values with, newest first, 32 bytes or more each; empty: no encryption.
    encryption_keys: tuple[bytes, ...] = field(default=(), repr=False)
    #: Whether Flask-Login's log-in and log-out rotate and set the principal.
    login_hooks: bool = True
    #: Replicas that must have a commit before the response goes out.
    wait_replicas: int = 0
    #: Milliseconds to wait for them, over 0 (which Redis takes for "for ever").
    wait_timeout_ms: int = 100

    @property
    def answer_seconds(self) -> float:
        """Seconds that a server may take to answer, replicas included."""
        return self.redis_timeout + (self.wait_timeout_ms / 1000 if self.wait_replicas else 0)

    @property
    def socket_seconds(self) -> float:
        """Seconds that a connection waits for its server at most."""
        # A client or a URL of the app's own may say how long, but no longer than a request waits for Redis.
        says = self.redis is not None or "timeout=" in self.redis_url
        return max(self.redis_deadline, self.answer_seconds) if says else self.answer_seconds

    @property
    def call_seconds(self) -> float:
        """Seconds that one call takes at most: the deadline, and a last attempt that began within it."""
        return self.redis_deadline + 2 * self.socket_seconds  # it connects, and waits for the answer

    def touch_ms(self, lifetime_ms: int, own_ms: int | None = None) -> int:
        """Return the milliseconds between two refreshes of a session's TTL.

        ``SESSION_TOUCH_INTERVAL`` if it was set; at most half of a lifetime of the session's own, or of
        the app's where that was made too short for it. Else a twentieth of the lifetime, at most one minute.

        :param lifetime_ms: idle lifetime of sessions that have none of their own, milliseconds.
        :param own_ms: idle lifetime of the session's own, milliseconds.
        """
        if self.touch_interval_ms is None:
            return min(_TOUCH_MS, (own_ms or lifetime_ms) // _LIFETIME_PART)
        if own_ms or self.touch_interval_ms + self.trust_seconds(lifetime_ms) * 1000 >= lifetime_ms:
            return min(self.touch_interval_ms, (own_ms or lifetime_ms) // 2)
        return self.touch_interval_ms

    def trust_seconds(self, lifetime_ms: int) -> float:
        """Return the seconds that a cached snapshot of a session is trusted.

        ``SESSION_CACHE_TTL`` if it was set (0 if that was None), else a
        twentieth of the lifetime, at most two seconds. By default, touch
        interval and trust window thus take a tenth of the lifetime, and a
        session in use cannot expire unrefreshed behind the cache.

        :param lifetime_ms: idle lifetime of the session, milliseconds.
        """
        if self.cache_ttl is None or self.cache_ttl_set:
            return self.cache_ttl or 0.0
        return min(self.cache_ttl, lifetime_ms / 1000 / _LIFETIME_PART)


def read_config(settings: Mapping[str, Any]) -> Config:
    """Read all settings of luasession from an app's configuration.

    Flask-Session's keys are understood: they warn and say what replaces them.

    :param settings: ``app.config``.
    :raises ConfigurationError: a value has a wrong type or range, or a name
        looks like a misspelt one. No message shows a URL or a key.
    """
    _refuse_misspelt(settings)
    _heed_flask_session(settings)
    given = {key: settings[key] for key in _SETTINGS if key in settings}
    fields = {_SETTINGS[key][0]: _SETTINGS[key][1](value, key) for key, value in given.items()}
    config = Config(**fields, cache_ttl_set="SESSION_CACHE_TTL" in given)
    if "PERMANENT_SESSION_LIFETIME" in settings:  # it is read at each request, and may be another one then
        milliseconds(settings["PERMANENT_SESSION_LIFETIME"], "PERMANENT_SESSION_LIFETIME")
    if config.cache_ttl_set or config.touch_interval_ms is not None:
        _check_windows(config, settings.get("PERMANENT_SESSION_LIFETIME", timedelta(days=31)))
    if config.renew_after_ms is not None and config.renew_after_ms <= config.grace_ms:
        # Renewed again while its predecessors are in force, a secret would soon have too many of them.
        raise ConfigurationError(
            f"SESSION_RENEW_AFTER ({config.renew_after_ms / 1000:g} s) must be longer than "
            f"SESSION_ROTATION_GRACE ({config.grace_ms / 1000:g} s)"
        )
    wait_s, most_s = config.wait_timeout_ms / 1000, max(config.redis_deadline, config.redis_timeout)
    if config.wait_replicas and wait_s > most_s:
        raise ConfigurationError(
            f"SESSION_WAIT_TIMEOUT ({wait_s:g} s) must be {most_s:g} s at most, the longer one of "
            "SESSION_REDIS_DEADLINE and SESSION_REDIS_TIMEOUT"
        )
    return config


_POSITIVE_MS = partial(milliseconds, at_least=1)

# Setting -> the field of Config, and what reads it.
_SETTINGS: Mapping[str, tuple[str, readers.Reader]] = {
    "SESSION_REDIS": ("redis", readers.optional(readers.client)),
    "SESSION_REDIS_URL": ("redis_url", readers.redis_url),
    "SESSION_KEY_PREFIX": ("key_prefix", readers.prefix),
    "SESSION_ID_LENGTH": ("id_length", readers.integer(16, 128)),
    "SESSION_REDIS_TIMEOUT": ("redis_timeout", partial(readers.seconds, at_least=1)),
    "SESSION_REDIS_DEADLINE": ("redis_deadline", readers.seconds),
    "SESSION_PERMANENT": ("permanent", readers.flag),
    "SESSION_CACHE_TTL": ("cache_ttl", readers.optional(readers.seconds)),
    "SESSION_CACHE_BYTES": ("cache_bytes", readers.integer(1)),
    "SESSION_CONFLICT": ("conflict", readers.policy("overwrite", "raise", "serializable")),
    "SESSION_MERGE": ("merge", readers.merge),
    "SESSION_ABSOLUTE_LIFETIME": ("absolute_ms", readers.optional(_POSITIVE_MS)),
    "SESSION_RENEW_AFTER": ("renew_after_ms", readers.optional(_POSITIVE_MS)),
    "SESSION_ROTATION_GRACE": ("grace_ms", _POSITIVE_MS),
    "SESSION_TOUCH_INTERVAL": ("touch_interval_ms", readers.optional(milliseconds)),
    "SESSION_MAX_BYTES": ("max_bytes", readers.integer(1, 2**32 - 1)),
    "SESSION_SERIALIZER": ("serializer", readers.serializer),
    "SESSION_ENCRYPTION_KEYS": ("encryption_keys", readers.encryption_keys),
    "SESSION_LOGIN_HOOKS": ("login_hooks", readers.flag),
    "SESSION_WAIT_REPLICAS": ("wait_replicas", readers.integer(0)),
    "SESSION_WAIT_TIMEOUT": ("wait_timeout_ms", _POSITIVE_MS),
}

# Flask-Session's names, each alone or with more after an underscore -> what replaces them.
_FLASK_SESSION = {
    "SESSION_USE_SIGNER": "nothing is needed: an id is proved by its secret, not by a signature",
    "SESSION_SERIALIZATION_FORMAT": "SESSION_SERIALIZER replaces it",
    "SESSION_CLEANUP_N_REQUESTS": "nothing is needed: Redis itself removes what has expired",
    **dict.fromkeys(
        [
            *("SESSION_FILE", "SESSION_MEMCACHED", "SESSION_CACHELIB"),
            *("SESSION_MONGODB", "SESSION_SQLALCHEMY", "SESSION_DYNAMODB"),
        ],
        "sessions are kept in Redis: set SESSION_REDIS_URL or SESSION_REDIS",
    ),
}

# Flask is asked for its own names, so that a later Flask's are known too.
_FLASK = tuple(name for name in Flask.default_config if name.startswith("SESSION_"))
_KNOWN = (*_SETTINGS, *_FLASK, "SESSION_TYPE")


def _advice(name: str) -> str | None:
    for stem, advice in _FLASK_SESSION.items():
        if name == stem or name.startswith(f"{stem}_"):
            return advice
    return None


def _refuse_misspelt(settings: Mapping[str, Any]) -> None:
    # Compared without the common prefix, which would make all names alike.
    known = {name.removeprefix("SESSION_"): name for name in _KNOWN}
    for name in settings:
        if not name.startswith("SESSION_") or name in _KNOWN or _advice(name):
            continue
        # What is close to nothing belongs to another extension.
        for close in difflib.get_close_matches(name.removeprefix("SESSION_"), known, 1, _CLOSE):
            raise ConfigurationError(f"{name} is not a setting; did you mean {known[close]}?")


def _heed_flask_session(settings: Mapping[str, Any]) -> None:
    kind = settings.get("SESSION_TYPE")
    if kind is not None and not (isinstance(kind, str) and kind.lower() == "redis"):
        raise readers.wrong("SESSION_TYPE", "'redis' (or absent): luasession knows no other store", kind)
    for name, value in settings.items():
        advice = _advice(name)
        if advice and value is not None:
            warnings.warn(
                f"{name} is a setting of Flask-Session and has no effect; {advice}.",
                stacklevel=_level_outside(),
            )


def _level_outside() -> int:
    """Count the frames from the caller's to the first one outside of luasession."""
    level = 0
    frame = inspect.currentframe()
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame = frame.f_back
        level += 1
    return level


def _check_windows(config: Config, lifetime: object) -> None:
    # A read from the cache refreshes no TTL: a session that is used all the time goes
    # unrefreshed for a touch interval and one trust window after it.
    lifetime_ms = milliseconds(lifetime, "PERMANENT_SESSION_LIFETIME")
    touch_ms = config.touch_interval_ms
    touch = (config.touch_ms(lifetime_ms) if touch_ms is None else touch_ms) / 1000
    trust = config.trust_seconds(lifetime_ms)
    if touch + trust >= lifetime_ms / 1000:
        raise ConfigurationError(
            f"SESSION_TOUCH_INTERVAL ({touch:g} s) and SESSION_CACHE_TTL ({trust:g} s) must "
            f"together stay below PERMANENT_SESSION_LIFETIME ({lifetime_ms / 1000:g} s), "
            "or a session could expire while in use"
        )
