"""Rows to token ids and labels.

Every row becomes input_ids and labels of equal length; a label is the token itself where it is learned, else IGNORE.
What is learned is decided here and nowhere else: the completion, the assistant's turns, or the whole text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from daemon.config import DataSettings, TrainingSettings
from daemon.job import FailureKind, Plan
from daemon.rows import Row
from daemon.trainer.failure import RunFailure

IGNORE = -100  # transformers' losses skip this label


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row, ready for the model."""

    input_ids: list[int]  # (T,)
    labels: list[int]  # (T,), IGNORE where nothing is learned
    line: int
    content_digest: str

    @property
    def trained_tokens(self) -> int:
        """Labels that count after the model's shift by one: the first position predicts nothing."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True, kw_only=True)
class Examples:
    """A dataset, tokenised and split."""

    train: list[Example]
    held_out: list[Example]
    dropped_lines: tuple[int, ...]  # rows without a trained token
    truncated_rows: int


def tokenise(rows: Iterable[Row], tokenizer: Any, data: DataSettings) -> Examples:
    """Turn every row into an Example and split off the held-out ones by their content.

    A row stays on its side of the split whatever else the file holds. When all rows fall on the held-out side (a file
    of one or two rows), they are trained and nothing is held out.
    Raises RunFailure(BAD_DATA) when no row has a trained token, RunFailure(CONFIG) when the tokenizer lacks what the
    rows need.
    """
    train: list[Example] = []
    held_out: list[Example] = []
    dropped: list[int] = []
    truncated = 0
    for row in rows:
        input_ids, labels = encode(row, tokenizer, data)
        if len(input_ids) > data.max_length:
            truncated += 1
            input_ids, labels = input_ids[: data.max_length], labels[: data.max_length]
        example = Example(input_ids=input_ids, labels=labels, line=row.line, content_digest=row.content_digest)
        if example.trained_tokens == 0:
            dropped.append(row.line)
        elif held_out_rank(row.content_digest) < data.held_out_fraction:
            held_out.append(example)
        else:
            train.append(example)
    if not train:
        train, held_out = held_out, []
    if not train:
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"none of {len(dropped)} rows has a token to train on within max_length = {data.max_length}",
            hint="raise max_length under [data], or look at train_on and the length of the prompts",
        )
    return Examples(train=train, held_out=held_out, dropped_lines=tuple(dropped), truncated_rows=truncated)


def held_out_rank(content_digest: str) -> float:
    """A row's place in [0, 1), from its content alone."""
    return int(content_digest[:13], 16) / 16**13


def encode(row: Row, tokenizer: Any, data: DataSettings) -> tuple[list[int], list[int]]:
    """input_ids and labels of one row, both (T,), before truncation."""
    if row.kind == "text":
        ids = _with_eos(tokenizer(row.text)["input_ids"], tokenizer)
        return ids, list(ids)
    if row.kind == "messages":
        return _encode_chat(
            row.messages or [], 0, row.tools, tokenizer, "assistant" if data.train_on == "auto" else data.train_on
        )
    if isinstance(row.prompt, str) and isinstance(row.completion, str):
        return _encode_text_pair(row.prompt, row.completion, tokenizer, everything=data.train_on == "all")
    prompt, completion = _as_messages(row.prompt, "user"), _as_messages(row.completion, "assistant")
    return _encode_chat(
        [*prompt, *completion],
        len(prompt),
        row.tools,
        tokenizer,
        "assistant" if data.train_on == "auto" else data.train_on,
    )


def _as_messages(part: Any, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": part}] if isinstance(part, str) else list(part or ())


def _encode_text_pair(prompt: str, completion: str, tokenizer: Any, *, everything: bool) -> tuple[list[int], list[int]]:
    """Plain text: the joined string is tokenised once, and the prompt's own tokens are masked.

    When a merge spans the seam, the prompt's last token is learned as part of the completion rather than lost.
    """
    head = tokenizer(prompt)["input_ids"]
    ids = _with_eos(tokenizer(prompt + completion)["input_ids"], tokenizer)
    common = next((at for at, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
    masked = 0 if everything else common
    return ids, [IGNORE] * masked + ids[masked:]


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    """End the sequence with EOS, so that the model learns to stop."""
    eos = tokenizer.eos_token_id
    return [*ids, eos] if eos is not None and (not ids or ids[-1] != eos) else list(ids)


def _encode_chat(
    messages: Sequence[dict[str, Any]], first_trained: int, tools: Any, tokenizer: Any, train_on: str
) -> tuple[list[int], list[int]]:
    """A conversation through the chat template.

    Assistant turns from `first_trained` on are learned (only the last of them for "last_turn", everything for "all"),
    each with the end-of-turn tokens that the template puts behind it. Turns with weight 0 are not.
    """
    template = tokenizer.chat_template
    if not template:
        raise RunFailure(
            FailureKind.CONFIG,
            "these rows are conversations, and the tokenizer of the base model has no chat template",
            hint="choose an instruction-tuned base model, or drop prompt/completion or text rows",
        )
    ids = _render(messages, tools, tokenizer)
    if train_on == "all":
        return ids, list(ids)
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant" and at >= first_trained]
    turns = [at for at in (turns[-1:] if train_on == "last_turn" else turns) if messages[at].get("weight") != 0]
    labels = [IGNORE] * len(ids)
    if "{% generation" in template.replace("{%-", "{%") and len(turns) == sum(
        message["role"] == "assistant" for message in messages
    ):
        mask = _render(messages, tools, tokenizer, key="assistant_masks", return_assistant_tokens_mask=True)
        return ids, [token if learned else IGNORE for token, learned in zip(ids, mask, strict=True)]
    for at in turns:
        start = len(_prefix(messages[:at], ids, tools, tokenizer, generation_prompt=True))
        end = len(_prefix(messages[: at + 1], ids, tools, tokenizer)) if at + 1 < len(messages) else len(ids)
        labels[start:end] = ids[start:end]
    return ids, labels


def _render(
    messages: Sequence[dict[str, Any]], tools: Any, tokenizer: Any, *, key: str = "input_ids", **options: bool
) -> list[int]:
    try:
        rendered = tokenizer.apply_chat_template(
            [{key: value for key, value in message.items() if key != "weight"} for message in messages],
            tools=tools,
            tokenize=True,
            return_dict=True,
            **options,
        )
    except Exception as error:  # jinja2 raises whatever a template's author wrote, TypeError and TemplateError alike
        raise RunFailure(
            FailureKind.BAD_DATA,
            f"the chat template refuses a conversation: {type(error).__name__}: {error}",
            hint="compare the rows' roles with what the base model's chat template accepts",
        ) from error
    return list(rendered[key])


def _prefix(
    messages: Sequence[dict[str, Any]], whole: list[int], tools: Any, tokenizer: Any, *, generation_prompt: bool = False
) -> list[int]:
    """The rendering of the first messages, which must be how the whole begins; else masks would be guesswork."""
    ids = _render(messages, tools, tokenizer, add_generation_prompt=generation_prompt)
    if whole[: len(ids)] != ids:
        raise RunFailure(
            FailureKind.CONFIG,
            "the chat template renders a conversation's beginning differently once it goes on,"
            " so its turns cannot be told apart",
            hint='set train_on = "all" or "last_turn" under [data], or use a template with generation markers',
        )
    return ids


def plan(examples: Examples, training: TrainingSettings) -> Plan:
    """The run's arithmetic, the same as the Trainer's own."""
    rows = len(examples.train)
    batches = math.ceil(rows / training.per_device_train_batch_size)
    steps_per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    total = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    return Plan(
        rows=rows,
        held_out_rows=len(examples.held_out),
        dropped_rows=len(examples.dropped_lines),
        tokens=sum(len(example.input_ids) for example in examples.train),
        trained_tokens=sum(example.trained_tokens for example in examples.train),
        global_batch_size=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        steps_per_epoch=steps_per_epoch,
        epochs=training.num_train_epochs,
        total_steps=total,
        warmup_steps=warmup(training.warmup_steps, total),
    )


def warmup(wanted: float, total_steps: int) -> int:
    """Warm-up in whole steps: a number of them, or below 1 a share of all, rounded down; never the whole run.

    The learning rate of the first warm-up step is zero. Rounded up, as the Trainer does it, a run of one step would be
    all warm-up, and train nothing.
    """
    steps = int(wanted) if wanted >= 1 else int(wanted * total_steps)
    return min(steps, max(total_steps - 1, 0))


class EpochBatches(torch.utils.data.Sampler[list[int]]):  # type: ignore[misc]  # torch is not followed
    """Batches of row indices in an order that depends on seed and epoch alone, never on the process's random state.

    A resumed run sets the epoch and skips: it meets the same rows in the same batches.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.drop_last = False
        self.epoch = 0
        self._rows = rows
        self._seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        order = torch.randperm(self._rows, generator=generator).tolist()
        for start in range(0, self._rows, self.batch_size):
            yield order[start : start + self.batch_size]

    def __len__(self) -> int:
        return math.ceil(self._rows / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads Examples to one batch."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask and labels, all int64 (B, T), T the longest row's length; padding is IGNOREd."""
        length = max(len(example.input_ids) for example in examples)
        input_ids = torch.full((len(examples), length), self.pad_token_id, dtype=torch.long)
        labels = torch.full((len(examples), length), IGNORE, dtype=torch.long)
        mask = torch.zeros((len(examples), length), dtype=torch.long)
        for at, example in enumerate(examples):
            size = len(example.input_ids)
            input_ids[at, :size] = torch.tensor(example.input_ids)
            labels[at, :size] = torch.tensor(example.labels)
            mask[at, :size] = 1
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
