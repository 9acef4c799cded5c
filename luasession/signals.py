"""Signals, sent with the app as the sender; they carry handles, never secrets.

Each receiver gets ``handle`` (a str) and, by signal, what its comment says.
"""

from __future__ import annotations

from blinker import Namespace

_signals = Namespace()

#: A new session was stored; ``version``.
session_created = _signals.signal("session-created")
#: A delta was applied; ``version``.
session_committed = _signals.signal("session-committed")
#: A key that the request read and changed had been changed by somebody else;
#: ``key``, ``base``, ``theirs``, ``ours``, ``outcome`` and ``policy``. Sent once a key;
#: a missing side is :data:`luasession.merge.MISSING`, and where the types did not fit a merge
#: function, so that ours was stored, ``policy`` is ``"overwrite"``.
session_conflict = _signals.signal("session-conflict")
#: The secret was replaced; ``version``.
session_rotated = _signals.signal("session-rotated")
#: The session was ended.
session_destroyed = _signals.signal("session-destroyed")
#: A delta was dropped; ``reason``: its session had ended (``"gone"``) or had been rotated away
#: (``"stale"``), or Redis had not answered before and the view went on (``"unavailable"``).
session_discarded = _signals.signal("session-discarded")
#: A stored value did not decode and reads as missing; ``key`` and ``error``.
session_corrupt = _signals.signal("session-corrupt")
