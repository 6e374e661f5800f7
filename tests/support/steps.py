"""The steps of a file's way through the daemon: where an error or a death is injected, and a root on which that is quick."""

from __future__ import annotations

TABLES = {
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 2},
    "inbox": {"settle_seconds": 0.05, "rescan_seconds": 0.3},
}
ALWAYS = 1_000_000
PLACES = {
    "a name is found": "daemon.inbox.candidates:CandidateTracker._examine_candidate",
    "the claim": "daemon.inbox.intake:claim",
    "its rows are sent to be checked": "daemon.inbox.validation:Validator._submit",
    "the result of the check": "daemon.inbox.validation:Validator._apply",
    "the duplicate check": "daemon.scheduler:Scheduler._finish_duplicate",
    "the holds": "daemon.scheduler:Scheduler._hold_for",
    "the launch": "daemon.scheduler:Scheduler._launch",
    "observing": "daemon.scheduler:Scheduler._relay",
    "the decision": "daemon.scheduler:Scheduler._end_attempt",
    "the promotion": "daemon.scheduler:Scheduler._promote",
    "the conclusion": "daemon.scheduler:Scheduler._finish",
    "the archive": "daemon.inbox.archive:archive_files",
    "the log": "daemon.notifications:canonical",
    "the status": "daemon.status_writer:finished_job",
}


def rows(word: str) -> list[dict[str, str]]:
    """Four rows that no other word has."""
    return [{"text": f"{word} {number}"} for number in range(4)]
