"""Guarantees on a cluster and behind Sentinel: the tests of a single server, run once more on each of them.

The fixtures below stand in for the ones of the same names that the tests were written for. All tests of
all guarantees run on the embedded default, save what :data:`LEFT_OUT` names; on the other kinds, whose
clusters and sentinels are slow to test, run the few of :data:`ON_EVERY_KIND`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import pytest
from flask import session

from . import (
    test_g1_disjoint_keys,
    test_g2_readers_never_write,
    test_g3_same_key,
    test_g4_atomic_repeatable,
    test_g5_versions,
    test_g6_exactly_once,
    test_g7_dead_stays_dead,
    test_g8_grace,
    test_g9_read_your_writes,
    test_g10_bounded_staleness,
    test_g11_strict_ids,
    test_g12_values,
    test_g13_expiry,
    test_g14_redis_down,
    test_g15_late_writes,
    test_g16_no_cross_talk,
)
from .conftest import GUARANTEED, Browser, MakeApp, TestApp
from .front import Front
from .servers import ClusterTopology, Commands, SentinelTopology
from .test_g6_exactly_once import lossy  # noqa: F401 - a fixture
from .test_topologies import CLUSTERS, SENTINELS, close, make_app  # noqa: F401 - a fixture

Topology = ClusterTopology | SentinelTopology

GUARANTEES: dict[str, ModuleType] = {
    "G1": test_g1_disjoint_keys,
    "G2": test_g2_readers_never_write,
    "G3": test_g3_same_key,
    "G4": test_g4_atomic_repeatable,
    "G5": test_g5_versions,
    "G6": test_g6_exactly_once,
    "G7": test_g7_dead_stays_dead,
    "G8": test_g8_grace,
    "G9": test_g9_read_your_writes,
    "G10": test_g10_bounded_staleness,
    "G11": test_g11_strict_ids,
    "G12": test_g12_values,
    "G13": test_g13_expiry,
    "G14": test_g14_redis_down,
    "G15": test_g15_late_writes,
    "G16": test_g16_no_cross_talk,
}

#: What runs on a single server only, by the reason.
LEFT_OUT: dict[str, set[str]] = {
    "a script, called on one connection: it is the same wherever its key is": {
        "test_one_write_id_twice_in_any_order",
        "test_one_creation_twice",
        "test_at_every_depth_of_the_ring",
        "test_resends_in_busy_and_quiet_times",
        "test_a_new_commit_is_never_unknown",
        "test_a_session_of_one_commit_keeps_no_ring",
        "test_a_session_that_has_lost_its_ring",
    },
    "no server is asked": {
        "test_garbage_costs_nothing",
        "test_malformed_ids_send_no_command",
        "test_a_value_that_contains_itself",
        "test_a_key_that_is_no_str",
        "test_a_lifetime_that_is_none",
        "test_without_a_handler_too_large_is_a_plain_413",
    },
    "a matter of encoding and decoding; others of that file run": {
        "test_rubbish_of_any_sort",
        "test_a_serializer_that_gives_text",
        "test_a_type_error_writes_nothing",
    },
    "a server made read-only, which a cluster's node cannot be, and which sentinels undo": {
        "test_a_server_that_is_a_replica",
    },
    "a primary without replicas": {
        "test_a_foreign_reply_before_wait",
        "test_replicas_are_waited_for_longer_than_an_answer",
    },
    "connections to one server, without any call": {
        "test_a_broken_connection_leaves_those_in_use_alone",
        "test_a_broken_connection_takes_its_neighbours_along",
    },
    "time, which passes alike everywhere, and takes its time; others of that file run": {
        "test_ten_lost_replies_in_a_row",
        "test_the_idle_lifetime_slides",
        "test_a_short_lifetime_of_its_own_slides_too",
        "test_a_key_with_an_end_of_its_own",
        "test_an_ended_key_leaves_with_the_next_commit",
    },
}

#: What runs on a cluster and not behind Sentinel, with the reason.
CLUSTER_ONLY = {
    "test_a_hung_server_runs_all_sendings": "a new connection asks for the role first, so one sending is all",
}

CLIENTS = ("url", "redis-py", "valkey-py")

#: What runs with the first of these alone, with the reason.
BY_URL_ALONE = {
    "test_a_connection_that_lost_step": "many replies to many calls, told apart by what no client does differently",
}

#: The fast subset that runs on all kinds: of each guarantee one test or two, of races that are no matter of luck.
ON_EVERY_KIND: dict[str, set[str]] = {
    "G1": {"test_a_request_inside_another_keeps_both_keys", "test_deletes_and_nested_changes_merge"},
    "G2": {"test_the_same_value_again_is_no_change"},
    "G3": {"test_the_last_writer_wins_and_the_signal_tells", "test_merges_count_both"},
    "G4": {"test_reads_are_of_one_version"},
    "G5": {"test_one_for_each_commit"},
    "G6": {"test_a_creation_whose_reply_is_lost_makes_one_session", "test_unknown_says_so"},
    "G7": {"test_clear_and_new_keys_keeps_exactly_the_new_keys", "test_a_read_after_the_end_starts_nothing"},
    "G8": {"test_within_the_grace_an_open_request_goes_on", "test_the_second_click_of_a_double_log_in"},
    "G9": {"test_a_warm_process_sees_what_another_wrote"},
    "G10": {"test_a_base_beyond_the_journal_is_read_whole"},
    "G11": {"test_an_unknown_id_is_never_adopted", "test_a_wrong_secret_ends_nothing"},
    "G12": {"test_every_type_comes_back"},
    "G13": {"test_the_absolute_lifetime_stands"},
    "G14": {"test_a_hanging_primary", "test_a_server_without_memory"},
    "G15": {"test_a_late_write_to_an_ended_session_is_dropped"},
    "G16": {"test_a_crossed_reply"},
}


def defined_in(module: ModuleType) -> dict[str, Callable[..., None]]:
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and getattr(test, "__module__", None) == module.__name__
    }


left_out = {name for names in LEFT_OUT.values() for name in names}
for module in GUARANTEES.values():
    globals().update({name: test for name, test in defined_in(module).items() if name not in left_out})


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have each test run on a cluster and behind Sentinel, of the default or of all kinds."""
    if metafunc.function is test_the_lists:
        return
    # A test that uses neither does not belong here.
    assert "topology" in metafunc.fixturenames, metafunc.function.__name__
    everywhere = any(metafunc.function.__name__ in names for names in ON_EVERY_KIND.values())
    shapes = ("cluster",) if metafunc.function.__name__ in CLUSTER_ONLY else ("cluster", "sentinel")
    wanted = [(shape, kind) for kind in (GUARANTEED if everywhere else GUARANTEED[:1]) for shape in shapes]
    metafunc.parametrize("topology", wanted, ids="-".join, indirect=True, scope="session")
    if "client" in metafunc.fixturenames:
        by_url_alone = metafunc.function.__name__ in BY_URL_ALONE
        metafunc.parametrize("client", CLIENTS[:1] if by_url_alone else CLIENTS, indirect=True)


@pytest.fixture(scope="session")
def topology(request: pytest.FixtureRequest, clusters: Any, sentinels: Any) -> Topology:
    """A cluster, or a primary behind sentinels."""
    shape, kind = request.param
    found: Topology = {"cluster": clusters, "sentinel": sentinels}[shape](kind)
    return found


@pytest.fixture
def server(topology: Topology) -> Topology:
    return topology


@pytest.fixture
def valkey(topology: Topology) -> Topology:
    return topology


@pytest.fixture
def make_valkey_app(make_app: MakeApp) -> MakeApp:  # noqa: F811 - the fixture
    return make_app


@pytest.fixture
def proxy(topology: Topology) -> Iterator[Front]:
    """Proxies before all servers, as one."""
    with Front(topology) as front:
        yield front


@pytest.fixture
def own_proxy(proxy: Front) -> Front:
    return proxy


class Whole:
    """A topology in the place of a test's own server: what is done to it is done to the whole, and undone."""

    def __init__(self, topology: Topology, front: Front) -> None:
        self._topology = topology
        #: Down is what cannot be reached: nobody is promoted.
        self.stop, self.restart = front.refuse, front.accept
        self.url = front.url
        self.owner = topology.owner
        self._paused = ExitStack()

    @contextmanager
    def client(self) -> Iterator[Any]:
        with self._topology.client() as client:
            client.config_set = self.configure
            yield client

    def configure(self, option: str, value: str) -> None:
        for each in self._topology.primaries:
            with each.client() as client:
                client.config_set(option, value)

    def pause(self) -> None:
        self._paused.enter_context(self._topology.hanging(self._topology.primaries))

    def resume(self) -> None:
        self._paused.close()

    @contextmanager
    def counting(self) -> Iterator[Commands]:
        commands = Commands()
        with ExitStack() as stack:
            counts = [stack.enter_context(each.counting()) for each in self._topology.primaries]
            yield commands
        commands.names += [name for each in counts for name in each.names]


@pytest.fixture
def own_server(topology: Topology, proxy: Front) -> Iterator[Whole]:
    """The shared topology, left as it was found."""
    whole = Whole(topology, proxy)
    yield whole
    whole.resume()
    whole.configure("maxmemory", "0")


@pytest.fixture
def client(request: pytest.FixtureRequest, topology: Topology) -> Iterator[dict[str, Any]]:
    """What an app is configured with to use one of the clients."""
    ways: Any = CLUSTERS if isinstance(topology, ClusterTopology) else SENTINELS
    config = ways[request.param](topology)
    yield config
    close(config)


def test_the_lists() -> None:
    """Each test of each guarantee is here or left out, and the lists name nothing else."""
    tests = [name for module in GUARANTEES.values() for name in defined_in(module)]
    assert len(set(tests)) == len(tests)
    own = defined_in(sys.modules[__name__]).keys()
    assert not own & set(tests)
    assert left_out <= set(tests)
    assert {name for name in tests if name in globals()} == set(tests) - left_out
    assert CLUSTER_ONLY.keys() | BY_URL_ALONE.keys() <= set(tests) - left_out
    assert ON_EVERY_KIND.keys() == GUARANTEES.keys() == {f"G{n}" for n in range(1, 17)}
    for guarantee, names in ON_EVERY_KIND.items():
        assert names
        assert names <= (defined_in(GUARANTEES[guarantee]).keys() - left_out) | own


# G14, where there is more than one server.


def handle_of(browser: Browser) -> str:
    return browser.cookies["session"].partition(".")[0]


def begin(app: TestApp) -> Browser:
    browser = app.browser()
    browser.run(lambda: session.update(a=1))
    return browser


def test_a_hanging_primary(topology: Topology, make_app: MakeApp) -> None:  # noqa: F811 - the fixture
    """Of a primary that hangs the sessions are a 503, never empty; those of others and the untouched are served."""
    app = make_app(SESSION_CACHE_TTL=0)
    hasty = app.another(SESSION_REDIS_TIMEOUT=0.1, SESSION_REDIS_DEADLINE=0.1)
    first = begin(app)
    hung = topology.owner(app.prefix + handle_of(first))
    other = first
    while len(topology.primaries) > 1 and topology.owner(app.prefix + handle_of(other)) is hung:
        other = begin(app)
    hit = first.twin(hasty)
    with topology.hanging([hung]):
        for view in (lambda: dict(session), lambda: session.update(b=1)):
            hit.run(view, status=503)
            assert hit.response is not None
            assert "Retry-After" in hit.response.headers
            assert hit.set_cookies == {}
        assert hit.get("/untouched").status_code == 200
        if other is not first:
            other.run(lambda: session.update(b=1))
            assert other.run(lambda: dict(session)) == {"a": 1, "b": 1}
    # What it was sent it may run when it goes on, since nobody was told that it had not.
    assert hit.twin(app).run(lambda: dict(session)) in ({"a": 1}, {"a": 1, "b": 1})
    assert topology.owner(app.prefix + handle_of(first)) is hung
