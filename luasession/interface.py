"""The session interface: a cookie in, a session, cookies out."""

from __future__ import annotations

import math
import weakref
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flask.sessions import SessionInterface
from werkzeug.http import dump_cookie

from .clock import now_ns
from .codec import make_serializer
from .errand import Errand
from .outcome import Standing
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


class LuaSessionInterface(SessionInterface):
    """Flask's way to luasession.

    Opening a session costs nothing and asks nobody. Saving applies the delta; an
    error that is met there becomes the response, by way of the app's error
    handlers, and takes the place of what the view returned.

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
            request,
            self.get_cookie_name(app),
            app.config,
            now_ns(),
            self.notify,
        )
        return LuaSession(visit, self._values, self._policies)

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        """Apply the delta and write the cookies that follow from it."""
        if not isinstance(session, LuaSession):
            return
        try:
            transaction_of(session).save()
        except Exception as error:  # noqa: BLE001 - handed on to Flask, which knows what to do with each
            # Out of here an exception would pass by the app's handlers for its class. One that none of
            # them answers is raised again, and Flask makes a 500 of it.
            _replace(response, app.make_response(app.handle_user_exception(error)))
        wrote = self._write_cookies(app, session, response)
        if wrote and "Cache-Control" not in response.headers:
            # A cache between us and the browser would hand one visitor's id to the next (OWASP, "Web Content
            # Caching"), and some such caches do not heed Vary. An app that says what it wants is heeded.
            response.headers.add("Cache-Control", "private")
        if wrote or session.accessed:
            if response.headers.getlist("Vary"):
                response.vary.add("Cookie")
            else:
                response.headers.add("Vary", "Cookie")

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
            idle_end = seen.touched_ms + (seen.lifetime_ms or visit.caller.lifetime_ms)
            ends_ms = max(ends_ms, min(idle_end, seen.absolute_ms or idle_end))
        return datetime.now(UTC) + timedelta(milliseconds=ends_ms - visit.now_ms)

    def notify(self, signal: NamedSignal, **about: Any) -> None:
        """Send a signal, with the app as its sender."""
        if signal.receivers and (app := self._app()) is not None:
            signal.send(app, _async_wrapper=app.ensure_sync, **about)

    def _attributes(self, app: Flask) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "domain": self.get_cookie_domain(app),
            "path": self.get_cookie_path(app),
            "secure": self.get_cookie_secure(app),
            "httponly": self.get_cookie_httponly(app),
            "samesite": self.get_cookie_samesite(app),
        }
        if self.get_cookie_partitioned(app):
            attributes["partitioned"] = True
        return attributes

    def _write_cookies(self, app: Flask, session: LuaSession, response: Response) -> bool:
        """Set or delete what has to be, and tell whether anything was."""
        visit = visit_of(session)
        renamed = visit.ended or visit.issued or visit.offered
        if not (renamed or visit.made or visit.refreshed or visit.expiry_changed):
            return False
        name = visit.name
        caching = self._config.cache_ttl is not None
        attributes = self._attributes(app)
        others = response.headers.getlist("Set-Cookie") if renamed else []
        if visit.ended:
            for cookie in (name, f"{name}_v", f"{name}_o") if caching else (name,):
                response.delete_cookie(cookie, **attributes)
        elif visit.id is not None:
            expires = self.get_expiration_time(app, session) if visit.seen else None
            if self._is_id_due(app, visit):
                response.set_cookie(name, (visit.offered or visit.id).sid, expires=expires, **attributes)
            if caching and visit.made is not None:
                hint = f"{name}_v"
                if expires is None:
                    # What follows the value is the same each time.
                    line = f"{hint}={visit.made}{_end_of_cookie(**attributes)}"
                    response.headers.add("Set-Cookie", line)
                else:
                    response.set_cookie(hint, str(visit.made), expires=expires, **attributes)
            if caching and visit.others_wrote:
                window = math.ceil(self._config.cache_ttl or 0) + 1
                response.set_cookie(f"{name}_o", "1", max_age=window, **attributes)
        if others:
            # Ours first: whatever cuts a long list of headers off, it is not the session id.
            ours = response.headers.getlist("Set-Cookie")[len(others) :]
            response.headers.setlist("Set-Cookie", ours + others)
        return True

    @staticmethod
    def _is_id_due(app: Flask, visit: Visit) -> bool:
        """Whether the response carries the id.

        An ordinary write never repeats it, so that its late answer cannot undo a rotation.
        """
        if visit.issued is not None:
            return True
        if visit.standing is not Standing.LIVE or visit.seen is None:
            return False
        if visit.offered is not None:
            return True
        refresh = visit.seen.permanent and app.config["SESSION_REFRESH_EACH_REQUEST"]
        return visit.expiry_changed or bool(visit.refreshed and refresh)


@lru_cache(maxsize=64)
def _end_of_cookie(**attributes: Any) -> str:
    return dump_cookie("name", "0", **attributes).removeprefix("name=0")


def _replace(response: Response, answer: Response) -> None:
    """Lay one response over another, which is already on its way out."""
    close = getattr(response.response, "close", None)
    if close is not None:
        answer.call_on_close(close)
    response.response = answer.response
    response.status = answer.status
    response.headers = answer.headers
    response.direct_passthrough = answer.direct_passthrough
    response.call_on_close(answer.close)
