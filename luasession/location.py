"""Where Redis is: URLs of clusters and sentinels, which have more than one address.

``redis+cluster://[user:password@]host:port,host:port[?option=value]`` and
``redis+sentinel://[user:password@]host:port,host:port/service[/db][?option=value]``;
``rediss+`` for TLS. Options are those of redis-py's own URLs; with ``sentinel_``
before them they are for the sentinels, as ``sentinel_password``. What is left to
redis-py is the meaning of each option; what is checked here is all that a typing
error may hit, when the app starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from redis.connection import Connection, SSLConnection, parse_url

from .errors import ConfigurationError

_FORM = re.compile(
    r"(?P<scheme>rediss?)\+(?P<kind>cluster|sentinel)://(?:(?P<user>[^@/?#]*)@)?(?P<hosts>[^/?#]*)"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?"
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^:\[\]\s@]+)(?::([0-9]+))?")
_PORTS = {"cluster": 6379, "sentinel": 26379}
_EXPECTED = {
    "cluster": "redis+cluster://[user:password@]host:port,host:port",
    "sentinel": "redis+sentinel://[user:password@]host:port,host:port/service[/db]",
}
_ESCAPED = "(a / ? # or @ in a password is written %2F %3F %23 %40)"
_FOR_SENTINELS = "sentinel_"


@dataclass(frozen=True, slots=True)
class Location:
    """A cluster, or a service of sentinels."""

    #: Of some nodes, or of the sentinels: host and port.
    addresses: tuple[tuple[str, int], ...]
    #: The sentinels' name for it; None: a cluster.
    service: str | None
    #: For connections to Redis, as redis-py calls them.
    options: dict[str, Any] = field(repr=False)
    #: For connections to the sentinels.
    sentinel_options: dict[str, Any] = field(repr=False)
    tls: bool = False


def is_location(url: str) -> bool:
    """Whether a URL is of a cluster or of sentinels."""
    return "+" in url.partition("://")[0]


def read_location(url: str, key: str) -> Location:
    """Read the URL of a cluster or of sentinels.

    :param key: the setting, to name it in the error.
    :raise ConfigurationError: if it is not of the form; no message shows what may be a password.
    """
    form = _FORM.fullmatch(url)
    kind = "sentinel" if "+sentinel" in url.partition("://")[0] else "cluster"
    if form is None:
        raise _wrong(key, kind, f"it is not of that form {_ESCAPED}")
    addresses = tuple(_address(host, key, kind) for host in form["hosts"].split(","))
    service, db = _service(form["path"] or "", key) if kind == "sentinel" else (None, 0)
    if service is None and (form["path"] or "/").strip("/") not in {"", "0"}:
        raise _wrong(key, kind, "a cluster has no database but 0 and no service")
    given = parse_qsl(form["query"] or "", keep_blank_values=True)
    start = len(_FOR_SENTINELS)
    own = [pair for pair in given if not pair[0].startswith(_FOR_SENTINELS)]
    theirs = [(name[start:], value) for name, value in given if name.startswith(_FOR_SENTINELS)]
    if theirs and service is None:
        raise _wrong(key, kind, "options that begin with sentinel_ are for sentinels")
    options = _options(form["scheme"], form["user"], own, key, kind)
    if service is not None:
        options["db"] = db
    # Certificates and their like hold for the sentinels, too, unless they are told otherwise.
    tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    sentinel_options = tls | _options(form["scheme"], None, theirs, key, kind)
    return Location(addresses, service, options, sentinel_options, form["scheme"] == "rediss")


def check_address(url: str, key: str) -> None:
    """Check the URL of one server, as far as that goes without connecting.

    :param key: the setting, to name it in the error.
    :raise ConfigurationError: if there is no such database, path or option; no message shows what may be a
        password.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        if not parts.path.strip("/"):
            raise ConfigurationError(f"{key} names no socket: expected unix:///path/of/the.sock")
    elif not re.fullmatch(r"/*[0-9]*/*", parts.path):
        raise ConfigurationError(f"{key} must end with the number of a database, as in redis://host:6379/0")
    try:
        options: dict[str, Any] = parse_url(re.sub("^valkey", "redis", url))  # type: ignore[no-untyped-call]
        _try(options.pop("connection_class", Connection), options)
    except Exception:  # noqa: BLE001 - whatever redis-py thinks of it
        names = ", ".join(sorted({name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}))
        raise ConfigurationError(
            f"{key} has an option that is unknown or has a wrong value, one of these: {names or 'none'}"
        ) from None


def _try(kind: Any, options: Mapping[str, Any]) -> None:
    # Unknown names and odd values come to light when a connection is made, long before it connects.
    kind(**{name: value for name, value in options.items() if name != "max_connections"})


def _wrong(key: str, kind: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"{key} must be {_EXPECTED[kind]}; {why}")


def _address(text: str, key: str, kind: str) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    if found is None:
        raise _wrong(key, kind, f"each address must be host or host:port, with commas between {_ESCAPED}")
    port = int(found[2] or _PORTS[kind])
    if not 0 < port < 1 << 16:
        raise _wrong(key, kind, f"{port} is no port")
    return found[1].strip("[]"), port


def _service(path: str, key: str) -> tuple[str, int]:
    service, _, db = path.removeprefix("/").partition("/")
    if not service:
        raise _wrong(key, "sentinel", "the name of the service is missing")
    if not re.fullmatch(r"[0-9]*", db):
        raise _wrong(key, "sentinel", "the database must be a number")
    return unquote(service), int(db or 0)


def _options(
    scheme: str, user: str | None, query: list[tuple[str, str]], key: str, kind: str
) -> dict[str, Any]:
    names = ", ".join(sorted(name for name, _ in query))
    # A username alone is a mistake of the colon, mostly; redis-py would not send it at all.
    if user is not None and ":" not in user:
        raise _wrong(key, kind, "before the @ is user:password, or :password")
    try:
        options: dict[str, Any] = parse_url(  # type: ignore[no-untyped-call]
            f"{scheme}://{_quoted(user)}host/?{urlencode(query, quote_via=quote)}"
        )
        options.pop("connection_class", None)
        options.pop("host")
        _try(SSLConnection if scheme == "rediss" else Connection, options)
    except Exception:  # noqa: BLE001 - whatever redis-py thinks of it
        raise _wrong(
            key, kind, f"one of these options is unknown or has a wrong value: {names or 'none'}"
        ) from None
    return options


def _quoted(user: str | None) -> str:
    if user is None:
        return ""
    name, _, password = user.partition(":")
    return f"{quote(unquote(name), safe='')}:{quote(unquote(password), safe='')}@"
