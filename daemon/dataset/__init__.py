"""A dropped file's rows: what they may look like, and one pass that checks them all."""

from daemon.dataset.validate import (
    DatasetChanged,
    DatasetReport,
    RejectedDataset,
    Scan,
    scan_dataset,
)

__all__ = ["DatasetChanged", "DatasetReport", "RejectedDataset", "Scan", "scan_dataset"]
