"""Rows that become several samples, where a template does not nest: cut, passed together, killed and resumed."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import guard
from daemon.job import Outcome, RunResult, RunSpec, from_json, to_json
from daemon.recipe import DataSettings
from daemon.trainer.attention import use_packed
from daemon.trainer.collate import Example, flatten, pad
from daemon.trainer.tokenise import tokenise
from tests.integration.test_train_run import adapted
from tests.support.inprocess import events, specify
from tests.support.root import environment, fork_server
from tests.support.tokens import itself
from tests.unit.test_trainer_samples import FORGETS, conversation, says, user

TABLES: dict[str, dict[str, Any]] = {
    "training": {"save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "data": {"max_length": 96, "held_out_fraction": 0.2},
    "lora": {"r": 4, "lora_dropout": 0.1},
}
LONG = " ".join(f"word{number}" for number in range(60))


def chat(number: int) -> list[dict[str, Any]]:
    """Two answers with reasoning, and in every third row more words than fit."""
    return [
        user(f"Is {number} even? {LONG if number % 3 == 0 else ''}"),
        says("Yes." if number % 2 == 0 else "No.", f"{number} mod 2"),
        user("And its successor?"),
        says("No." if number % 2 == 0 else "Yes.", f"{number + 1} mod 2"),
    ]


@pytest.fixture(scope="module")
def forgetful(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model whose template drops the reasoning of earlier turns."""
    base = tmp_path_factory.mktemp("base") / "forgets"
    shutil.copytree(tiny_base, base)
    (base / "chat_template.jinja").write_text(FORGETS)
    return base


def attempt(spec: RunSpec, *, killed_at: int = 0) -> RunResult | None:
    """One attempt in a process of its own; None when it was killed."""
    run_dir = Path(spec.run_dir)
    (run_dir / "result.json").unlink(missing_ok=True)
    (run_dir / "run.json").write_text(to_json(spec))
    before = ("tests.support.injected:train", str(run_dir), killed_at)
    done = fork_server(training=True).run([], env=environment(), timeout=200, before=before)
    if killed_at:
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        return None
    return from_json((run_dir / "result.json").read_bytes(), RunResult)


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_at_several_steps_ends_with_the_same_adapter(forgetful: Path, tmp_path: Path) -> None:
    """To the bit, held-out losses included; each attempt goes on from the last sealed checkpoint."""
    content = [{"messages": chat(number)} for number in range(20)]
    spec = specify(tmp_path / "whole", content, forgetful, TABLES)
    whole = attempt(spec)
    assert whole is not None
    assert whole.outcome is Outcome.SUCCEEDED, whole
    assert whole.samples == 2 * whole.rows
    assert whole.steps_run >= 7

    spec = specify(tmp_path / "killed", content, forgetful, TABLES)
    for number, step in enumerate((3, 6), start=1):
        attempt(replace(spec, attempt=number), killed_at=step)
    result = attempt(replace(spec, attempt=3))
    assert result is not None
    assert result.resumed_from == "checkpoint-4"
    assert [event.get("start_step") for event in events(spec, "run.started")] == [0, 2, 4]
    assert result.adapter_digest == whole.adapter_digest
    ours, theirs = (
        guard.digest_file(Path(one.candidate or "") / "adapter_model.safetensors") for one in (result, whole)
    )
    assert ours == theirs
    assert (result.held_out_before, result.held_out_after) == (whole.held_out_before, whole.held_out_after)
    assert (result.steps_run, result.samples, result.truncated_rows) == (
        whole.steps_run,
        whole.samples,
        whole.truncated_rows,
    )


def prepared(base: Path, max_length: int) -> tuple[Any, list[Example], Any]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [conversation(number, chat(number), f"{number:032x}") for number in range(1, 7)]
    data = DataSettings(max_length=max_length, held_out_fraction=0.0)
    found = tokenise(rows, tokenizer, data, read=itself)
    return tokenizer, found.train, found


def test_each_sample_of_a_row_is_cut_by_itself_and_keeps_what_is_learned(forgetful: Path) -> None:
    """The row is counted once, however many of its samples were cut, and told only where something learned is gone."""
    tokenizer, whole, _ = prepared(forgetful, 4096)
    _, cut, found = prepared(forgetful, 96)
    assert len(cut) == len(whole) == 12
    for before, after in zip(whole, cut, strict=True):
        assert after.line == before.line
        assert len(after.input_ids) == min(96, len(before.input_ids))
        assert learned_text(after, tokenizer) == learned_text(before, tokenizer)
    assert found.truncated_rows == 2  # rows 3 and 6, both of whose samples are too long
    assert found.truncated_lines == ()


def learned_text(example: Example, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(example.input_ids[begin:end]) for begin, end in example.learned]


def test_samples_of_a_row_in_one_flattened_pass_do_not_see_each_other(forgetful: Path) -> None:
    """Its loss is that of the samples one by one."""
    _, examples, _ = prepared(forgetful, 96)
    model = adapted(forgetful)
    alone = sum(model(**pad([one], 0), num_items_in_batch=1).loss.item() for one in examples[:6])
    assert use_packed(model, examples)
    together = model(**flatten(examples[:6]), num_items_in_batch=1).loss.item()
    assert together == pytest.approx(alone, rel=1e-5)
    assert [one.line for one in examples[:6]] == [1, 1, 2, 2, 3, 3]
