"""Who is logged in to this machine, by systemd's login manager."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from daemon.processes import account_name

LIBRARY = "libsystemd.so.0"
SESSIONS = Path("/run/systemd/sessions")  # where it keeps them, also when there is none
_free = ctypes.CDLL(None).free
_free.argtypes, _free.restype = (ctypes.c_void_p,), None


def logged_in() -> list[str]:
    """Return the accounts that have a session of a person, each once. Raises OSError when it cannot be told."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise OSError(f"who is logged in cannot be told without {LIBRARY}") from error
    if not SESSIONS.is_dir():  # its library would say that there are none
        raise OSError("who is logged in cannot be told: systemd-logind does not run here")
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
    uid = ctypes.c_uint32()  # its name is told by systemd 254 and later alone
    return account_name(uid.value) if library.sd_session_get_uid(session, ctypes.byref(uid)) >= 0 else "somebody"


def _text(function: Any, session: bytes) -> str:
    """What a function of the library tells of a session; empty when that is gone by now."""
    text = ctypes.c_void_p()
    if function(session, ctypes.byref(text)) < 0 or not text.value:
        return ""
    try:
        return ctypes.string_at(text.value).decode("utf-8", "replace")
    finally:
        _free(text)
