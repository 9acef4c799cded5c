"""Flask-Login: a new session id, and whose session it is, at each log-in and log-out.

Flask-Login tells of these by signals and rotates nothing itself. Its package is
looked at only once an app has a login manager, which is to say that somebody
else has imported it by then.

=========================== =============================== =======================
signal of Flask-Login       session id                      principal
=========================== =============================== =======================
``user_logged_in``          rotated                         the user
``user_loaded_from_cookie`` rotated                         the user
``user_login_confirmed``    rotated                         the user
``user_logged_out``         rotated, nothing in flight is   none
                            stored any more
``session_protected``       kept                            none, if that ended the
                                                            log-in ("strong")
=========================== =============================== =======================

A rotation that changes the principal drops what is in flight over it (G8). A user
who came without the session, by a request loader, is no log-in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import session

from .session import LuaSession

if TYPE_CHECKING:
    from flask import Flask

# Where Flask-Login keeps the id of the user who is logged in.
_USER_ID = "_user_id"


def connect(app: Flask) -> bool:
    """Follow the log-ins of an app if it has a login manager; tell whether it has.

    To do so again is harmless. The signals hold functions of this module and the app weakly.
    """
    if not hasattr(app, "login_manager"):
        return False
    try:
        import flask_login as login  # noqa: PLC0415 - an extra, which this app has
    except ImportError:
        return True  # a login manager of another kind

    login.user_logged_in.connect(_log_in, app)
    login.user_loaded_from_cookie.connect(_remember, app)
    login.user_login_confirmed.connect(_log_in, app)
    login.user_logged_out.connect(_log_out, app)
    login.session_protected.connect(_protect, app)
    return True


def _ours() -> LuaSession | None:
    """Return the session of this request, None where somebody else's interface made it."""
    current: Any = session._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001 - documented
    return current if isinstance(current, LuaSession) else None


def _log_in(_app: Flask, **_about: Any) -> None:
    if (ours := _ours()) is None:
        return
    ours.regenerate()
    user_id = ours.get(_USER_ID)
    ours.principal = None if user_id is None else str(user_id)


def _remember(app: Flask, **about: Any) -> None:
    try:
        _log_in(app, **about)
    except RuntimeError:
        # The response is being sent, so no new id can go with it, and a log-in under the old one could be
        # shared with whoever planted that. The user is known for this request, and to the next one anew.
        for key in (_USER_ID, "_fresh"):
            session.pop(key, None)


def _log_out(_app: Flask, user: Any = None, **_about: Any) -> None:
    ours = _ours()
    if ours is None or (ours.principal is None and not getattr(user, "is_authenticated", False)):
        return
    # Said so, since the same request may log the same user in again, which changes no principal.
    ours.regenerate(in_flight=False)
    ours.principal = None


def _protect(_app: Flask, **_about: Any) -> None:
    # Not rotated: all that a browser sends at once from its new address comes here, and each rotation but
    # the first would make a session of its own. The next log-in rotates.
    ours = _ours()
    if ours is not None and _USER_ID not in ours and ours.principal is not None:
        ours.principal = None
