"""Rows to token ids and labels: exactly the completion, the assistant's turns, or the whole text is learned."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from daemon.dataset.rows import Format, Row, RowReader
from daemon.dataset.strict_json import LineError
from daemon.fingerprint import fingerprint_run
from daemon.job import Dataset, FailureKind
from daemon.recipe import DataSettings, TrainingSettings
from daemon.trainer.collate import IGNORE, Example, pad, plan
from daemon.trainer.errors import RunFailure
from daemon.trainer.tokenise import tokenise
from guard.components import COMPONENTS
from tests.support.tokens import encode, itself

DATA = DataSettings(max_length=512)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "It is 6."},
]
# Renders like the tiny model's own template, without generation markers; and one whose beginnings do not nest.
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
COUNTING = "{{ messages|length }}" + PLAIN


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def row(**fields: Any) -> Row:
    kind = "messages" if "messages" in fields else "text" if "text" in fields else "prompt_completion"
    return Row(kind=kind, line=1, content_digest="80" * 16, **fields)  # type: ignore[arg-type]


def learned(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    return str(tokenizer.decode([label for label in labels if label != IGNORE]))


@pytest.mark.parametrize("template", [None, PLAIN])
def test_of_a_conversation_the_assistants_turns_are_learned_with_their_ends(
    tokenizer: Any, template: str | None
) -> None:
    """With generation markers and by comparing prefixes alike."""
    tokenizer = _with_template(tokenizer, template)
    text = learned(tokenizer, *encode(row(messages=TURNS), tokenizer, DATA))
    assert text.replace("\n", "") == "4.<|end|>It is 6.<|end|>"


def test_a_turn_with_weight_0_is_context_alone(tokenizer: Any) -> None:
    turns = [dict(turn) for turn in TURNS]
    turns[2]["weight"] = 0
    assert learned(tokenizer, *encode(row(messages=turns), tokenizer, DATA)).strip() == "It is 6.<|end|>"


def test_the_last_turn_alone_or_everything_can_be_learned(tokenizer: Any) -> None:
    last = encode(row(messages=TURNS), tokenizer, DATA.model_copy(update={"train_on": "last_turn"}))
    assert learned(tokenizer, *last).strip() == "It is 6.<|end|>"
    ids, labels = encode(row(messages=TURNS), tokenizer, DATA.model_copy(update={"train_on": "all"}))
    assert ids == labels


def test_a_template_that_never_continues_its_own_generation_prompt_is_refused_with_the_line(tokenizer: Any) -> None:
    with pytest.raises(
        RunFailure, match=r"line \d+: the chat template asks for message \d .* does not go on"
    ) as caught:
        encode(row(messages=TURNS), _with_template(tokenizer, COUNTING), DATA)
    assert caught.value.kind is FailureKind.BAD_DATA
    assert "another template" in caught.value.hint


def test_without_a_chat_template_conversations_are_refused(tokenizer: Any) -> None:
    bare = _with_template(tokenizer, None)
    bare.chat_template = None
    with pytest.raises(RunFailure, match="no chat template"):
        encode(row(messages=TURNS), bare, DATA)


@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: 2+2? A:", " 4"), ("abc", "def"), ("", "alone"), ("héllo ", "wörld")]
)
def test_of_a_pair_the_completion_and_the_end_are_learned(tokenizer: Any, prompt: str, completion: str) -> None:
    ids, labels = encode(row(prompt=prompt, completion=completion), tokenizer, DATA)
    assert tokenizer.decode(ids) == prompt + completion + tokenizer.eos_token
    assert learned(tokenizer, ids, labels).endswith(completion + tokenizer.eos_token)
    assert labels[-1] == tokenizer.eos_token_id


def test_a_pair_of_message_lists_learns_the_completions_turns_only(tokenizer: Any) -> None:
    ids, labels = encode(row(prompt=TURNS[:4], completion=TURNS[4:]), tokenizer, DATA)
    assert learned(tokenizer, ids, labels).strip() == "It is 6.<|end|>"


def test_a_text_is_learned_whole_with_its_end(tokenizer: Any) -> None:
    ids, labels = encode(row(text="some text"), tokenizer, DATA)
    assert ids == labels
    assert ids[-1] == tokenizer.eos_token_id


def test_rows_without_a_trained_token_are_dropped_and_named_and_none_left_is_bad_data(tokenizer: Any) -> None:
    unsaid = Row(kind="messages", messages=TURNS[:2], line=7, content_digest="80" * 16)
    examples = tokenise([row(text="fine"), unsaid], tokenizer, DATA, read=itself)
    assert (len(examples.train), examples.dropped_lines) == (1, (7,))
    with pytest.raises(RunFailure, match="none of 1 rows") as caught:
        tokenise([unsaid], tokenizer, DATA, read=itself)
    assert caught.value.kind is FailureKind.BAD_DATA


def test_several_processes_give_the_same_and_their_failures_arrive_whole(tokenizer: Any) -> None:
    rows = [
        Row(kind="messages", messages=TURNS, line=n, content_digest=f"{n * 0x0101010101010101:032x}")
        for n in range(600)
    ]
    data = DATA.model_copy(update={"held_out_fraction": 0.1, "max_length": 20})
    assert tokenise(rows, tokenizer, data, read=itself, processes=2) == tokenise(rows, tokenizer, data, read=itself)
    with pytest.raises(RunFailure, match=r"line 0: .* does not go on") as caught:
        tokenise(rows, _with_template(tokenizer, COUNTING), data, read=itself, processes=2)
    assert caught.value.kind is FailureKind.BAD_DATA
    assert "another template" in caught.value.hint


def test_a_process_that_tokenises_and_is_killed_ends_the_run_with_a_sentence(tokenizer: Any) -> None:
    """Its rows would never come: without that, the run waited for them until it counted as stalled."""

    def kill(item: Row) -> Row:
        if item.line == 300:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    rows = [Row(kind="text", text=f"row {n}", line=n, content_digest="80" * 16) for n in range(600)]
    with pytest.raises(RunFailure, match="a process that tokenised was killed") as caught:
        tokenise(rows, tokenizer, DATA, read=kill, processes=2)
    assert caught.value.kind is FailureKind.LOST


def test_in_another_process_a_template_without_end_is_stopped_and_a_bad_line_is_told(
    tokenizer: Any, tmp_path: Path
) -> None:
    endless = _with_template(
        tokenizer, "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    data = DATA.model_copy(update={"render_seconds": 0.05})
    with pytest.raises(RunFailure, match=r"line 1: rendering the row took longer than render_seconds = 0.05"):
        tokenise([row(messages=TURNS)], endless, data, read=itself, processes=2)
    reader = RowReader(tmp_path / "rows.jsonl", Format.TEXT, DATA)
    reader.path.write_text('{"text": "good"}\n{"text": 1}\n')
    with pytest.raises(LineError, match=r"line 2, column 10: .*expected a string, found a number"):
        tokenise(reader.lines(), tokenizer, DATA, read=reader.row, processes=2)


def numbered(count: int, start: int = 0) -> list[Row]:
    """Different rows, whose digests are spread evenly, in no order of the file."""
    return [
        Row(
            kind="text",
            text=f"row {n}",
            line=n,
            content_digest=f"{n * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}",
        )
        for n in range(start, start + count)
    ]


def test_the_same_rows_are_held_out_in_any_order_and_repeated(tokenizer: Any) -> None:
    rows = numbered(100)
    found = [tokenise(some, tokenizer, DATA, read=itself) for some in (rows, rows[::-1], [*rows, *rows[:30]])]
    held_out = [{example.content_digest for example in examples.held_out} for examples in found]
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 20
    for examples in found:
        assert not held_out[0] & {example.content_digest for example in examples.train}


@pytest.mark.parametrize(("count", "held_out"), [(1, 0), (24, 0), (25, 5), (199, 39), (200, 40), (500, 40)])
def test_forty_rows_are_held_out_of_two_hundred_a_fifth_of_fewer_and_none_of_a_handful(
    tokenizer: Any, count: int, held_out: int
) -> None:
    examples = tokenise(numbered(count), tokenizer, DATA, read=itself)
    assert (examples.held_out_rows, examples.train_rows) == (held_out, count - held_out)
    assert ("too small to measure" in examples.unmeasured) is (count < 25)


def test_rows_held_out_of_an_earlier_dataset_are_not_trained_and_counted(tokenizer: Any) -> None:
    rows = numbered(100)
    before = {row.content_digest: "old.jsonl" for row in rows[60:80]}
    examples = tokenise(rows, tokenizer, DATA, read=itself, held_out_before=before)
    assert not before.keys() & {example.content_digest for example in examples.train}
    assert examples.withheld == {"old.jsonl": 20}
    assert examples.rows == 100
    chosen = {example.content_digest for example in tokenise(rows, tokenizer, DATA, read=itself).held_out}
    assert {example.content_digest for example in examples.held_out} == chosen


def test_a_file_that_is_trained_again_holds_out_its_own_rows_and_withholds_none(tokenizer: Any) -> None:
    rows = numbered(100)
    first = tokenise(rows, tokenizer, DATA, read=itself)
    own = {example.content_digest: "same.jsonl" for example in first.held_out}
    again = tokenise(rows, tokenizer, DATA, read=itself, held_out_before=own, held_out_again=own.keys())
    assert (again.held_out_rows, again.train_rows, again.withheld) == (first.held_out_rows, first.train_rows, {})
    # One that is not chosen any more is not trained all the same.
    fewer = DATA.model_copy(update={"held_out_min_rows": 0, "held_out_fraction": 0.02})
    less = tokenise(rows, tokenizer, fewer, read=itself, held_out_before=own, held_out_again=own.keys())
    assert (less.held_out_rows, less.train_rows) == (2, first.train_rows)
    assert less.withheld == {"same.jsonl": first.held_out_rows - 2}


@pytest.mark.parametrize(("count", "refused"), [(19, True), (20, True), (21, False)])
def test_a_file_that_is_half_held_out_rows_is_refused_and_trained_by_force(
    tokenizer: Any, count: int, refused: bool
) -> None:
    rows = numbered(count)
    before = {row.content_digest: "old.jsonl" for row in rows[:10]}
    if not refused:
        assert tokenise(rows, tokenizer, DATA, read=itself, held_out_before=before).withheld_rows == 10
        assert not tokenise(rows, tokenizer, DATA, read=itself, held_out_before=before, force=True).released
        return
    with pytest.raises(RunFailure, match=f"10 of {count} rows are held-out rows of old.jsonl") as caught:
        tokenise(rows, tokenizer, DATA, read=itself, held_out_before=before)
    assert caught.value.kind is FailureKind.BAD_DATA
    forced = tokenise(rows, tokenizer, DATA, read=itself, held_out_before=before, force=True)
    assert (forced.train_rows, forced.withheld_rows) == (count, 0)
    assert forced.released == before.keys()


def test_padding_is_neither_attended_nor_learned() -> None:
    batch = pad(
        [
            Example(input_ids=[1, 2, 3], learned=((1, 3),), line=1, content_digest=""),
            Example(input_ids=[4], learned=((0, 1),), line=2, content_digest=""),
        ],
        9,
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [4, IGNORE, IGNORE]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "max_steps", "steps"),
    [(1, 4, 2, 1.0, -1, 1), (5, 4, 2, 1.0, -1, 1), (8, 4, 2, 1.0, -1, 1), (9, 4, 2, 3.0, -1, 6), (9, 4, 2, 0.5, -1, 1), (9, 4, 2, 1.0, 40, 40)],
)  # fmt: skip
def test_planned_steps(rows: int, batch: int, accumulation: int, epochs: float, max_steps: int, steps: int) -> None:
    from daemon.trainer.collate import Examples

    example = Example(input_ids=[1, 2], learned=((0, 2),), line=1, content_digest="")
    training = TrainingSettings(
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        max_steps=max_steps,
    )
    planned = plan(
        Examples(train=[example] * rows, held_out=[], train_rows=rows, held_out_rows=0, dropped_lines=()), training
    )
    assert planned.total_steps == steps


@pytest.mark.parametrize(
    ("wanted", "total", "steps"),
    [(0.03, 1, 0), (0.03, 33, 0), (0.03, 100, 3), (5, 1, 0), (5, 5, 4), (5, 50, 5), (0, 9, 0)],
)
def test_warm_up_never_takes_the_whole_run(wanted: float, total: int, steps: int) -> None:
    """A run of one step that is all warm-up has a learning rate of zero: a success that trained nothing."""
    from daemon.trainer.collate import warmup

    assert warmup(wanted, total) == steps


def test_every_component_of_a_run_is_in_the_guards_table(tiny_base: Path) -> None:
    """One that is not counts as identity, and would make every checkpoint stale the moment it varies."""
    from daemon.recipe import ModelSettings, Recipe

    fingerprint = fingerprint_run(
        dataset=Dataset(name="x", path="/x", size_bytes=1, rows=1, digest="00", format="text"),
        recipe=Recipe(model=ModelSettings(model_name_or_path=str(tiny_base))),
        base_path=tiny_base,
        base_revision=None,
        parent_version=None,
        parent_digest=None,
        precision="float32",
    )
    known = {component.name for component in COMPONENTS}
    sections = {name.removesuffix("*") for name in known if name.endswith(".*")}
    unknown = {
        name
        for name in fingerprint.components
        if name not in known and not any(name.startswith(section) for section in sections)
    }
    assert unknown == set()
    assert json.dumps(fingerprint.to_json())


def _with_template(tokenizer: Any, template: str | None) -> Any:
    """A copy of the tokenizer, with another template unless None."""
    import copy

    other = copy.deepcopy(tokenizer)
    if template is not None:
        other.chat_template = template
    return other
