"""Session ids: what the cookie carries, and what Redis keeps of it.

A session id is ``<handle>.<secret>``, both URL-safe base64 without padding.
The handle names the session and may be logged; the secret proves the right to
use it, and only its SHA-256, the digest, leaves this process.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable
from functools import cache

#: Bytes of a handle; 128 bits.
HANDLE_BYTES = 16
#: Bytes of a write id, which names one commit (or one call) for good.
WRITE_ID_BYTES = 8

_HANDLE_CHARS = 22
_HANDLE = re.compile(rf"[A-Za-z0-9_-]{{{_HANDLE_CHARS}}}")


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


class SessionId:
    """One session id, taken apart.

    The secret stays out of :func:`repr`, so that no log line can show it.
    """

    __slots__ = ("_digest", "handle", "secret")

    def __init__(self, handle: str, secret: str) -> None:
        self.handle = handle
        self.secret = secret
        self._digest: bytes | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.handle}>"

    @classmethod
    def without_secret(cls, handle: str) -> SessionId:
        """Return a stand-in for calls from outside a request: it means whatever secret is current."""
        session_id = cls(handle, "")
        session_id._digest = b""
        return session_id

    @property
    def digest(self) -> bytes:
        """SHA-256 of the secret, 32 bytes; what Redis stores."""
        # Made when it is first asked for: a read that Redis has to answer asks while it waits.
        if self._digest is None:
            self._digest = hashlib.sha256(self.secret.encode("ascii")).digest()
        return self._digest

    @property
    def sid(self) -> str:
        """The whole id, as the cookie carries it."""
        return f"{self.handle}.{self.secret}"

    def rotated(self, length: int) -> SessionId:
        """Return the same handle with a new secret of ``length`` bytes."""
        return SessionId(self.handle, _text(os.urandom(length)))


def is_handle(text: str) -> bool:
    """Whether a text has the form of a handle."""
    return _HANDLE.fullmatch(text) is not None


def new_session_id(length: int) -> SessionId:
    """Draw a new session id from the system's generator.

    :param length: bytes of the secret.
    """
    return SessionId(_text(os.urandom(HANDLE_BYTES)), _text(os.urandom(length)))


def parse_session_id(cookie: str, length: int) -> SessionId | None:
    """Take a cookie's value apart, or return None for what no server issued.

    A length or an alphabet that is off is refused here, before Redis is asked
    (G11): what remains is right in form and has yet to prove itself.

    :param length: bytes of the secret that this app issues.
    """
    match = _form(length).fullmatch(cookie)
    return SessionId(match[1], match[2]) if match else None


@cache
def _form(length: int) -> re.Pattern[str]:
    return re.compile(rf"([A-Za-z0-9_-]{{{_HANDLE_CHARS}}})\.([A-Za-z0-9_-]{{{(length * 8 + 5) // 6}}})")


#: Compares two digests in constant time.
same_digest: Callable[[bytes, bytes], bool] = hmac.compare_digest


def new_write_id() -> bytes:
    """Draw the id of one call: it makes a commit repeatable and its reply provable."""
    return os.urandom(WRITE_ID_BYTES)
