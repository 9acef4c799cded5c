"""A TCP proxy that loses, delays and cuts replies on demand.

It stands between a client and a real server and knows just enough of the Redis
protocol to see whole requests and whole replies and to tell which reply answers
which request, pipelines included. A test gives it a rule and then sees what its
client makes of it::

    with Proxy(server.socket_path) as proxy:
        rule = proxy.drop_reply(when=command("EVALSHA"))
        ...  # the next EVALSHA is executed, and its client never hears of it
        assert rule.done == 1
"""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, BinaryIO, Self, TypeAlias

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

#: Tells from the words of a request whether a rule is meant for it.
Predicate: TypeAlias = "Callable[[list[bytes]], bool]"
#: Where the server is: host and port, or the path of a unix socket.
Address: TypeAlias = "tuple[str, int] | str"

# Seconds that a thread may take to end.
_PATIENCE = 5.0
# What a client sends by itself when it opens a connection.
_SETUP = {b"HELLO", b"AUTH", b"CLIENT", b"SELECT"}


def anything(words: list[bytes]) -> bool:
    """Match all requests but those with which a client sets its connection up."""
    return words[0].upper() not in _SETUP


def command(*names: str) -> Predicate:
    """Match requests by the name of their command."""
    wanted = {name.upper().encode() for name in names}
    return lambda words: words[0].upper() in wanted


@dataclass(eq=False)
class Rule:
    """What is to happen to some requests or their replies; the proxy's methods make them."""

    #: One of the words that :attr:`Proxy.counts` counts.
    action: str
    when: Predicate
    #: How many more requests it is for; None: all.
    remaining: int | None
    #: How often it has done what it says.
    done: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    hook: Callable[[], object] | None = None

    def stop(self) -> None:
        """Match no further request."""
        self.remaining = 0


class Proxy:
    """A proxy on a free loopback port, listening until the end of its ``with`` block.

    Of all rules that match a request the oldest one gets it, and only that. A rule
    is used up when its request comes in, not when it takes effect. Predicates must
    not wait for anything; hooks may. What one of them raises is raised again at the
    end of the block.

    :param like: another proxy, whose rules and counts hold for both of them.
    """

    def __init__(self, upstream: Address, like: Proxy | None = None) -> None:
        self.upstream = upstream
        #: The port that clients connect to.
        self.port = 0
        #: How often what was done: ``connections``, ``requests``, ``replies``, and the
        #: actions ``dropped``, ``delayed``, ``truncated``, ``crossed``, ``cut``.
        self.counts: Counter[str] = Counter()
        #: Ports of servers, as other servers tell them, and what clients are told instead.
        self.ports: dict[int, int] = {}
        self._rules: list[Rule] = []
        self._links: set[_Link] = set()
        # The last reply to each kind of command, and who got it.
        self._last: dict[tuple[bytes, ...], tuple[_Link, bytes]] = {}
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()
        if like is not None:
            self.counts, self.ports, self._rules = like.counts, like.ports, like._rules
            self._last, self._errors, self._lock = like._last, like._errors, like._lock
        self._listener = self._bind()
        self._acceptor: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    # Rules. ``times`` is how many requests they are for, None all.

    def drop_reply(
        self,
        when: Predicate = anything,
        *,
        times: int | None = 1,
        before_drop: Callable[[], object] | None = None,
    ) -> Rule:
        """Let the server execute the request, lose its reply, and close the connection.

        :param before_drop: called when the server has replied and the client knows
            nothing yet. Requests that the client had pipelined behind may have been
            executed too, or not.
        """
        return self._add(Rule("dropped", when, times, hook=before_drop))

    def delay_reply(self, seconds: float, when: Predicate = anything, *, times: int | None = 1) -> Rule:
        """Hold the reply back, and all later ones of the same connection."""
        return self._add(Rule("delayed", when, times, seconds=seconds))

    def truncate_reply(self, nbytes: int, when: Predicate = anything, *, times: int | None = 1) -> Rule:
        """Send the first bytes of the reply, and close the connection."""
        return self._add(Rule("truncated", when, times, nbytes=nbytes))

    def cross_reply(self, when: Predicate = anything, *, times: int | None = 1) -> Rule:
        """Give the reply that another connection last got to a command of this kind, and lose the own one.

        It is as with a connection that has lost step. While there is no such reply the own one is given.
        """
        return self._add(Rule("crossed", when, times))

    def cut_request(self, when: Predicate = anything, *, times: int | None = 1) -> Rule:
        """Close the connection instead of forwarding the request.

        Replies to earlier requests that are still on their way are lost with it.
        """
        return self._add(Rule("cut", when, times))

    def drop_every(
        self, n: int, when: Predicate = anything, *, generator: random.Random | None = None
    ) -> Rule:
        """Drop the reply of each n-th matching request, of all connections together.

        :param generator: draws instead, with a chance of one in n.
        """
        matching = 0

        def is_due(words: list[bytes]) -> bool:
            nonlocal matching
            if not when(words):
                return False
            matching += 1
            return generator.randrange(n) == 0 if generator else matching % n == 0

        return self._add(Rule("dropped", is_due, None))

    def clear(self) -> None:
        """Forget all rules."""
        with self._lock:
            self._rules.clear()

    # Connections.

    def refuse(self) -> None:
        """Close all connections, and have the system refuse new ones (ECONNREFUSED)."""
        acceptor, self._acceptor = self._acceptor, None
        if acceptor is not None:
            # Closing a listener does not wake up who waits on it; a last connection does.
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), _PATIENCE):
                acceptor.join(_PATIENCE)
            self._listener.close()
            # Bound but not listening: nobody else gets the port meanwhile.
            self._listener = self._bind()
        self.disconnect()

    def accept(self) -> None:
        """Listen, at first or again after :meth:`refuse`."""
        if self._acceptor is None:
            self._listener.listen()
            self._acceptor = threading.Thread(target=self._accept_all, daemon=True)
            self._acceptor.start()

    def disconnect(self) -> None:
        """Close all connections; new ones are welcome."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()
        for link in links:
            link.join()

    def close(self) -> None:
        """End all connections and threads, and raise the first error that one of them met."""
        self.refuse()
        self._listener.close()
        if self._errors:
            raise self._errors[0]

    # What the threads call.

    def _add(self, rule: Rule) -> Rule:
        with self._lock:
            self._rules.append(rule)
        return rule

    def _claim(self, words: list[bytes]) -> Rule | None:
        """Find the rule for a request, and use it up."""
        with self._lock:
            self.counts["requests"] += 1
            for rule in self._rules:
                if rule.remaining != 0 and rule.when(words):
                    if rule.remaining is not None:
                        rule.remaining -= 1
                    return rule
        return None

    def _count(self, what: str, rule: Rule | None = None) -> None:
        with self._lock:
            self.counts[what] += 1
            if rule is not None:
                rule.done += 1

    def _retell(self, reply: bytes, kind: tuple[bytes, ...]) -> bytes:
        """Put proxies in the place of the servers that a node or a sentinel tells of."""
        if kind[:1] in {(b"CLUSTER",), (b"SENTINEL",)} or reply.startswith((b"-MOVED ", b"-ASK ")):
            for port, mine in self.ports.items():
                # A number, or the end of a redirection; or a text.
                reply = reply.replace(b":%d\r\n" % port, b":%d\r\n" % mine)
                reply = reply.replace(_text(port), _text(mine))
        return reply

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)

    def _forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _bind(self) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        return listener

    def _accept_all(self) -> None:
        me = threading.current_thread()
        while True:
            client, _ = self._listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._acceptor is not me:
                client.close()
                return
            try:
                server = _connect(self.upstream)
            except OSError:  # the server is down: so are we
                client.close()
                continue
            link = _Link(self, client, server)
            with self._lock:
                self.counts["connections"] += 1
                self._links.add(link)
            link.start()


class _Link:
    """One client's connection, its connection to the server, and a thread for each direction."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        # One entry for each forwarded request whose reply is due: its rule, if any, and its kind.
        self._due: SimpleQueue[tuple[Rule | None, tuple[bytes, ...]]] = SimpleQueue()
        self._closed = threading.Event()
        self._requests = threading.Thread(target=self._run, daemon=True)
        self._replies = threading.Thread(target=self._guarded, args=(self._forward_replies,), daemon=True)

    def start(self) -> None:
        self._requests.start()

    def close(self) -> None:
        """End both connections, which wakes up both threads."""
        self._closed.set()
        for connection in (self._client, self._server):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        # A hook may close all connections, the one that it was called for included.
        if threading.current_thread() is not self._replies:
            self._requests.join(_PATIENCE)

    def _run(self) -> None:
        with self._client, self._server:
            self._replies.start()
            self._guarded(self._forward_requests)
            self._replies.join()
        self._proxy._forget(self)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError:
            pass  # one side has gone, and the other follows
        except Exception as e:  # noqa: BLE001 - from a predicate; close() raises it again
            self._proxy._fail(e)
        finally:
            self.close()

    def _forward_requests(self) -> None:
        with self._client.makefile("rb") as stream:
            while (request := read_request(stream)) is not None:
                raw, words = request
                if words:  # to an empty request there is no reply
                    rule = self._proxy._claim(words)
                    if rule is not None and rule.action == "cut":
                        self._proxy._count("cut", rule)
                        return
                    # Which script, too.
                    self._due.put((rule, tuple(words[: 2 if words[0].startswith(b"EVAL") else 1])))
                self._server.sendall(raw)

    def _forward_replies(self) -> None:
        with self._server.makefile("rb") as stream:
            while (reply := read_frame(stream)) is not None:
                if reply.startswith(b">"):  # a push message of RESP3 answers nothing
                    self._client.sendall(reply)
                    continue
                self._proxy._count("replies")
                if not self._deliver(reply, *self._next_rule()):
                    return

    def _next_rule(self) -> tuple[Rule | None, tuple[bytes, ...]]:
        try:
            return self._due.get_nowait()
        except Empty:
            return None, ()  # one more answer to the same request, as SUBSCRIBE gives them

    def _deliver(self, reply: bytes, rule: Rule | None, kind: tuple[bytes, ...]) -> bool:
        """Do with a reply as its rule says; tell whether the connection goes on.

        What was done is counted before the client can notice it.
        """
        reply = self._proxy._retell(reply, kind)
        others = self._proxy._last.get(kind)
        self._proxy._last[kind] = (self, reply)
        if rule is not None and rule.action == "crossed" and (others is None or others[0] is self):
            rule = None
        if rule is None:
            self._client.sendall(reply)
            return True
        if rule.action == "crossed" and others is not None:
            self._proxy._count("crossed", rule)
            self._client.sendall(others[1])
            return True
        if rule.action == "dropped":
            self._call(rule.hook)
            self._proxy._count("dropped", rule)
            return False
        self._proxy._count(rule.action, rule)
        if rule.action == "truncated":
            self._client.sendall(reply[: rule.nbytes])
            return False
        self._closed.wait(rule.seconds)
        self._client.sendall(reply)
        return True

    def _call(self, hook: Callable[[], object] | None) -> None:
        try:
            if hook is not None:
                hook()
        except BaseException as e:  # noqa: BLE001 - pytest.fail() too; close() raises it again
            self._proxy._fail(e)


def _text(number: int) -> bytes:
    """Return a number as the text that it may be in a reply."""
    digits = b"%d" % number
    return b"$%d\r\n%b\r\n" % (len(digits), digits)


def _connect(address: Address) -> socket.socket:
    if isinstance(address, str):
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(address)
        except OSError:
            connection.close()
            raise
        return connection
    connection = socket.create_connection(address)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class _TruncatedError(ConnectionError):
    """The connection ended inside a request or a reply."""


def read_request(stream: BinaryIO) -> tuple[bytes, list[bytes]] | None:
    """Read one request; return its bytes and its words, or None at the end."""
    head = _read_line(stream)
    if head is None:
        return None
    if not head.startswith(b"*"):  # an inline command, typed by hand
        return head, head.split()
    raw, words = [head], []
    for _ in range(int(head[1:])):
        frame = _read_frame(stream)
        raw.append(frame)
        words.append(frame[frame.index(b"\r\n") + 2 : -2])
    return b"".join(raw), words


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read one whole reply, of RESP2 or RESP3; return its bytes, or None at the end."""
    head = _read_line(stream)
    return None if head is None else _rest_of_frame(head, stream)


def _read_frame(stream: BinaryIO) -> bytes:
    frame = read_frame(stream)
    if frame is None:
        raise _TruncatedError
    return frame


def _rest_of_frame(head: bytes, stream: BinaryIO) -> bytes:
    kind = head[:1]
    if kind not in b"$!=*~>%|":
        return head  # all is said in one line
    size = int(head[1:])
    if size < 0:
        return head  # the null of RESP2
    if kind in b"$!=":
        body = stream.read(size + 2)
        if len(body) < size + 2:
            raise _TruncatedError
        return head + body
    parts = size * 2 if kind in b"%|" else size
    # Attributes come before the reply that they belong to.
    parts += kind == b"|"
    return head + b"".join(_read_frame(stream) for _ in range(parts))


def _read_line(stream: BinaryIO) -> bytes | None:
    line = stream.readline()
    if not line:
        return None
    if not line.endswith(b"\r\n"):
        raise _TruncatedError
    return line
