"""The settings of luasession: read once, checked, and brought to one unit each.

:func:`read_config` turns ``app.config`` into a :class:`Config` when the
extension is set up, so that a wrong value stops the app at its start and not a
user at some request. What Flask itself reads at each request
(``SESSION_COOKIE_*``, ``PERMANENT_SESSION_LIFETIME``) is not kept here.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any, TypeAlias

from flask import Flask

from .errors import ConfigurationError
from .location import is_location, read_location

#: What to do about a conflict: a word, or a function ``(base, theirs, ours) -> value``.
Policy: TypeAlias = str | Callable[[Any, Any, Any], Any]

# A setting's value and name in, its normal form out; or a ConfigurationError.
_Reader: TypeAlias = Callable[[Any, str], Any]

_SCHEMES = (
    *("redis", "rediss", "valkey", "valkeys", "unix", "embedded"),
    *("redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"),
)
_DEFAULT_CACHE_TTL = 2.0
_KEY_BYTES = 32
_TOUCH_MS = 60_000
# Windows of a default take this part of the lifetime, so two of them never fill it.
_LIFETIME_PART = 20
# Lua prints whole numbers of up to 14 digits; now plus this many milliseconds has no more.
_MAX_SECONDS = 1000 * 365 * 86_400
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

    def touch_ms(self, lifetime_ms: int) -> int:
        """Return the milliseconds between two refreshes of a session's TTL.

        ``SESSION_TOUCH_INTERVAL`` if it was set, else a twentieth of the
        lifetime, at most one minute.

        :param lifetime_ms: idle lifetime of the session, milliseconds.
        """
        if self.touch_interval_ms is not None:
            return self.touch_interval_ms
        return min(_TOUCH_MS, lifetime_ms // _LIFETIME_PART)

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
    if config.cache_ttl_set or config.touch_interval_ms is not None:
        _check_windows(config, settings.get("PERMANENT_SESSION_LIFETIME", timedelta(days=31)))
    if config.renew_after_ms is not None and config.renew_after_ms <= config.grace_ms:
        # Renewed again while its predecessors are in force, a secret would soon have too many of them.
        raise ConfigurationError(
            f"SESSION_RENEW_AFTER ({config.renew_after_ms / 1000:g} s) must be longer than "
            f"SESSION_ROTATION_GRACE ({config.grace_ms / 1000:g} s)"
        )
    return config


def milliseconds(value: object, key: str, at_least: int = 0) -> int:
    """Turn a duration into whole milliseconds; one above zero never becomes zero.

    :param value: a timedelta, or a number of seconds, at most 1000 years.
    :param key: what the value is for, to name it in the error.
    :param at_least: the smallest result that will do, milliseconds; 1 refuses zero.
    :raises ConfigurationError: it is no duration, negative, too small or too large.
    """
    seconds: Any = value.total_seconds() if isinstance(value, timedelta) else value
    # NaN fails the comparison, as infinity does.
    if _is_a(seconds, int | float) and 0 <= seconds <= _MAX_SECONDS:
        ms = max(round(seconds * 1000), 1) if seconds else 0
        if ms >= at_least:
            return ms
    expected = f"{at_least / 1000:g} at least and 1000 years at most"
    raise _wrong(key, f"a timedelta or a number of seconds, {expected}", value)


@lru_cache(maxsize=16)
def idle_lifetime(value: timedelta | float) -> int:
    """Return ``PERMANENT_SESSION_LIFETIME`` in milliseconds; it is read at each request.

    :raises ConfigurationError: it is no positive time.
    """
    return milliseconds(value, "PERMANENT_SESSION_LIFETIME", at_least=1)


def _wrong(key: str, expected: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"{key} must be {expected}, not {value!r}")


def _is_a(value: object, number: Any) -> bool:
    return isinstance(value, number) and not isinstance(value, bool)


def _must_be(expected: str, test: Callable[[Any], bool]) -> _Reader:
    def read(value: Any, key: str) -> Any:
        if not test(value):
            raise _wrong(key, expected, value)
        return value

    return read


def _optional(read: _Reader) -> _Reader:
    return lambda value, key: None if value is None else read(value, key)


def _integer(low: int, high: float = math.inf) -> _Reader:
    expected = f"an integer, {low} at least" + (f" and {high} at most" if high < math.inf else "")
    return _must_be(expected, lambda value: _is_a(value, int) and low <= value <= high)


def _policy(*words: str) -> _Reader:
    return _must_be(
        f"{', '.join(map(repr, words))} or a function (base, theirs, ours) -> value",
        lambda value: value in words if isinstance(value, str) else callable(value),
    )


_flag = _must_be("True or False", lambda value: isinstance(value, bool))

# Braces would put all sessions of a cluster into one slot.
_prefix = _must_be(
    "a text that is not empty and has no braces",
    lambda value: isinstance(value, str) and re.fullmatch(r"[^{}]+", value) is not None,
)

# Their loads runs what the bytes say: whoever can write to Redis would own the app.
_EXECUTING = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal")

_serializer = _must_be(
    "'json', 'msgpack' or an object with dumps and loads that is no pickle",
    lambda value: (
        (isinstance(value, str) and value in ("json", "msgpack"))
        or (
            all(callable(getattr(value, name, None)) for name in ("dumps", "loads"))
            and getattr(value, "__name__", None) not in _EXECUTING
        )
    ),
)


def _seconds(value: object, key: str, at_least: int = 0) -> float:
    return milliseconds(value, key, at_least) / 1000


def _merge(value: object, key: str) -> Mapping[str, Policy]:
    if not isinstance(value, Mapping):
        raise _wrong(key, "a mapping of session keys to policies", value)
    # No "serializable" here: a serial order of some keys only is none.
    read = _policy("overwrite", "raise")
    for name, policy in value.items():
        if not isinstance(name, str) or not name or "*" in name[:-1]:
            raise _wrong(f"each name in {key}", "a session key, or its beginning and one *", name)
        read(policy, f"{key}[{name!r}]")
    return MappingProxyType(dict(value))


def _encryption_keys(value: object, key: str) -> tuple[bytes, ...]:
    if value is None:
        return ()
    given = (value,) if isinstance(value, str | bytes) else value
    # An empty list is more likely a lost secret than a wish to store plain text.
    if not isinstance(given, list | tuple) or not given:
        raise ConfigurationError(
            f"{key} must be None, a key, or a list of keys, newest first; its value is not shown"
        )
    keys = []
    for number, one in enumerate(given, 1):
        # "surrogatepass" since an encoding error would quote the key.
        raw = one.encode("utf-8", "surrogatepass") if isinstance(one, str) else one
        if not isinstance(raw, bytes) or len(raw) < _KEY_BYTES:
            raise ConfigurationError(
                f"{key} must hold str or bytes of {_KEY_BYTES} bytes at least; "
                f"number {number} is not, and is not shown"
            )
        keys.append(raw)
    return tuple(keys)


def _redis_url(value: object, key: str) -> str:
    # Of a wrong one the scheme is shown and nothing else, since the rest may hold a password.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value) if isinstance(value, str) else None
    if isinstance(value, str) and scheme and scheme[1] in _SCHEMES:
        if is_location(value):
            read_location(value, key)
        return value
    found = repr(scheme[1]) if scheme else "none"
    raise ConfigurationError(
        f"{key} must be a URL with one of the schemes {', '.join(_SCHEMES)}; its scheme is {found}"
    )


def _client(value: Any, key: str) -> Any:
    # A client is named by its type alone: some versions show the password in their repr.
    found = f"{key} must be a synchronous redis-py or valkey-py client, not "
    if isinstance(value, str | bytes):
        raise ConfigurationError(f"{found}a text; for a URL there is SESSION_REDIS_URL")
    if isinstance(value, type):
        raise ConfigurationError(f"{found}the class {value.__name__} itself")
    execute = getattr(value, "execute_command", None)
    if not callable(execute):
        raise ConfigurationError(f"{found}a value of type {type(value).__name__}")
    if inspect.iscoroutinefunction(execute):
        raise ConfigurationError(f"{found}an asyncio one; asyncio clients are not supported")
    if _caches_replies(value):
        raise ConfigurationError(
            f"{found}one with client-side caching: its cached replies would pass for the newest "
            "state of a session. Give it no cache_config; luasession has a cache of its own"
        )
    return value


def _caches_replies(client: Any) -> bool:
    # redis-py keeps its cache at the pool or at a cluster's nodes, valkey-py in their arguments.
    pool, nodes = (getattr(client, name, None) for name in ("connection_pool", "nodes_manager"))
    arguments = getattr(nodes if pool is None else pool, "connection_kwargs", {})
    caches = [getattr(pool, "cache", None), getattr(nodes, "_cache", None)]
    caches += [arguments.get("client_cache"), arguments.get("cache_enabled") or None]
    return any(cache is not None for cache in caches)


_POSITIVE_MS = partial(milliseconds, at_least=1)

# Setting -> the field of Config, and what reads it.
_SETTINGS: Mapping[str, tuple[str, _Reader]] = {
    "SESSION_REDIS": ("redis", _optional(_client)),
    "SESSION_REDIS_URL": ("redis_url", _redis_url),
    "SESSION_KEY_PREFIX": ("key_prefix", _prefix),
    "SESSION_ID_LENGTH": ("id_length", _integer(16, 128)),
    "SESSION_REDIS_TIMEOUT": ("redis_timeout", partial(_seconds, at_least=1)),
    "SESSION_REDIS_DEADLINE": ("redis_deadline", _seconds),
    "SESSION_PERMANENT": ("permanent", _flag),
    "SESSION_CACHE_TTL": ("cache_ttl", _optional(_seconds)),
    "SESSION_CACHE_BYTES": ("cache_bytes", _integer(1)),
    "SESSION_CONFLICT": ("conflict", _policy("overwrite", "raise", "serializable")),
    "SESSION_MERGE": ("merge", _merge),
    "SESSION_ABSOLUTE_LIFETIME": ("absolute_ms", _optional(_POSITIVE_MS)),
    "SESSION_RENEW_AFTER": ("renew_after_ms", _optional(_POSITIVE_MS)),
    "SESSION_ROTATION_GRACE": ("grace_ms", _POSITIVE_MS),
    "SESSION_TOUCH_INTERVAL": ("touch_interval_ms", _optional(milliseconds)),
    "SESSION_MAX_BYTES": ("max_bytes", _integer(1)),
    "SESSION_SERIALIZER": ("serializer", _serializer),
    "SESSION_ENCRYPTION_KEYS": ("encryption_keys", _encryption_keys),
    "SESSION_LOGIN_HOOKS": ("login_hooks", _flag),
    "SESSION_WAIT_REPLICAS": ("wait_replicas", _integer(0)),
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
        raise _wrong("SESSION_TYPE", "'redis' (or absent): luasession knows no other store", kind)
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
    touch, trust = config.touch_ms(lifetime_ms) / 1000, config.trust_seconds(lifetime_ms)
    if touch + trust >= lifetime_ms / 1000:
        raise ConfigurationError(
            f"SESSION_TOUCH_INTERVAL ({touch:g} s) and SESSION_CACHE_TTL ({trust:g} s) must "
            f"together stay below PERMANENT_SESSION_LIFETIME ({lifetime_ms / 1000:g} s), "
            "or a session could expire while in use"
        )
