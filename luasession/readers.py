"""Values of settings: each checked and brought to its normal form, or a :exc:`ConfigurationError`.

What is wrong is named together with what was expected. A URL, a client and a
key are never shown, since they may hold or be a secret.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from .errors import ConfigurationError
from .location import check_address, is_location, read_location
from .policy import Policy

# A setting's value and name in, its normal form out; or a ConfigurationError.
Reader: TypeAlias = Callable[[Any, str], Any]

_SCHEMES = (
    *("redis", "rediss", "valkey", "valkeys", "unix", "embedded"),
    *("redis+cluster", "rediss+cluster", "redis+sentinel", "rediss+sentinel"),
)
_KEY_BYTES = 32
# Lua prints whole numbers of up to 14 digits; now plus this many milliseconds has no more.
_MAX_SECONDS = 1000 * 365 * 86_400


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
    raise wrong(key, f"a timedelta or a number of seconds, {expected}", value)


@lru_cache(maxsize=16)
def idle_lifetime(value: timedelta | float) -> int:
    """Return ``PERMANENT_SESSION_LIFETIME`` in milliseconds; it is read at each request.

    :raises ConfigurationError: it is no positive time.
    """
    return milliseconds(value, "PERMANENT_SESSION_LIFETIME", at_least=1)


def wrong(key: str, expected: str, value: object) -> ConfigurationError:
    """Return the error about a value that is not what was expected."""
    return ConfigurationError(f"{key} must be {expected}, not {value!r}")


def _is_a(value: object, number: Any) -> bool:
    return isinstance(value, number) and not isinstance(value, bool)


def must_be(expected: str, test: Callable[[Any], bool]) -> Reader:
    """Return a reader of values that pass a test."""

    def read(value: Any, key: str) -> Any:
        if not test(value):
            raise wrong(key, expected, value)
        return value

    return read


def optional(read: Reader) -> Reader:
    """Return a reader that takes None as well."""
    return lambda value, key: None if value is None else read(value, key)


def integer(low: int, high: float = math.inf) -> Reader:
    """Return a reader of integers within bounds, which are included."""
    expected = f"an integer, {low} at least" + (f" and {high} at most" if high < math.inf else "")
    return must_be(expected, lambda value: _is_a(value, int) and low <= value <= high)


def policy(*words: str) -> Reader:
    """Return a reader of one of these words, or a merge function."""
    return must_be(
        f"{', '.join(map(repr, words))} or a function (base, theirs, ours) -> value",
        lambda value: value in words if isinstance(value, str) else _takes_three(value),
    )


def _takes_three(function: Any) -> bool:
    try:
        inspect.signature(function, follow_wrapped=False).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:  # written in C, it does not say
        return True
    return True


flag = must_be("True or False", lambda value: isinstance(value, bool))

# Braces would put all sessions of a cluster into one slot.
prefix = must_be(
    "a text that is not empty and has no braces",
    lambda value: isinstance(value, str) and re.fullmatch(r"[^{}\ud800-\udfff]+", value) is not None,
)

# Their loads runs what the bytes say: whoever can write to Redis would own the app.
_EXECUTING = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "marshal")

serializer = must_be(
    "'json', 'msgpack' or an object with dumps and loads that is no pickle",
    lambda value: (
        (isinstance(value, str) and value in ("json", "msgpack"))
        or (
            all(callable(getattr(value, name, None)) for name in ("dumps", "loads"))
            and getattr(value, "__name__", None) not in _EXECUTING
        )
    ),
)


def seconds(value: object, key: str, at_least: int = 0) -> float:
    """Read a duration as seconds; see :func:`milliseconds`."""
    return milliseconds(value, key, at_least) / 1000


def merge(value: object, key: str) -> Mapping[str, Policy]:
    """Read policies by session key."""
    if not isinstance(value, Mapping):
        raise wrong(key, "a mapping of session keys to policies", value)
    # No "serializable" here: a serial order of some keys only is none.
    read = policy("overwrite", "raise")
    for name, given in value.items():
        if not isinstance(name, str) or not name or "*" in name[:-1]:
            raise wrong(f"each name in {key}", "a session key, or its beginning and one *", name)
        read(given, f"{key}[{name!r}]")
    return MappingProxyType(dict(value))


def encryption_keys(value: object, key: str) -> tuple[bytes, ...]:
    """Read one key or several."""
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


def redis_url(value: object, key: str) -> str:
    """Read a URL."""
    # Of a wrong one the scheme is shown and nothing else, since the rest may hold a password.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", value) if isinstance(value, str) else None
    if isinstance(value, str) and scheme and scheme[1] in _SCHEMES:
        if is_location(value):
            read_location(value, key)
        elif not _has_a_port(value):
            raise ConfigurationError(f"{key} has a port that is none: it must be a number from 0 to 65535")
        elif scheme[1] != "embedded":
            check_address(value, key)
        return value
    found = f"its scheme is {scheme[1]!r}" if scheme else "it has no scheme"
    if not isinstance(value, str):
        found = f"it is of type {type(value).__name__}"
    raise ConfigurationError(f"{key} must be a URL with one of the schemes {', '.join(_SCHEMES)}; {found}")


def _has_a_port(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018 - it is looked at, and raises
    except ValueError:
        return False
    return True


def client(value: Any, key: str) -> Any:
    """Read a ready client."""
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
    if hasattr(value, "command_stack"):
        raise ConfigurationError(f"{found}a pipeline; expected the client that made it")
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
