"""A population: many sessions at once, of which a few are asked for most of the time."""

from __future__ import annotations

from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING

import redis

from luasession.ids import SessionId, new_session_id

from .peers import BARE_MIX, CACHED, CHECKED, COLD, COOKIE, FLOOR, LEAST, PEERS, RIVAL, Peer, family
from .samples import Row, summary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: Ten fields with the number and the cart.
TEN = {f"key{n}": "v" * 38 for n in range(8)}
#: The skew of YCSB.
_SKEW = 0.99
_WRITES = 0.1
# The digest in the metadata field @i.
_DIGEST = slice(1, 33)


class Population:
    """As many sessions in each peer's store, all alike, made from the bytes of a real one."""

    def __init__(self, socket: str, count: int) -> None:
        self._weights = list(accumulate(1 / (rank + 1) ** _SKEW for rank in range(count)))
        self._ranks = range(count)
        client = redis.Redis(unix_socket_path=socket, protocol=2)
        jars = [Peer(name, socket, TEN).jar for name in (CACHED, RIVAL, COOKIE)]
        ours, theirs, cookie = (jar["session"] for jar in jars)
        # The copies are of one version: with a cache, their browsers were told which.
        self._hints = {name: value for name, value in jars[0].items() if name != "session"}
        ids = [new_session_id(32) for _ in range(count)]
        #: Cookie values by family.
        self.cookies: dict[str, list[str]] = {
            family(FLOOR): [""] * count,
            family(COOKIE): [cookie] * count,
            family(COLD): [each.sid for each in ids],
            family(BARE_MIX): [each.sid for each in ids],
            family(RIVAL): [each.sid for each in ids],
        }
        #: What one of them takes of the server's memory, all told.
        self.rows: list[Row] = []
        for name, copies in (
            (COLD, _copies_of_ours(client, ours.partition(".")[0], ids)),
            (RIVAL, _copies_of_theirs(client, theirs, ids)),
        ):
            before = client.info("memory")["used_memory"]
            _pour(client, copies)
            taken = client.info("memory")["used_memory"] - before
            self.rows.append({"peer": name, "sessions": count, "bytes_each": round(taken / count)})
        client.close()

    def jar(self, name: str, place: int, who: int) -> dict[str, str]:
        """Return the cookies of a session; peers of a family at other places have others for the same one.

        All sessions are alike, so peers that share a store are kept off each other's.
        """
        cookies = self.cookies[family(name)]
        hints = self._hints if name != COLD and family(name) == family(COLD) else {}
        return {"session": cookies[(who + place * len(cookies) // 5) % len(cookies)], **hints}

    def clicks(self, seed: int, among: int | None = None) -> Callable[[], tuple[int, str]]:
        """Return what gives, each time, whose click is next and on which path; the same for a seed.

        :param among: how many sessions are asked for, the first ones; all of them if None.
        """
        draw = Random(seed)
        ranks, weights = self._ranks[:among], self._weights[:among]

        def click() -> tuple[int, str]:
            [who] = draw.choices(ranks, cum_weights=weights)
            return who, "/change" if draw.random() < _WRITES else "/read"

        return click


class Mix:
    """The mix in this process, on a population whose browsers keep their cookies from one run to the next."""

    def __init__(self, population: Population, socket: str, names: Iterable[str]) -> None:
        self._population = population
        self._socket = socket
        self._jars: dict[str, dict[int, dict[str, str]]] = {name: {} for name in names}

    def run(self, rounds: int, calls: int, among: int | None = None) -> list[Row]:
        """Time the mix over the first sessions, or all, by apps that have seen none of them yet."""
        peers = {name: self._peer(name) for name in self._jars}
        series: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(rounds):
            for place, (name, peer) in enumerate(peers.items()):
                click = self._population.clicks(number, among)
                for _ in range(calls):
                    who, path = click()
                    jar = self._jars[name].setdefault(who, self._population.jar(name, place, who))
                    series[name].append(peer.call(path, jar))
        return [{"workload": "mix", "peer": name, **summary(values)} for name, values in series.items()]

    def _peer(self, name: str) -> Peer:
        peer, population = Peer(name, self._socket, TEN), self._population
        if name != FLOOR:
            # The copies are as good as the session that they were made from.
            peer.call("/read", population.jar(name, 0, len(population.cookies[family(name)]) - 1))
            if peer.body != b"v":
                raise RuntimeError(f"{name} does not know its sessions")
        return peer


def measure(population: Population, socket: str, rounds: int, calls: int) -> list[Row]:
    """Time the mix over all sessions, for all peers that are called in this process."""
    names = [name for name in PEERS if name not in (CHECKED, *LEAST)]
    return [{"shape": "10 fields", **row} for row in Mix(population, socket, names).run(rounds, calls)]


def _copies_of_ours(client: redis.Redis, handle: str, ids: list[SessionId]) -> Iterable[bytes]:
    key = f"session:{handle}"
    fields = client.hgetall(key)
    identity = fields.pop(b"@i")
    pack = _packer(client)
    hole = b"\0" * 32
    whole = identity[: _DIGEST.start] + hole + identity[_DIGEST.stop :]
    flat = [part for pair in fields.items() for part in pair]
    before, between, after = _cut(pack("HSET", key, "@i", whole, *flat), handle.encode(), hole)
    expire = pack("PEXPIRE", key, client.pttl(key)).split(handle.encode())
    for each in ids:
        name = each.handle.encode()
        yield before + name + between + each.digest + after + name.join(expire)


def _copies_of_theirs(client: redis.Redis, sid: str, ids: list[SessionId]) -> Iterable[bytes]:
    # Their ids may be any text, so ours will do.
    key = f"fs:{sid}"
    pack = _packer(client)
    value, ttl = client.get(key), client.ttl(key)
    for each in ids:
        yield pack("SET", f"fs:{each.sid}", value, "EX", ttl) + pack("PING")


def _packer(client: redis.Redis) -> Callable[..., bytes]:
    connection = client.connection_pool.make_connection()
    return lambda *parts: b"".join(connection.pack_command(*parts))


def _cut(text: bytes, first: bytes, second: bytes) -> tuple[bytes, bytes, bytes]:
    before, _, rest = text.partition(first)
    between, _, after = rest.partition(second)
    return before, between, after


def _pour(client: redis.Redis, pairs: Iterable[bytes]) -> None:
    """Send pairs of commands a thousand at a time, and look at every answer."""
    connection = client.connection_pool.get_connection()
    batch: list[bytes] = []

    def flush() -> None:
        connection.send_packed_command([b"".join(batch)])
        for _ in range(2 * len(batch)):
            connection.read_response()  # raises what the server refused
        batch.clear()

    for pair in pairs:
        batch.append(pair)
        if len(batch) == 1000:
            flush()
    flush()
    client.connection_pool.release(connection)
