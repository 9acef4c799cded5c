"""The Flask extension."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from flask.globals import request_ctx

from . import login
from .config import read_config
from .errors import LuaSessionError
from .interface import LuaSessionInterface
from .session import LuaSession
from .sessions import Sessions
from .store import Store

if TYPE_CHECKING:
    from flask import Flask, Response


class Session:
    """Server-side sessions for a Flask app, configured by its ``SESSION_*`` settings.

    ``Session(app)``, or ``Session().init_app(app)`` for app factories; one
    extension serves several apps.

    :param app: the app; its settings are read once, here.
    :raise ConfigurationError: if a setting is wrong; the message names it.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Use luasession for the sessions of an app.

        :raise ConfigurationError: if a setting is wrong; the message names it.
        """
        config = read_config(app.config)
        store = Store(config, app.root_path)
        # Another extension may set its login manager up later than this.
        connect = login.connect if config.login_hooks else None
        interface = LuaSessionInterface(app, config, store, connect)
        app.session_interface = interface
        if "luasession" not in app.extensions:
            app.process_response = _answers_errors(app)  # type: ignore[method-assign]
        app.extensions["luasession"] = Sessions(app, interface)


def _answers_errors(app: Flask) -> Callable[..., Any]:
    """Return an app's ``process_response`` that answers what ``after_request`` functions meet in the session.

    Where Redis is down those that read the session, Flask-Login's is one, raise what the view has raised,
    and Flask makes a 500 of whatever they raise, past the app's own handlers (G14). Whatever else fails
    there, the response carries what has been committed.
    """
    # Weakly: Flask promises that an app that nobody holds is freed.
    reference = weakref.ref(app)
    theirs = vars(app).get("process_response")

    def process_response(*given: Any, response: Any = None) -> Any:
        app = reference()
        if app is None:
            raise RuntimeError("the app of this response is gone")
        context: Any = given
        if response is None:
            *context, response = given
        process: Callable[..., Any] = theirs or partial(type(app).process_response, app)
        try:
            try:
                return process(*context, response)
            except LuaSessionError as error:
                answer = app.make_response(app.handle_user_exception(error))
        except Exception:
            # It may be the page of an error already, which Flask sends as it is.
            _carry_on(app, response)
            raise
        response.close()
        try:
            return process(*context, answer)
        except LuaSessionError:  # as before: what comes after the function that reads the session is left out
            app.session_interface.save_session(app, _session(), answer)
            return answer

    return process_response


def _carry_on(app: Flask, response: Response) -> None:
    session = _session()
    if isinstance(session, LuaSession) and isinstance(app.session_interface, LuaSessionInterface):
        app.session_interface.write_cookies(app, session, response)


def _session() -> Any:
    return request_ctx._session  # noqa: SLF001 - the public name marks the session as accessed
