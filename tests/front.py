"""Proxies before a whole cluster, or before sentinels and the servers that they watch.

Nodes and sentinels tell clients where the others are, and so lead them past a
proxy. Here each of them has a proxy of its own, one set of rules and counts holds
for all of them, and wherever a server is told of, its proxy is told in its place::

    with Front(cluster) as front:
        rule = front.drop_reply(is_commit)
        ...  # by front.url the next commit, whichever node gets it, loses its reply
"""

from __future__ import annotations

from contextlib import ExitStack

from .proxy import Proxy
from .servers import ClusterTopology, SentinelTopology


class Front(Proxy):
    """One proxy for each server, all of them as one."""

    def __init__(self, topology: ClusterTopology | SentinelTopology) -> None:
        first, *rest = topology.everyone
        super().__init__(first.socket_path)
        self._others = [Proxy(each.socket_path, like=self) for each in rest]
        self.ports |= {first.port: self.port}
        self.ports |= {each.port: other.port for each, other in zip(rest, self._others, strict=True)}
        self._url = topology.url
        for port, mine in self.ports.items():
            self._url = self._url.replace(f":{port}", f":{mine}")

    @property
    def url(self) -> str:
        """The URL for luasession."""
        return self._url

    def refuse(self) -> None:
        """Close all connections to all servers, and have the system refuse new ones."""
        for each in self._others:
            each.refuse()
        super().refuse()

    def accept(self) -> None:
        """Listen before each server, at first or again after :meth:`refuse`."""
        for each in self._others:
            each.accept()
        super().accept()

    def disconnect(self) -> None:
        """Close all connections; new ones are welcome."""
        for each in self._others:
            each.disconnect()
        super().disconnect()

    def close(self) -> None:
        """End all connections and threads, and raise the first error that one of them met."""
        with ExitStack() as stack:
            for each in self._others:
                stack.callback(each.close)
            super().close()
