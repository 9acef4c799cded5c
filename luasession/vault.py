"""The vault: values encrypted before they leave the process, bound to where they belong.

Each value is sealed by itself with AES-256-GCM (NIST SP 800-38D) under a key
of its session's own, which HKDF (RFC 5869) derives from a configured key and
the handle; the name of the field is authenticated along with it. So a value
moved to another session or to another field does not open. Field names,
principal, label and lifetimes are not values: they stay as they are, since
the scripts work with them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from .delta import Delta

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_FORMAT: Final = b"\x01"
_NONCE_BYTES = 12
_TAG_BYTES = 16
#: Bytes by which a sealed value is longer.
SEAL_BYTES: Final = len(_FORMAT) + _NONCE_BYTES + _TAG_BYTES
_PURPOSE: Final = b"luasession values 1"
# Sessions whose keys a process keeps at hand.
_SESSIONS_AT_HAND = 1024


class Vault:
    """Seals and opens values.

    :param keys: newest first, 32 bytes or more each. The first one seals, each of them opens.
    :raise ImportError: without cryptography, the extra ``luasession[crypto]``.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag  # an extra
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
        except ImportError as error:
            raise ImportError("encryption needs cryptography: pip install 'luasession[crypto]'") from error

        # A random nonce is safe for some billions of values under one key. Of one session they never get
        # that many, of all sessions together they would.
        stretched = [HKDF(SHA256(), 32, None, _PURPOSE).derive(key) for key in keys]

        @lru_cache(maxsize=_SESSIONS_AT_HAND)
        def ciphers(handle: str) -> list[AESGCM]:
            return [AESGCM(HKDFExpand(SHA256(), 32, handle.encode()).derive(key)) for key in stretched]

        self._ciphers = ciphers
        self._invalid = InvalidTag

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"

    def seal(self, handle: str, delta: Delta) -> Delta:
        """Return the delta with its values sealed for one session."""
        if not delta.sets:
            return delta
        cipher = self._ciphers(handle)[0]
        sets = {}
        for name, put in delta.sets.items():
            nonce = os.urandom(_NONCE_BYTES)
            sets[name] = put._replace(value=_FORMAT + nonce + cipher.encrypt(nonce, put.value, name))
        return delta._replace(sets=sets)

    def open(self, handle: str, name: bytes, sealed: bytes) -> bytes:
        """Return what was sealed for this session and this field.

        :raise ValueError: if no key opens it, as it was sealed for another place, changed, or never sealed.
        """
        start = len(_FORMAT) + _NONCE_BYTES
        if sealed.startswith(_FORMAT) and len(sealed) >= start + _TAG_BYTES:
            for cipher in self._ciphers(handle):
                try:
                    return cipher.decrypt(sealed[len(_FORMAT) : start], sealed[start:], name)
                except self._invalid:
                    continue
        raise ValueError("no key of SESSION_ENCRYPTION_KEYS opens it")
