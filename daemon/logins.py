"""Who is logged in to this machine, by systemd's login manager."""

from __future__ import annotations

import ctypes
from typing import Any

LIBRARY = "libsystemd.so.0"
_free = ctypes.CDLL(None).free
_free.argtypes, _free.restype = (ctypes.c_void_p,), None


def logged_in() -> list[str]:
    """Return the accounts that have a session of a person, each once. Raises OSError when it cannot be told."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise OSError(f"who is logged in cannot be told without {LIBRARY}") from error
    found = ctypes.POINTER(ctypes.c_void_p)()
    count = library.sd_get_sessions(ctypes.byref(found))
    if count < 0:
        raise OSError(-count, "systemd-logind does not tell who is logged in")
    try:
        sessions = [ctypes.string_at(found[index]) for index in range(count)]
    finally:
        for index in range(count):
            _free(found[index])
        _free(found)
    return sorted({_account(library, session) for session in sessions if _is_persons(library, session)})


def _is_persons(library: ctypes.CDLL, session: bytes) -> bool:
    """Whether a session is neither a service's nor a login screen's, and not at its end."""
    kind, state = _text(library.sd_session_get_class, session), _text(library.sd_session_get_state, session)
    return kind.startswith("user") and state != "closing"


def _account(library: ctypes.CDLL, session: bytes) -> str:
    return _text(library.sd_session_get_username, session) or "somebody"


def _text(function: Any, session: bytes) -> str:
    """What a function of the library tells of a session; empty when that is gone by now."""
    text = ctypes.c_void_p()
    if function(session, ctypes.byref(text)) < 0 or not text.value:
        return ""
    try:
        return ctypes.string_at(text.value).decode("utf-8", "replace")
    finally:
        _free(text)
