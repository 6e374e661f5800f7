"""Five functions of an earlier generation, with the same names, arguments and results; thin over the core.

They know the dataset and three numbers of the adapter, so they can prove less than `prepare_run` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .atomic import PathLike
from .clear import Logger, plan_clear
from .errors import GuardError
from .fingerprint import Fingerprint, fingerprint_dataset, name_size_hash
from .lock import locked
from .metadata import MetadataKind, load_raw_metadata, read_metadata, write_metadata
from .prepare import make_metadata, plain_lora_config
from .verdict import Verdict, VerdictCause

_PEFT_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}


def compute_dataset_hash(dataset_path: PathLike) -> str:
    """md5 of `name:size`, as old metadata has it.

    The content is not read: a same-size edit has the same hash.
    """
    return name_size_hash(dataset_path)[1]


def save_dataset_metadata(output_dir: PathLike, dataset_path: PathLike, lora_config: Any) -> None:
    """Record that `output_dir` belongs to this dataset (content included) and adapter."""
    lora = _lora_components(lora_config)
    content = fingerprint_dataset(dataset_path)
    fingerprint = Fingerprint({**content.components(), "dataset.path": str(Path(dataset_path).absolute()), **lora})
    metadata = make_metadata(fingerprint=fingerprint, dataset_path=dataset_path, lora_config=lora_config)
    with locked(output_dir, owner="save_dataset_metadata"):
        write_metadata(output_dir, metadata)


def load_dataset_metadata(output_dir: PathLike) -> dict[str, Any] | None:
    """Return the metadata as the file has it.

    None when missing, unreadable or not an object.
    """
    return load_raw_metadata(output_dir)


def validate_checkpoint_compatibility(
    output_dir: PathLike, dataset_path: PathLike, lora_config: Any
) -> tuple[bool, str | None]:
    """Whether the metadata is of this dataset and adapter, and if not, why not.

    Missing or broken metadata is incompatible. Metadata of the old form is judged by name and size alone.
    """
    reading = read_metadata(output_dir)
    if reading.run is None:
        return False, f"the metadata is {reading.kind.value}: {reading.reason}"
    recorded = reading.run.fingerprint
    try:
        if reading.kind is MetadataKind.LEGACY or recorded is None:
            recorded_dataset = {"dataset.digest": reading.run.dataset_hash, "dataset.name": reading.run.dataset_name}
            old = Fingerprint({**recorded_dataset, **_lora_components(reading.run.lora_config)})
            digest = compute_dataset_hash(dataset_path)
            known: dict[str, Any] = {"dataset.digest": digest, "dataset.name": Path(dataset_path).name}
        else:
            old = recorded
            # 32 hex digits are md5 of name and size: what was too large to read then is not read now.
            by_size = len(str(recorded.components.get("dataset.digest") or "")) == 32
            known = {**fingerprint_dataset(dataset_path, mode="name_size" if by_size else "content").components()}
    except GuardError as exc:
        return False, str(exc).splitlines()[0]
    new = Fingerprint({**old.components, **known, **_lora_components(lora_config)})
    reasons = list(old.explain_changes(new))
    if reading.run.finished is not None:
        reasons.insert(0, f"the run that wrote it finished as version {reading.run.finished}")
    return (False, "; ".join(reasons)) if reasons else (True, None)


def clear_checkpoints(output_dir: PathLike, logger: Logger | None = None) -> int:
    """Move every checkpoint folder into `.cleared/`; returns how many. Nothing is deleted."""
    if not Path(output_dir).is_dir():
        return 0
    everything = Verdict(cause=VerdictCause.REQUESTED, reasons=("the caller asked for it",))
    with locked(output_dir, owner="clear_checkpoints"):
        return plan_clear(output_dir, verdict=everything).execute(logger).cleared


def _lora_components(lora_config: Any) -> dict[str, Any]:
    return {f"lora.{_PEFT_NAMES.get(name, name)}": value for name, value in plain_lora_config(lora_config).items()}
