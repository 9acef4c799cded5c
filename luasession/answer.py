"""The answer: what a response carries on behalf of a session, cookies and the headers that go with them.

What does not depend on what Redis says is done while it is waited for: a commit's round trip is long
enough for that.
"""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from flask.sessions import SessionInterface
from flask.wrappers import Response
from werkzeug.http import dump_cookie

from .outcome import LIVE
from .session import LuaSession, visit_of

if TYPE_CHECKING:
    from datetime import datetime

    from flask import Flask

    from .config import Config
    from .visit import Visit


_RULES = [
    name for name in vars(SessionInterface) if name.startswith("get_cookie_") and name != "get_cookie_name"
]


class Answer:
    """What one response carries on behalf of its session.

    :param interface: knows the app's rules for cookies.
    """

    __slots__ = ("_app", "_attributes", "_caches", "_config", "_end", "_interface", "_response", "_varies")

    def __init__(self, interface: SessionInterface, app: Flask, config: Config, response: Response) -> None:
        self._interface = interface
        self._app = app
        self._config = config
        self._caches = config.cache_ttl is not None
        self._response = response
        self._attributes: dict[str, Any] | None = None
        # What follows the value in a cookie that ends with the browser: the same each time.
        self._end: str | None = None
        # The headers that say already that they depend on the cookie.
        self._varies: Any = None

    def prepare(self) -> None:
        """Do what an answer to a commit needs, whatever comes of it; it may be called again."""
        self._vary()
        # An interface of the app's own may fail, take its time or read the session; so it is not asked while
        # a commit is on its way.
        kind: Any = type(self._interface)
        # A setting that is none is met again when the cookies are written, and told then.
        with suppress(Exception):
            if _has_rules_of_flask(kind):
                self._attributes = self._read_attributes()
                self._end = _end_of_cookie(**self._attributes)

    def write(self, session: LuaSession) -> None:
        """Set the cookies that are due, and say on what the answer depends."""
        visit = visit_of(session)
        renamed = visit.ended or visit.issued or visit.offered
        wrote = renamed or visit.made or visit.refreshed or visit.expiry_changed
        if wrote:
            headers = self._response.headers
            others = headers.getlist("Set-Cookie") if renamed else []
            attributes = self._attributes or self._read_attributes()
            if visit.ended:
                self._delete_cookies(visit, attributes)
            else:
                self._set_cookies(session, visit, attributes)
            if others:
                # Ours first: whatever cuts a long list of headers off, it is not the session id.
                ours = headers.getlist("Set-Cookie")[len(others) :]
                headers.setlist("Set-Cookie", ours + others)
        if wrote or session.accessed:
            self._vary()
        visit.is_carried = True

    def _delete_cookies(self, visit: Visit, attributes: dict[str, Any]) -> None:
        name = visit.name
        for cookie in (name, f"{name}_v", f"{name}_o") if self._caches else (name,):
            self._response.delete_cookie(cookie, **attributes)
        self._keep_private()

    def _set_cookies(self, session: LuaSession, visit: Visit, attributes: dict[str, Any]) -> None:
        response, name = self._response, visit.name
        expires = self._interface.get_expiration_time(self._app, session) if visit.seen else None
        if self._is_id_due(visit) and (named := visit.offered or visit.id) is not None:
            self._set_cookie(name, named.sid, expires, attributes)
            self._keep_private()
        if not self._caches:
            return
        if visit.made is None:
            return
        self._set_cookie(f"{name}_v", str(visit.made), expires, attributes)
        if visit.must_confirm():
            window = math.ceil(self._config.cache_ttl or 0) + 1
            response.set_cookie(f"{name}_o", "1", max_age=window, **attributes)

    def _set_cookie(
        self, name: str, value: str, expires: datetime | None, attributes: dict[str, Any]
    ) -> None:
        if expires is not None or type(self._response).set_cookie is not Response.set_cookie:
            self._response.set_cookie(name, value, expires=expires, **attributes)
            return
        # Neither ids nor numbers need quoting, and what follows them is the same each time.
        end = self._end or _end_of_cookie(**attributes)
        self._response.headers.add("Set-Cookie", f"{name}={value}{end}")

    def _keep_private(self) -> None:
        # A cache between us and the browser would hand one visitor's id to the next (OWASP, "Web Content
        # Caching"), and some such caches do not heed Vary. An app that says what it wants is heeded.
        if "Cache-Control" not in self._response.headers:
            self._response.headers.add("Cache-Control", "private")

    def _vary(self) -> None:
        headers = self._response.headers
        if self._varies is headers:
            return
        if headers.getlist("Vary"):
            self._response.vary.add("Cookie")
        else:
            headers.add("Vary", "Cookie")
        self._varies = headers

    def _read_attributes(self) -> dict[str, Any]:
        app, interface = self._app, self._interface
        attributes: dict[str, Any] = {
            "domain": interface.get_cookie_domain(app),
            "path": interface.get_cookie_path(app),
            "secure": interface.get_cookie_secure(app),
            "httponly": interface.get_cookie_httponly(app),
            "samesite": interface.get_cookie_samesite(app),
        }
        if interface.get_cookie_partitioned(app):
            attributes["partitioned"] = True
        return attributes

    def _is_id_due(self, visit: Visit) -> bool:
        """Whether the response carries the id.

        An ordinary write never repeats it, so that its late answer cannot undo a rotation.
        """
        if visit.issued is not None:
            return True
        if visit.standing is not LIVE or visit.seen is None:
            return False
        if visit.offered is not None:
            return True
        if not visit.refreshed:
            return visit.expiry_changed
        refresh: bool = visit.seen.permanent and self._app.config["SESSION_REFRESH_EACH_REQUEST"]
        return visit.expiry_changed or refresh


@lru_cache(maxsize=64)
def _has_rules_of_flask(kind: Any) -> bool:
    return all(getattr(kind, rule) is getattr(SessionInterface, rule) for rule in _RULES)


@lru_cache(maxsize=64, typed=True)
def _end_of_cookie(**attributes: Any) -> str:
    return dump_cookie("name", "0", **attributes).removeprefix("name=0")
