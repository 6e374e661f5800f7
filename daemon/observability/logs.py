"""Logging: one event, up to two readers - the file (complete, JSON lines), and a terminal (brief) or the journal.

structlog shapes the events, the standard library's handlers carry and rotate them. Nothing that a file's name or a
dataset's text holds can forge a line, a field or a colour: JSON is ASCII, everything else is escaped.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import structlog

from daemon.config import Settings
from daemon.observability import journald, log_reader
from daemon.text import finite
from guard.atomic import append_or_nothing, end_last_line

SHOWN_BY_SCREEN = frozenset({"run.stepped"})
Listener = Callable[[str, Mapping[str, Any]], None]  # (event name, its data)


class TextStream(Protocol):
    """Where a handler writes lines."""

    def write(self, text: str, /) -> object:
        """Print a line that ends in a newline. Raises OSError."""

    def flush(self) -> None:
        """Write what waits."""


def configure(
    settings: Settings, *, terminal: bool = True, screen: TextStream | None = None, listeners: Sequence[Listener] = ()
) -> Any:
    """Set up the log of a daemon and return its logger.

    A log file that cannot be opened now is told on stderr and by `problem`, and opened when it can be. `terminal=False` writes to the file alone; a `screen` that shows the
    running job itself gets the lines of the terminal, without those of its steps. `listeners` get every event, also those
    below the level that is written.
    """
    with suppress(OSError):  # the file says why it cannot be opened
        settings.log_path.parent.mkdir(parents=True, exist_ok=True)
    file = CompleteFile(settings.log_path, max_bytes=settings.logging.max_bytes, backups=settings.logging.backups)
    handlers: list[tuple[logging.Handler, Any]] = [(file, _json)]
    if screen is not None:
        above = logging.StreamHandler(cast(TextIO, screen))
        above.addFilter(_is_not_a_step)
        handlers.append((above, _above_screen))
    elif terminal:
        native = journald.JournalHandler() if journald.is_stderr() else None
        handlers.append((native, journald.render) if native else (logging.StreamHandler(sys.stderr), _console))

    def publish(logger: Any, name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        for listener in listeners:
            listener(str(event.get("event", "")), event)
        return event

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
    ]
    logger = logging.getLogger("dropforge")
    for old in logger.handlers:
        old.close()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(settings.logging.level.upper())
    for handler, renderer in handlers:
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
                foreign_pre_chain=shared,
            )
        )
        logger.addHandler(handler)
    # watchdog reports a queue overflow in its log alone; it belongs in ours.
    logging.getLogger("watchdog").handlers = [file]
    structlog.configure(
        processors=[*shared, publish, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    return structlog.stdlib.get_logger("dropforge")


def _is_not_a_step(record: logging.LogRecord) -> bool:
    return not (isinstance(record.msg, dict) and record.msg.get("event") in SHOWN_BY_SCREEN)


def reopen() -> None:
    """Open the log file again by its name, after logrotate has moved ours away."""
    for file in _files():
        file.reopen()


def write_error() -> str:
    """Return why the last event is missing from the log file; empty when it was written."""
    return next((file.write_error for file in _files()), "")


def problem() -> str:
    """Say what is wrong with the log file, and what to do; empty while it is written."""
    for file in _files():
        if file.write_error:
            what = f"the log {file.baseFilename} cannot be written: {file.write_error}"
            return f"{what}; what happens is told on stderr alone until it can, or [logging] names another folder"
    return ""


def _files() -> Iterator[CompleteFile]:
    return (handler for handler in logging.getLogger("dropforge").handlers if isinstance(handler, CompleteFile))


class CompleteFile(logging.handlers.RotatingFileHandler):
    """The log file. A write that fails is reported on stderr, once, and the daemon goes on."""

    def __init__(self, path: Path, *, max_bytes: int, backups: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="ascii", delay=True)
        self.write_error = ""
        try:
            self.stream = self._open()
        except OSError as error:  # tried again at each event
            self.write_error = error.strerror or str(error)
            self._tell()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, rotating first when the file is full."""
        before, self.write_error = self.write_error, ""
        super().emit(record)
        if self.write_error and self.write_error != before:
            self._tell()

    def _tell(self) -> None:
        print(f"dropforge: cannot write the log {self.baseFilename}: {self.write_error}", file=sys.stderr)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  the name is the base class's
        """Remember why; the base class would print a traceback for every line."""
        error = sys.exc_info()[1]
        self.write_error = getattr(error, "strerror", None) or str(error) or type(error).__name__

    def _open(self) -> Any:
        """Open the file; the base class calls this, also after a rotation."""
        return _WholeLines(Path(self.baseFilename))

    def reopen(self) -> None:
        """Close the file; the next event opens the one that has its name now, and reports when it cannot."""
        self.acquire()
        try:
            if self.stream is not None:
                self.stream.close()
            self.stream = None  # emit opens it, and knows how to fail
        finally:
            self.release()


class _WholeLines:
    """The stream of the log file: each line is written at once, or not at all.

    A text stream would keep what a full disk refused, raise it again at its close, and leave half a line behind.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            end_last_line(self._fd)  # the machine may have lost its power since
        except OSError:
            os.close(self._fd)
            raise

    def write(self, text: str) -> None:
        """Append the whole line or nothing. Raises OSError."""
        append_or_nothing(self._fd, text.encode("ascii"))

    def flush(self) -> None:
        """Do nothing: every line is written at once."""

    def seek(self, offset: int, whence: int) -> None:
        """Do nothing: every write goes to the end."""

    def tell(self) -> int:
        """Return the file's size."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


def _json(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """One ASCII line: time, level and event first, then the data; never NaN."""
    first = {key: event.pop(key) for key in ("timestamp", "level", "event") if key in event}
    return json.dumps(finite({**first, **event}), default=str, ensure_ascii=True, allow_nan=False)


def _console(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """The event as the console shows it; the file has it whole."""
    return log_reader.format_line(log_reader.brief(finite(event)), colours=_has_colours(), width=_width())


def _above_screen(logger: Any, name: str, event: MutableMapping[str, Any]) -> str:
    """The event as a person sees it who watches it happen."""
    return log_reader.format_line(log_reader.brief(finite(event)), colours=_has_colours(), short=True, width=_width())


def _width() -> int | None:
    return log_reader.terminal_width(sys.stderr)


def _has_colours() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")
