"""The readers of files that somebody else wrote, each as a function of bytes and a folder to lay them into.

A target passes over what its reader documents as a refusal; whatever else it raises is a finding.
"""

from __future__ import annotations

import json
import os
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from daemon import config, run_dir, versions
from daemon.backup.manifest import DamagedManifest, parse_manifest
from daemon.backup.manifest import _digest as manifest_digest
from daemon.cli.check import prepare
from daemon.config import QueueSettings, Settings
from daemon.dataset.rows import Columns, Rules, iter_rows
from daemon.dataset.sidecar import RejectedSidecar, read_sidecar
from daemon.dataset.validate import RejectedDataset, scan_dataset
from daemon.errors import ConfigError, DropforgeError, RejectedData
from daemon.executors.base import Exit
from daemon.inbox import layout
from daemon.inbox.other_files import explain_other_name, names_unfinished_dataset
from daemon.inbox.report import rows_text
from daemon.job import Job, JobState, to_json
from daemon.limits import LimitSettings
from daemon.lineage import LINEAGE, newest_number, read_lineage
from daemon.memory import store as memory
from daemon.observability import logs, status
from daemon.observability.status import StatusSnapshot, running_job
from daemon.recipe import Recipe
from daemon.recovery import jobs_on_disk
from daemon.retry import decide
from daemon.root_identity import MARK, contradiction, read_parts
from daemon.status_writer import LossHistory
from daemon.text import escape
from daemon.verification import RESULT_NAME as VERIFICATION_NAME
from daemon.verification import read_verification
from guard.checkpoints import scan_checkpoints
from guard.completeness import recorded_step
from guard.digest import DigestCache
from guard.errors import GuardError
from guard.metadata import METADATA_NAME, load_raw_metadata, read_metadata
from guard.seal import SEAL_NAME, _value_of

Target = Callable[[bytes, Path], None]
JOB = Job(id="20261125-120000-abcd", name="a.jsonl", state=JobState.RUNNING)
KEY = b"0123456789abcdef"


def sidecar(data: bytes, folder: Path) -> None:
    """A sidecar, up to the recipe that is queued with it."""
    path = folder / "a.job.toml"
    path.write_bytes(data)
    with suppress(RejectedSidecar):
        found = read_sidecar(path, Recipe(), LimitSettings(), data_owner=os.geteuid())
        to_json(found)
        to_json(Recipe().with_overrides(found.overrides).model_dump(mode="json"))


def rows(data: bytes, folder: Path) -> None:
    """A dataset. Its first byte says how it is read: plain or compressed, and under which rules."""
    choice, content = (data[0], data[1:]) if data else (0, b"")
    path = folder / f"a.jsonl{('', '', '.gz', '.zst')[choice & 3]}"
    path.write_bytes(content)
    rules = Rules(
        columns=Columns(prompt="q", completion="a") if choice & 4 else Columns(),
        on_bad_rows="skip" if choice & 8 else "reject",
        prompt_completion="chat" if choice & 16 else "as_is",
        max_bad_fraction=1.0,
    )
    try:
        report = scan_dataset(path, rules).report
        assert report.rows == sum(1 for _ in iter_rows(path, str(report.format), rules))
    except RejectedDataset as error:
        report = error.report
    to_json(report)
    assert all(map(_is_safe, rows_text(report)))


def name(data: bytes, folder: Path) -> None:
    """A name in the inbox, and a file and a sidecar that have it where a file system lets them."""
    text = os.fsdecode(data.replace(b"/", b"_").replace(b"\0", b"_")[: layout.MAX_NAME_BYTES])
    layout.name_kind(text)
    assert "".join(layout.split_data_name(text)) == text
    for derived in (layout.sidecar_name(text), layout.stem(text), layout.numbered_name(text, 12)):
        assert "/" not in derived
    assert _is_safe(escape(text))
    assert _is_safe(escape(explain_other_name(text).reason))
    names_unfinished_dataset(text)
    path = folder / text
    if text in ("", ".", ".."):
        return
    path.write_text('{"text": "a"}\n')
    with suppress(RejectedData):
        to_json(prepare(path, Settings(root=folder)).request)


def run_directory(data: bytes, folder: Path) -> None:
    """What a trainer, or a crash, leaves in a run directory: the same bytes under each of its names."""
    directory = run_dir.run_dir_of(folder, JOB.id)
    directory.mkdir(parents=True)
    reader = run_dir.RunReader(directory)
    for file in ("run.json", "trainer.json", "events.jsonl", "progress.json", "result.json", "replay.json"):
        (directory / file).write_bytes(data)
    with suppress(ValueError):  # as it is documented; the trainer says it of its own
        run_dir.read_spec(directory)
    run_dir.latest_spec(folder)
    identity = run_dir.read_identity(directory)
    assert identity is None or not identity.alive or identity.pid > 0
    run_dir.sealed_step(directory)
    run_dir.read_result(directory)
    progress, result = reader.progress(), reader.result()
    losses = LossHistory().observe(directory, 1, progress)
    snapshot = StatusSnapshot(status="training", reason="", job=running_job(JOB, progress, losses))
    status.render(snapshot)
    decision = decide(
        job=JOB,
        result=result,
        ended=Exit(),
        stop=None,
        phase=progress.phase if progress else "",
        progressed=False,
        queue=QueueSettings(),
        now=0.0,
    )
    to_json(decision)
    log = _log()
    for event, facts in reader.events():
        log.info(event, **{**facts, "job": JOB.id})
        assert not logs.write_error()


def settings(data: bytes, folder: Path) -> None:
    """`dropforge.toml`."""
    with suppress(ConfigError):
        loaded = config.load(folder, text=data)
        to_json(loaded.recipe.model_dump(mode="json"))


def lineage(data: bytes, folder: Path) -> None:
    """A model directory: its lineage, the record of a version, and the adapter's configuration."""
    version = folder / versions.VERSIONS / "0001"
    version.mkdir(parents=True)
    for path in (folder / LINEAGE, version / versions.RECORD, version / versions.ADAPTER_FILES[0]):
        path.write_bytes(data)
    (folder / versions.LATEST).symlink_to(f"{versions.VERSIONS}/0001")
    found = read_lineage(folder)
    json.dumps([found.current, found.newest_number, sorted(found.recorded())])
    assert newest_number(folder) == found.newest_number <= versions.newest_number(folder)
    versions.learned_by(folder, "d")
    with suppress(DropforgeError):
        current = versions.current_version(folder)
        assert current is not None
        versions.line_of(current)
        versions.named_base(current)
        versions.promotion_record(current)
        with suppress(OSError):  # a name that is too long for the file system
            versions.damage(current)
        status.render(StatusSnapshot(status="idle", reason="", model=status.current_model(current)))


def seal(data: bytes, folder: Path) -> None:
    """The seal of a checkpoint: as it is, and with a value that fits, so that what is behind that is read too."""
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_bytes(data)
    recorded_step(checkpoint)
    for text in (data, *_sealed(data)):
        (checkpoint / SEAL_NAME).write_bytes(text)
        for key in (None, KEY):
            for found in scan_checkpoints(folder, key=key, digests=True):
                assert _is_safe(escape(found.reason))


def _sealed(data: bytes) -> list[bytes]:
    """The same document with a value that fits it, with and without a key."""
    found = []
    for key, algorithm in ((None, "blake3"), (KEY, "hmac-sha256")):
        with suppress(ValueError, TypeError, RecursionError):
            document = {**json.loads(data), "algorithm": algorithm}
            document["seal"] = _value_of(document, key)
            found.append((json.dumps(document, indent=1, sort_keys=True) + "\n").encode())
    return found


def metadata(data: bytes, folder: Path) -> None:
    """The guard's other files in a model directory: whose the checkpoints are, and the digests of large files."""
    (folder / METADATA_NAME).write_bytes(data)
    reading = read_metadata(folder)
    assert _is_safe(escape(reading.reason))
    load_raw_metadata(folder)
    if reading.run is not None:
        reading.run.to_json()
        if reading.run.fingerprint is not None:
            reading.run.fingerprint.explain_changes(reading.run.fingerprint)
            assert reading.run.fingerprint.identity_digest
    (folder / "cache.json").write_bytes(data)
    with suppress(GuardError):
        DigestCache(folder / "cache.json").digest(__file__)  # one that nobody writes to, which would be waited for


def root(data: bytes, folder: Path) -> None:
    """The files by which a root is known and shown: its marks, its status, its last check, memories and reports."""
    own = Settings(root=folder)
    remembered = memory.memory_dir_of(own.state_dir) / "0123"
    report = own.inbox_dir / layout.DONE / JOB.id
    for path in (
        *(part / MARK for part in (own.state_dir, own.model_dir, own.inbox_dir)),
        own.status_path,
        own.state_dir / VERIFICATION_NAME,
        remembered / memory.META_NAME,
        report / "report.json",
        own.model_dir / versions.VERSIONS / "0001" / versions.RECORD,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert _is_safe(escape(contradiction(read_parts(own)), most=10_000))
    with suppress(ValueError), patch.object(status, "REREAD_SECONDS", 0.0):
        status.read_status(own.status_path)
    read_verification(own)
    memory.list_memories(memory.memory_dir_of(own.state_dir))
    for job in jobs_on_disk(own):
        to_json(job)


def manifest(data: bytes, folder: Path) -> None:
    """The manifest of a backup, which may come from a stranger."""
    for text in (data, *_with_digest(data)):
        with suppress(DamagedManifest):
            parse_manifest(text)


def _with_digest(data: bytes) -> list[bytes]:
    with suppress(ValueError, TypeError, AttributeError, RecursionError):
        value = json.loads(data)
        value.pop("digest", None)
        return [json.dumps({**value, "digest": manifest_digest(value)}).encode()]
    return []


TARGETS: Mapping[str, Target] = {
    target.__name__: target
    for target in (sidecar, rows, name, run_directory, settings, lineage, seal, metadata, root, manifest)
}


def _is_safe(line: str) -> bool:
    """Whether a line can be shown on any terminal: nothing in it ends it, colours it or turns it round."""
    return not {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} & set(map(unicodedata.category, line))


@cache
def _log() -> Any:
    """The daemon's log, in a folder that is left to the system to clean."""
    return logs.configure(Settings(root=Path(tempfile.mkdtemp(prefix="fuzz-log-"))), terminal=False)
