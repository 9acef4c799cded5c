"""The codec: every type of G12 comes back as it went in, nothing else is let in or out."""

from __future__ import annotations

import enum
import inspect
import json
import os
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Context, Decimal, localcontext
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from luasession.codec import (
    MAX_DEPTH,
    JSONSerializer,
    MsgpackSerializer,
    is_immutable,
    make_serializer,
)

pytestmark = pytest.mark.filterwarnings("error")

JSON = JSONSerializer()
NAMES = ["json", "msgpack"]
UID = uuid.UUID("12345678-1234-5678-1234-567812345678")
CEST = timezone(timedelta(hours=2))
TAG_KEYS = [
    *(" t", " s", " fs", " b", " m", " u", " n", " d", " date", " time", " td", " i", " x"),
    *(" di", " dx"),
]


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest) -> Any:
    if request.param == "msgpack":
        pytest.importorskip("msgspec")
    return make_serializer(request.param)


def canonical(value: Any) -> Any:
    """Return a form that is equal only for values that nobody can tell apart: types, the order
    of dicts, the sign of zero, NaN, the exponent of decimals, offset and fold of times.
    """
    kind = type(value)
    if kind is dict:
        return kind, [(canonical(key), canonical(item)) for key, item in value.items()]
    if kind in (list, tuple):
        return kind, [canonical(item) for item in value]
    if kind in (set, frozenset):
        return kind, sorted(repr(canonical(item)) for item in value)
    if kind is float:
        return kind, value.hex() if value == value else "nan"
    if kind is Decimal:
        return kind, value.as_tuple()
    if kind is int:
        return kind, hex(value)
    if kind in (datetime, time):
        return kind, value.replace(tzinfo=None).isoformat(), value.utcoffset(), value.fold
    return kind, value


def assert_round_trip(codec: Any, value: Any) -> None:
    data = codec.dumps(value)
    assert type(data) is bytes
    assert canonical(codec.loads(data)) == canonical(value)


def nested(depth: int, wrap: Any = lambda value: [value]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = wrap(value)
    return value


# -- what comes back ------------------------------------------------------------------------------

VALUES = [
    *(None, True, False, 0, -1, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63)),
    *(-(2**63) - 1, 2**2048, 2**2048 + 1, -(2**2048) - 1, 10**4300, -(10**10_000)),
    *(0.0, -0.0, 1.5, 1e-320, 1.7976931348623157e308, float("inf"), float("-inf"), float("nan")),
    *("", "plain", "Grüße \U0001f40d", "\x00\x1f\x7f\u2028\u2029", '"\\/', " t", "</script>"),
    *("\ud800", "a\udfffb", "\ud83d\ude00", "\U0001f600"),
    *(b"", b"\x00\xff", b"x" * 300),
    *([], [[]], (), ((),), (1,), {}, {"": {}}, set(), frozenset(), {1, "1", b"1", None}),
    *(frozenset({frozenset({frozenset()})}), {(1, ("a",)), (2,)}, {float("inf"), -1.5}),
    *(datetime(2026, 1, 2, 3, 4, 5), datetime(1, 1, 1), datetime.max, datetime(2026, 1, 2, fold=1)),
    datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    *(datetime(2026, 1, 2, 3, 4, 5, 6, timezone(timedelta(microseconds=n))) for n in (-999_999, -1, 1)),
    time(3, 4, tzinfo=timezone(timedelta(microseconds=-20)), fold=1),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=-5, microseconds=-7))),
    datetime(2026, 1, 2, 0, 0, 0, 1),
    datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=23, minutes=59, seconds=59))),
    datetime(2026, 10, 25, 2, 30, tzinfo=CEST, fold=1),
    *(date.min, date.max, date(2024, 2, 29)),
    *(time(), time.max, time(12, 30, fold=1), time(1, 2, 3, 4, tzinfo=CEST)),
    *(timedelta(), timedelta.min, timedelta.max, timedelta(microseconds=-1)),
    *(UID, uuid.UUID(int=0)),
    *map(Decimal, ["0", "-0", "0.00", "1E+9999999", "1E-30", "1." + "3" * 99, "Infinity"]),
    *map(Decimal, ["-Infinity", "NaN", "-NaN123", "sNaN", "sNaN9"]),
    *(Markup(""), Markup("<b>&amp;</b>"), Markup("\udc00")),
    {"cart": [{"id": 1, "price": Decimal("9.90"), "tags": {"a", "b"}}], "at": (date.max, None)},
]


@pytest.mark.parametrize(
    "value",
    VALUES,
    ids=lambda value: (
        repr(value)[:40].encode("ascii", "replace").decode()
        if type(value) is not int
        else f"int of {value.bit_length()} bits"
    ),
)
def test_every_type_comes_back_as_it_went_in(codec: Any, value: Any) -> None:
    """Each type of G12, at its edges, alone and inside each container, keeps type and value."""
    assert_round_trip(codec, value)
    assert_round_trip(codec, [value, {"key": value, "other": (value,)}])


def test_zones_become_offsets(codec: Any) -> None:
    """Of a named zone the offset at that moment is kept, and which of two equal clock times."""
    zone = ZoneInfo("Europe/Berlin")
    for fold in (0, 1):
        moment = datetime(2026, 10, 25, 2, 30, tzinfo=zone, fold=fold)
        back = codec.loads(codec.dumps(moment))
        assert back.utcoffset() == moment.utcoffset() == timedelta(hours=2 - fold)
        assert back.fold == fold


def test_two_nans_in_a_set_stay_two(codec: Any) -> None:
    """NaN is unequal to itself, so a set can hold several; none is lost."""
    nans = {float("nan"), float("nan"), Decimal("NaN"), Decimal("NaN")}
    assert len(codec.loads(codec.dumps(nans))) == 4


def test_the_decimal_context_does_not_matter(codec: Any) -> None:
    """Precision, traps and letter case of the current context change neither bytes nor value."""
    value = Decimal("1.23456789E+50")
    expected = codec.dumps(value)
    with localcontext(Context(prec=2, capitals=0, Emax=5, traps=[])):
        assert codec.dumps(value) == expected
        assert canonical(codec.loads(expected)) == canonical(value)
        with pytest.raises(ValueError, match="Decimal"):
            JSON.loads(b'{" n":"garbage"}')


text = st.text(st.characters()) | st.sampled_from(TAG_KEYS + [key + "__" for key in TAG_KEYS])
offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23))
zones = st.none() | st.builds(timezone, offsets)
folds = st.integers(0, 1)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.builds(
        lambda sign, bits, n: sign * 2**bits + n,
        st.sampled_from([1, -1]),
        st.integers(0, 20_000),
        st.integers(-2, 2),
    )
    | st.floats()
    | text
    | st.binary()
    | st.builds(lambda moment, fold: moment.replace(fold=fold), st.datetimes(timezones=zones), folds)
    | st.dates()
    | st.builds(lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.times(), zones, folds)
    | st.timedeltas()
    | st.uuids()
    | st.decimals().filter(lambda number: not number.is_snan())
    | st.builds(Markup, text)
)


@st.composite
def scalars(draw: st.DrawFn) -> Any:
    """Give the union a short name, since Hypothesis warns of strategies with a very long repr."""
    return draw(SCALARS)


hashables = st.recursive(
    scalars(), lambda inner: st.frozensets(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
)
values = st.recursive(
    hashables | st.sets(hashables, max_size=4) | st.decimals(),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(text, inner, max_size=5)
    ),
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(value=values)
@pytest.mark.parametrize("name", NAMES)
def test_any_value_round_trips(name: str, value: Any) -> None:
    """Whatever is built of the types of G12 comes back the same, and encodes the same again."""
    codec: Any = make_serializer(name)
    assert_round_trip(codec, value)
    assert codec.dumps(codec.loads(codec.dumps(value))) == codec.dumps(value)


# -- the bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ("é", '"é"'),
        ({"a": 1, "b": [1.5, None, True]}, '{"a":1,"b":[1.5,null,true]}'),
        ((1, 2), '{" t":[1,2]}'),
        (b"\xfb\xff", '{" b":"+/8="}'),
        (Markup("<b>"), '{" m":"<b>"}'),
        (UID, '{" u":"12345678123456781234567812345678"}'),
        ({"b", "a"}, '{" s":["a","b"]}'),
        (frozenset({2, 10}), '{" fs":[10,2]}'),
        (datetime(2026, 1, 2, 3, 4, tzinfo=CEST), '{" d":"2026-01-02T03:04:00+02:00"}'),
        (datetime(2026, 1, 2, fold=1), '{" d":"2026-01-02T00:00:00 fold"}'),
        (date(2026, 1, 2), '{" date":"2026-01-02"}'),
        (time(3, 4), '{" time":"03:04:00"}'),
        (timedelta(1, 2, 3), '{" td":[1,2,3]}'),
        (Decimal("1.10"), '{" n":"1.10"}'),
        (2**100, "1267650600228229401496703205376"),
        (-(16**600), f'{{" i":"-0x1{"0" * 600}"}}'),
        ({" t": [1]}, '{" di":{" t__":[1]}}'),
    ],
)
def test_the_json_form_is_stable(value: Any, data: str) -> None:
    """The bytes in Redis are part of the contract: another version must read them."""
    assert JSON.dumps(value) == data.encode()
    assert canonical(JSON.loads(data.encode())) == canonical(value)


def test_json_reads_what_flask_writes() -> None:
    """The tags that Flask has mean the same here, so its cookies' values can be taken over."""
    tag = pytest.importorskip("flask.json.tag")
    value = {"t": (1, b"x"), "m": Markup("<i>"), "u": UID, "di": {" t": [1]}, "l": [{"a": ()}]}
    data = tag.TaggedJSONSerializer().dumps(value).encode()
    assert canonical(JSON.loads(data)) == canonical(value)


@pytest.mark.parametrize("name", NAMES)
def test_sets_encode_alike_in_every_process(name: str) -> None:
    """String hashing differs from process to process, the bytes of a set do not."""
    if name == "msgpack":
        pytest.importorskip("msgspec")
    program = (
        "from luasession.codec import make_serializer;"
        "words = {w * n for w in 'abcdefgh' for n in range(9)};"
        f"value = [words, frozenset((w, frozenset(w)) for w in words)];"
        f"print(make_serializer({name!r}).dumps(value).hex())"
    )
    outputs = set()
    for seed in "1234":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        )
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_equal_sets_encode_alike(codec: Any) -> None:
    """Neither the order of insertion nor the history of a set shows in its bytes."""
    grown = set(range(0, 80_000, 8))
    grown -= set(range(800, 80_000, 8))
    assert codec.dumps(grown) == codec.dumps(set(range(792, -8, -8)))


def test_dict_order_is_part_of_the_value(codec: Any) -> None:
    """A dict comes back in its order, and two orders are two values."""
    one, other = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert list(codec.loads(codec.dumps(other))) == ["b", "a"]
    assert codec.dumps(one) != codec.dumps(other)


# -- the escape -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [*TAG_KEYS, " ", "  ", " future", " t__", " di__", " \ud800"])
def test_dicts_that_look_like_tags_stay_dicts(codec: Any, key: str) -> None:
    """A dict whose only key begins with a space is data, at any depth and with any content."""
    for content in ([1], "x", 5, {key: [1]}, {key: {key: (1,)}}, {f"{key}__": 1}, {key}):
        assert_round_trip(codec, {key: content})
        assert_round_trip(codec, [({key: content},), {"a": {key: content}, key: content}])


def test_unknown_tags_stay_dicts(codec: Any) -> None:
    """What a tag of some other version would look like is handed out as the dict it is."""
    assert JSON.loads(b'{" future":[1]}') == {" future": [1]}
    assert JSON.loads(b'{" t":[1],"b":2}') == {" t": [1], "b": 2}
    assert JSON.dumps({" future": [1]}) == b'{" di":{" future__":[1]}}'


# -- what is refused ------------------------------------------------------------------------------


class Colour(enum.IntEnum):
    RED = 1


class Mode(enum.StrEnum):
    ON = "on"


class Text(str):
    """Stands for the lazy strings and other look-alikes of frameworks."""


class Whole(int):
    pass


class Moment(datetime):
    pass


class Vague(tzinfo):
    """Has a name and no offset."""

    def utcoffset(self, moment: datetime | None) -> None:
        return None


Point = namedtuple("Point", "x y")
HERE = __name__

REFUSED = [
    (object(), "object"),
    (object, "type"),
    (print, "builtin_function_or_method"),
    (1j, "complex"),
    (bytearray(b"x"), "bytearray"),
    (memoryview(b"x"), "memoryview"),
    (range(3), "range"),
    ({}.keys(), "dict_keys"),
    (iter([]), "list_iterator"),
    (Colour.RED, f"{HERE}.Colour"),
    (Mode.ON, f"{HERE}.Mode"),
    (Text("x"), f"{HERE}.Text"),
    (Whole(1), f"{HERE}.Whole"),
    (Moment(2026, 1, 1), f"{HERE}.Moment"),
    (Point(1, 2), f"{HERE}.Point"),
    (OrderedDict(a=1), "collections.OrderedDict"),
    (defaultdict(int), "collections.defaultdict"),
    (Counter("a"), "collections.Counter"),
    (ValueError("x"), "ValueError"),
    (UTC, "datetime.timezone"),
    (datetime(2026, 1, 1, tzinfo=Vague()), "datetime.datetime whose tzinfo"),
    (time(1, tzinfo=ZoneInfo("Europe/Berlin")), "datetime.time whose tzinfo"),
    ({1: "x"}, "key of type int"),
    ({"a": 1, None: "x"}, "key of type NoneType"),
    ({(1,): "x"}, "key of type tuple"),
    ({Text("a"): "x"}, f"key of type {HERE}.Text"),
    ({Markup("a"): "x"}, "key of type markupsafe.Markup"),
]


@pytest.mark.parametrize(("value", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_other_types_are_refused_by_name(codec: Any, value: Any, name: str) -> None:
    """Anything that would not come back as it is raises TypeError with its qualified name and,
    when nested, with the path to it.
    """
    with pytest.raises(TypeError) as caught:
        codec.dumps(value)
    assert f"a {name}" in str(caught.value) or name in str(caught.value)
    assert " at " not in str(caught.value)
    with pytest.raises(TypeError) as caught:
        codec.dumps({"fine": [1], "items": [0, "a", (None,), {"x": (value,)}]})
    assert name in str(caught.value)
    assert str(caught.value).endswith(" at ['items'][3]['x'][0]")


def test_the_path_leads_through_sets(codec: Any) -> None:
    """Members of a set have no place, but what is inside them does."""
    with pytest.raises(TypeError, match=r"\.Colour at \['a'\]\[\*\]\[1\]$"):
        codec.dumps({"a": {(1, Colour.RED)}})


def test_the_first_of_several_faults_is_named(codec: Any) -> None:
    """Message and path speak of one and the same fault."""
    with pytest.raises(TypeError, match=r"cannot store a complex at \[1\]\[2\]$"):
        codec.dumps([0, {2: 1j}, object()])


@pytest.mark.parametrize(
    "wrap",
    [lambda v: [v], lambda v: (v,), lambda v: {"k": v}, lambda v: {" k": v}, lambda v: {"\ud800": v}],
    ids=["list", "tuple", "dict", "escaped dict", "surrogate key"],
)
def test_depth_has_a_limit_that_says_so(codec: Any, wrap: Any) -> None:
    """Up to MAX_DEPTH everything round-trips, below it a ValueError in words, at any depth."""
    assert_round_trip(codec, nested(MAX_DEPTH, wrap))
    for depth in (MAX_DEPTH + 1, 1000, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            codec.dumps(nested(depth, wrap))


def test_circles_are_refused(codec: Any) -> None:
    """A value that contains itself raises ValueError, not RecursionError."""
    circle: list[Any] = []
    circle.append({"again": (circle,)})
    with pytest.raises(ValueError, match="circular"):
        codec.dumps(circle)


def test_a_stack_that_is_nearly_full_is_no_crash(codec: Any) -> None:
    """RecursionError stays inside, whatever the caller has left of the stack."""
    value = nested(MAX_DEPTH, lambda inner: (inner,))
    data = codec.dumps(value)

    def fill(frames: int, function: Any, argument: Any) -> Any:
        return fill(frames - 1, function, argument) if frames else function(argument)

    free = sys.getrecursionlimit() - len(inspect.stack(0))
    for left in range(60, free, 60):
        for function, argument, expected in ((codec.dumps, value, data), (codec.loads, data, value)):
            try:
                outcome = fill(free - left, function, argument)
            except ValueError as error:
                outcome = str(error)[:17]
            assert outcome in (expected, "nested too deeply")
    with pytest.raises(ValueError, match="nested too deeply"):
        fill(free - 60, codec.dumps, value)


# -- what is not ours -----------------------------------------------------------------------------

MALFORMED = [
    *(b"", b" ", b"x", b"nul", b"[", b"[1,]", b'{"a"}', b'"', b'"\n"', b"1 2", b"[] x", b"\xff"),
    *(b"\x80\x04N.", b'"\xc3"', b"\xef\xbb\xbf1", b"1" * 5000, b"-", b"01", b"'a'"),
    *(b'{" u":5}', b'{" u":"x"}', b'{" u":null}', b'{" u":{" m":"x"}}'),
    *(b'{" b":"x"}', b'{" b":"a b="}', b'{" b":"\xc3\xa9"}', b'{" b":[]}', b'{" b":"YQ"}', b'{" b":"YQ==!"}'),
    *(b'{" d":"x"}', b'{" d":5}', b'{" d":"2026-13-01"}', b'{" d":"2026-01-01 fold fold"}'),
    *(b'{" date":"2026-02-30"}', b'{" time":"25:00"}', b'{" time":""}'),
    *(b'{" td":[1e999]}', b'{" td":[NaN]}', b'{" td":["x"]}', b'{" td":[9999999999]}'),
    *(b'{" n":5}', b'{" n":"x"}', b'{" n":"1e99999999999999999999"}', b'{" n":""}'),
    *(b'{" s":[[]]}', b'{" s":[{}]}', b'{" s":{}}', b'{" s":[{" n":"sNaN"}]}', b'{" fs":[{" s":[]}]}'),
    *(b'{" t":{}}', b'{" t":"ab"}', b'{" t":{" s":[1]}}', b'{" m":1}', b'{" m":{" m":"x"}}'),
    *(b'{" i":5}', b'{" i":"x"}', b'{" i":""}', b'{" x":"a"}', b'{" x":{" b":"/w=="}}'),
    *(b'{" di":1}', b'{" di":{}}', b'{" di":{"a":1}}', b'{" di":{"a__":1,"b__":2}}'),
    *(b'{" di":{" u":"12345678123456781234567812345678"}}', b'{" dx":{"zz":1}}', b'{" dx":{"ff":1}}'),
]


@pytest.mark.parametrize("data", MALFORMED, ids=repr)
def test_malformed_json_is_a_value_error(data: bytes) -> None:
    """Whatever is wrong with stored data, loads says it with ValueError."""
    with pytest.raises(ValueError):
        JSON.loads(data)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xc1", b"\x91", b"\xa1\xff", b"\x01\x01", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"),
        *(b"\x81\x01\x01", b"\x81\x91\x01\x01", b"\x81\x80\x01", b"\x81\xc4\x01a\x01"),
        *(b"\xd4\x05a", b"\x91\xd4\x05a", b"\xd6\xff\x00\x00\x00\x00", b"\x81\xa1a\xd6\xff\x00\x00\x00\x00"),
        *(b"\x81\xa2 u\x05", b"\x81\xa2 s\x91\x90", b"\x81\xa2 x\xc4\x01\xff", b"\x81\xa2 b\xc4\x01a"),
    ],
    ids=repr,
)
def test_malformed_msgpack_is_a_value_error(data: bytes) -> None:
    """Truncated data, keys that are no strings, extension types, tags with wrong content."""
    pytest.importorskip("msgspec")
    with pytest.raises(ValueError):
        MsgpackSerializer().loads(data)


def assert_value_or_value_error(codec: Any, data: bytes) -> None:
    try:
        value = codec.loads(data)
    except ValueError:
        return
    assert_round_trip(codec, value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text | st.integers(0, 9**9).map(str),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(text, inner, max_size=2)
        | st.builds(lambda key, item: {key: item}, st.sampled_from(TAG_KEYS), inner)
    ),
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary())
@pytest.mark.parametrize("name", NAMES)
def test_random_bytes_only_ever_value_error(name: str, data: bytes) -> None:
    """Garbage either is a value, which then round-trips, or raises ValueError."""
    assert_value_or_value_error(make_serializer(name), data)


@settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=500)
@given(value=plain)
@pytest.mark.parametrize("name", NAMES)
def test_random_tags_only_ever_value_error(name: str, value: Any) -> None:
    """Tags with any content, well-formed or not, are values or ValueErrors."""
    codec: Any = make_serializer(name)
    if name == "json":
        return assert_value_or_value_error(codec, json.dumps(value).encode())
    msgspec = pytest.importorskip("msgspec")
    try:
        data = msgspec.msgpack.encode(value)
    except (ValueError, OverflowError):
        return None
    return assert_value_or_value_error(codec, data)


MIB = 2**20
BOMBS = [
    b"[" * MIB,
    b"[" * (MIB // 2) + b"]" * (MIB // 2),
    b'{"a":' * (MIB // 5),
    b'{" t":[' * (MIB // 7),
    b'{" s":[' + b'{" t":[' * 1400 + b"]}" * 1400 + b"]}",
    b'{" di":' * (MIB // 7),
    b"1" * MIB,
    b'{" n":"1e999999999999"}',
    b'{" n":"' + b"9" * MIB + b'"}',
    b'{" i":"' + b"f" * MIB + b'"}',
    b'{" u":"' + b"f" * MIB + b'"}',
    b'{" d":"' + b"1" * MIB + b'"}',
    b"1." + b"7" * MIB,
    b"[" + b"{}," * (MIB // 3) + b"{}]",
    b"\x91" * MIB,
    b"\x81\xa1a" * (MIB // 3),
    b"\x81\xa2 t\x91" * (MIB // 5),
    b"\xdd\xff\xff\xff\xff" * (MIB // 5),
    b"\xc6\xff\xff\xff\xff" + b"x" * MIB,
]


@pytest.mark.parametrize("data", BOMBS, ids=lambda data: f"{data[:12]!r}")
def test_bombs_are_harmless(codec: Any, data: bytes) -> None:
    """A mebibyte of nesting, digits or false lengths is a value of a type we know, or a ValueError."""
    try:
        value = codec.loads(data)
    except ValueError:
        return
    kinds = {
        dict,
        list,
        str,
        bytes,
        int,
        float,
        tuple,
        set,
        frozenset,
        Decimal,
        datetime,
        date,
        time,
        timedelta,
    }
    assert type(value) in kinds


# -- choosing a serializer ------------------------------------------------------------------------


def test_serializers_by_name() -> None:
    """The two names give the two serializers."""
    pytest.importorskip("msgspec")
    assert type(make_serializer("json")) is JSONSerializer
    assert type(make_serializer("msgpack")) is MsgpackSerializer


def test_own_serializers_are_taken_as_they_are() -> None:
    """An object with dumps and loads is returned itself, a module too."""
    assert make_serializer(JSON) is JSON
    assert make_serializer(json) is json


@pytest.mark.parametrize(
    ("wrong", "error"), [("pickle", ValueError), ("", ValueError), (None, TypeError), (5, TypeError)]
)
def test_anything_else_is_refused(wrong: Any, error: type[Exception]) -> None:
    """The message says what was expected and what was given."""
    with pytest.raises(error, match="expected 'json', 'msgpack' or an object") as caught:
        make_serializer(wrong)
    assert (repr(wrong) if type(wrong) is str else type(wrong).__name__) in str(caught.value)


def test_half_a_serializer_is_refused() -> None:
    """Both methods are needed, and they have to be callable."""

    class Half:
        loads = None

        def dumps(self, value: Any) -> bytes:
            return b""

    with pytest.raises(TypeError, match="Half"):
        make_serializer(Half())


def test_msgpack_without_msgspec_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON works without the extra, and asking for msgpack names it."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    make_serializer("json")
    with pytest.raises(ImportError, match=r"pip install 'luasession\[msgpack\]'"):
        make_serializer("msgpack")


# -- immutability ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 1, 1.5, "x", b"x", Markup("x"), UID, Decimal(1), datetime.max, date.max),
        *(time.max, timedelta.max, (), (1, ("a", frozenset({b"x", (None,)}))), frozenset()),
        nested(100_000, lambda inner: (inner,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_scalars_and_tuples_of_them_are_immutable(value: Any) -> None:
    """What can't change in place needs no comparison at the end of a request."""
    assert is_immutable(value)


@pytest.mark.parametrize(
    "value",
    [
        *([], {}, set(), ([],), (1, (2, ({},))), object(), bytearray(), Text("x"), Colour.RED),
        *(Point(1, 2), Moment(2026, 1, 1), (Text("x"),), frozenset({Point(1, 2)})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_counts_as_mutable(value: Any) -> None:
    """Containers, tuples that hold one, and subclasses, which may carry attributes."""
    assert not is_immutable(value)
