"""The session interface: a cookie in, a session, cookies out."""

from __future__ import annotations

import weakref
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from flask import current_app
from flask.sessions import SessionInterface
from werkzeug.local import LocalProxy
from werkzeug.wrappers import Request as BaseRequest

from .answer import Answer
from .clock import now_ns
from .codec import make_serializer
from .errand import Errand
from .policy import Policies
from .session import LuaSession, transaction_of, visit_of
from .values import Values
from .visit import Visit

if TYPE_CHECKING:
    from collections.abc import Callable

    from blinker import NamedSignal
    from flask import Flask
    from flask.sessions import SessionMixin
    from flask.wrappers import Request, Response

    from .config import Config
    from .store import Store


def _saves_late(request: Request, session: LuaSession) -> Callable[[], None]:
    """Return a request's ``close`` that stores what was changed after the session was saved (G15).

    Flask closes the request as its context ends, after all that is torn down with it.
    """
    # Weakly: a request that holds itself waits for the garbage collector, uploads and all.
    reference = weakref.ref(request)
    # That of a session which was opened before for the same request, if any.
    before = vars(request).get("close")

    def close() -> None:
        try:
            transaction_of(session).save_late()
        except Exception:
            # Nobody is there to be told any more but the log.
            current_app.logger.exception("What was changed while the response was sent met an error")
        request = reference()
        if before is not None:
            before()
        elif request is not None:
            type(request).close(request)

    return close


class LuaSessionInterface(SessionInterface):
    """Flask's way to luasession.

    Opening a session costs nothing and asks nobody. Saving applies the delta; an
    error that is met there becomes the response, by way of the app's error
    handlers (see :mod:`luasession.replacement`), in the place of what the view returned.

    :param connect: called with the app at each request until it returns True.
    """

    def __init__(
        self, app: Flask, config: Config, store: Store, connect: Callable[[Flask], bool] | None = None
    ) -> None:
        # Weakly: Flask promises that an app that nobody holds is freed.
        self._app = weakref.ref(app)
        self._config = config
        self._store = store
        self._values = Values(make_serializer(config.serializer))
        self._policies = Policies(config.conflict, config.merge)
        self._connect = connect

    def open_session(self, app: Flask, request: Request) -> LuaSession:
        """Return a session that will read the request's cookie when it is first used."""
        if self._connect is not None and self._connect(app):
            self._connect = None
        visit = Visit(
            self._store,
            self._config,
            request.environ.get("HTTP_COOKIE", ""),
            self.get_cookie_name(app),
            app.config,
            now_ns(),
            self.notify,
        )
        session = LuaSession(visit, self._values, self._policies)
        if isinstance(request, LocalProxy):
            request = request._get_current_object()  # noqa: SLF001 - documented
        if isinstance(request, BaseRequest):  # whatever else has the cookies, Flask does not close it
            request.close = _saves_late(request, session)  # type: ignore[method-assign]
        return session

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Apply the delta and write the cookies that follow from it.

        :raise Exception: whatever is met; the extension has the app answer it.
        """
        if not isinstance(session, LuaSession):
            return
        answer = Answer(self, app, self._config, response)
        visit = visit_of(session)
        visit.response, visit.is_carried = weakref.ref(response), False
        transaction_of(session).save(answer.prepare)
        answer.write(session)

    def write_cookies(self, app: Flask, session: LuaSession, response: Response) -> None:
        """Have a response carry what has been committed, unless it does, and store nothing more."""
        visit = visit_of(session)
        if not (visit.is_carried and visit.response and visit.response() is response):
            Answer(self, app, self._config, response).write(session)

    def errand(self, app: Flask, handle: str) -> LuaSession:
        """Return a session for work from outside of a request; see :meth:`luasession.Sessions.edit`."""
        visit = Errand(self._store, self._config, handle, app.config, self.notify)
        return LuaSession(visit, self._values, self._policies)

    @property
    def store(self) -> Store:
        """Where the sessions are."""
        return self._store

    def regenerate(self, session: LuaSession) -> None:
        """Rotate the id of a session, as Flask-Session's interface does."""
        session.regenerate()

    def get_expiration_time(self, app: Flask, session: SessionMixin) -> datetime | None:
        """Return when the browser may forget the cookie: never before the server does."""
        if not isinstance(session, LuaSession) or (seen := (visit := visit_of(session)).seen) is None:
            return super().get_expiration_time(app, session)
        if not seen.permanent:
            return None
        ends_ms = seen.ends_ms
        if seen.size == 0:
            # Emptied key by key it ends with the grace unless a key is added, and then the cookie is needed.
            idle_end = seen.touched_ms + (seen.lifetime_ms or visit.lifetime_ms)
            ends_ms = max(ends_ms, min(idle_end, seen.absolute_ms or idle_end))
        return datetime.now(UTC) + timedelta(milliseconds=ends_ms - visit.now_ms)

    def notify(self, signal: NamedSignal, **about: Any) -> None:
        """Send a signal, with the app as its sender."""
        if signal.receivers and (app := self._app()) is not None:
            signal.send(app, _async_wrapper=app.ensure_sync, **about)
