"""Rows tokenised a second: our preparation, and TRL's of the same rows.

    python -m benchmarks.train_prepare [--rounds 3] [--copies 1] [FILE.jsonl]

Ours includes reading and checking the file; TRL's begins from rows in memory, with as many processes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks._table import Arm, measure, print_goal, print_table
from daemon.cli.init import examples_dir
from daemon.dataset.rows import Format, RowReader, iter_rows
from daemon.recipe import ColumnSettings, DataSettings
from daemon.trainer.tiny_model import build_tiny
from daemon.trainer.tokenise import tokenise
from tests.support.families import family_tokenizer

CASES = (  # a title, one of TRL's templates or the tiny model's own, turns of each conversation, and the goal
    ("conversations of one turn, a template with markers", None, 1, 3.0),
    ("conversations of two turns, Qwen3's template, which needs a sample for each", "qwen3", 2, 1.0),
    ("conversations of eight turns, Qwen2.5's template, of which one sample has all", "qwen2_5", 8, 1.0),
    ("conversations of eight turns, Qwen3.6's template, which needs a sample for each", "qwen3_6", 8, 1.0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copies", type=int, default=10, help="how often the example's rows are repeated")
    chosen = parser.parse_args()
    datasets.disable_caching()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tiny(folder / "base", sorted(examples_dir().glob("*.jsonl")))
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        lines = distinct_lines(examples_dir() / "gsm8k_more_messages.jsonl", chosen.copies)
        for title, template, turns, goal in CASES:
            tokenizer = AutoTokenizer.from_pretrained(folder / "base")
            if template is not None:
                chat_templates = Path(trl.__file__).parent / "chat_templates"
                tokenizer = family_tokenizer(tokenizer, (chat_templates / f"{template}.jinja").read_text())
            path = folder / "rows.jsonl"
            path.write_text("".join(joined(lines, turns)))
            compare(title, path, tokenizer, model, folder, rounds=chosen.rounds, goal=goal)


def distinct_lines(path: Path, copies: int) -> list[str]:
    """The rows so often, each with its copy's number in every turn: what is made of one is of no use for another."""
    found = []
    for number in range(copies):
        for line in path.read_text().splitlines():
            messages = json.loads(line)["messages"]
            numbered = [{**message, "content": f"{number}. {message['content']}"} for message in messages]
            found.append(json.dumps({"messages": numbered}))
    return found


def joined(lines: list[str], turns: int) -> Iterator[str]:
    """Rows of so many neighbours' turns each."""
    for at in range(0, len(lines) - turns + 1, turns):
        messages = [message for line in lines[at : at + turns] for message in json.loads(line)["messages"]]
        yield json.dumps({"messages": messages}) + "\n"


def compare(title: str, path: Path, tokenizer: Any, model: Any, folder: Path, *, rounds: int, goal: float) -> None:
    """Measure both, and print the table and the goal."""
    cores = len(os.sched_getaffinity(0))
    data = DataSettings(max_length=2048, columns=ColumnSettings(), held_out_fraction=0.0)
    reader = RowReader(path, Format.MESSAGES, data)
    rows = [{"messages": row.messages} for row in iter_rows(path, "messages", data)]
    table = datasets.Dataset.from_list(rows)

    def ours(processes: int) -> Any:
        return tokenise(reader.lines(), tokenizer, data, read=reader.row, processes=processes)

    def theirs(processes: int | None) -> Any:
        args = SFTConfig(
            output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False, max_length=2048,
            assistant_only_loss=True, dataset_num_proc=processes,
        )  # fmt: skip
        return SFTTrainer(model=model, args=args, train_dataset=table, processing_class=copy.deepcopy(tokenizer))

    seconds = measure(
        [
            Arm(name="dropforge, 1 process", run=lambda: ours(1)),
            Arm(name=f"dropforge, {cores} processes", run=lambda: ours(cores)),
            Arm(name="TRL, 1 process", run=lambda: theirs(None)),
            Arm(name=f"TRL, {cores} processes", run=lambda: theirs(cores)),
        ],
        rounds=rounds,
    )
    print_table(f"{len(rows):,} {title}", seconds, relative_to=["TRL, 1 process", f"TRL, {cores} processes"])
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    theirs_best = min(middle["TRL, 1 process"], middle[f"TRL, {cores} processes"])
    ours_best = min(middle["dropforge, 1 process"], middle[f"dropforge, {cores} processes"])
    print_goal("x TRL's better rate", value=theirs_best / ours_best, at_least=goal)


if __name__ == "__main__":
    main()
