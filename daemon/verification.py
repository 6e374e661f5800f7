"""Verification: what a root keeps is read again from the disk and compared with what was recorded of it.

`python -m daemon.verification ROOT` is the background pass: it reads slowly, behind everybody else, and leaves its result in
the state directory, where the daemon finds it. `dropforge doctor --verify` does the same at full speed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from daemon import config, root_identity, versions
from daemon.base_identity import Digest, base_change, find_base, identify_base, recorded_base
from daemon.config import Settings
from daemon.errors import DropforgeError
from daemon.inbox import layout
from daemon.inbox.report import REPORT_JSON, parse_report
from daemon.job import from_json, to_json, utc_now
from daemon.lineage import LINEAGE, read_lineage
from daemon.memory.store import MemoryDamaged, list_memories, memory_dir_of, read_memory
from daemon.processes import child_environment, describe_exit, die_with_parent, prefer_oom_kill
from daemon.text import escape
from guard import GuardError
from guard.atomic import write_atomic
from guard.digest import FileDigest, digest_file

RESULT_NAME = "verification.json"  # in the state directory
REST = 3.0  # seconds without reading for each second of it, in the background
FIRST_SECONDS = 600.0  # after a start: who has just started the daemon has other things to do
AGAIN_SECONDS = 3600.0  # after a pass that found something, or did not come to its end
MAX_PROBLEMS = 100
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}  # the C library has no function for it
_IOPRIO_IDLE = 3 << 13

RESTORE_VERSION = "bring it back from a backup, or go on from another version with `dropforge rollback N`"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not as it was recorded."""

    message: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What one pass looked at and found."""

    at: str  # when it ended
    versions: int
    datasets: int
    size_bytes: int
    seconds: float
    problems: tuple[Problem, ...] = ()


def verify(settings: Settings, digest: Digest = digest_file) -> Verification:
    """Check marks, lineage, versions, the base model and the trained files; every file is read by `digest`."""
    began, counted = time.monotonic(), _Counted(digest)
    problems = tuple(_problems(settings, counted))
    return Verification(
        at=utc_now(),
        versions=counted.versions,
        datasets=counted.datasets,
        size_bytes=counted.size_bytes,
        seconds=round(time.monotonic() - began, 3),
        problems=problems[:MAX_PROBLEMS],
    )


class _Counted:
    """A digest that counts what it read."""

    def __init__(self, digest: Digest) -> None:
        self.size_bytes = self.versions = self.datasets = 0
        self._digest = digest

    def __call__(self, path: Path) -> FileDigest:
        found = self._digest(path)
        self.size_bytes += found.size_bytes
        return found


def _problems(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    if reason := root_identity.contradiction(root_identity.read_parts(settings)):
        yield Problem(message=reason)
    # The lineage last: a version may have been promoted meanwhile.
    for check in (_versions, _base, _datasets, _memories, _lineage):
        try:
            yield from check(settings, digest)
        except (GuardError, OSError) as error:
            yield Problem(message=f"it could not be checked: {error}")


def _versions(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    """Every file of every version, and what each says of its parent."""
    promoted = read_lineage(settings.model_dir).recorded()
    for version in versions.list_versions(settings.model_dir):
        digest.versions += 1
        try:
            damage = versions.damage(version, partial(_digest_in, version.path, digest))
        except (GuardError, OSError) as error:
            damage = (f"version {version.name} cannot be read: {error}",)
        for sentence in damage:
            yield Problem(message=sentence, hint=RESTORE_VERSION)
        line = promoted.get(version.name)
        if line is None or not version.record:
            continue
        noted = {key: value for key, value in version.record.items() if key not in versions.ONLY_IN_RECORD}
        if any(line.get(key) != value for key, value in noted.items()):
            yield Problem(
                message=f"version {version.name}: {versions.RECORD} says something else than {LINEAGE}",
                hint="the lineage is what counts; bring the record back from a backup",
            )
        parent = promoted.get(str(line.get("parent")), {}).get("files", {}).get(versions.ADAPTER_FILES[1])
        if parent and line.get("parent_digest") not in (None, parent):
            yield Problem(
                message=f"version {version.name} continued an adapter that version {line.get('parent')} did not have"
            )


def _digest_in(folder: Path, digest: Digest, name: str) -> str | None:
    path = folder / Path(name).name
    return digest(path).blake3_hex if path.is_file() else None


def _base(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    """The base model that the next run would continue the current version on."""
    try:
        current = versions.current_version(settings.model_dir)
    except DropforgeError as error:
        yield Problem(message=error.sentence, hint=error.hint)
        return
    base = find_base(settings.recipe.model, settings.root)
    if current is None or base is None:
        return
    recorded = recorded_base(versions.promotion_record(current))
    if recorded is not None and (change := base_change(current.name, recorded, identify_base(base, digest))):
        yield Problem(message=change.message, hint=change.hint)


def _datasets(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    """The files in done/ that a report gives a digest of."""
    done = settings.inbox_dir / layout.DONE
    for folder in sorted(done.iterdir()) if done.is_dir() else ():
        try:
            report = parse_report((folder / REPORT_JSON).read_text(encoding="utf-8"))
            path, expected = folder / report["file"], (report.get("dataset") or {}).get("digest")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # without a report there is nothing to compare with
        if not expected or not path.is_file():  # deleted as the settings say, or by hand: it is trained
            continue
        digest.datasets += 1
        shown = escape(str(path.relative_to(settings.inbox_dir)))
        try:
            is_same = digest(path).blake3_hex == expected
        except GuardError as error:
            yield Problem(message=f"{shown} cannot be read: {error.cause}", hint=error.hint)
            continue
        if not is_same:
            yield Problem(
                message=f"{shown} is not the file that was trained",
                hint="bring it back from its source; the version that was made from it is not changed by this",
            )


def _memories(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    """The rows that are kept of earlier datasets."""
    memories, unreadable = list_memories(memory_dir_of(settings.state_dir))
    yield from (Problem(message=sentence, hint="bring the folder back from a backup") for sentence in unreadable)
    for memory in memories:
        try:
            digest.size_bytes += sum(len(memory.read(name)) for name in memory.meta.files)
        except MemoryDamaged as error:
            if read_memory(memory.path) == memory:  # else it was forgotten at this moment
                yield Problem(message=f"the memory of {error.subject}: {error.cause}", hint=error.hint)


def _lineage(settings: Settings, digest: _Counted) -> Iterator[Problem]:
    """The chain of the lineage, and whether it knows every version and the current one."""
    found = versions.list_versions(settings.model_dir)
    lineage = read_lineage(settings.model_dir)
    for sentence in lineage.broken:
        yield Problem(message=sentence, hint=f"{LINEAGE} was altered: bring it back from a backup")
    for version in found:
        if version.name not in lineage.recorded():
            yield Problem(
                message=f"version {version.name} has no line in {LINEAGE}",
                hint=f"bring {LINEAGE} back from a backup; a version that was copied here by hand is in no line",
            )
    try:
        current = versions.current_version(settings.model_dir)
    except DropforgeError:
        return  # told with the base
    if current is not None and lineage.current not in (None, current.name):
        yield Problem(
            message=f"`latest` leads to version {current.name}, and the lineage says {lineage.current}",
            hint="`dropforge rollback N` says which one is meant",
        )


def read_verification(settings: Settings) -> Verification | None:
    """Return what the last pass found; None before the first, or when its result cannot be read."""
    try:
        return from_json((settings.state_dir / RESULT_NAME).read_bytes(), Verification)
    except (OSError, ValueError):
        return None


class BackgroundVerifier:
    """Runs the background pass when it is due, and knows what the last one found. `poll` returns promptly."""

    def __init__(self, settings: Settings, log: Any) -> None:
        self.settings = settings
        self.last = read_verification(settings)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._due = time.monotonic() + min(FIRST_SECONDS, self._interval_seconds)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the last pass found, for the status."""
        problems = self.last.problems if self.last is not None else ()
        return tuple(f"{problem.message}; `dropforge doctor --verify` says what to do" for problem in problems)

    def poll(self) -> None:
        """Start a pass that is due, and collect one that has ended."""
        if self._process is not None:
            if (code := self._process.poll()) is not None:
                self._collect(code)
        elif self.settings.guard.verify_days and time.monotonic() >= self._due and self._is_old():
            self._start()

    def close(self) -> None:
        """End a pass that runs; the next one begins anew."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def _interval_seconds(self) -> float:
        return self.settings.guard.verify_days * 86_400

    def _is_old(self) -> bool:
        """Whether the last pass is an interval ago, or found something that may be mended by now."""
        try:
            age = time.time() - (self.settings.state_dir / RESULT_NAME).stat().st_mtime
        except OSError:
            return True
        patience = self._interval_seconds
        if self.last is None or self.last.problems:
            patience = min(patience, AGAIN_SECONDS)
        return not 0 <= age < patience  # a clock that was set back shows nothing

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "daemon.verification", str(self.settings.root), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                env=child_environment(),
            )
        except OSError as error:
            self._fail(str(error))

    def _collect(self, code: int) -> None:
        self._process = None
        if code != 0:
            self._fail(describe_exit(code))
            return
        self._due = 0.0  # its result tells when the next one is
        self.last = read_verification(self.settings)
        if self.last is None:
            self._fail(f"{RESULT_NAME} cannot be read")
            return
        for problem in self.last.problems:
            self._log.error("root.damaged", reason=problem.message, hint=problem.hint)
        self._log.info(
            "root.verified",
            versions=self.last.versions,
            datasets=self.last.datasets,
            size_bytes=self.last.size_bytes,
            seconds=self.last.seconds,
            problems=len(self.last.problems),
        )

    def _fail(self, why: str) -> None:
        self._due = time.monotonic() + AGAIN_SECONDS
        self._log.error("root.not_verified", error=why)


def yield_to_others() -> None:
    """Let every other process have the processor and the disk first."""
    os.nice(19)
    if (number := _IOPRIO_SET.get(platform.machine())) is not None:
        ctypes.CDLL(None, use_errno=True).syscall(number, 1, 0, _IOPRIO_IDLE)  # 1: of a process, 0: this one


def main() -> int:
    """Verify a root slowly, for the daemon whose pid is the second argument."""
    root, daemon_pid = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent(daemon_pid)
    prefer_oom_kill()
    yield_to_others()
    settings = config.load(root)
    result = verify(settings, partial(digest_file, rest=REST))
    write_atomic(settings.state_dir / RESULT_NAME, to_json(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
