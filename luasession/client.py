"""The way to Redis: one command on one connection, without anybody's retries.

redis-py (and valkey-py, its fork) send a command again on their own account
after a broken connection. For a commit that is wrong, since the first sending
may have been applied. So a call here takes a connection, sends once and reads
once, and what is sent again says so, under one deadline for the whole request
(:class:`Patience`). It is the same loop for a single server, for the primary
that sentinels name and for a cluster's nodes (:mod:`luasession.servers`).
"""

from __future__ import annotations

import inspect
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

import redis
import redis.sentinel
from redis.backoff import NoBackoff
from redis.retry import Retry

from . import embedded
from .clock import now_ns
from .config import Config
from .connections import ASKING, MAX_CONNECTIONS, Connections, Recipe, timeouts
from .errors import ConfigurationError
from .failures import REFUSALS, code_of, is_a, is_known, is_passing, unavailable
from .location import Location, is_location, read_location
from .servers import Address, Cluster, Sentinels, Servers

_FIRST_PAUSE = 0.005
_LONGEST_PAUSE = 0.25
# Nodes that disagree about a slot may send a call to and fro; more often than this it pauses.
_REDIRECTS = 5


class Patience:
    """What one request still waits for Redis, over all of its calls.

    :param seconds: ``SESSION_REDIS_DEADLINE``.
    """

    def __init__(self, seconds: float) -> None:
        self._left = seconds
        self._pause = _FIRST_PAUSE

    def wait(self, error: Exception, failed_after: float, server: str = "") -> None:
        """Sleep before the next try, with jitter.

        :param error: what the last try ended in.
        :param failed_after: seconds that it took.
        :param server: the name of the server, for the error.
        :raise SessionUnavailable: if the deadline has passed.
        """
        self._left -= failed_after
        pause = self._pause * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, no secret
        if self._left < pause:
            raise unavailable(error, server) from error
        time.sleep(pause)
        self._left -= pause
        self._pause = min(self._pause * 2, _LONGEST_PAUSE)


class Client:
    """One or more servers, by way of a client library's connections.

    :param connections: tell where a key lives, and have connections to there.
    :param greet: what is done first with a server that was not used before. It may fail.
    """

    def __init__(self, connections: Servers, greet: Callable[[Connections], None] | None = None) -> None:
        self._connections = connections
        self._greet = greet

    def call(
        self,
        words: Callable[[int, int, bool], Sequence[bytes]],
        accept: Callable[[Any], bool],
        patience: Patience,
        wait: tuple[int, int] | None = None,
        key: bytes = b"",
        meanwhile: Callable[[], object] | None = None,
    ) -> tuple[int, Any, Connections]:
        """Send one command until it is answered.

        :param words: makes the command when a connection is there for it, since the age of a request
            counts up to the sending. It gets the monotonic nanosecond of this sending and of the first
            one, and whether the server may know the script.
        :param accept: tells whether a reply is the answer to this call. If it is not, the connection
            has lost step, and with it goes the reply.
        :param wait: so many replicas have to acknowledge within so many milliseconds.
        :param key: the key that the command is about.
        :param meanwhile: called when the command has been sent, each time: what can be done while the server
            works. It has to be quick, and must not fail.
        :return: when it was sent, the reply, undecoded, and the server that gave it.
        :raise SessionUnavailable: if there is no answer within the deadline, or one that does not pass
            by itself, or too few replicas acknowledged.
        """
        first = 0
        known = True
        redirects = 0
        detour: Connections | None = None
        asking = b""
        while True:
            begun = now_ns()
            sent = 0
            server: Connections | None = None
            try:
                server = detour or self._connections.of(key)
                if not server.greeted:
                    self._meet(server)
                connection = server.take()
                sent = now_ns()
                first = first or sent
                command = partial(words, sent, first, known)
                reply = server.exchange(connection, command, accept, wait, asking, meanwhile)
            except Exception as error:
                if not is_known(error):
                    raise
                code = code_of(error)
                if first == sent and code in REFUSALS:
                    first = 0  # what was refused has not been applied: the next is the first
                if known and code == "NOSCRIPT":
                    # On the same server: the target of an ASK wants to be asked again.
                    known = False
                    continue
                detour = server and self._connections.heard(error, server, key)
                asking = ASKING if code == "ASK" else b""
                if detour is not None and redirects < _REDIRECTS:
                    redirects += 1
                    continue
                detour, asking = None, b""
                name = "" if server is None else str(server)
                if not is_passing(error):
                    raise unavailable(error, name) from error
                patience.wait(error, max(now_ns() - begun, 0) / 1e9, name)
            else:
                return sent, reply, server

    def doubt(self, server: Connections) -> bool:
        """Look again which server has what, and tell whether it may be another one by now."""
        return self._connections.doubt(server)

    def known(self, key: bytes) -> Connections | None:
        """Return the server that a key lives on, if that needs no asking."""
        return self._connections.known(key)

    def _meet(self, server: Connections) -> None:
        # Whoever comes meanwhile goes on without; and whatever goes wrong, the call itself will say so.
        server.greeted = True
        try:
            if self._greet is not None:
                self._greet(server)
        except Exception as error:
            if not is_known(error):
                raise


def connect(config: Config, name: str, greet: Callable[[Connections], None] | None = None) -> Client:
    """Build the client of this process; no connection is opened yet.

    :param name: names the app, for its embedded server.
    :param greet: as for :class:`Client`.
    :raise ConfigurationError: if the kind of client or URL is not one that works here.
    """
    seconds = config.redis_timeout
    at_most = config.socket_seconds
    ready = config.redis
    if ready is None and is_location(config.redis_url):
        where = read_location(config.redis_url, "SESSION_REDIS_URL")
        settings = {**_settings(config), **where.options}
        settings |= timeouts(settings, at_most)
        if where.service is None:
            return Client(_cluster_at(where, settings, seconds), greet)
        theirs = {**_settings(config), "ssl": where.tls, **where.sentinel_options}
        sentinels: Any = redis.sentinel.Sentinel
        ready = sentinels(where.addresses, sentinel_kwargs=theirs, ssl=where.tls, **settings).master_for(
            where.service
        )
    if ready is None:
        url, revive = _served(config, name)
        ours = redis.ConnectionPool.from_url(url, **_settings(config))
        return Client(Connections(Recipe.of(ours, at_most), seconds, revive), greet)
    if hasattr(ready, "nodes_manager"):
        return Client(_cluster_of(ready, seconds, at_most), greet)
    pool = getattr(ready, "connection_pool", None)
    if pool is None:
        raise ConfigurationError(
            f"SESSION_REDIS is a {type(ready).__name__}; expected a redis-py Redis or RedisCluster,"
            " a Sentinel's master_for(), or valkey-py's like"
        )
    if hasattr(pool, "sentinel_manager"):
        return Client(_sentinels_of(pool, seconds, at_most), greet)
    return Client(Connections(Recipe.of(pool, at_most), seconds), greet)


class _Fixed(NamedTuple):
    """What a Sentinel's connection asks for the address, in the place of its pool."""

    service_name: str
    address: Address
    is_master: bool = True
    check_connection: bool = False

    def get_master_address(self) -> Address:
        return self.address


def _sentinels_of(pool: Any, seconds: float, at_most: float) -> Sentinels:
    if not pool.is_master:
        raise ConfigurationError("SESSION_REDIS is a Sentinel's slave_for(); expected its master_for()")
    recipe, manager = Recipe.of(pool, at_most), pool.sentinel_manager
    is_valkey = any(kind.__module__.startswith("valkey.") for kind in pool.connection_class.__mro__)
    hook = "valkey_connect_func" if is_valkey else "redis_connect_func"

    def primary(host: str, port: int) -> Connections:
        host = getattr(manager, "_force_master_ip", None) or host
        fixed = _Fixed(pool.service_name, (host, port))
        at = recipe.at(host, port)
        settings = {
            **at.settings,
            "connection_pool": fixed,
            hook: partial(_meet_primary, at.settings.get(hook)),
        }
        return Connections(at._replace(settings=settings), seconds)

    sentinels = [Connections(Recipe.of(each.connection_pool, at_most), seconds) for each in manager.sentinels]
    return Sentinels(sentinels, pool.service_name, primary, manager.min_other_sentinels, seconds)


def _meet_primary(theirs: Callable[[Any], None] | None, connection: Any) -> None:
    # A sentinel that has not heard of a failover names the old primary. Back as a replica it refuses
    # writes, but what is read there is old, or nothing at all while it is filled: a session that is there
    # would be taken for one that is not. So Sentinel's clients are to ask each for its role.
    if theirs is None:
        connection.on_connect()
    else:
        theirs(connection)
    connection.send_command("ROLE")
    try:
        role = connection.read_response()[0]
    except Exception as error:
        if not is_a(error, "ResponseError"):
            raise
        return  # it may not be asked; then the sentinels are believed
    if role not in {b"master", "master"}:
        raise redis.ConnectionError("what the sentinels named as the primary is a replica")


def _cluster_at(where: Location, settings: dict[str, Any], seconds: float) -> Cluster:
    bound = settings.pop("max_connections", MAX_CONNECTIONS)
    kind = redis.connection.SSLConnection if where.tls else redis.connection.Connection
    recipe = Recipe(kind, settings, bound)
    return Cluster(
        where.addresses,
        lambda host, port: Connections(recipe.at(host, port), seconds),
        lambda host, port: (host, port),
        seconds,
    )


def _cluster_of(client: Any, seconds: float, at_most: float) -> Cluster:
    manager = client.nodes_manager
    nodes = [*manager.nodes_cache.values(), *manager.startup_nodes.values()]
    make = getattr(manager, "create_redis_node", None) or manager.create_valkey_node
    with make(nodes[0].host, nodes[0].port, **manager.connection_kwargs) as one:
        recipe = Recipe.of(one.connection_pool, at_most)
    # Its hook makes a connection read from replicas, which would answer what is old. What the app itself
    # hooked in stays.
    hook = "valkey_connect_func" if "valkey_connect_func" in recipe.settings else "redis_connect_func"
    recipe = recipe.without(hook, "oss_cluster_maint_notifications_handler")
    if client.user_on_connect_func is not None:
        recipe = recipe._replace(settings={**recipe.settings, hook: partial(_prepare, client)})
    return Cluster(
        [(node.host, int(node.port)) for node in nodes],
        lambda host, port: Connections(recipe.at(host, port), seconds),
        manager.remap_host_port,
        seconds,
    )


def _prepare(client: Any, connection: Any) -> None:
    connection.on_connect()
    client.user_on_connect_func(connection)


def _settings(config: Config) -> dict[str, Any]:
    """Return what connections that luasession makes for a URL are made with."""
    options: dict[str, Any] = {
        "protocol": 2,
        "socket_timeout": config.answer_seconds,
        "socket_connect_timeout": config.redis_timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    if "driver_info" in inspect.signature(redis.connection.AbstractConnection).parameters:
        # Two round trips less for each new connection: the library's name is not announced.
        options["driver_info"] = None
    return options


def _served(config: Config, name: str) -> tuple[str, Callable[[], object] | None]:
    """Return a URL that redis-py understands, and what starts the server there once more, if that is ours."""
    url = config.redis_url
    scheme, _, rest = url.partition("://")
    if scheme == "embedded":
        start = partial(embedded.start, embedded.directory_from(rest), name=name)
        return "unix://" + quote(start()), start
    if scheme in {"valkey", "valkeys"}:
        url = ("rediss://" if scheme == "valkeys" else "redis://") + rest
    return url, None
