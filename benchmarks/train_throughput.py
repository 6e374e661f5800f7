"""Useful tokens a second and what they taught: our trainer, TRL as it comes, TRL tuned, and a plain padded Trainer.

    python -m benchmarks.train_throughput [--rounds 3] [--rows 128] [--parameters tiny|0.5b] [--data FILE_OR_FOLDER ...]

Every arm trains the same rows for one epoch, in steps of 8 rows, with the same LoRA, learning rate and labels, from the
same weights; the arms take turns within each round. Padding does not count as tokens. The loss over the same held-out rows
stands beside the speed, and so does the number of steps, so that speed is never bought with learning. One model load and
the tokenising are outside the clock for all arms; evaluation too. Our arm also does a run's bookkeeping (checks of every
step, progress, events, curves), whose share of the time is printed. Set OMP_NUM_THREADS=1 on a machine that does other
things as well: threads that wait for each other measure those.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from benchmarks._table import print_goal
from daemon.cli.init import examples_dir
from daemon.dataset.rows import detect_format, iter_rows
from daemon.dataset.strict_json import parse_object
from daemon.recipe import ColumnSettings, DataSettings, TrainingSettings
from daemon.run_dir import RunWriter
from daemon.trainer.attention import use_packed
from daemon.trainer.callbacks import MonitorCallback, ScalarWriter
from daemon.trainer.collate import IGNORE, PASS_TOKENS, Collator, Example, Examples, plan
from daemon.trainer.loop import RunTrainer, held_out_loss
from daemon.trainer.loss import Objective
from daemon.trainer.tiny_model import build_tiny
from daemon.trainer.tokenise import tokenise

ROWS_A_STEP, DEVICE_ROWS, MAX_LENGTH, RATE = 8, 4, 1024, 1e-3
CUDA = torch.cuda.is_available()


class NeverStop:
    """The loop asks; nobody stops a benchmark."""

    requested = False


@dataclass(frozen=True, kw_only=True)
class Result:
    seconds: float
    tokens: int
    steps: int
    held_out: float
    bookkeeping: float | None = None  # its share of the seconds, where there is any


def lognormal(count: int, vocabulary: int) -> list[Example]:
    """Rows of log-normal lengths over a language that can be learned: each token is its predecessor's neighbour."""
    draw = random.Random(7)
    found = []
    for number in range(count):
        size = max(8, min(MAX_LENGTH, int(draw.lognormvariate(5.0, 0.8))))
        ids = [draw.randrange(10, vocabulary)]
        for _ in range(size - 1):
            ids.append(10 + (ids[-1] - 10 + draw.choice((1, 2, 3))) % min(vocabulary - 10, 400))
        found.append(Example(input_ids=ids, learned=((0, size),), line=number, content_digest=""))
    return found


def from_file(path: Path, count: int, tokenizer: Any) -> list[Example]:
    """The first rows of a dataset, tokenised as a run does it; what is learned is masked likewise in every arm."""
    columns = ColumnSettings()
    with path.open("rb") as lines:
        format_ = detect_format(parse_object(lines.readline().strip()), columns)
    if format_ is None:
        columns = ColumnSettings(prompt="question", completion="answer")
    data = DataSettings(max_length=MAX_LENGTH, columns=columns, held_out_fraction=0.0)
    rows = iter_rows(path, format_ or "columns", data)
    return tokenise(islice(rows, count), tokenizer, data, read=lambda row: row).train


def fresh(base: Path) -> Any:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if CUDA else torch.float32)
    network.config.use_cache = False
    model = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    return model.to("cuda") if CUDA else model


def common(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "num_train_epochs": 1, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": not CUDA, "bf16": CUDA, "seed": 1,
        "logging_steps": 1000, "warmup_steps": 0, "dataloader_pin_memory": CUDA,
    }  # fmt: skip


def as_table(examples: Sequence[Example]) -> Dataset:
    return Dataset.from_list([{"input_ids": list(e.input_ids), "labels": e.labels} for e in examples])


def ours(base: Path, tokenizer: Any, train: Sequence[Example], folder: str) -> tuple[Any, Trainer]:
    model = fresh(base)
    collator = Collator(
        pad_token_id=tokenizer.pad_token_id,
        budget_tokens=DEVICE_ROWS * MAX_LENGTH,
        flat=CUDA and use_packed(model, train),
        pass_tokens=PASS_TOKENS["cuda" if CUDA else "cpu"],
    )
    args = TrainingArguments(
        **common(folder),
        per_device_train_batch_size=ROWS_A_STEP,
        optim="adamw_torch_fused",
        remove_unused_columns=False,
    )
    objective = Objective()
    objective.select_trained(model, train)
    trainer = RunTrainer(
        model=model,
        args=args,
        examples=train,
        collator=collator,
        objective=objective,
        tokenizer=tokenizer,
        grouped=True,
    )
    settings = TrainingSettings(per_device_train_batch_size=ROWS_A_STEP, gradient_accumulation_steps=1)
    planned = plan(Examples(train=list(train), held_out=[], dropped_lines=(), truncated_rows=0), settings)
    trainer.watch = MonitorCallback(
        writer=RunWriter(Path(folder)),
        stop=NeverStop(),  # type: ignore[arg-type]
        plan=planned,
        trainer=trainer,
        scalars=ScalarWriter(Path(folder)),
    )
    trainer.add_callback(trainer.watch)
    return model, trainer


def trl_default(base: Path, tokenizer: Any, train: Sequence[Example], folder: str) -> tuple[Any, Trainer]:
    """As it comes: gradient checkpointing on, padded. The same rows a step as the others."""
    model = fresh(base)
    args = SFTConfig(
        **common(folder),
        per_device_train_batch_size=DEVICE_ROWS,
        gradient_accumulation_steps=ROWS_A_STEP // DEVICE_ROWS,
        max_length=MAX_LENGTH,
    )
    return model, SFTTrainer(model=model, args=args, train_dataset=as_table(train), processing_class=tokenizer)


def trl_tuned(base: Path, tokenizer: Any, train: Sequence[Example], folder: str) -> tuple[Any, Trainer]:
    """Packed best-fit, no gradient checkpointing; a step holds about as many tokens as 8 rows do."""
    model = fresh(base)
    mean = sum(len(example.input_ids) for example in train) / len(train)
    args = SFTConfig(
        **common(folder),
        per_device_train_batch_size=max(1, round(ROWS_A_STEP * mean / MAX_LENGTH)),
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        gradient_checkpointing=False,
    )
    return model, SFTTrainer(model=model, args=args, train_dataset=as_table(train), processing_class=tokenizer)


def padded(base: Path, tokenizer: Any, train: Sequence[Example], folder: str) -> tuple[Any, Trainer]:
    """transformers' Trainer with padded batches in random order."""
    model = fresh(base)
    args = TrainingArguments(
        **common(folder),
        per_device_train_batch_size=DEVICE_ROWS,
        gradient_accumulation_steps=ROWS_A_STEP // DEVICE_ROWS,
        remove_unused_columns=False,
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": IGNORE, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in fill.items()
        }

    return model, Trainer(model=model, args=args, train_dataset=as_table(train), data_collator=collate)


ARMS: dict[str, Callable[..., tuple[Any, Trainer]]] = {
    "dropforge": ours,
    "TRL default": trl_default,
    "TRL tuned": trl_tuned,
    "Trainer padded": padded,
}


def run(arm: str, base: Path, tokenizer: Any, train: Sequence[Example], held_out: Sequence[Example]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        model, trainer = ARMS[arm](base, tokenizer, train, folder)
        if CUDA:
            torch.cuda.synchronize()
        began = time.perf_counter()
        trainer.train()
        if CUDA:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        flat = arm == "dropforge" and trainer.data_collator.flat
        collator = Collator(pad_token_id=tokenizer.pad_token_id, budget_tokens=8192, flat=flat)
        loss = held_out_loss(model, held_out, collator, Objective(), NeverStop())  # type: ignore[arg-type]
        result = Result(
            seconds=seconds,
            tokens=sum(len(example.input_ids) for example in train),
            steps=int(trainer.state.global_step),
            held_out=loss or 0.0,
            bookkeeping=trainer.watch.bookkeeping_seconds / seconds if arm == "dropforge" else None,
        )
    del model, trainer
    gc.collect()
    return result


def compare(title: str, base: Path, tokenizer: Any, examples: list[Example], rounds: int) -> dict[str, float]:
    """Print one table; returns each arm's median tokens a second."""
    held_out, train = examples[: len(examples) // 8], examples[len(examples) // 8 :]
    results: dict[str, list[Result]] = {arm: [] for arm in ARMS}
    for number in range(rounds + 1):  # the first round warms up and does not count
        for arm in ARMS:
            result = run(arm, base, tokenizer, train[:32] if number == 0 else train, held_out)
            if number:
                results[arm].append(result)
    speeds = {arm: statistics.median(r.tokens / r.seconds for r in found) for arm, found in results.items()}
    lengths = sorted(len(example.input_ids) for example in train)
    print(f"\n{title}: {len(train)} rows, {sum(lengths):,} tokens, median length {lengths[len(lengths) // 2]}"
          f" ({rounds} rounds, interleaved, {'CUDA' if CUDA else f'CPU, {torch.get_num_threads()} threads'})")  # fmt: skip
    print(f"  {'':<16}{'tokens/s':>10}{'min':>9}{'max':>9}{'x ours':>9}{'steps':>7}{'held-out loss':>15}")
    for arm, found in results.items():
        each = [r.tokens / r.seconds for r in found]
        print(f"  {arm:<16}{speeds[arm]:>10,.0f}{min(each):>9,.0f}{max(each):>9,.0f}"
              f"{speeds[arm] / speeds['dropforge']:>9.2f}{found[0].steps:>7}{found[-1].held_out:>15.4f}")  # fmt: skip
    shares = [r.bookkeeping for found in results.values() for r in found if r.bookkeeping is not None]
    print_goal("percent of the time spent on bookkeeping", value=100 * statistics.median(shares), at_most=1.0)
    return speeds


def half_a_billion(folder: Path, vocabulary: int) -> None:
    """A Llama of about 0.6 billion random parameters, for a GPU."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=16,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--parameters", choices=("tiny", "0.5b"), default="0.5b" if CUDA else "tiny")
    parser.add_argument("--no-log-normal", action="store_true", help="only the rows of --data")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="*",
        default=[examples_dir() / "gsm8k_messages.jsonl"],
        help=".jsonl files, or folders",
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        build_tiny(base, sorted(examples_dir().glob("*.jsonl")))
        tokenizer = AutoTokenizer.from_pretrained(base)
        if chosen.parameters == "0.5b":
            half_a_billion(base, len(tokenizer))
        tables = {} if chosen.no_log_normal else {"log-normal lengths": lognormal(chosen.rows, len(tokenizer))}
        for given in chosen.data:
            for path in [given] if given.is_file() else sorted(given.rglob("*.jsonl")):
                tables[path.name] = from_file(path, chosen.rows, tokenizer)
        for title, examples in tables.items():
            speeds = compare(title, base, tokenizer, examples, chosen.rounds)
            print_goal(
                "x TRL default", value=speeds["dropforge"] / speeds["TRL default"], at_least=1.0 if CUDA else 2.3
            )
            print_goal("x TRL tuned", value=speeds["dropforge"] / speeds["TRL tuned"], at_least=1.0 if CUDA else 1.2)


if __name__ == "__main__":
    main()
