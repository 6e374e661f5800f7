"""Whether this process may work in a folder, in words."""

from __future__ import annotations

import os
from pathlib import Path


def closed(path: Path) -> str:
    """Why nothing can be read, made and renamed in a folder; empty when all of that can be done.

    Raises FileNotFoundError when there is none.
    """
    try:
        path.stat()
        if os.access(path, os.R_OK | os.W_OK | os.X_OK):
            return ""
        return "read-only file system" if os.statvfs(path).f_flag & os.ST_RDONLY else "permission denied"
    except FileNotFoundError:
        raise
    except OSError as error:
        return (error.strerror or str(error)).lower()
