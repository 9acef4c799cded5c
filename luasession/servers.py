"""Which server a key lives on: a single one, the primary that sentinels name, a cluster's nodes.

The libraries answer this too, and what they were told (addresses, credentials,
TLS, remapped addresses) is taken from them. The asking itself is not: they ask
with retries of their own (ten, with pauses, for each sentinel that is down),
over decoded connections, and hold locks meanwhile, which a fork or a killed
greenlet leaves locked. It is one command each, so it is sent as all others are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from redis.crc import key_slot

from .clock import now_ns
from .connections import Connections
from .failures import Nowhere, code_of, is_known, is_passing, is_read_only, words_of

Address: TypeAlias = tuple[str, int]

_SLOTS = 16384
# Seconds within which one MOVED is a slot's own business; after that the whole map is asked for.
_SETTLED = 1.0
# Seconds that the sentinels' word is taken for. A failover that was asked for leaves the old primary
# taking writes, all of them lost, for some ten seconds more, and breaks no connection meanwhile.
_TRUST = 1.0


class Servers(Protocol):
    """One or more servers, each with connections of its own."""

    def of(self, key: bytes, /) -> Connections:
        """Return the connections to the primary that has a key.

        :raise Nowhere: if nobody says which one that is.
        """

    def known(self, key: bytes, /) -> Connections | None:
        """Return the same, if that needs no asking."""

    def heard(self, error: Exception, server: Connections, key: bytes, /) -> Connections | None:
        """Take in what a call ended in, and return where it has to go instead, if the server said so."""

    def doubt(self, server: Connections, /) -> bool:
        """Look again which server has what, and tell whether it may be another one by now."""


class _Word(NamedTuple):
    """What one sentinel says of the primary."""

    sentinel: Connections
    #: The number of the last failover that it has heard of, and whether it names what that one promoted
    #: before it is over.
    failover: tuple[int, bool]
    address: Address
    #: Why the address is not to be used, if so.
    fault: str


class Sentinels:
    """The primary of one service, as sentinels name it.

    They are asked again once a second, and whenever a call fails in a way that
    may come from a failover; as long as they name the same server its connections
    stay.

    :param sentinels: connections to each.
    :param service: the name of the service.
    :param primary: makes connections to an address.
    :param others: how many other sentinels one must see to be believed.
    :param seconds: after so long no further sentinel is asked.
    """

    def __init__(
        self,
        sentinels: Iterable[Connections],
        service: str,
        primary: Callable[[str, int], Connections],
        others: int,
        seconds: float,
    ) -> None:
        self._sentinels = list(sentinels)
        self._service = service.encode()
        self._make = primary
        self._others = others
        self._seconds = seconds
        self._first = self._sentinels[0]
        self._last: tuple[Address, Connections] | None = None
        # The failover that the last primary was named by, and whether one that came after it was told of.
        self._failover = (0, False)
        self._behind = False
        self._sure = False
        self._doubted = False
        self._due = 0.0

    def of(self, _key: bytes) -> Connections:
        """Return the connections to the primary.

        :raise Nowhere: if no sentinel names one.
        """
        last = self._last
        if last is None or not self._sure:
            return self._find()
        now = _now()
        if now < self._due:
            return last[1]
        # One request asks, and if nobody answers, no other one for a while: the primary may be well.
        self._due = now + 10 * _TRUST
        try:
            return self._find()
        except Nowhere:
            if self._behind:
                self._sure = False
                raise
            return last[1]
        except BaseException:
            self._due = 0.0  # a greenlet that is killed while it asks leaves that to the next one
            raise

    def known(self, _key: bytes) -> Connections | None:
        """Return the connections to the primary, if it was found before."""
        return self._last and self._last[1]

    def heard(self, error: Exception, server: Connections, _key: bytes) -> None:
        """Ask the sentinels before the next call, if what was heard may mean a failover."""
        if is_read_only(error):
            server.drop()
        if is_passing(error):
            self._sure = False

    def doubt(self, _server: Connections) -> bool:
        """Ask all sentinels before the next call: one that was the last to hear of a failover is as wrong."""
        self._sure, self._doubted = False, True
        return True

    def _find(self) -> Connections:
        begun = _now()
        everybody, self._doubted = self._doubted, False
        said: list[_Word] = []
        heard: list[str] = []
        passing = False
        for sentinel in sorted(self._sentinels, key=lambda each: each is not self._first):
            if (said or heard) and _now() - begun > self._seconds:
                break
            try:
                said.append(self._word_of(sentinel))
            except Exception as error:
                if not is_known(error):
                    raise
                heard.append(f"{sentinel}: {words_of(error)}")
                passing = passing or is_passing(error)
            else:
                if not everybody and not max(said, key=_weight).fault:
                    break
        if said:
            # The last failover's word counts, though that primary be down: whoever has not heard of it names
            # the one before, which takes writes that will be lost.
            best = max(said, key=_weight)
            if not best.fault:
                self._first, self._failover = best.sentinel, best.failover
                return self._settle(best.address)
            self._behind = best.failover > self._failover
            passing = True
            heard += [f"{each.sentinel}: {each.fault or 'it has not heard of a failover'}" for each in said]
        named = self._service.decode(errors="replace")
        raise Nowhere(f"no sentinel names a primary of {named}: {'; '.join(heard)}", passing=passing)

    def _word_of(self, sentinel: Connections) -> _Word:
        _, reply = sentinel.ask((b"SENTINEL", b"MASTER", self._service), self._is_state)
        state = _paired(reply)
        address = [state[b"ip"], state[b"port"]]
        flags = state[b"flags"].split(b",")
        promoted = False
        if b"failover_in_progress" in flags:
            # The sentinel that leads a failover counts it as soon as the new primary is there, but shows the
            # old one, and how that is, until all replicas follow. Clients are to go to the new one meanwhile.
            _, current = sentinel.ask((b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service), _is_address)
            promoted = current != address
            address = current
        fault = ""
        if not promoted and not {b"s_down", b"o_down", b"disconnected"}.isdisjoint(flags):
            fault = f"the primary is {state[b'flags'].decode()}"
        elif int(state.get(b"num-other-sentinels", 0)) < self._others:
            fault = "it sees too few other sentinels"
        failover = (int(state.get(b"config-epoch", 0)), promoted)
        return _Word(sentinel, failover, (address[0].decode(), int(address[1])), fault)

    def _settle(self, address: Address) -> Connections:
        last = self._last
        if last is None or last[0] != address:
            if last is not None:
                last[1].drop()
            last = self._last = (address, self._make(*address))
        self._sure, self._behind = True, False
        self._due = _now() + _TRUST
        return last[1]

    def _is_state(self, reply: Any) -> bool:
        if not isinstance(reply, (list, dict)):
            return False
        state = _paired(reply)
        return state.get(b"name") == self._service and {b"flags", b"ip", b"port"} <= state.keys()


class Cluster:
    """A cluster's primaries, by the slot of a key.

    The map of slots is asked for when there is none, when a node does not answer, by the request
    that it did not answer, and at times when a node sends a request elsewhere. Requests for other
    slots never wait for that.

    :param seeds: where to ask first.
    :param node: makes connections to an address.
    :param remap: turns an address that nodes tell into one that can be reached from here.
    :param seconds: after so long no further node is asked.
    """

    def __init__(
        self,
        seeds: Sequence[Address],
        node: Callable[[str, int], Connections],
        remap: Callable[[str, int], Address],
        seconds: float,
    ) -> None:
        self._make = node
        self._remap = remap
        self._seconds = seconds
        self._seeds = {address: node(*address) for address in seeds}
        self._nodes = dict(self._seeds)
        self._owners: list[Connections | None] = [None] * _SLOTS
        self._asked = 0.0

    def of(self, key: bytes) -> Connections:
        """Return the connections to the primary of a key's slot.

        :raise Nowhere: if no node says which one that is.
        """
        owner = self._owners[key_slot(key)]
        if owner is None:
            heard = self._ask()
            owner = self._owners[key_slot(key)]
            if owner is None:
                raise heard or Nowhere(f"slot {key_slot(key)} is not covered by the cluster")
        return owner

    def known(self, key: bytes) -> Connections | None:
        """Return the connections to the primary of a key's slot, if it was found before."""
        return self._owners[key_slot(key)]

    def heard(self, error: Exception, server: Connections, key: bytes) -> Connections | None:
        """Follow a node that sends elsewhere; ask the others for the map if one does not answer."""
        code = code_of(error)
        if code in {"MOVED", "ASK"}:
            host, _, port = str(error).rpartition(" ")[2].rpartition(":")
            node = self._node(self._address(host, int(port), server))
            if code == "MOVED":
                # Not each time, while slots move one by one.
                if _now() - self._asked > _SETTLED:
                    self._ask(first=node, last=server)
                self._owners[key_slot(key)] = node
            return node
        if is_passing(error):
            self._ask(last=server)
        return None

    def doubt(self, server: Connections) -> bool:
        """Ask the others for the map."""
        self._ask(last=server)
        return True

    def _ask(self, *, first: Connections | None = None, last: Connections | None = None) -> Nowhere | None:
        """Ask node after node for the map of slots; the newest answer counts.

        Nobody holds a lock: two requests that ask at once both get an answer as good as the other's.
        """
        self._asked = begun = _now()
        # Each node once, a healthy one soon, whoever else is down.
        nodes = random.sample(list(self._nodes.values()), len(self._nodes))
        nodes.sort(key=lambda node: (node is last, node is not first))
        heard: list[str] = []
        passing = False
        for node in nodes:
            if heard and _now() - begun > self._seconds:
                break
            try:
                _, reply = node.ask((b"CLUSTER", b"SLOTS"), _is_map)
            except Exception as error:
                if not is_known(error):
                    raise
                heard.append(f"{node}: {words_of(error)}")
                passing = passing or is_passing(error)
            else:
                self._learn(reply, node)
                return None
        return Nowhere(f"no node tells the slots of the cluster: {'; '.join(heard)}", passing=passing)

    def _learn(self, ranges: list[Any], source: Connections) -> None:
        owners: list[Connections | None] = [None] * _SLOTS
        told = dict(self._seeds)
        for first, last, *nodes in ranges:
            addresses = [
                self._address(b"" if node[0] is None else node[0], int(node[1]), source) for node in nodes
            ]
            told |= {address: self._nodes.get(address) or self._make(*address) for address in addresses}
            owners[first : last + 1] = [told[addresses[0]]] * (last + 1 - first)
        # What is told no more closes its connections when the last request is through with it.
        self._nodes = told
        self._owners = owners

    def _node(self, address: Address) -> Connections:
        node = self._nodes.get(address)
        if node is None:
            node = self._nodes[address] = self._make(*address)
        return node

    def _address(self, host: bytes | str, port: int, source: Connections) -> Address:
        name = host.decode() if isinstance(host, bytes) else host
        # A node that does not know its own address leaves it to whoever reached it.
        return self._remap(source.host if name in {"", "?"} else name, port)


def _now() -> float:
    return now_ns() / 1e9


def _weight(word: _Word) -> tuple[tuple[int, bool], bool]:
    return word.failover, not word.fault


def _is_address(reply: Any) -> bool:
    return isinstance(reply, list) and len(reply) == 2 and all(isinstance(each, bytes) for each in reply)


def _is_map(reply: Any) -> bool:
    return (
        isinstance(reply, list)
        and bool(reply)
        and all(isinstance(each, list) and len(each) > 2 and isinstance(each[2], list) for each in reply)
    )


def _paired(reply: Any) -> dict[Any, Any]:
    return reply if isinstance(reply, dict) else dict(zip(reply[::2], reply[1::2], strict=False))
