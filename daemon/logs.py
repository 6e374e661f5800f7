"""Logging: one event, up to three readers - the file (complete, JSON lines), a terminal (pretty), the journal.

structlog shapes the events, the standard library's handlers carry and rotate them. Values are escaped on their way into
text that a terminal or the journal interprets, so that a file's name can forge neither a line nor a colour.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from daemon.config import Settings
from daemon.text import escape

_JOURNAL_LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}


def configure(settings: Settings, *, terminal: bool = True) -> Any:
    """Set up the log of a daemon and return its logger.

    Raises OSError when the log file cannot be opened. `terminal=False` writes to the file alone.
    """
    settings.log_path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.handlers.RotatingFileHandler(
        settings.log_path,
        maxBytes=settings.logging.max_bytes,
        backupCount=settings.logging.backups,
        encoding="ascii",
    )
    handlers: list[tuple[logging.Handler, Any]] = [(file, _json)]
    if terminal:
        stream = logging.StreamHandler(sys.stderr)
        if os.environ.get("JOURNAL_STREAM"):
            handlers.append((stream, _journal))
        else:
            handlers.append((stream, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())))
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.dict_tracebacks,
    ]
    logger = logging.getLogger("dropforge")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(settings.logging.level.upper())
    for handler, renderer in handlers:
        steps = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[*steps, *([] if renderer is _json else [_escaped]), renderer], foreign_pre_chain=shared
            )
        )
        logger.addHandler(handler)
    # watchdog tells of a queue overflow in its log alone; it belongs into ours.
    logging.getLogger("watchdog").handlers = [file]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    return structlog.stdlib.get_logger("dropforge")


def _json(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """One ASCII line: time, level and event first, then the data."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return json.dumps({**first, **event}, default=str, ensure_ascii=True)


def _escaped(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {
        key: escape(value, most=2000) if isinstance(value, str) and key != "exception" else value
        for key, value in event.items()
    }


def _journal(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """`<priority>event key=value ...`, as sd-daemon(3) has it; time and level are the journal's."""
    level = str(event.pop("level", "info"))
    event.pop("timestamp", None)
    what = event.pop("event", "")
    data = " ".join(f"{key}={value}" for key, value in event.items())
    return f"<{_JOURNAL_LEVELS.get(level, 6)}>{what} {data}".rstrip()
