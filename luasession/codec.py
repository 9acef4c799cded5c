"""The bytes of one session value.

Both formats share one table of tags: what a format can't write as it is becomes a dict with a
single key that begins with a space, as in Flask's :class:`~flask.json.tag.TaggedJSONSerializer`,
so ``(1, 2)`` is ``{" t":[1,2]}``. Types are matched exactly. A subclass would come back as its
base, so it is refused and not changed on the way. Of a time zone the UTC offset is kept.
"""

from __future__ import annotations

from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Context, Decimal, InvalidOperation
from functools import partial
from json import JSONDecoder, JSONEncoder
from json.encoder import encode_basestring
from types import NoneType
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from uuid import UUID

from markupsafe import Markup

#: How many containers may be nested in one another. A fixed number well below Python's recursion
#: limit, since what was stored at a shallow point of the stack must be readable at a deep one.
MAX_DEPTH = 200

_TOO_DEEP = f"nested too deeply (more than {MAX_DEPTH} levels) or circular (contains itself)"

# A context of our own: the thread's current one could write "1e5" or read garbage as NaN.
_DECIMAL = Context(capitals=1, traps=[InvalidOperation])

_Moment = TypeVar("_Moment", datetime, time)


class Serializer(Protocol):
    """What ``SESSION_SERIALIZER`` may be: one value to bytes and back."""

    def dumps(self, value: Any, /) -> bytes | str:
        """Encode a value, or raise :exc:`TypeError`."""

    def loads(self, data: bytes, /) -> Any:
        """Decode a value, or raise :exc:`ValueError`."""


def _dump_text(value: str) -> bytes:
    return value.encode("utf-8", "surrogatepass")


def _load_text(content: bytes) -> str:
    return content.decode("utf-8", "surrogatepass")


def _dump_moment(value: datetime | time) -> str:
    if value.tzinfo is not None and value.utcoffset() is None:
        # A time of day in a named zone: its ISO form would come back naive.
        raise TypeError(f"cannot store a {_name(type(value))} whose tzinfo gives no UTC offset")
    return value.isoformat() + " fold" * value.fold


def _load_moment(kind: type[_Moment], content: str) -> _Moment:
    text = content.removesuffix(" fold")
    moment = kind.fromisoformat(text).replace(fold=int(text != content))
    if text[-16:-6] in ("+00:00:00.", "-00:00:00."):
        # fromisoformat() reads an offset of less than a second as none at all.
        fraction = timedelta(microseconds=int(text[-16] + text[-6:]))
        moment = moment.replace(tzinfo=timezone(fraction))
    return moment


def _load_escaped(content: dict[str, Any]) -> dict[str, Any]:
    [(key, value)] = content.items()
    if not key.endswith("__"):
        raise ValueError("an escaped key ends with two underscores")
    return {key[:-2]: value}


def _load_hex_keys(content: dict[str, Any]) -> dict[str, Any]:
    return {_load_text(bytes.fromhex(key)): value for key, value in content.items()}


def _unfrozen(kind: type) -> Any:
    """Return the type that a class of freezegun's stands for, or the same type."""
    if not kind.__module__.startswith("freezegun"):
        return kind
    return next((base for base in kind.__mro__ if base.__module__ == "datetime"), kind)


class _Tag(NamedTuple):
    """One type that the formats lack.

    :param key: the only key of the dict that stands for a value. Never ends with ``__``, which
        tells an escaped dict from a tag.
    :param kind: the exact type of the value.
    :param inner: the exact type of what stands under the key.
    """

    key: str
    kind: type
    inner: type
    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


_TAGS = (
    _Tag(" t", tuple, list, list, tuple),
    _Tag(" s", set, list, list, set),
    _Tag(" fs", frozenset, list, list, frozenset),
    _Tag(
        " b",
        bytes,
        str,
        lambda value: b2a_base64(value, newline=False).decode(),
        lambda content: a2b_base64(content, strict_mode=True),
    ),
    _Tag(" m", Markup, str, str, Markup),
    _Tag(" u", UUID, str, lambda value: value.hex, UUID),
    _Tag(" n", Decimal, str, _DECIMAL.to_sci_string, lambda content: Decimal(content, _DECIMAL)),
    # Bound here, as freezegun puts classes of its own in the place of names.
    _Tag(" d", _unfrozen(datetime), str, _dump_moment, partial(_load_moment, _unfrozen(datetime))),
    _Tag(" date", _unfrozen(date), str, date.isoformat, _unfrozen(date).fromisoformat),
    _Tag(" time", time, str, _dump_moment, partial(_load_moment, time)),
    _Tag(
        " td",
        timedelta,
        list,
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda content: timedelta(*content),
    ),
    # Hexadecimal, since Python refuses decimal digits beyond sys.get_int_max_str_digits().
    _Tag(" i", int, str, hex, lambda content: int(content, 16)),
    # MessagePack only: text with lone surrogates, which has no UTF-8 form.
    _Tag(" x", str, bytes, _dump_text, _load_text),
)
_BY_TYPE = {tag.kind: tag for tag in _TAGS}
_BY_KEY = {tag.key: tag for tag in _TAGS}
# A dict that would read as a tag, and (MessagePack only) one whose keys have no UTF-8 form.
_BY_KEY[" di"] = _Tag(" di", dict, dict, dict, _load_escaped)
_BY_KEY[" dx"] = _Tag(" dx", dict, dict, dict, _load_hex_keys)

_IMMUTABLE = frozenset({NoneType, bool, float, *_BY_TYPE}) - {tuple, set, frozenset}


def _untag(value: dict[str, Any]) -> Any:
    """Turn a tag into what it stands for; any other dict is returned as it is."""
    if len(value) != 1:
        return value
    [(key, content)] = value.items()
    tag = _BY_KEY.get(key)
    if tag is None:
        return value
    if type(content) is not tag.inner:
        raise ValueError(f"tag {key!r} holds a {_name(type(content))}")
    try:
        return tag.load(content)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"tag {key!r} holds no {_name(tag.kind)}") from error


class _Packers(dict[type, Callable[[Any, int], Any]]):
    """How to make a value of some exact type plain: functions of the value and its depth."""

    def __missing__(self, kind: type) -> Callable[[Any, int], Any]:
        real = _unfrozen(kind)
        if real in self:
            return self[real]
        raise TypeError(f"cannot store a {_name(kind)}")


class _Tagged:
    """The walk that the formats share: checks each value and puts the tags in.

    :param native: scalar types that the format writes as they are.
    :param ints: the least and the greatest int that it writes as it is.
    """

    def __init__(self, native: Iterable[type], ints: tuple[int, int]) -> None:
        self._native = frozenset(native)
        self._ints = ints
        self._packers = _Packers(
            dict.fromkeys(_BY_TYPE, self._tagged)
            | {kind: lambda value, _depth: value for kind in self._native}
            | {int: self._int, list: self._list, dict: self._dict, set: self._set}
            | {frozenset: self._set, tuple: lambda value, depth: {" t": self._list(value, depth)}}
        )

    def _encode(self, plain: Any) -> bytes:
        raise NotImplementedError

    def dumps(self, value: Any) -> bytes:
        """Encode a value. Equal sets give equal bytes; a dict keeps its order.

        :raises TypeError: if it would not come back as it is. Names the type, and the path to
            the culprit if that is nested.
        :raises ValueError: if it is nested too deeply or contains itself.
        """
        try:
            return self._encode(self._packers[type(value)](value, 0))
        except TypeError as error:
            path = self._path_to_fault(value)
            raise TypeError(f"{error} at {path}" if path else str(error)) from error
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None

    def _tagged(self, value: Any, depth: int) -> dict[str, Any]:
        tag = _BY_TYPE[_unfrozen(type(value))]
        content = tag.dump(value)
        return {tag.key: self._packers[type(content)](content, depth)}

    def _int(self, value: int, depth: int) -> Any:
        least, greatest = self._ints
        return value if least <= value <= greatest else self._tagged(value, depth)

    def _list(self, value: Iterable[Any], depth: int) -> list[Any]:
        if depth >= MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        native, packers, depth = self._native, self._packers, depth + 1
        return [v if type(v) in native else packers[type(v)](v, depth) for v in value]

    def _set(self, value: set[Any] | frozenset[Any], depth: int) -> dict[str, Any]:
        # Each process orders the strings in a set anew; their encoded form is the same in all.
        return {_BY_TYPE[type(value)].key: sorted(self._list(value, depth), key=self._encode)}

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        if depth >= MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        native, packers, depth = self._native, self._packers, depth + 1
        plain = {k: v if type(v) in native else packers[type(v)](v, depth) for k, v in value.items()}
        for key in plain:
            if type(key) is not str:
                raise TypeError(f"cannot store a dict with a key of type {_name(type(key))}")
        return self._escaped(plain)

    def _escaped(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Guard a dict that would read as a tag, be it one that only a later version knows."""
        if len(plain) == 1:
            [(key, content)] = plain.items()
            if key.startswith(" "):
                return {" di": {f"{key}__": content}}
        return plain

    def _path_to_fault(self, value: Any) -> str:
        """Return where in a refused value the culprit is; only refusals pay for this."""
        path = ""
        while True:
            for step, part in _parts(value):
                try:
                    self._packers[type(part)](part, 0)
                except TypeError:
                    path, value = path + step, part
                    break
            else:
                return path


class JSONSerializer(_Tagged):
    """Flask's tagged JSON, widened to all types that a session keeps.

    UTF-8 without blanks, so that a person can read it in ``redis-cli``.
    """

    def __init__(self) -> None:
        # 617 digits: below the least limit that sys.set_int_max_str_digits() takes.
        super().__init__((NoneType, bool, float, str), (-(2**2048), 2**2048))
        self._encoder = JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"))
        # float() makes a new NaN each time: two NaNs in a set are two members.
        self._decoder = JSONDecoder(object_hook=_untag, parse_constant=float)

    def dumps(self, value: Any) -> bytes:
        """Encode a value; see :meth:`_Tagged.dumps`."""
        # Most values are texts, which need no walk.
        if type(value) is str:
            return encode_basestring(value).encode("utf-8", "surrogatepass")
        return super().dumps(value)

    def _encode(self, plain: Any) -> bytes:
        if type(plain) is str:
            return _dump_text(encode_basestring(plain))
        if plain is None:
            return b"null"
        return _dump_text(str(plain) if type(plain) is int else self._encoder.encode(plain))

    def loads(self, data: bytes) -> Any:
        """Decode a value.

        :raises ValueError: for data that does not decode, tags with wrong content included.
        """
        try:
            text = data.decode("utf-8", "surrogatepass")
            value, end = self._decoder.raw_decode(text)
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
        if end != len(text):
            raise ValueError("data after the end of the value")
        return value


class MsgpackSerializer(_Tagged):
    """The same tags in MessagePack: smaller for bytes and numbers, but not for people to read.

    :raises ImportError: without msgspec, the extra ``luasession[msgpack]``.
    """

    def __init__(self) -> None:
        try:
            import msgspec  # an extra
        except ImportError as error:
            raise ImportError("msgpack needs msgspec: pip install 'luasession[msgpack]'") from error
        super().__init__((NoneType, bool, float, bytes), (-(2**63), 2**64 - 1))
        self._packers[str] = self._str
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder()
        # Up to 0.20 DecodeError is no ValueError, and an unhashable key gives TypeError.
        self._decode_errors = (msgspec.DecodeError, TypeError)

    def _encode(self, plain: Any) -> bytes:
        return self._encoder.encode(plain)

    def _str(self, value: str, depth: int) -> Any:
        return value if _has_utf8(value) else self._tagged(value, depth)

    def _escaped(self, plain: dict[str, Any]) -> dict[str, Any]:
        if all(map(_has_utf8, plain)):
            return super()._escaped(plain)
        return {" dx": {_dump_text(key).hex(): item for key, item in plain.items()}}

    def loads(self, data: bytes) -> Any:
        """Decode a value.

        :raises ValueError: for data that does not decode, tags with wrong content included.
        """
        try:
            return self._unpack(self._decoder.decode(data))
        except RecursionError:
            raise ValueError(_TOO_DEEP) from None
        except self._decode_errors as error:
            raise ValueError(str(error)) from error

    def _unpack(self, value: Any) -> Any:
        """Resolve the tags in place, since the decoder has just made these containers."""
        kind = type(value)
        if kind is list:
            for index, item in enumerate(value):
                value[index] = self._unpack(item)
            return value
        if kind is dict:
            for key, item in value.items():
                if type(key) is not str:
                    raise ValueError(f"a dict with a key of type {_name(type(key))}")
                value[key] = self._unpack(item)
            return _untag(value)
        if kind is str or kind is int or kind in self._native:
            return value
        raise ValueError(f"a MessagePack extension, {_name(kind)}")


def make_serializer(name: str | object) -> Serializer:
    """Return the serializer that ``SESSION_SERIALIZER`` asks for.

    :param name: ``"json"``, ``"msgpack"``, or an object with ``dumps`` and ``loads``, which is
        returned as it is.
    :raises ValueError: for any other name.
    :raises TypeError: for an object that lacks one of the two methods.
    :raises ImportError: for ``"msgpack"`` without msgspec.
    """
    expected = "expected 'json', 'msgpack' or an object with dumps and loads"
    if isinstance(name, str):
        if name == "json":
            return JSONSerializer()
        if name == "msgpack":
            return MsgpackSerializer()
        raise ValueError(f"{expected}, not {name!r}")
    if not all(callable(getattr(name, method, None)) for method in ("dumps", "loads")):
        raise TypeError(f"{expected}, not a {_name(type(name))}")
    return cast("Serializer", name)


def is_immutable(value: Any) -> bool:
    """Tell whether nothing can change a value in place.

    That is an exact scalar type of those that a session keeps, or a tuple or
    frozenset made wholly of these.
    """
    if type(value) in _IMMUTABLE:
        return True
    # A list and no recursion: a value may be nested more deeply than the stack has room left.
    pending = [value]
    while pending:
        item = pending.pop()
        if type(item) in (tuple, frozenset):
            pending.extend(item)
        elif type(item) not in _IMMUTABLE:
            return False
    return True


def _name(kind: type) -> str:
    """Return a type's qualified name, without the module for a builtin."""
    module = kind.__module__
    return kind.__qualname__ if module == "builtins" else f"{module}.{kind.__qualname__}"


def _has_utf8(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the members of a container, each with its step in a path."""
    if type(value) is dict:
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif type(value) in (list, tuple):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif type(value) in (set, frozenset):
        yield from (("[*]", item) for item in value)
