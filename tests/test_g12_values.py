"""G12: values come back as they went in, and what cannot be stored is refused by name."""

from __future__ import annotations

import datetime as dt
import logging
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from flask import session
from flask.sessions import session_json_serializer
from markupsafe import Markup

from luasession import SessionConflict, SessionTooLarge
from luasession.codec import JSONSerializer
from luasession.signals import session_corrupt

from .conftest import MakeApp, TestApp


class Backwards:
    """A serializer of one's own: the bytes of the default, from the last to the first."""

    def __init__(self) -> None:
        self._json = JSONSerializer()

    def dumps(self, value: Any) -> bytes:
        return self._json.dumps(value)[::-1]

    def loads(self, data: bytes) -> Any:
        return self._json.loads(data[::-1])


SERIALIZERS = ["json", "msgpack", Backwards()]
by_serializer = pytest.mark.parametrize("serializer", SERIALIZERS, ids=["json", "msgpack", "own"])

ZONE = dt.timezone(dt.timedelta(hours=5, minutes=30))
SETS: dict[str, Any] = {"set": {1, "a", (2,)}, "frozenset": frozenset("ab"), "no_set": set()}
VALUES: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "int": -5,
    "big": 2**70,
    "zero": -0.0,
    "half": 0.5,
    "str": "ü\x00\U0001f600",
    "empty": "",
    "half_a_pair": "\ud83d",
    "bytes": b"\x00\xff",
    "no_bytes": b"",
    "list": [1, [2, None]],
    "tuple": (1, ("a", [2])),
    "dict": {"b": 1, "a": {" t": [1]}},
    "no_dict": {},
    "naive": dt.datetime(2026, 1, 2, 3, 4, 5, 678),
    "aware": dt.datetime(2026, 1, 2, tzinfo=ZONE),
    "date": dt.date(2026, 1, 2),
    "time": dt.time(1, 2, 3),
    "ago": dt.timedelta(days=-1, microseconds=5),
    "uuid": UUID(int=7),
    "decimal": Decimal("1.10"),
    "markup": Markup("<b>"),
    "nested": {"m": [Markup("x")]},
}

#: Keys that look like metadata, like a pattern or like nothing, and one that no journal can name.
KEYS = ["@v", "@", "@@", "@@v", "@t", "", " t", "*", "nul\x00byte", "ünï", "\ud800", "j" * 300, "k" * 3000]
KEY_NAMES = [
    "meta",
    "at",
    "at_at",
    "at_meta",
    "tomb",
    "empty",
    "tag",
    "star",
    "nul",
    "utf8",
    "surrogate",
    "300",
    "3000",
]


@by_serializer
def test_every_type_comes_back(make_app: MakeApp, serializer: Any) -> None:
    """All types come back as they were, type for type: cached, read cold, and over an older snapshot."""
    app = make_app(SESSION_SERIALIZER=serializer)
    elsewhere = app.another()
    browser = app.browser()
    browser.run(lambda: session.update(first=1))
    browser.twin(elsewhere).run(lambda: session["first"])
    browser.run(lambda: session.update(VALUES | SETS))
    for reader in (browser, browser.twin(app.another()), browser.twin(elsewhere)):
        seen = reader.run(lambda: dict(session))
        assert seen.pop("first") == 1
        # The repr tells 1 from True, a list from a tuple, 0.0 from -0.0, a str from a Markup.
        assert {key: repr(seen.pop(key)) for key in VALUES} == {key: repr(VALUES[key]) for key in VALUES}
        assert seen == SETS
        assert [type(seen[key]) for key in SETS] == [set, frozenset, set]


@by_serializer
def test_mutable_values_changed_in_place(make_app: MakeApp, serializer: Any) -> None:
    """Lists, dicts and sets changed in place count, however deep, and nothing else is written."""
    app = make_app(SESSION_SERIALIZER=serializer)
    browser = app.browser()
    start = {"list": [1], "dict": {"a": 1}, "set": {1}, "tuple": ([1], 2), "deep": {"a": [{"b": {1}}]}}
    browser.run(lambda: session.update(start, seen=[1], untouched=[1]))

    def change() -> None:
        session["list"].append(2)
        session["dict"]["b"] = session["seen"]
        session["set"].discard(1)
        session["tuple"][0].append(2)
        session["deep"]["a"][0]["b"].add(2)

    browser.run(change)
    assert browser.twin(app.another()).run(lambda: (session.version, dict(session))) == (
        2,
        {
            "list": [1, 2],
            "dict": {"a": 1, "b": [1]},
            "set": set(),
            "tuple": ([1, 2], 2),
            "deep": {"a": [{"b": {1, 2}}]},
            "seen": [1],
            "untouched": [1],
        },
    )


class Text:
    """A serializer of one's own that gives text, and cannot take anything but str."""

    def dumps(self, value: str) -> str:
        return "=" + value

    def loads(self, data: bytes) -> str:
        return data.decode("utf-8", "surrogatepass").removeprefix("=")


@pytest.mark.parametrize(
    ("serializer", "value"),
    [(session_json_serializer, ("ü", Markup("<b>"))), (Text(), "ü\ud83d")],
    ids=["flask", "own"],
)
def test_a_serializer_that_gives_text(make_app: MakeApp, serializer: Any, value: Any) -> None:
    """Serializers whose dumps gives a str, Flask's own among them, can be used as they are."""
    app = make_app(SESSION_SERIALIZER=serializer)
    browser = app.browser()
    browser.run(lambda: session.update(a=value))
    handle = browser.run(lambda: session.handle)
    assert browser.twin(app.another()).run(lambda: session["a"]) == value
    assert app.stored(handle)[b"a"] == serializer.dumps(value).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("key", KEYS, ids=KEY_NAMES)
def test_any_str_is_a_key(make_app: MakeApp, key: str) -> None:
    """Set, read, iterated, changed, found in conflict and deleted as any other key, beside its neighbours."""
    app = make_app(SESSION_CONFLICT="raise")
    browser, elsewhere = app.browser(), app.another()
    browser.run(lambda: session.update({key: [1], "other": 1}))
    assert browser.twin(elsewhere).run(lambda: dict(session)) == {key: [1], "other": 1}
    other = browser.twin()

    def overlapping() -> None:
        session[key].append("ours")
        other.run(lambda: session.update({key: ["theirs"]}))
        with pytest.raises(SessionConflict) as caught:
            session.commit()
        assert caught.value.keys == (key,)
        session.reload()

    browser.run(overlapping)
    assert other.twin(elsewhere).run(lambda: (session.version, dict(session))) == (
        2,
        {key: ["theirs"], "other": 1},
    )
    other.run(lambda: session.pop(key))
    assert other.twin(elsewhere).run(lambda: (key in session, dict(session))) == (False, {"other": 1})


def fault_on_top() -> None:
    session["thing"] = object()


def fault_inside() -> None:
    session["thing"] = {"deep": [1, {"er": object()}]}


def fault_in_place() -> None:
    session["thing"].append(object())


def fault_by_subclass() -> None:
    session["thing"] = OrderedDict(a=1)


FAULTS = [fault_on_top, fault_inside, fault_in_place, fault_by_subclass]


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_type_error_writes_nothing(make_app: MakeApp, fault: Callable[[], None], serializer: str) -> None:
    """An unserializable value: TypeError naming key and type for the 500 handler, nothing written."""
    app = make_app(SESSION_SERIALIZER=serializer)
    seen: list[Any] = []

    def answer(error: Any) -> tuple[str, int]:
        seen.append(error.original_exception)
        return "no", 500

    app.flask.register_error_handler(500, answer)
    browser = app.browser()
    browser.run(lambda: session.update(thing=[1], gone=1))
    handle = browser.run(lambda: session.handle)
    before = app.stored(handle)

    def view() -> None:
        session["before"] = 1
        del session["gone"]
        fault()
        session["after"] = 1
        session.permanent = True
        session.regenerate()

    browser.run(view, status=500)
    assert browser.response is not None
    assert browser.response.text == "no"
    assert browser.set_cookies == {}
    [error] = seen
    assert type(error) is TypeError
    assert "'thing'" in str(error)
    assert ("OrderedDict" if fault is fault_by_subclass else "object") in str(error)
    assert app.stored(handle) == before
    assert browser.run(lambda: dict(session)) == {"thing": [1], "gone": 1}


def test_a_type_error_starts_no_session(app: TestApp) -> None:
    """A new visitor whose value cannot be stored gets no session; errorhandler(TypeError) may answer."""
    seen: list[Any] = []

    def answer(error: TypeError) -> tuple[str, int]:
        seen.append(str(error))
        return "mine", 422

    app.flask.register_error_handler(TypeError, answer)
    browser = app.browser()
    browser.run(lambda: session.update(fine=1, thing=object()), status=422)
    assert browser.response is not None
    assert browser.response.text == "mine"
    assert "'thing'" in seen[0]
    assert browser.set_cookies == {}
    assert app.keys() == []


def test_a_value_that_contains_itself(make_valkey_app: MakeApp) -> None:
    """A circular value is refused with the key named, and nothing is written."""
    app = make_valkey_app()
    seen: list[str] = []

    def answer(error: ValueError) -> tuple[str, int]:
        seen.append(str(error))
        return "mine", 422

    app.flask.register_error_handler(ValueError, answer)

    def view() -> None:
        session["ring"] = ring = [1]
        ring.append(ring)  # type: ignore[arg-type]

    app.browser().run(view, status=422)
    assert "'ring'" in seen[0]
    assert app.keys() == []


def test_a_refused_commit_can_be_mended(app: TestApp) -> None:
    """TypeError out of session.commit() leaves the session usable: what is mended is stored."""
    browser = app.browser()

    def view() -> None:
        session.update(fine=1, thing=object())
        assert session.modified
        with pytest.raises(TypeError, match="'thing'"):
            session.commit()
        assert app.keys() == []
        session["thing"] = "mended"

    browser.run(view)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"fine": 1, "thing": "mended"}


@pytest.mark.parametrize("key", [5, None, b"a", 1.5, ("a",)])
def test_a_key_that_is_no_str(make_valkey_app: MakeApp, key: Any) -> None:
    """A non-str key is a TypeError at the assignment, however it is assigned; to read it is to miss it."""
    app = make_valkey_app()
    browser = app.browser()

    def view() -> None:
        for assign in (
            lambda: session.__setitem__(key, 1),
            lambda: session.update({key: 1}),
            lambda: session.setdefault(key, 1),
            lambda: session.set(key, 1, ttl=5),  # type: ignore[attr-defined]
        ):
            with pytest.raises(TypeError, match=type(key).__name__):
                assign()
        assert key not in session
        assert session.get(key) is None
        with pytest.raises(KeyError):
            session.pop(key)
        session["a"] = 1

    browser.run(view)
    assert browser.run(lambda: dict(session)) == {"a": 1}


class Corrupt:
    """A session of a=1, b=[2] and c=3 in which the stored bytes of ``a`` are spoiled."""

    RUBBISH = b'{"secret-rubbish":'

    def __init__(self, app: TestApp) -> None:
        self.first = app.browser()
        self.first.run(lambda: session.update(a=1, b=[2], c=3))
        self.handle: str = self.first.run(lambda: session.handle)
        self.spoil(app, b"a", self.RUBBISH)
        # In a process that has not seen it: the other one still holds a snapshot from before.
        self.app = app.another()
        self.browser = self.first.twin(self.app)
        self.told: list[tuple[str, str, str]] = []
        session_corrupt.connect(self._receive, self.app.flask)

    def spoil(self, app: TestApp, name: bytes, value: bytes) -> None:
        assert app.server is not None
        with app.server.client() as client:
            client.hset(app.prefix + self.handle, name, value)

    def _receive(self, _sender: Any, handle: str, key: str, error: Exception) -> None:
        self.told.append((handle, key, type(error).__name__))

    @property
    def stored(self) -> dict[bytes, bytes]:
        return self.app.stored(self.handle)


def test_what_does_not_decode_reads_as_missing(app: TestApp, caplog: pytest.LogCaptureFixture) -> None:
    """For each way to read; session_corrupt is sent and one record logged, without the value."""
    corrupt = Corrupt(app)

    def view() -> None:
        assert session.get("a") is None
        assert "a" not in session
        with pytest.raises(KeyError):
            session["a"]
        with pytest.raises(KeyError):
            del session["a"]
        assert session.pop("a", "default") == "default"
        assert list(session) == ["b", "c"]
        assert len(session) == 2
        assert dict(session) == {"b": [2], "c": 3}
        assert list(session.items()) == [("b", [2]), ("c", 3)]
        assert list(session.values()) == [[2], 3]
        assert not session.modified

    with caplog.at_level(logging.INFO, "luasession"):
        corrupt.browser.run(view)
    [record] = [record for record in caplog.records if record.name == "luasession"]
    assert record.levelno >= logging.WARNING
    assert corrupt.handle in record.getMessage()
    assert "'a'" in record.getMessage()
    assert "secret-rubbish" not in caplog.text
    assert [told[:2] for told in corrupt.told] == [(corrupt.handle, "a")]
    assert corrupt.stored[b"a"] == Corrupt.RUBBISH
    assert corrupt.browser.run(lambda: session.version) == 1


def test_what_does_not_decode_is_left_as_it_is(app: TestApp) -> None:
    """Sets, in-place changes, deletes and a rotation beside it are stored, and it stays for inspection."""
    corrupt = Corrupt(app)

    def view() -> None:
        assert dict(session) == {"b": [2], "c": 3}
        session["b"].append(4)
        session["d"] = 5
        session.pop("c")
        session.pop("a", None)
        session.regenerate()

    corrupt.browser.run(view)
    fields = {name: value for name, value in corrupt.stored.items() if not name.startswith(b"@")}
    assert fields == {b"a": Corrupt.RUBBISH, b"b": b"[2,4]", b"d": b"5"}
    assert corrupt.browser.run(lambda: dict(session)) == {"b": [2, 4], "d": 5}


@pytest.mark.parametrize("how", ["blind", "after reading", "setdefault"])
def test_what_does_not_decode_can_be_set_anew(app: TestApp, how: str) -> None:
    """Set on purpose, the key is stored as any other."""
    corrupt = Corrupt(app)

    def view() -> None:
        if how == "setdefault":
            assert session.setdefault("a", 9) == 9
            return
        if how == "after reading":
            assert session.get("a") is None
        session["a"] = 9

    corrupt.browser.run(view)
    assert corrupt.stored[b"a"] == b"9"
    assert corrupt.browser.run(lambda: dict(session)) == {"a": 9, "b": [2], "c": 3}


@pytest.mark.parametrize("serializer", ["json", "msgpack"])
@pytest.mark.parametrize(
    "rubbish", [b"\xff\xfe", b"\xc1", b"[1", b'{" u":"no-uuid"}', b"nul", b"\x81\xa2 u\x01"]
)
def test_rubbish_of_any_sort(make_valkey_app: MakeApp, serializer: str, rubbish: bytes) -> None:
    """Whatever the bytes are, reading them raises nothing else and hides no other key."""
    corrupt = Corrupt(make_valkey_app(SESSION_SERIALIZER=serializer))
    corrupt.spoil(corrupt.app, b"a", rubbish)
    assert corrupt.browser.run(lambda: dict(session)) == {"b": [2], "c": 3}
    assert [told[1] for told in corrupt.told] == ["a"]


def test_a_field_that_is_no_key(app: TestApp) -> None:
    """A hash field whose name is no text, put there by somebody else, is not shown and stays."""
    corrupt = Corrupt(app)
    corrupt.spoil(app, b"a", b"1")
    corrupt.spoil(app, b"\xff\xfe", b"1")
    corrupt.browser.run(lambda: session.update(c=len(session)))
    assert corrupt.browser.run(lambda: dict(session)) == {"a": 1, "b": [2], "c": 3}
    assert corrupt.stored[b"\xff\xfe"] == b"1"
    assert corrupt.told == []


@pytest.mark.parametrize("cache_ttl", [2.0, None])
def test_ten_thousand_keys(make_app: MakeApp, cache_ttl: float | None) -> None:
    """Ten thousand keys are set in one commit, and deleted in one."""
    app = make_app(SESSION_CACHE_TTL=cache_ttl)
    browser = app.browser()
    keys = {f"key{n}": n for n in range(10_000)}
    browser.run(lambda: session.update(keys))
    elsewhere = browser.twin(app.another())
    assert elsewhere.run(lambda: (session.version, dict(session))) == (1, keys)

    def delete() -> None:
        for key in list(session):
            del session[key]

    browser.run(delete)
    assert browser.twin(elsewhere.app).run(lambda: (session.version, dict(session))) == (2, {})
    handle = browser.run(lambda: session.handle)
    assert all(name.startswith(b"@") for name in app.stored(handle))


def test_a_value_of_a_megabyte(app: TestApp) -> None:
    """It is stored, read elsewhere, and changed beside and in itself."""
    browser = app.browser()
    big = ["x" * 1_000_000]
    browser.run(lambda: session.update(big=big))
    elsewhere = browser.twin(app.another())
    assert elsewhere.run(lambda: session["big"]) == big
    elsewhere.run(lambda: session.update(small=1))
    elsewhere.run(lambda: session["big"].append("end"))
    assert elsewhere.twin(app).run(lambda: dict(session)) == {"big": [*big, "end"], "small": 1}


def refused(app: TestApp) -> list[SessionTooLarge]:
    """Collect what the app's 413 handler sees."""
    seen: list[SessionTooLarge] = []

    def answer(error: SessionTooLarge) -> tuple[str, int]:
        seen.append(error)
        return "too large", 413

    app.flask.register_error_handler(413, answer)
    return seen


def test_a_session_may_have_so_many_bytes(make_app: MakeApp) -> None:
    """Names and values together may reach SESSION_MAX_BYTES; one byte more is a 413 that writes nothing."""
    app = make_app(SESSION_MAX_BYTES=1000)
    seen = refused(app)
    browser = app.browser()
    browser.run(lambda: session.update(k="x" * 998), status=413)
    assert browser.set_cookies == {}
    assert app.keys() == []
    # The name and the quotes are 3 bytes.
    browser.run(lambda: session.update(k="x" * 987, d=123456789))
    handle = browser.run(lambda: session.handle)
    before = app.stored(handle)

    def change() -> None:
        session["k"] = "x" * 988
        session["d"] = 123456789
        session.regenerate()

    browser.run(change, status=413)
    assert browser.set_cookies == {}
    assert browser.response is not None
    assert browser.response.text == "too large"
    assert app.stored(handle) == before
    assert [(error.size, error.limit) for error in seen] == [(1001, 1000), (1001, 1000)]
    assert browser.run(lambda: len(session["k"])) == 987


@pytest.mark.parametrize("name", ["label", "principal"])
def test_label_and_principal_have_a_bound(make_app: MakeApp, name: str) -> None:
    """What is kept beside the keys may have as many bytes as these, and no more: 413, and nothing is written."""
    app = make_app(SESSION_MAX_BYTES=1000)
    browser = app.browser()
    browser.run(lambda: session.update(k=1))
    handle = browser.run(lambda: session.handle)
    before = app.stored(handle)

    def change() -> None:
        session["k"] = 2
        setattr(session, name, "x" * 1000)

    browser.run(change, status=413)
    assert app.stored(handle) == before
    browser.run(lambda: setattr(session, name, "x" * 998))
    assert browser.run(lambda: len(getattr(session, name))) == 998


def test_without_a_handler_too_large_is_a_plain_413(make_valkey_app: MakeApp) -> None:
    """SessionTooLarge answers by itself, and says nothing of sizes or keys to the browser."""
    app = make_valkey_app(SESSION_MAX_BYTES=100)
    browser = app.browser()
    browser.run(lambda: session.update(private="x" * 200), status=413)
    assert browser.response is not None
    assert "too large" in browser.response.text
    assert "private" not in browser.response.text
    assert "100" not in browser.response.text


def test_what_does_not_grow_passes(make_app: MakeApp) -> None:
    """A session over the limit, which has been lowered, can shrink, stay as large, and not grow."""
    first = make_app()
    browser = first.browser()
    browser.run(lambda: session.update(k="x" * 900, b="y" * 90))
    app = first.another(SESSION_MAX_BYTES=500)
    seen = refused(app)
    lower = browser.twin(app)
    lower.run(lambda: session.update(k="z" * 900))
    lower.run(lambda: session.update(k="z" * 901), status=413)
    lower.run(lambda: session.update(k="z" * 910, b="y" * 80))
    lower.run(lambda: session.pop("b"))
    lower.run(lambda: session.update(b=1), status=413)
    assert lower.run(lambda: dict(session)) == {"k": "z" * 910}
    lower.run(lambda: session.update(k="z"))
    lower.run(lambda: session.update(b=1))
    assert lower.run(lambda: dict(session)) == {"k": "z", "b": 1}
    assert len(seen) == 2


def test_in_place_growth_counts_too(make_app: MakeApp) -> None:
    """A nested value that grows over the limit is refused, and so is the rest of that request."""
    app = make_app(SESSION_MAX_BYTES=100)
    browser = app.browser()
    browser.run(lambda: session.update(cart=["x" * 50]))

    def view() -> None:
        session["a"] = 1
        session["cart"].append("y" * 50)

    browser.run(view, status=413)
    assert browser.twin(app.another()).run(lambda: dict(session)) == {"cart": ["x" * 50]}
