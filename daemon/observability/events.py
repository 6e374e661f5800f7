"""Every event that the log may hold: the one list from which docs/events.md is made.

Names are `noun.past_verb`. A trainer's events are relayed under their own names. Code writes the names out where it logs;
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Event:
    """What an event means. Keys that are not always there are listed as well."""

    level: str
    meaning: str
    keys: tuple[str, ...] = ()


def _event(level: str, meaning: str, keys: str = "") -> Event:
    return Event(level=level, meaning=meaning, keys=tuple(keys.split()))


_END = (
    "job dataset was reason failure attempt version duplicate_of priority owner force overrides base_model size_bytes digest"
    " format dataset_rows skipped_rows hint tried steps_planned steps_run start_step resumed_from verdict reasons cleared"
    " train_loss held_out_before held_out_after held_out_losses best_step kept_step stopped_early tokens_per_second steady_tokens_per_second tokens_trained rows samples refused_rows dropped_rows held_out_rows"
    " replayed evaluation withheld_rows unmeasured truncated_rows trained_share spikes wall_seconds adapter_digest lora_norm base parent parent_digest warnings max_step created_at started_at"
    " total_seconds"
)

EVENTS: Mapping[str, Event] = {
    "daemon.started": _event("info", "Recovery is done and the inbox is watched.", "root watch_mode"),
    "daemon.stopping": _event("info", "It was asked to stop; a running trainer seals a checkpoint.", "running"),
    "daemon.stopped": _event("info", "The last line of a daemon that left in order."),
    "daemon.reloaded": _event("info", "SIGHUP: the log was opened again, settings were read again.", "ignored"),
    "daemon.not_reloaded": _event("error", "SIGHUP: the settings have a fault; those of before stay.", "error"),
    "daemon.not_closed": _event(
        "error", "Something could not be recorded at the end; the next start finds it.", "error"
    ),
    "unexpected.raised": _event(
        "error",
        "What nobody foresaw, with its traceback: the job or file in hand is tried once more, then given up.",
        "step job file error times exception",
    ),
    "daemon.ended_suddenly": _event(
        "error",
        "The daemon before this one crashed or was killed, while it did `step` to the job or file; `idle` is none. Twice in"
        " a row over one: it is given up.",
        "step job file times",
    ),
    "unexpected.not_given_up": _event(
        "error", "A job or file could not be given up; the queue is held.", "job error exception"
    ),
    "store.broken": _event("error", "The queue's database was damaged while the daemon ran; it is rebuilt.", "reason"),
    "store.set_aside": _event("error", "The queue's database cannot be read and was moved aside.", "path reason"),
    "root.contradicted": _event("error", "Parts of the root do not belong together; the queue is held.", "reason"),
    "root.verified": _event(
        "info",
        "All that is kept was read again and compared, in the background.",
        "versions datasets size_bytes seconds problems",
    ),
    "root.damaged": _event("error", "Something that is kept is not as it was recorded.", "reason hint"),
    "root.not_verified": _event("error", "The background check did not come to its end; it is tried again.", "error"),
    "job.quarantined": _event(
        "error", "A job was failed over an unexpected error, or a crash of the daemon, twice in a row.", "job reason"
    ),
    "job.brought_forward": _event(
        "warning", "The queue was older than the lineage, which has the job's version.", "job version"
    ),
    "job.moved": _event("info", "The root lies elsewhere than when the job was queued.", "job was now"),
    "store.rebuilt": _event("warning", "The queue was made anew from the folders.", "jobs succeeded"),
    "status.not_written": _event("error", "The status file cannot be written; logged once, training goes on.", "error"),
    "status.written_again": _event("info", "The status file can be written again."),
    "metrics.not_written": _event("error", "The metrics file cannot be written; logged once.", "path error"),
    "metrics.not_served": _event("error", "The metrics endpoint cannot be opened; training goes on.", "port error"),
    "doctor.found": _event("warning", "What would hold the daemon, found before it begins.", "check reason hint"),
    "queue.held": _event("warning", "Nothing is launched although jobs are ready.", "kind reason"),
    "queue.released": _event("info", "The reason to hold the queue is gone.", "kind"),
    "hook.failed": _event("error", "A hook could not be started, failed, or took too long.", "hook error"),
    "hook.left_out": _event(
        "warning", "Too many hooks waited, or the daemon ended; these were not run.", "hook waiting"
    ),
    "notice.sent": _event("info", "People were told what happened.", "events services"),
    "notice.failed": _event("error", "A notice was not taken; it is tried again when nobody took it.", "error"),
    "notice.lost": _event("error", "A notice that nobody took within a day was given up.", "events lines"),
    "inbox.claims_failed": _event("error", "Files could not be claimed; it is tried again.", "error"),
    "inbox.unusable": _event(
        "warning", "A folder of the inbox is missing or may not be entered; logged once.", "reason"
    ),
    "inbox.usable_again": _event("info", "The inbox can be used again."),
    "inbox.many_left_alone": _event(
        "warning", "So many names more than were logged will not be taken, or cannot be read.", "more last"
    ),
    "inbox.polling": _event("warning", "The inbox cannot be watched by events; it is polled instead.", "reason"),
    "inbox.watch_rebuilt": _event("warning", "The watch was lost and set up again.", "reason"),
    "inbox.events_lost": _event("warning", "The kernel dropped events; a scan finds their files.", "overflows"),
    "file.settled": _event("info", "A dropped file stopped changing.", "file reason"),
    "file.claimed": _event("info", "A dropped file was taken.", "file job priority owner"),
    "file.not_claimed": _event("warning", "A file could not be taken; it stays or is gone.", "file job reason"),
    "file.came_back": _event(
        "warning",
        "More was written under a name that had just been taken: it comes as several jobs.",
        "file job continues",
    ),
    "file.sidecar_ignored": _event(
        "warning", "The sidecar beside a file is another user's: the file is taken without it.", "job file reason"
    ),
    "file.unreadable": _event("warning", "A dropped file may not be read; it is taken when it may.", "file reason"),
    "file.quarantined": _event(
        "error",
        "A dropped file is moved to failed/, or left alone, over an unexpected error or a crash of the daemon, twice in a row.",
        "file reason",
    ),
    "file.replaced": _event("warning", "Another file took its place while it was taken.", "file job now"),
    "file.left_alone": _event("warning", "Something in the inbox will not be taken as it is.", "file reason"),
    "file.not_moved": _event(
        "error", "A finished job's file could not be moved; it is tried again.", "job error exception"
    ),
    "file.moved": _event("info", "A finished job's file that could not be moved has been.", "job"),
    "file.purged": _event("info", "A trained file was deleted after keep_done_days.", "job file finished_at"),
    "file.not_purged": _event("error", "A trained file could not be deleted.", "job error"),
    "file.adopted": _event("warning", "A claimed file that no job knew was queued anew.", "job file"),
    "file.claimed_after_crash": _event("info", "A claim that a crash cut short was completed.", "job file"),
    "file.returned_after_crash": _event("info", "A claim that a crash cut short was taken back.", "job"),
    "file.not_repaired": _event("error", "A job's file could not be put where it belongs at the start.", "job error"),
    "file.settled_after_crash": _event("info", "A finished job's file was moved where it belongs.", "job"),
    "dataset.not_concluded": _event(
        "error", "What the validation found could not be applied; it is tried again.", "job error"
    ),
    "dataset.checked": _event(
        "info",
        "Every row was read and is good.",
        "job rows format size_bytes digest skipped_rows unused_keys warnings",
    ),
    "dataset.child_ended": _event("warning", "A process that reads rows ended; it is started again.", "how"),
    "dataset.child_died": _event("warning", "A process that reads rows died over a file.", "job how tries"),
    "job.queued": _event("info", "It waits for its turn.", "job"),
    "job.renewed": _event(
        "info", "A held job took [model] and start_from from the settings of now.", "job base_model start_from"
    ),
    "job.started": _event("info", "A trainer was launched.", "job dataset attempt"),
    "job.requeued": _event("info", "An attempt ended without a result; the job waits for its next one.", _END),
    "job.succeeded": _event("info", "All steps ran and the adapter was promoted.", _END),
    "job.failed": _event("error", "It was given up.", _END),
    "job.cancelled": _event("info", "It will not be trained: a duplicate, or a person said so.", _END),
    "job.rejected": _event("warning", "The data cannot be trained; the report beside it says why.", _END),
    "trainer.adopted": _event("warning", "A trainer outlived its daemon; it is asked to leave.", "job attempt"),
    "trainer.asked_to_leave": _event("info", "The trainer is to seal a checkpoint and leave.", "job reason"),
    "trainer.ended": _event("warning", "A trainer did not leave when asked and was ended.", "job waited_seconds"),
    "trainer.not_launched": _event("error", "The trainer could not be started.", "job error"),
    "guard.run_decided": _event(
        "info", "Whose checkpoints are these: fresh, resume or stale.", "job verdict step reasons"
    ),
    "guard.checkpoint_passed_over": _event(
        "info", "A checkpoint is not resumed from.", "job path step state reason resume_from"
    ),
    "guard.entry_left_alone": _event("info", "Something in the model directory is none of ours.", "job path reason"),
    "guard.checkpoints_cleared": _event(
        "info", "Checkpoints that do not belong were moved aside.", "job cleared set reason size_bytes"
    ),
    "guard.cleared_sets_purged": _event("info", "Cleared checkpoints were deleted as policy says.", "sets size_bytes"),
    "guard.not_purged": _event("error", "Cleared checkpoints could not be deleted.", "error"),
    "guard.run_stamped": _event("info", "The model directory says whose run it holds.", "job identity dataset"),
    "memory.kept": _event(
        "info",
        "Rows of a trained dataset are kept, to rehearse and to measure.",
        "job digest rows held_out_rows discarded",
    ),
    "memory.shrunk": _event(
        "info", "Fewer rows of some datasets are kept, within memory_bytes.", "datasets memory_bytes"
    ),
    "memory.damaged": _event("error", "A dataset's memory is not as it was written, and is passed over.", "job error"),
    "memory.swept": _event("info", "Memories of jobs that ended without a version were removed.", "datasets"),
    "memory.not_swept": _event("error", "What a crash left among the memories could not be deleted.", "error"),
    "run.replay_drawn": _event(
        "info",
        "Which rows of earlier datasets are trained again, and how many of theirs the new ones replace.",
        "job rows trained_tokens wanted_tokens datasets replaced_rows",
    ),
    "run.planned": _event(
        "info",
        "The arithmetic of the run, before its first step.",
        "job rows replayed_rows replayed_tokens samples held_out_rows withheld_rows dropped_rows tokens trained_tokens global_batch_size steps_per_epoch epochs total_steps"
        " warmup_steps arithmetic",
    ),
    "run.data_warned": _event("warning", "What a person should know of the data before it is trained.", "job warnings"),
    "run.origin_warned": _event(
        "warning",
        "What could not be proven of the base model that the continued version was trained on.",
        "job warnings",
    ),
    "run.evaluated": _event(
        "info",
        "Loss over the rows held out: before, during or after the run.",
        "job when step held_out_loss rows best_step",
    ),
    "run.best_kept": _event(
        "info", "The step with the lowest held-out loss: the run ends with its weights.", "job step steps_run problem"
    ),
    "run.gate_judged": _event(
        "info",
        "What was lost of earlier datasets, by their held-out rows, and which blend mends it.",
        "job verdict reasons scored unscored evals alpha tried scored_tokens seconds",
    ),
    "run.started": _event(
        "info",
        "The first step is next.",
        "job start_step total_steps resumed_from tokenised_seconds loaded_seconds flat scores_trained_only",
    ),
    "run.stepped": _event(
        "info",
        "Each logging_steps, in a short run more often: how training goes.",
        "job step loss grad_norm learning_rate epoch tokens_per_second",
    ),
    "run.first_step": _event("info", "The first step of this attempt is done.", "job step loss"),
    "run.loss_spiked": _event("info", "A step's loss is far above the usual.", "job step loss usual"),
    "run.scalars_not_written": _event(
        "warning",
        "The run has no TensorBoard files from here on: their package is missing, or the disk refuses them.",
        "job error hint",
    ),
    "run.passes_halved": _event(
        "info", "Memory was short: a step is divided into smaller passes.", "job step budget_tokens passes"
    ),
    "run.gradient_checkpointing_enabled": _event("info", "Memory was short even for one row.", "job step longest_row"),
    "run.trained": _event(
        "info",
        "All steps are done: where the time went.",
        "job train_seconds bookkeeping_share sealing_share tokens_per_second",
    ),
    "checkpoint.sealed": _event("info", "A checkpoint is on disk, whole.", "job step path size_bytes"),
    "version.latest_repaired": _event(
        "warning", "`latest` was lost; the lineage told which version it names.", "version"
    ),
    "version.promoted": _event("info", "A finished adapter became the current one.", "job version"),
    "version.held": _event(
        "warning",
        "A finished adapter has lost something of earlier datasets, and is not current.",
        "job version reasons",
    ),
    "job.second_run": _event(
        "warning",
        "A version has lost something of earlier datasets: its dataset is trained again with twice the share of them.",
        "job version share reasons",
    ),
    "version.not_promoted": _event("error", "A finished adapter could not become a version.", "job error"),
    "version.pruned": _event("info", "Old versions were moved aside, as [versions] says.", "versions size_bytes"),
    "version.purged": _event("info", "Versions that were moved aside long ago were deleted.", "versions size_bytes"),
    "version.not_pruned": _event("error", "Old versions could not be moved aside or deleted.", "error"),
    "version.unreadable": _event("error", "The current version cannot be read.", "error"),
}

# What the console shows of an event, in this order, with its job; of an event that is not here, every short value.
CONSOLE_KEYS: Mapping[str, tuple[str, ...]] = {
    name: tuple(keys.split())
    for name, keys in {
        "file.claimed": "file",
        "dataset.checked": "rows format size_bytes skipped_rows unused_keys warnings",
        "job.started": "dataset attempt",
        "job.requeued": "dataset attempt reason hint warnings",
        "job.succeeded": (
            "dataset version steps_run steps_planned train_loss held_out_before held_out_after total_seconds warnings"
        ),
        "job.failed": "dataset attempt reason hint warnings",
        "job.cancelled": "dataset reason hint",
        "job.rejected": "dataset reason hint",
        "guard.run_decided": "verdict step reasons",
        "guard.run_stamped": "dataset",
        "memory.kept": "rows held_out_rows discarded",
        "run.replay_drawn": "rows trained_tokens replaced_rows",
        "run.planned": "rows held_out_rows replayed_rows dropped_rows tokens trained_tokens total_steps",
        "run.started": "start_step total_steps resumed_from",
        "run.gate_judged": "verdict reasons alpha",
        "run.trained": "train_seconds tokens_per_second",
        "checkpoint.sealed": "step size_bytes",
    }.items()
}


def by_noun() -> dict[str, dict[str, Event]]:
    """The events of each noun, in the order of the list."""
    nouns: dict[str, dict[str, Event]] = {}
    for name, event in EVENTS.items():
        nouns.setdefault(name.partition(".")[0], {})[name] = event
    return nouns
