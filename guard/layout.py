"""The names that the guard uses inside a model directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from .atomic import PathLike, make_folder_durable
from .errors import StorageError, storage_errors

METADATA_NAME: Final = ".dataset_metadata.json"
STAGING_NAME: Final = ".staging"
CLEARED_NAME: Final = ".cleared"
LOCK_NAME: Final = ".lock"

# A folder under .staging/ with this prefix was given up on purpose; what is left of it may be removed at any
# time.
TRASH_PREFIX: Final = "trash-"


def ensure_staging(model_dir: PathLike) -> Path:
    """Make the staging folder if it is missing; returns it."""
    return ensure_own_folder(model_dir, STAGING_NAME)


def ensure_own_folder(model_dir: PathLike, name: str) -> Path:
    """A folder of the guard's own directly below the model directory, created when missing.

    Raises StorageError when a symlink has its name: the guard never leaves the model directory.
    """
    folder = Path(model_dir, name)
    with storage_errors("use the folder", folder):
        if folder.is_symlink():
            raise StorageError(
                operation="use the folder",
                path=folder,
                cause="it is a symbolic link",
                hint="the guard never leaves the model directory: remove the link",
            )
        make_folder_durable(folder)
    return folder


def unused_name(folder: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... when it is taken."""
    number, candidate = 1, name
    while os.path.lexists(folder / candidate):
        number += 1
        candidate = f"{name}-{number}"
    return candidate
