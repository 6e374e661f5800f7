"""decide: a table of values, no disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import guard
from guard import Checkpoint, CheckpointState, MetadataKind, MetadataReading, RunMetadata, VerdictCause, VerdictKind
from tests.unit.guard.conftest import make_fingerprint

OURS = make_fingerprint()
OTHER = make_fingerprint(lora__r=99)


def metadata_of(fingerprint: guard.Fingerprint | None = OURS, **changes: Any) -> MetadataReading:
    metadata = RunMetadata(
        dataset_name="rows.jsonl",
        dataset_hash="0" * 32,
        dataset_path="/rows.jsonl",
        lora_config={},
        fingerprint=fingerprint,
        **changes,
    )
    return MetadataReading(kind=MetadataKind.CURRENT, run=metadata)


def checkpoint(
    step: int, state: CheckpointState = CheckpointState.INTACT, fingerprint: guard.Fingerprint | None = OURS
) -> Checkpoint:
    return Checkpoint(
        path=Path(f"checkpoint-{step}"),
        step=step,
        state=state,
        reason="" if state is CheckpointState.INTACT else "it was damaged",
        fingerprint=fingerprint if state is CheckpointState.INTACT else None,
    )


def test_no_checkpoints_is_fresh_whatever_the_metadata_says() -> None:
    for metadata in (
        metadata_of(),
        metadata_of(OTHER),
        MetadataReading(kind=MetadataKind.MISSING, reason="there is no metadata"),
    ):
        assert guard.decide(metadata=metadata, fingerprint=OURS, checkpoints=[]).kind is VerdictKind.FRESH


def test_the_same_run_resumes_from_the_newest_intact_of_its_own() -> None:
    verdict = guard.decide(
        metadata=metadata_of(),
        fingerprint=OURS,
        checkpoints=[
            checkpoint(10),
            checkpoint(20),
            checkpoint(30, fingerprint=OTHER),
            checkpoint(40, CheckpointState.TORN),
            checkpoint(50, CheckpointState.ALTERED),
            checkpoint(60, CheckpointState.UNSEALED),
        ],
    )
    assert verdict.kind is VerdictKind.RESUME
    assert verdict.checkpoint == checkpoint(20)
    assert [item.step for item in verdict.skipped] == [30, 40, 50, 60]
    assert verdict.reasons == (
        "checkpoint-30 is of another run: LoRA r: 99 -> 8",
        "checkpoint-40 is torn: it was damaged",
        "checkpoint-50 is altered: it was damaged",
        "checkpoint-60 is unsealed: it was damaged",
    )
    assert str(verdict).splitlines()[0] == "RESUME from checkpoint-20"


def test_a_note_that_changed_is_told_and_does_not_matter() -> None:
    verdict = guard.decide(
        metadata=metadata_of(), fingerprint=make_fingerprint(training__save_steps=99), checkpoints=[checkpoint(10)]
    )
    assert verdict.kind is VerdictKind.RESUME
    assert verdict.reasons == ("training.save_steps: 10 -> 99 (noted, does not matter)",)


@pytest.mark.parametrize(
    ("metadata", "cause", "reason"),
    [
        (
            MetadataReading(kind=MetadataKind.MISSING, reason="there is no metadata"),
            VerdictCause.METADATA_UNKNOWN, "there is no metadata",
        ),
        (MetadataReading(kind=MetadataKind.UNREADABLE, reason="it is empty"), VerdictCause.METADATA_UNKNOWN, "it is empty"),
        (
            MetadataReading(kind=MetadataKind.LEGACY, run=metadata_of(None).run, reason="it has the old form"),
            VerdictCause.METADATA_UNKNOWN, "old form",
        ),
        (metadata_of(OTHER), VerdictCause.COMPONENTS_CHANGED, "LoRA r: 99 -> 8"),
        (
            metadata_of(finished="0003"),
            VerdictCause.RUN_FINISHED, "the run that wrote them finished as version 0003",
        ),
        (
            metadata_of(OTHER, finished="0003"),
            VerdictCause.COMPONENTS_CHANGED, "the run that wrote them finished as version 0003",
        ),
    ],
)  # fmt: skip
def test_checkpoints_that_the_metadata_does_not_vouch_for_are_stale(
    metadata: MetadataReading, cause: VerdictCause, reason: str
) -> None:
    """Even when their own seals are of this run: both have to agree."""
    verdict = guard.decide(metadata=metadata, fingerprint=OURS, checkpoints=[checkpoint(10)])
    assert verdict.kind is VerdictKind.STALE
    assert verdict.cause is cause
    assert verdict.checkpoint is None
    assert reason in verdict.reasons[0]


def test_checkpoints_that_do_not_vouch_for_themselves_are_stale() -> None:
    """The metadata alone is not enough either."""
    verdict = guard.decide(
        metadata=metadata_of(),
        fingerprint=OURS,
        checkpoints=[checkpoint(10, fingerprint=OTHER), checkpoint(20, CheckpointState.TORN)],
    )
    assert verdict.cause is VerdictCause.NONE_INTACT
    assert verdict.kind is VerdictKind.STALE
    assert verdict.reasons == (
        "no checkpoint is intact and of this run",
        "checkpoint-10 is of another run: LoRA r: 99 -> 8",
        "checkpoint-20 is torn: it was damaged",
    )


def test_a_later_form_of_metadata_is_not_judged() -> None:
    for checkpoints in ([], [checkpoint(10)]):
        with pytest.raises(guard.MetadataTooNew):
            guard.decide(
                metadata=MetadataReading(kind=MetadataKind.NEWER, reason="it is newer"),
                fingerprint=OURS,
                checkpoints=checkpoints,
            )


folders = st.lists(
    st.tuples(st.integers(0, 100), st.sampled_from(CheckpointState), st.sampled_from([OURS, OTHER])),
    unique_by=lambda item: item[0],
).map(lambda items: [checkpoint(*item) for item in sorted(items, key=lambda item: item[0])])


@settings(deadline=None)
@given(folders, st.sampled_from([OURS, OTHER]), st.sampled_from([None, "0001"]), st.sampled_from([OURS, OTHER]))
def test_a_resume_is_always_from_the_run_s_own_and_never_older_than_it_must_be(
    checkpoints: list[Checkpoint],
    recorded: guard.Fingerprint,
    finished: str | None,
    wanted: guard.Fingerprint,
) -> None:
    metadata = metadata_of(recorded, finished=finished)
    verdict = guard.decide(metadata=metadata, fingerprint=wanted, checkpoints=checkpoints)
    own = [item for item in checkpoints if item.belongs_to(wanted)]
    if verdict.kind is VerdictKind.RESUME:
        assert recorded.same_run(wanted)
        assert finished is None
        assert verdict.checkpoint == own[-1]
        # Leaving out the older ones, as scan_until_resumable does, changes nothing.
        tail = checkpoints[checkpoints.index(own[-1]) :]
        assert guard.decide(metadata=metadata, fingerprint=wanted, checkpoints=tail) == verdict
    elif verdict.kind is VerdictKind.STALE:
        assert verdict.reasons
        assert not (own and recorded.same_run(wanted) and finished is None)
    else:
        assert not checkpoints


def test_a_verdict_for_programs_says_all_that_its_sentences_do() -> None:
    """And `changed` names what makes checkpoints stale, not the notes."""
    noted = make_fingerprint(lora__r=99, training__save_steps=99)
    stale = guard.decide(metadata=metadata_of(), fingerprint=noted, checkpoints=[checkpoint(10)])
    assert stale.changed == ("lora.r",)
    assert [change["name"] for change in stale.to_json()["differences"]] == ["lora.r", "training.save_steps"]
    assert stale.to_json()["differences"][0] == {"name": "lora.r", "old": 8, "new": 99, "kind": "identity"}
    assert (stale.to_json()["checkpoint"], stale.to_json()["step"]) == (None, None)
    found = [checkpoint(10), checkpoint(20, CheckpointState.TORN)]
    assert guard.decide(metadata=metadata_of(), fingerprint=OURS, checkpoints=found).to_json() == {
        "verdict": "resume",
        "checkpoint": "checkpoint-10",
        "step": 10,
        "reasons": ["checkpoint-20 is torn: it was damaged"],
        "differences": [],
        "passed_over": [{"path": "checkpoint-20", "step": 20, "state": "torn", "reason": "it was damaged"}],
    }
