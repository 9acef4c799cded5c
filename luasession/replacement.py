"""The replacement: what the app answers in the place of a response, where its session met an error."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from flask.globals import request_ctx

from .errors import LuaSessionError, SessionUnavailable
from .interface import LuaSessionInterface
from .session import LuaSession, transaction_of, visit_of

if TYPE_CHECKING:
    from flask import Flask, Response


def answers_errors(app: Flask) -> Callable[..., Any]:
    """Return an app's ``process_response`` that answers errors of the session by the app's handlers.

    What saving it meets, and what ``after_request`` functions meet in it: where Redis is down those that
    read the session, Flask-Login's is one, raise what the view has raised. Flask makes a 500 of whatever is
    raised here, past the app's handlers (G14). The answer goes by the ``after_request`` functions as each
    page of an error does. Whatever else fails here, the response carries what has been committed.
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
            return process(*context, response)
        except Exception as error:  # noqa: BLE001 - what is not the session's is raised again
            answer = _answer(app, error, response)
            # The response that the answer replaces: the one that was saved for, as an after_request function
            # may have put that in the place of the view's.
            last = visit_of(_session()).response
            replaced = (last and last()) or response
        try:
            answer = process(*context, answer)
        except LuaSessionError as error:
            # An after_request function that reads the session raises for the answer as for the response: the
            # functions after it do not see the answer, and nothing more is stored.
            transaction = transaction_of(_session())
            if isinstance(error, SessionUnavailable):
                transaction.drop()
            else:
                transaction.give_up()
            _carry_on(app, answer)
        except Exception:
            _carry_on(app, response)
            raise
        if replaced is not answer:
            try:
                replaced.close()
            except Exception:
                app.logger.exception("A response that an error took the place of did not close")
        return answer

    return process_response


def _answer(app: Flask, error: Exception, response: Response) -> Response:
    """Return what the app answers to an error, or raise it, or what its handler raises."""
    session = _session()
    try:
        if not isinstance(session, LuaSession):
            raise error
        if not isinstance(error, LuaSessionError) and transaction_of(session).failure != id(error):
            raise error
        return app.make_response(app.handle_user_exception(error))
    except Exception:
        # It may be the page of an error already, which Flask sends as it is.
        _carry_on(app, response)
        raise


def _carry_on(app: Flask, response: Response) -> None:
    session = _session()
    if isinstance(session, LuaSession) and isinstance(app.session_interface, LuaSessionInterface):
        app.session_interface.write_cookies(app, session, response)


def _session() -> Any:
    return request_ctx._session  # noqa: SLF001 - the public name marks the session as accessed
