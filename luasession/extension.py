"""The Flask extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import login
from .config import read_config
from .interface import LuaSessionInterface
from .replacement import answers_errors
from .sessions import Sessions
from .store import Store

if TYPE_CHECKING:
    from flask import Flask


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
            app.process_response = answers_errors(app)  # type: ignore[method-assign]
        app.extensions["luasession"] = Sessions(app, interface)
