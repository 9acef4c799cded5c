"""What is done to servers under load, and undone: each fault alone, or a random mix of them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import redis

from .proxy import Predicate, Proxy, anything
from .servers import (
    ClusterTopology,
    SentinelTopology,
    Server,
    cluster,
    eventually,
    sentinel,
    standalone,
)

#: Slots that move at a time.
SLOTS = 2000


@dataclass
class World:
    """The servers under load, and what has been done to them."""

    topology: Server | ClusterTopology | SentinelTopology
    #: Between the app and a server alone.
    proxy: Proxy | None
    random: random.Random
    stop: threading.Event = field(default_factory=threading.Event)
    #: From when to when a replica took over.
    failovers: list[tuple[float, float]] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)
    #: How long a hung server hangs, in seconds.
    hang: float = 3.0

    @property
    def name(self) -> str:
        return {Server: "standalone", ClusterTopology: "cluster", SentinelTopology: "sentinel"}[
            type(self.topology)
        ]

    @property
    def url(self) -> str:
        return self.proxy.url if self.proxy else self.topology.url

    def say(self, words: str) -> None:
        self.events.append((time.monotonic(), words))

    def primaries(self) -> list[Server]:
        """Return the servers that take writes, in no order."""
        if isinstance(self.topology, Server):
            return [self.topology]
        if isinstance(self.topology, SentinelTopology):
            return [self.topology.primary]
        return [server for server, slots in _owners(self.topology) if slots]

    def replicas_of(self, primary: Server) -> list[Server]:
        if isinstance(self.topology, SentinelTopology):
            return [server for server in self.topology.servers if server is not primary]
        assert isinstance(self.topology, ClusterTopology)
        name = self.topology.node_id(primary)
        ports = {int(f[1].split("@")[0].rpartition(":")[2]) for f in _nodes(self.topology) if f[3] == name}
        return [server for server in self.topology.servers if server.port in ports]

    def victim(self) -> Server:
        """Return a primary that a replica can replace."""
        return self.random.choice([each for each in self.primaries() if self.replicas_of(each)])

    @contextmanager
    def failing_over(self, words: str) -> Iterator[None]:
        began = time.monotonic()
        self.say(words)
        yield
        assert not isinstance(self.topology, Server)
        self.topology.settle()
        self.failovers.append((began, time.monotonic()))
        self.say("settled")


def _nodes(topology: ClusterTopology) -> list[list[str]]:
    with topology.alive()[0].client() as client:
        client.response_callbacks.clear()
        lines = client.execute_command("CLUSTER NODES").decode().splitlines()
    return [line.split() for line in lines]


def _owners(topology: ClusterTopology) -> list[tuple[Server, list[int]]]:
    """Return the primaries and their slots."""
    by_port = {server.port: server for server in topology.servers}
    owners = []
    for fields in _nodes(topology):
        if "master" in fields[2] and "fail" not in fields[2]:
            slots: list[int] = []
            for part in fields[8:]:
                if not part.startswith("["):
                    first, _, last = part.partition("-")
                    slots += range(int(first), int(last or first) + 1)
            owners.append((by_port[int(fields[1].split("@")[0].rpartition(":")[2])], slots))
    return owners


# -- what breaks no server -------------------------------------------------


def scripts(world: World) -> None:
    """Flush the scripts of all primaries, every 50 ms."""
    servers = world.primaries()
    flushed = 0
    while not world.stop.wait(0.05):
        for server in servers:
            with suppress(redis.RedisError), server.client() as client:
                flushed += bool(client.script_flush())
    world.say(f"flushed the scripts {flushed} times")


def connections(world: World) -> None:
    """Kill all connections of clients to all primaries, every 100 ms."""
    servers = world.primaries()
    killed = 0
    while not world.stop.wait(0.1):
        for server in servers:
            with suppress(redis.RedisError), server.client() as client:
                for each in client.client_list("normal"):
                    # Without theirs the sentinels would take it for dead.
                    if not each["name"].startswith("sentinel-"):
                        killed += client.execute_command("CLIENT", "KILL", "ID", each["id"])
    world.say(f"killed {killed} connections")


def drops(world: World) -> None:
    """Lose one in twenty replies, after execution."""
    assert world.proxy
    _ruled(world, [world.proxy.drop_reply(_one_in(20, world.random), times=None)])


def cuts(world: World) -> None:
    """Cut one in twenty replies off after some bytes."""
    assert world.proxy
    _ruled(
        world,
        [world.proxy.truncate_reply(nbytes, _one_in(60, world.random), times=None) for nbytes in (1, 12, 60)],
    )


def crossed(world: World) -> None:
    """Give one in twenty requests the reply that another connection got."""
    assert world.proxy
    _ruled(world, [world.proxy.cross_reply(_one_in(20, world.random), times=None)])


def _one_in(n: int, generator: random.Random) -> Predicate:
    return lambda words: anything(words) and generator.randrange(n) == 0


def _ruled(world: World, rules: list[Any]) -> None:
    world.stop.wait()
    for rule in rules:
        rule.stop()
    world.say(f"{rules[0].action} {sum(rule.done for rule in rules)} replies")


def memory(world: World) -> None:
    """Have the primaries out of memory, for half a second each second."""
    while not world.stop.wait(0.5):
        for limit in (1, 0):
            for server in world.primaries():
                with server.client() as client:
                    client.config_set("maxmemory", limit)
            if limit:
                world.say("out of memory")
                world.stop.wait(0.5)


def read_only(world: World) -> None:
    """Make the primary a replica of nobody, for half a second each second."""
    server = world.primaries()[0]
    with server.client() as client:
        while not world.stop.wait(0.5):
            world.say("read-only")
            client.execute_command("REPLICAOF", "127.0.0.1", "1")
            world.stop.wait(0.5)
            client.execute_command("REPLICAOF", "NO", "ONE")


# -- what a replica replaces -----------------------------------------------


def kill(world: World) -> None:
    """Kill a primary; when its replica is promoted, the old one comes back as a replica."""
    while not world.stop.wait(0.3):
        victim = world.victim()
        with world.failing_over(f"killed {victim.port}"):
            victim.kill()
            _bring_back(world, victim)


def cut_off(world: World) -> None:
    """Cut a primary off its replicas, and kill it half a second later."""
    while not world.stop.wait(0.3):
        victim = world.victim()
        with world.failing_over(f"cut off {victim.port}"):
            with victim.client() as client:
                client.execute_command("ACL", "SETUSER", "default", "-psync", "-sync", "-replconf")
                client.execute_command("CLIENT", "KILL", "TYPE", "replica")
            time.sleep(0.5)
            world.say(f"killed {victim.port}")
            victim.kill()
            _bring_back(world, victim)


def hang(world: World) -> None:
    """Stop a primary for three seconds; it comes back as what it was, or as a replica."""
    while not world.stop.wait(0.3):
        if isinstance(world.topology, Server):
            world.say("hung")
            world.topology.pause()
            world.stop.wait(world.hang)
            world.topology.resume()
            world.say("back")
            continue
        victim = world.victim()
        with world.failing_over(f"hung {victim.port}"):
            victim.pause()
            time.sleep(world.hang)
            victim.resume()
            world.say(f"back {victim.port}")
            # It was replaced, or it was not; the sentinels would tell it some ten seconds later.
            if isinstance(world.topology, SentinelTopology):
                time.sleep(1)
                if (new := world.topology.primary) is not victim:
                    with victim.client() as client:
                        client.execute_command("REPLICAOF", "127.0.0.1", new.port)


def _bring_back(world: World, victim: Server) -> None:
    topology = world.topology
    if isinstance(topology, SentinelTopology):
        if not eventually(lambda: topology.primary is not victim, 30):
            raise RuntimeError(f"nobody is promoted:\n{topology.sentinels[0].log()}")
        promoted = topology.primary
        topology.bring_back(victim)
        if topology.primary is not promoted:
            world.say(f"{promoted.port} was promoted, and {topology.primary.port} in its place")
    else:

        def replaced() -> bool:
            # Not as soon as it is given up: come back before another one has its slots, it would have
            # them again, and be empty.
            owners = _owners(topology)
            return sum(len(slots) for server, slots in owners if server is not victim) == 16384

        if not eventually(replaced, 30):
            raise RuntimeError(f"nobody is promoted:\n{topology.alive()[0].log()}")
        victim.restart()  # it finds its place by what it knows of the cluster


# -- slots on the move -----------------------------------------------------


def reshard(world: World) -> None:
    """Move 2,000 slots to a new primary or an existing one, slot by slot."""
    for source, target, slots in _moves(world):
        moved = _move(world, source, target, slots)
        world.say(f"moved {moved} slots from {source.port} to {target.port}")


def migrate(world: World) -> None:
    """Move 2,000 slots as a whole, by the servers' own atomic migration."""
    for source, target, slots in _moves(world):
        assert isinstance(world.topology, ClusterTopology)
        with source.client() as client:
            name = world.topology.node_id(target)
            client.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slots[0], slots[-1], "NODE", name)

            def state(client: redis.Redis = client) -> str:
                text = repr(client.execute_command("CLUSTER", "GETSLOTMIGRATIONS")[0])
                return next((word for word in ("success", "failed", "canceled") if f"b'{word}'" in text), "")

            world.say(f"migration of {len(slots)} slots: {eventually(state, 60)}")


def _moves(world: World) -> Iterator[tuple[Server, Server, list[int]]]:
    """Give the next move until it is time to stop: first to the new primary, then back, and so on."""
    topology = world.topology
    assert isinstance(topology, ClusterTopology)
    while not world.stop.wait(0.1):
        owners = [(server, slots) for server, slots in _owners(topology)]
        source, slots = max(owners, key=lambda pair: len(pair[1]))
        others = [server for server, _ in owners if server is not source]
        target = topology.spare if world.random.random() < 0.5 else world.random.choice(others)
        if target is source:
            continue
        runs: list[list[int]] = []
        for slot in slots:
            if runs and runs[-1][-1] == slot - 1:
                runs[-1].append(slot)
            else:
                runs.append([slot])
        yield source, target, max(runs, key=len)[:SLOTS]
        topology.settle()


def _move(world: World, source: Server, target: Server, slots: list[int]) -> int:
    assert isinstance(world.topology, ClusterTopology)
    source_id, target_id = world.topology.node_id(source), world.topology.node_id(target)
    with source.client() as here, target.client() as there:
        for number, slot in enumerate(slots):
            if world.stop.is_set():
                return number
            there.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            here.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            while found := here.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 100):
                here.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *found)
            for client in (there, here):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    return len(slots)


# -- which there are -------------------------------------------------------

Fault = Callable[[World], None]

#: Faults by topology and name.
FAULTS: dict[str, dict[str, Fault]] = {
    "standalone": {
        "scripts": scripts,
        "connections": connections,
        "drops": drops,
        "cuts": cuts,
        "crossed": crossed,
        "hang": hang,
        "memory": memory,
        "read-only": read_only,
    },
    "cluster": {
        "kill": kill,
        "cut-off": cut_off,
        "hang": hang,
        "reshard": reshard,
        "migrate": migrate,
        "scripts": scripts,
        "connections": connections,
        "memory": memory,
    },
    "sentinel": {
        "kill": kill,
        "cut-off": cut_off,
        "hang": hang,
        "scripts": scripts,
        "connections": connections,
        "memory": memory,
    },
}
# What is done beside another fault.
_NOISE = ("scripts", "connections", "drops", "cuts", "crossed")


def mix(world: World) -> None:
    """One fault after another, each for some seconds, half of them with a second one beside."""
    faults = FAULTS[world.name]
    while not world.stop.wait(0.2):
        names = [world.random.choice(list(faults))]
        noise = [name for name in _NOISE if name in faults and name != names[0]]
        if world.random.random() < 0.5:
            names.append(world.random.choice(noise))
        world.say(f"mix: {' and '.join(names)}")
        until = threading.Event()
        errors: list[BaseException] = []
        threads = [_start(world, faults[name], until, errors) for name in names]
        world.stop.wait(world.random.uniform(1, 4))
        until.set()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


def _start(
    world: World, fault: Fault, until: threading.Event, errors: list[BaseException]
) -> threading.Thread:
    own = World(
        world.topology,
        world.proxy,
        random.Random(world.random.random()),
        until,
        world.failovers,
        world.events,
        world.hang,
    )

    def run() -> None:
        try:
            fault(own)
        except BaseException as error:  # noqa: BLE001 - raised again by who waits for the thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@contextmanager
def injecting(world: World, name: str) -> Iterator[None]:
    """Do a fault during the block, ``mix`` for a mix and ``none`` for none; leave all well behind."""
    if name == "none":
        yield
        return
    errors: list[BaseException] = []
    fault = mix if name == "mix" else FAULTS[world.name][name]
    thread = _start(world, fault, world.stop, errors)
    try:
        yield
    finally:
        world.stop.set()
        thread.join()
    if not isinstance(world.topology, Server):
        world.topology.settle()
    if errors:
        raise errors[0]


@contextmanager
def world_of(topology: str, kind: str, seed: int) -> Iterator[World]:
    """Run servers for the block: ``standalone``, ``cluster`` or ``sentinel``."""
    generator = random.Random(seed)
    if topology == "cluster":
        with cluster(kind) as many:
            yield World(many, None, generator)
    elif topology == "sentinel":
        with sentinel(kind) as watched:
            yield World(watched, None, generator)
    else:
        with standalone(kind) as one, Proxy(one.socket_path) as proxy:
            yield World(one, proxy, generator)
