"""Errands: dealings with a session from outside of a request, for :meth:`luasession.Sessions.edit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .clock import now_ns
from .config import Config
from .delta import Delta
from .ids import SessionId
from .outcome import Applied, Refused, Standing
from .store import Store
from .visit import Visit


class Errand(Visit):
    """Dealings with one session from outside of a request: no browser, no cookies, no use of it.

    :param handle: the session; whatever secret is current will do.
    """

    has_browser = False

    def __init__(
        self,
        store: Store,
        config: Config,
        handle: str,
        settings: Mapping[str, Any],
        notify: Callable[..., None],
    ) -> None:
        super().__init__(store, config, None, "", settings, now_ns(), notify)
        self._id = SessionId.without_secret(handle)
        self._caller = self.caller._replace(uses=False)

    def create(self, delta: Delta) -> Applied | Refused:  # noqa: ARG002 - it is what a visit takes
        """Start none: there is nobody to give it to."""
        return Refused(Standing.MISSING)
