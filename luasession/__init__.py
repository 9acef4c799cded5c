"""Server-side sessions for Flask on Redis that lose nothing when requests overlap."""

from . import merge as merge
from . import signals as signals
from .errors import ConfigurationError as ConfigurationError
from .errors import CorruptSession as CorruptSession
from .errors import LuaSessionError as LuaSessionError
from .errors import SessionConflict as SessionConflict
from .errors import SessionGone as SessionGone
from .errors import SessionTooLarge as SessionTooLarge
from .errors import SessionUnavailable as SessionUnavailable
from .extension import Session as Session
from .interface import LuaSessionInterface as LuaSessionInterface
from .retry import retry_on_conflict as retry_on_conflict
from .session import LuaSession as LuaSession
from .sessions import SessionInfo as SessionInfo
from .sessions import Sessions as Sessions
from .signals import session_committed as session_committed
from .signals import session_conflict as session_conflict
from .signals import session_corrupt as session_corrupt
from .signals import session_created as session_created
from .signals import session_destroyed as session_destroyed
from .signals import session_discarded as session_discarded
from .signals import session_rotated as session_rotated
