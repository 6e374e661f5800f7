"""Request and reply between the daemon and the child process that validates files."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from daemon.dataset.rows import Rules
from daemon.dataset.validate import DatasetChanged, DatasetReport, RejectedDataset, scan_dataset
from daemon.job import Dataset

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """One file to validate."""

    job_id: str
    path: str
    rules: Rules


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The result; `kind` says which of the other fields are set."""

    job_id: str
    kind: str  # progress | passed | rejected | changed | failed
    bytes_read: int = 0
    dataset: Dataset | None = None
    report: DatasetReport | None = None
    message: str = ""


def answer(request: Request, report_progress: Callable[[Reply], None]) -> Reply:
    """Validate the file. Never raises: every outcome has a reply."""
    reported_at = time.monotonic()

    def progress(count: int) -> None:
        nonlocal reported_at
        if (now := time.monotonic()) - reported_at >= PROGRESS_SECONDS:
            reported_at = now
            report_progress(Reply(job_id=request.job_id, kind="progress", bytes_read=count))

    try:
        scan = scan_dataset(request.path, request.rules, progress=progress)
    except RejectedDataset as error:
        return Reply(job_id=request.job_id, kind="rejected", report=error.report)
    except DatasetChanged as error:
        return Reply(job_id=request.job_id, kind="changed", message=error.sentence)
    except MemoryError:
        return Reply(job_id=request.job_id, kind="failed", message="a row needs too much memory")
    except OSError as error:
        reason = f"it cannot be read: {error.strerror or type(error).__name__}"
        return Reply(job_id=request.job_id, kind="failed", message=reason)
    except Exception as error:  # a fault of ours; the file is refused, and the next one gets its turn
        traceback.print_exc(file=sys.stderr)
        reason = f"its rows could not be checked: {type(error).__name__} inside Dropforge; its log has the details"
        return Reply(job_id=request.job_id, kind="failed", message=reason)
    return Reply(job_id=request.job_id, kind="passed", dataset=scan.dataset, report=scan.report)
