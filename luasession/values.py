"""Values: what stands under a session's keys, as bytes and back, by the app's serializer."""

from __future__ import annotations

import marshal
from typing import Any, NamedTuple

from . import merge
from .codec import Serializer

# The last version without references: equal values give equal bytes, whoever else holds parts of them.
_MARSHAL = 2


class Given(NamedTuple):
    """What a mutable value was when it was handed out, or committed."""

    #: Its bytes, as they are stored.
    raw: bytes
    fingerprint: bytes | None
    #: The end that its key had then, milliseconds of the server's clock.
    end: int | None = None


def fingerprint(value: Any) -> bytes | None:
    """Return bytes that tell whether a value was changed in place; None for values that have none.

    They are those of :mod:`marshal`, which takes exact built-in types at a tenth of what encoding costs.
    Nothing is ever read back from them. A ``bytearray`` in the place of equal ``bytes`` is no change to it.
    """
    try:
        return marshal.dumps(value, _MARSHAL)
    except ValueError:
        return None


class Values:
    """Encodes and decodes session values.

    :param serializer: the app's; whatever one of its own raises is dealt with here.
    """

    def __init__(self, serializer: Serializer) -> None:
        self._serializer = serializer
        #: Decode bytes, or raise whatever the serializer raises.
        self.load = serializer.loads

    def encode(self, key: str, value: Any) -> bytes:
        """Return a value's bytes.

        :param key: the session key, to name it in an error.
        :raise TypeError: if the value is of a type that cannot be stored.
        :raise ValueError: if it is nested too deeply.
        """
        try:
            raw = self._serializer.dumps(value)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"session[{key!r}] cannot be stored: {error}") from error
        if isinstance(raw, str):
            raw = raw.encode("utf-8", "surrogatepass")
        if not raw:
            raise TypeError(f"session[{key!r}] cannot be stored: the serializer gave no bytes for it")
        return raw

    def decode(self, raw: bytes | None) -> Any:
        """Return a value, ``merge.MISSING`` for none or what does not decode."""
        if raw is None:
            return merge.MISSING
        try:
            return self.load(raw)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - whatever a serializer of one's own raises
            return merge.MISSING

    def same(self, raw: bytes, stored: bytes) -> bool:
        """Whether bytes are of the value that is stored."""
        if raw == stored:
            return True
        # Those of another writer, or of an older version, may differ for the same value.
        try:
            return raw == self.encode("", self.load(stored))
        except Exception:  # noqa: BLE001 - whatever a serializer of one's own raises
            return False
