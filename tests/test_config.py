from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import math
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import redis.asyncio
from flask import Flask

from luasession import merge
from luasession.config import _SETTINGS, Config, milliseconds, read_config
from luasession.errors import ConfigurationError

KEY = "0123456789abcdef" * 2
DAY = 86_400_000


def ours(base: Any, theirs: Any, ours: Any) -> Any:
    return ours


class Recording:
    """A synchronous client, as far as the settings look at one; its repr shows too much."""

    def __repr__(self) -> str:
        return "Recording(password='hunter2')"

    def execute_command(self, *args: Any) -> None:
        raise AssertionError("reading the settings sends nothing")


# -- defaults --------------------------------------------------------------------------------


def test_defaults() -> None:
    """Without any setting, every field has the documented default, in its unit."""
    assert read_config({}) == Config(
        redis=None,
        redis_url="redis://localhost:6379/0",
        key_prefix="session:",
        id_length=32,
        redis_timeout=1.0,
        redis_deadline=2.0,
        permanent=False,
        cache_ttl=2.0,
        cache_ttl_set=False,
        cache_bytes=32 * 1024 * 1024,
        conflict="overwrite",
        merge={},
        absolute_ms=None,
        renew_after_ms=None,
        grace_ms=60_000,
        touch_interval_ms=None,
        max_bytes=1024 * 1024,
        serializer="json",
        encryption_keys=(),
        login_hooks=True,
        wait_replicas=0,
        wait_timeout_ms=100,
    )


def test_a_fresh_flask_app_has_nothing_to_object_to() -> None:
    """Flask's own settings, whatever its version, pass without an error or a warning."""
    assert read_config(Flask("app").config) == Config()


def test_every_field_has_its_setting() -> None:
    """No field can be forgotten in the table of settings, nor set by two of them."""
    fields = [name for name, _ in _SETTINGS.values()]
    assert sorted([*fields, "cache_ttl_set"]) == sorted(field.name for field in dataclasses.fields(Config))


def test_default_durations_are_those_that_the_settings_would_give() -> None:
    """The defaults, given as settings, come out as the defaults: no unit is mixed up."""
    given = {
        "SESSION_REDIS_TIMEOUT": 1,
        "SESSION_REDIS_DEADLINE": timedelta(seconds=2),
        "SESSION_ROTATION_GRACE": timedelta(minutes=1),
        "SESSION_WAIT_TIMEOUT": 0.1,
    }
    assert read_config(given) == Config()


# -- values ----------------------------------------------------------------------------------

CLIENT = Recording()

GOOD = [
    ("SESSION_REDIS", None, "redis", None),
    ("SESSION_REDIS", CLIENT, "redis", CLIENT),
    *(
        ("SESSION_REDIS_URL", url, "redis_url", url)
        for url in (
            "redis://",
            "redis://:secret@host:6379/1",
            "rediss://host",
            "unix:///run/redis.sock?db=1",
            "embedded://",
            "embedded:///srv/app",
            "redis+cluster://a:1,b:2",
            "rediss+cluster://a:1",
            "redis+sentinel://a:1,b:2/main/0",
            "rediss+sentinel://a:1/main",
            "valkey://host",
            "valkeys://host",
        )
    ),
    ("SESSION_KEY_PREFIX", "shop:", "key_prefix", "shop:"),
    ("SESSION_ID_LENGTH", 16, "id_length", 16),
    ("SESSION_ID_LENGTH", 128, "id_length", 128),
    ("SESSION_REDIS_TIMEOUT", 0.25, "redis_timeout", 0.25),
    ("SESSION_REDIS_TIMEOUT", timedelta(seconds=3), "redis_timeout", 3.0),
    ("SESSION_REDIS_DEADLINE", 0, "redis_deadline", 0.0),
    ("SESSION_PERMANENT", True, "permanent", True),
    ("SESSION_CACHE_TTL", None, "cache_ttl", None),
    ("SESSION_CACHE_TTL", 0, "cache_ttl", 0.0),
    ("SESSION_CACHE_TTL", timedelta(milliseconds=500), "cache_ttl", 0.5),
    ("SESSION_CACHE_BYTES", 1, "cache_bytes", 1),
    ("SESSION_CONFLICT", "raise", "conflict", "raise"),
    ("SESSION_CONFLICT", "serializable", "conflict", "serializable"),
    ("SESSION_CONFLICT", ours, "conflict", ours),
    ("SESSION_MERGE", {}, "merge", {}),
    (
        "SESSION_MERGE",
        {"cart": ours, "csrf_*": "overwrite", "*": "raise"},
        "merge",
        {"cart": ours, "csrf_*": "overwrite", "*": "raise"},
    ),
    ("SESSION_ABSOLUTE_LIFETIME", None, "absolute_ms", None),
    ("SESSION_ABSOLUTE_LIFETIME", timedelta(days=1), "absolute_ms", DAY),
    ("SESSION_ABSOLUTE_LIFETIME", 86_400, "absolute_ms", DAY),
    ("SESSION_RENEW_AFTER", None, "renew_after_ms", None),
    ("SESSION_RENEW_AFTER", 3600.5, "renew_after_ms", 3_600_500),
    ("SESSION_ROTATION_GRACE", 5, "grace_ms", 5000),
    ("SESSION_TOUCH_INTERVAL", None, "touch_interval_ms", None),
    ("SESSION_TOUCH_INTERVAL", 0, "touch_interval_ms", 0),
    ("SESSION_TOUCH_INTERVAL", timedelta(seconds=90), "touch_interval_ms", 90_000),
    ("SESSION_MAX_BYTES", 4096, "max_bytes", 4096),
    ("SESSION_SERIALIZER", "msgpack", "serializer", "msgpack"),
    ("SESSION_SERIALIZER", json, "serializer", json),
    ("SESSION_ENCRYPTION_KEYS", None, "encryption_keys", ()),
    ("SESSION_ENCRYPTION_KEYS", KEY, "encryption_keys", (KEY.encode(),)),
    ("SESSION_ENCRYPTION_KEYS", KEY.encode(), "encryption_keys", (KEY.encode(),)),
    ("SESSION_ENCRYPTION_KEYS", ("é" * 16, b"k" * 40), "encryption_keys", ("é".encode() * 16, b"k" * 40)),
    ("SESSION_LOGIN_HOOKS", False, "login_hooks", False),
    ("SESSION_WAIT_REPLICAS", 2, "wait_replicas", 2),
    ("SESSION_WAIT_TIMEOUT", timedelta(milliseconds=250), "wait_timeout_ms", 250),
    ("SESSION_WAIT_TIMEOUT", 0.0001, "wait_timeout_ms", 1),
]


@pytest.mark.parametrize(("key", "value", "field", "expected"), GOOD)
def test_a_good_value_is_taken(key: str, value: Any, field: str, expected: Any) -> None:
    """A value of the right type and range arrives in its field, in the field's unit and type."""
    got = getattr(read_config({key: value}), field)
    assert got == expected
    assert isinstance(got, type(expected)) or field == "merge"


def test_every_setting_has_a_good_value_in_the_table() -> None:
    """The table above leaves no setting out."""
    assert {row[0] for row in GOOD} == set(_SETTINGS)


DURATIONS = {
    "SESSION_REDIS_TIMEOUT": "0.001 at least",
    "SESSION_REDIS_DEADLINE": "0 at least",
    "SESSION_CACHE_TTL": "0 at least",
    "SESSION_ABSOLUTE_LIFETIME": "0.001 at least",
    "SESSION_RENEW_AFTER": "0.001 at least",
    "SESSION_ROTATION_GRACE": "0.001 at least",
    "SESSION_TOUCH_INTERVAL": "0 at least",
    "SESSION_WAIT_TIMEOUT": "0.001 at least",
}
NO_DURATIONS = [
    "2",
    True,
    b"2",
    -1,
    -0.001,
    timedelta(seconds=-1),
    math.nan,
    math.inf,
    10**400,
    timedelta.max,
]
WHOLE = {
    "SESSION_ID_LENGTH": "16 at least and 128 at most",
    "SESSION_CACHE_BYTES": "1 at least",
    "SESSION_MAX_BYTES": "1 at least",
    "SESSION_WAIT_REPLICAS": "0 at least",
}
NO_NONE = sorted({*DURATIONS, *WHOLE} - {key for key, value, *_ in GOOD if value is None})

BAD = [
    *((key, value, expected) for key, expected in DURATIONS.items() for value in NO_DURATIONS),
    *((key, 0, expected) for key, expected in DURATIONS.items() if expected[0:2] == "0."),
    *((key, value, expected) for key, expected in WHOLE.items() for value in ("1", True, 20.0, -1)),
    *((key, None, "must be") for key in NO_NONE),
    ("SESSION_ID_LENGTH", 15, "16 at least"),
    ("SESSION_ID_LENGTH", 129, "128 at most"),
    ("SESSION_CACHE_BYTES", 0, "1 at least"),
    ("SESSION_MAX_BYTES", 0, "1 at least"),
    *(
        (key, value, "True or False")
        for key in ("SESSION_PERMANENT", "SESSION_LOGIN_HOOKS")
        for value in (0, 1, "no", None)
    ),
    *(("SESSION_KEY_PREFIX", value, "no braces") for value in ("", "{s}:", "s}", b"s:", None)),
    *(("SESSION_CONFLICT", value, "'serializable' or a function") for value in ("merge", None, 1)),
    *(
        ("SESSION_SERIALIZER", value, "dumps and loads")
        for value in ("pickle", None, object(), SimpleNamespace(dumps=json.dumps, loads=1))
    ),
    *(("SESSION_MERGE", value, "a mapping") for value in (None, "overwrite", [("cart", ours)])),
]


@pytest.mark.parametrize(("key", "value", "expected"), BAD)
def test_a_bad_value_is_refused(key: str, value: Any, expected: str) -> None:
    """A value of a wrong type or range is an error that names key, value and what was expected."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({key: value})
    assert str(caught.value).startswith(f"{key} must be ")
    assert expected in str(caught.value)
    assert str(caught.value).endswith(f", not {value!r}")


@pytest.mark.parametrize("name", ["a*b", "*_token", "a**", "", 7])
def test_a_merge_name_is_a_key_or_a_beginning(name: Any) -> None:
    """A star stands at the end of a name or nowhere, and a name is a text."""
    with pytest.raises(ConfigurationError, match="name in SESSION_MERGE") as caught:
        read_config({"SESSION_MERGE": {name: "raise"}})
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("policy", ["serializable", "deep", None, 1])
def test_a_merge_policy_is_for_one_key(policy: Any) -> None:
    """Per key, "overwrite", "raise" and functions are policies; "serializable" is for all keys."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_MERGE\['cart'\] must be 'overwrite', 'raise' or"):
        read_config({"SESSION_MERGE": {"cart": policy}})


# -- replicas --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"SESSION_WAIT_TIMEOUT": 100}, "(100 s) must be 2 s at most"),
        ({"SESSION_WAIT_TIMEOUT": 3, "SESSION_REDIS_DEADLINE": 2.5}, "2.5 s at most"),
        ({"SESSION_WAIT_TIMEOUT": 2, "SESSION_REDIS_DEADLINE": 0.5}, "1 s at most"),
    ],
)
def test_a_wait_for_replicas_fits_into_the_deadline(settings: dict[str, Any], message: str) -> None:
    """It is in seconds, and one that is longer than a request waits for Redis in all is refused."""
    with pytest.raises(ConfigurationError, match="SESSION_WAIT_TIMEOUT") as caught:
        read_config({"SESSION_WAIT_REPLICAS": 1, **settings})
    assert message in str(caught.value)
    assert read_config({"SESSION_WAIT_REPLICAS": 0, **settings}).wait_replicas == 0


@pytest.mark.parametrize(
    ("settings", "answer", "call"),
    [
        ({}, 1.0, 4.0),
        ({"SESSION_WAIT_TIMEOUT": 1}, 1.0, 4.0),  # of no replica
        ({"SESSION_WAIT_REPLICAS": 1, "SESSION_WAIT_TIMEOUT": 1}, 2.0, 6.0),
        ({"SESSION_REDIS_DEADLINE": 0, "SESSION_REDIS_TIMEOUT": 5}, 5.0, 10.0),
        ({"SESSION_REDIS": redis.Redis(), "SESSION_REDIS_DEADLINE": 3}, 1.0, 9.0),
        ({"SESSION_REDIS_URL": "redis://here?socket_timeout=30"}, 1.0, 6.0),
        ({"SESSION_REDIS_URL": "redis+cluster://here:1?socket_connect_timeout=30"}, 1.0, 6.0),
    ],
)
def test_what_a_call_takes_at_most(settings: dict[str, Any], answer: float, call: float) -> None:
    """The server's answer, replicas included; and all attempts, of which the last begins within the deadline."""
    config = read_config(settings)
    assert (config.answer_seconds, config.call_seconds) == (answer, call)


# -- durations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (timedelta(0), 0),
        (0.0004, 1),
        (timedelta(microseconds=1), 1),
        (1.001, 1001),
        (2.007, 2007),
        (timedelta(days=31), 31 * DAY),
        (timedelta(days=365_000), 365_000 * DAY),
    ],
)
def test_milliseconds(value: Any, expected: int) -> None:
    """Durations are rounded to milliseconds, and none above zero becomes zero."""
    got = milliseconds(value, "ttl")
    assert got == expected
    assert type(got) is int


def test_milliseconds_can_refuse_zero() -> None:
    """A caller that needs a positive duration says so, and the error names what it is for."""
    assert milliseconds(0.0001, "ttl", at_least=1) == 1
    with pytest.raises(ConfigurationError, match=r"^ttl must be .*0\.001 at least.*, not 0$"):
        milliseconds(0, "ttl", at_least=1)


# -- windows ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lifetime_ms", "touch_ms", "trust"),
    [
        (31 * DAY, 60_000, 2.0),
        (1_200_000, 60_000, 2.0),
        (60_000, 3_000, 2.0),
        (40_000, 2_000, 2.0),
        (2_000, 100, 0.1),
        (1, 0, 0.00005),
    ],
)
def test_default_windows_shrink_with_the_lifetime(lifetime_ms: int, touch_ms: int, trust: float) -> None:
    """By default, interval and trust window each take a twentieth of a short lifetime."""
    config = read_config({"PERMANENT_SESSION_LIFETIME": timedelta(milliseconds=lifetime_ms)})
    assert config.touch_ms(lifetime_ms) == touch_ms
    assert config.trust_seconds(lifetime_ms) == pytest.approx(trust)
    assert touch_ms / 1000 + trust < lifetime_ms / 1000


@pytest.mark.parametrize(("ttl", "trust"), [(None, 0.0), (0, 0.0), (2.0, 2.0), (30, 30.0)])
def test_a_set_trust_window_is_used_as_it_is(ttl: Any, trust: float) -> None:
    """SESSION_CACHE_TTL, once set, holds for every lifetime, even set to its default."""
    assert read_config({"SESSION_CACHE_TTL": ttl}).trust_seconds(1000) == trust


def test_a_lifetime_made_too_short_for_the_interval() -> None:
    """What the app sets late shortens the interval only where a session in use would end."""
    config = read_config({"SESSION_TOUCH_INTERVAL": 10, "SESSION_CACHE_TTL": 2})
    assert [config.touch_ms(ms) for ms in (60_000, 12_001, 12_000, 2_000)] == [10_000, 10_000, 6_000, 1_000]


@pytest.mark.parametrize("interval", [0, 45])
def test_a_set_touch_interval_is_used_as_it_is(interval: int) -> None:
    """SESSION_TOUCH_INTERVAL, once set, holds for every lifetime."""
    config = read_config({"SESSION_TOUCH_INTERVAL": interval})
    assert config.touch_ms(50_000) == interval * 1000
    # Save one that the app has made too short for it since: or what is in use would end (G13).
    assert config.touch_ms(20_000) == min(interval * 1000, 10_000)


@pytest.mark.parametrize(
    "settings",
    [
        {"SESSION_TOUCH_INTERVAL": 50, "SESSION_CACHE_TTL": 10},
        {"SESSION_TOUCH_INTERVAL": 60},
        {"SESSION_TOUCH_INTERVAL": 58},  # 58 s and the default window of 2 s
        {"SESSION_CACHE_TTL": 57},  # 57 s and the default interval of 3 s
        {"SESSION_CACHE_TTL": None, "SESSION_TOUCH_INTERVAL": 60},
        {"SESSION_CACHE_TTL": 60, "SESSION_TOUCH_INTERVAL": 0},
    ],
)
@pytest.mark.parametrize("lifetime", [60, timedelta(minutes=1)])
def test_windows_that_fill_the_lifetime_are_refused(settings: dict[str, Any], lifetime: Any) -> None:
    """Interval and window, set or default, together stay below the idle lifetime."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({**settings, "PERMANENT_SESSION_LIFETIME": lifetime})
    for word in ("SESSION_TOUCH_INTERVAL", "SESSION_CACHE_TTL", "PERMANENT_SESSION_LIFETIME (60 s)"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"SESSION_TOUCH_INTERVAL": 50, "SESSION_CACHE_TTL": 9.9},
        {"SESSION_TOUCH_INTERVAL": 57.9},
        {"SESSION_CACHE_TTL": 56.9},
        {"SESSION_CACHE_TTL": None},
        {"SESSION_CACHE_TTL": None, "SESSION_TOUCH_INTERVAL": 59.9},
    ],
)
def test_windows_below_the_lifetime_pass(settings: dict[str, Any]) -> None:
    """Windows that leave anything of the idle lifetime are the app's own affair."""
    config = read_config({**settings, "PERMANENT_SESSION_LIFETIME": 60})
    assert config.touch_ms(60_000) / 1000 + config.trust_seconds(60_000) < 60


def test_the_lifetime_is_flasks_default_where_it_is_missing() -> None:
    """Settings without Flask's defaults are checked against its 31 days."""
    read_config({"SESSION_TOUCH_INTERVAL": timedelta(days=30)})
    with pytest.raises(ConfigurationError, match="together stay below"):
        read_config({"SESSION_TOUCH_INTERVAL": timedelta(days=31)})


def test_the_lifetime_itself_is_not_checked() -> None:
    """An app may expire its sessions at once, as tests do, while no window was set."""
    config = read_config({"PERMANENT_SESSION_LIFETIME": timedelta(0)})
    assert config == read_config({})


def test_a_lifetime_that_is_none_is_refused_beside_a_set_window() -> None:
    """A window cannot be below a lifetime that is no duration."""
    with pytest.raises(ConfigurationError, match=r"^PERMANENT_SESSION_LIFETIME must be a timedelta"):
        read_config({"PERMANENT_SESSION_LIFETIME": None, "SESSION_CACHE_TTL": 1})


@pytest.mark.parametrize("name", ["pickle", "marshal"])
def test_a_serializer_that_executes_is_refused(name: str) -> None:
    """Modules whose loads runs code are refused, though they have dumps and loads."""
    with pytest.raises(ConfigurationError, match=r"SESSION_SERIALIZER must be .* no pickle"):
        read_config({"SESSION_SERIALIZER": importlib.import_module(name)})


# -- clients and URLs ------------------------------------------------------------------------


def valkey_client(**options: Any) -> Any:
    return pytest.importorskip("valkey").Valkey(**options)


def cached_client(**options: Any) -> Any:
    config = pytest.importorskip("redis.cache").CacheConfig()
    return redis.Redis(protocol=3, cache_config=config, **options)


def cluster_client(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    # The library's own class; only its first look at the servers is left out.
    monkeypatch.setattr("redis.cluster.NodesManager.initialize", lambda *args, **kwargs: None)
    monkeypatch.setattr("redis.cluster.CommandsParser", lambda *args: None)
    return redis.RedisCluster(host="localhost", port=1, protocol=3, **options)


@pytest.mark.parametrize("make", [redis.Redis, valkey_client])
def test_ready_clients_are_taken(make: Any) -> None:
    """A client of redis-py or valkey-py is kept, the very object."""
    client = make(host="localhost", port=1, decode_responses=True)
    assert read_config({"SESSION_REDIS": client}).redis is client


def test_sentinel_clients_are_taken() -> None:
    """What a Sentinel's ``master_for`` gives is a client like others."""
    sentinel: Any = importlib.import_module("redis.sentinel")
    client = sentinel.Sentinel([("localhost", 1)]).master_for("main")
    assert read_config({"SESSION_REDIS": client}).redis is client


def test_cluster_clients_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster's client, which has no pool of its own, is a client like others."""
    client = cluster_client(monkeypatch)
    assert read_config({"SESSION_REDIS": client}).redis is client


def test_asyncio_clients_are_refused() -> None:
    """An asyncio client is refused in so many words."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_REDIS must .*asyncio clients are not supported"):
        read_config({"SESSION_REDIS": redis.asyncio.Redis()})


def test_clients_that_cache_replies_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that answers from a cache of its own is refused, whatever library made it."""
    config = pytest.importorskip("redis.cache").CacheConfig()
    clients = [
        cached_client(),
        cluster_client(monkeypatch, cache_config=config),
        valkey_client(protocol=3, cache_enabled=True),
        valkey_client(protocol=3, client_cache=object()),
    ]
    for client in clients:
        with pytest.raises(ConfigurationError, match=r"^SESSION_REDIS must .*client-side caching"):
            read_config({"SESSION_REDIS": client})


@pytest.mark.parametrize("url", ["redis://:hunter2@host", b"redis://:hunter2@host"])
def test_a_url_in_the_place_of_a_client_is_sent_on(url: Any) -> None:
    """A URL given as SESSION_REDIS is an error that names SESSION_REDIS_URL, not the password."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_REDIS must .*SESSION_REDIS_URL") as caught:
        read_config({"SESSION_REDIS": url})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("client", "word"), [(redis.Redis, "the class Redis"), (object(), "type object"), (1, "type int")]
)
def test_what_is_no_client_is_refused(client: Any, word: str) -> None:
    """Anything that cannot run a command is refused by its type."""
    with pytest.raises(ConfigurationError, match=rf"^SESSION_REDIS must .*{word}"):
        read_config({"SESSION_REDIS": client})


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://:hunter2@host", "its scheme is 'http'"),
        ("Redis://:hunter2@host", "its scheme is 'Redis'"),
        ("redis+http://:hunter2@host", "its scheme is 'redis+http'"),
        (":hunter2@host:6379", "it has no scheme"),
        ("user:hunter2://host", "it has no scheme"),
        ("redis:/:hunter2@host", "it has no scheme"),
        ("", "it has no scheme"),
        (b"redis://:hunter2@host", "it is of type bytes"),
        (None, "it is of type NoneType"),
        (6379, "it is of type int"),
    ],
)
def test_a_url_of_another_scheme_is_refused(url: Any, found: str) -> None:
    """The error lists the schemes, and shows nothing of the URL but its scheme."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({"SESSION_REDIS_URL": url})
    message = str(caught.value)
    assert message.startswith("SESSION_REDIS_URL must be ")
    assert message.endswith(f"; {found}")
    for scheme in (
        "redis,",
        "rediss,",
        "unix,",
        "embedded,",
        "redis+cluster,",
        "rediss+sentinel;",
        "valkeys,",
    ):
        assert scheme in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:hunter2@host/one", "number of a database"),
        ("rediss://:hunter2@host/0/1", "number of a database"),
        ("valkey://:hunter2@host/0?foo=hunter2", "one of these: foo"),
        ("redis://:hunter2@host/0?socket_timeout=soon&foo=1", "one of these: foo, socket_timeout"),
        ("redis://:hunter2@host?db=x", "one of these: db"),
        ("unix:///tmp/hunter2.sock?db=x", "one of these: db"),
        ("unix://", "names no socket"),
        ("unix:///", "names no socket"),
    ],
)
def test_a_url_with_a_wrong_part_is_refused(url: str, expected: str) -> None:
    """What a request would stumble over is said at the start, by the name of the setting, and no secret with it."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({"SESSION_REDIS_URL": url})
    assert str(caught.value).startswith("SESSION_REDIS_URL ")
    assert expected in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://host",
        "redis://host/",
        "redis://host:7000/15",
        "redis://:secret@[::1]:7000/1?socket_timeout=2&max_connections=5&client_name=web",
        "rediss://user:secret@host/0?ssl_cert_reqs=none",
        "valkey://host/3",
        "valkeys://host",
        "unix:///tmp/of.sock?db=2",
        "unix://user:secret@/tmp/of.sock",
        "embedded://",
        "embedded:///tmp/here?not=read",
    ],
)
def test_a_url_of_a_server_passes(url: str) -> None:
    """Whatever redis-py takes is taken."""
    assert read_config({"SESSION_REDIS_URL": url}).redis_url == url


@pytest.mark.parametrize("key", ["SESSION_CONFLICT", "SESSION_MERGE"])
@pytest.mark.parametrize("function", [lambda theirs, ours: ours, lambda: 1, lambda *, a: a])
def test_a_merge_function_takes_three(key: str, function: Any) -> None:
    """One that cannot be called with base, theirs and ours is refused at the start, not at the first conflict."""
    value = {"a": function} if key == "SESSION_MERGE" else function
    with pytest.raises(ConfigurationError, match=rf"^{key}.*\(base, theirs, ours\)"):
        read_config({key: value})


def with_a_database(function: Any) -> Any:
    @functools.wraps(function)
    def given(*sides: Any) -> Any:
        return function("database", *sides)

    return given


@with_a_database
def of_four(_database: str, _base: Any, _theirs: Any, ours: Any) -> Any:
    return ours


@pytest.mark.parametrize("function", [lambda *sides: sides, lambda a, b, c, d=1: a, merge.add, max, of_four])
def test_a_function_that_takes_three_passes(function: Any) -> None:
    """However it is written, and where it does not say what it takes."""
    assert read_config({"SESSION_MERGE": {"a": function}}).merge["a"] is function


@pytest.mark.parametrize("lifetime", ["3600", None, -1, [1]])
def test_a_lifetime_that_is_no_duration_is_refused_at_the_start(lifetime: Any) -> None:
    """A request that touches its session would stumble over it."""
    with pytest.raises(ConfigurationError, match=r"^PERMANENT_SESSION_LIFETIME must be a timedelta"):
        read_config({"PERMANENT_SESSION_LIFETIME": lifetime})


def test_a_pipeline_is_no_client() -> None:
    """It would gather commands and send none."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_REDIS .*a pipeline"):
        read_config({"SESSION_REDIS": redis.Redis().pipeline()})


# -- secrets ---------------------------------------------------------------------------------


def test_no_secret_in_the_repr() -> None:
    """A logged Config shows neither the URL, nor the client, nor a key."""
    config = read_config(
        {
            "SESSION_REDIS_URL": "redis://:hunter2@host",
            "SESSION_REDIS": Recording(),
            "SESSION_ENCRYPTION_KEYS": [KEY],
        }
    )
    assert "hunter2" not in repr(config)
    assert KEY not in repr(config)


@pytest.mark.parametrize(
    "keys",
    [
        "hunter2",
        b"hunter2",
        ["hunter2"],
        [KEY, "hunter2"],
        {KEY},
        {"hunter2": KEY},
        [],
        (),
        "",
        7,
        [None],
        [bytearray(b"hunter2" * 9)],
        [["hunter2" * 9]],
    ],
)
def test_encryption_keys_have_a_shape(keys: Any) -> None:
    """Short keys, no keys and other types are refused without being shown."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_ENCRYPTION_KEYS must .*not shown$") as caught:
        read_config({"SESSION_ENCRYPTION_KEYS": keys})
    assert "hunter2" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_encryption_keys_from_an_odd_environment() -> None:
    """A key that UTF-8 cannot encode is taken; the codec's error would have quoted it."""
    assert len(read_config({"SESSION_ENCRYPTION_KEYS": "\udce9" * 11}).encryption_keys[0]) == 33


# -- names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("SESSION_REDIS_TIMOUT", "SESSION_REDIS_TIMEOUT"),
        ("SESSION_ENCRYPTION_KEY", "SESSION_ENCRYPTION_KEYS"),
        ("SESSION_KEYPREFIX", "SESSION_KEY_PREFIX"),
        ("SESSION_REDIS_URI", "SESSION_REDIS_URL"),
        ("SESSION_MERGES", "SESSION_MERGE"),
        ("SESSION_SERIALISER", "SESSION_SERIALIZER"),
        ("SESSION_COOKIE_SAME_SITE", "SESSION_COOKIE_SAMESITE"),
        ("SESSION_TYPES", "SESSION_TYPE"),
    ],
)
def test_a_misspelt_name_is_refused(name: str, meant: str) -> None:
    """A name close to a known one is an error that asks for that, and keeps the value to itself."""
    with pytest.raises(ConfigurationError) as caught:
        read_config({name: "hunter2"})
    assert str(caught.value) == f"{name} is not a setting; did you mean {meant}?"


@pytest.mark.parametrize(
    "name",
    [
        "SESSION_PROTECTION",
        "SESSION_COOKIE_AGE",
        "SESSION_ENGINE",
        "SESSION_SECRET_KEY",
        "SESSION_REDIS_HOST",
        "SESSION_REDIS_DB",
        "SESSION_",
        "SESSIONS_MERGE",
        "REMEMBER_COOKIE_NAME",
    ],
)
def test_other_names_are_left_alone(name: str) -> None:
    """Names close to nothing, Flask-Login's SESSION_PROTECTION among them, are somebody else's."""
    assert read_config({name: "basic"}) == Config()


# -- Flask-Session ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["redis", "Redis", None])
def test_the_type_redis_passes(kind: Any) -> None:
    """Flask-Session's SESSION_TYPE = "redis" is right, and none at all is too."""
    assert read_config({"SESSION_TYPE": kind}) == Config()


@pytest.mark.parametrize("kind", ["filesystem", "null", "", 1])
def test_any_other_type_is_refused(kind: Any) -> None:
    """Another store of Flask-Session is an error, not a silent move to Redis."""
    with pytest.raises(ConfigurationError, match=r"^SESSION_TYPE must be 'redis'") as caught:
        read_config({"SESSION_TYPE": kind})
    assert repr(kind) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("SESSION_USE_SIGNER", False, "nothing is needed"),
        ("SESSION_SERIALIZATION_FORMAT", "msgpack", "SESSION_SERIALIZER replaces it"),
        ("SESSION_CLEANUP_N_REQUESTS", 100, "nothing is needed"),
        *(
            (name, "x", "set SESSION_REDIS_URL or SESSION_REDIS")
            for name in (
                "SESSION_FILE_DIR",
                "SESSION_MEMCACHED",
                "SESSION_MONGODB_DB",
                "SESSION_SQLALCHEMY",
                "SESSION_DYNAMODB_TABLE",
                "SESSION_CACHELIB",
                "SESSION_CACHELIB_BYTES",
            )
        ),
    ],
)
def test_flask_sessions_settings_warn(name: str, value: Any, advice: str) -> None:
    """A setting that only Flask-Session heeds warns, once, and says what replaces it."""
    with pytest.warns(UserWarning, match=advice) as caught:
        assert read_config({name: value}) == Config()
    assert [str(one.message).partition(" ")[0] for one in caught] == [name]


def test_a_warning_points_at_the_apps_own_line() -> None:
    """However deep in luasession the settings are read, the warning shows the app's line."""
    inside: dict[str, Any] = {"__name__": "luasession.extension", "read_config": read_config}
    exec("def init_app(settings): read_config(settings)\ndef Session(settings): init_app(settings)", inside)
    with pytest.warns(UserWarning, match="SESSION_USE_SIGNER") as caught:
        inside["Session"]({"SESSION_USE_SIGNER": True})
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert (caught[0].filename, caught[0].lineno) == (__file__, line)


def test_all_of_flask_session_is_understood() -> None:
    """Each default of the installed Flask-Session is one of ours, or warns unless it is None."""
    defaults = vars(pytest.importorskip("flask_session.defaults").Defaults)
    settings = {name: value for name, value in defaults.items() if name.startswith("SESSION_")}
    foreign = {name for name, value in settings.items() if name not in _SETTINGS and value is not None}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = read_config({**settings, "SESSION_TYPE": "redis"})
    assert {str(one.message).partition(" ")[0] for one in caught} == foreign - {"SESSION_TYPE"}
    assert config.permanent


# -- the object ------------------------------------------------------------------------------


def test_a_config_is_frozen() -> None:
    """No field can be assigned, and no attribute added."""
    config = read_config({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.id_length = 16  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        config.other = 1  # type: ignore[attr-defined]


def test_merge_is_a_copy_that_cannot_change() -> None:
    """What the app does to its own mapping later does not reach the policies."""
    policies = {"cart": "raise"}
    config = read_config({"SESSION_MERGE": policies})
    policies["cart"] = "serializable"
    assert config.merge == {"cart": "raise"}
    with pytest.raises(TypeError):
        config.merge["cart"] = "overwrite"  # type: ignore[index]


def test_the_settings_are_not_touched() -> None:
    """Reading changes nothing in the app's configuration."""
    settings = {"SESSION_MERGE": {"cart": "raise"}, "SESSION_CACHE_TTL": timedelta(seconds=1)}
    before = dict(settings)
    read_config(settings)
    assert settings == before


def test_nothing_else_of_luasession_is_needed() -> None:
    """Of luasession the modules import leaves alone: the errors, what reads a value or a URL, and what a policy is."""
    imported = {
        line
        for name in ("luasession.config", "luasession.readers")
        for line in inspect.getsource(importlib.import_module(name)).splitlines()
        if line.startswith(("from .", "from luasession"))
    }
    assert imported == {
        "from . import readers",
        "from .policy import Policy",
        "from .readers import milliseconds",
        "from .errors import ConfigurationError",
        "from .location import check_address, is_location, read_location",
    }
