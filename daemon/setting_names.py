"""Names of settings: the nearest right one for a name that is none, and what is wrong with a value in a reader's words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

# Names that other trainers have, and peft's and transformers' own for the same thing.
ALIASES: Mapping[str, str] = {
    "alpha": "lora.lora_alpha",
    "batch_size": "training.per_device_train_batch_size",
    "base_model": "model.model_name_or_path",
    "bf16": "model.dtype",
    "cutoff_len": "data.max_length",
    "dropout": "lora.lora_dropout",
    "epochs": "training.num_train_epochs",
    "eval_split": "data.held_out_fraction",
    "fp16": "model.dtype",
    "grad_accum": "training.gradient_accumulation_steps",
    "gradient_clipping": "training.max_grad_norm",
    "load_4bit": "model.load_in_4bit",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "training.per_device_train_batch_size",
    "model": "model.model_name_or_path",
    "model_max_length": "data.max_length",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "quantization_bit": "model.load_in_4bit",
    "rank": "lora.r",
    "sequence_len": "data.max_length",
    "torch_dtype": "model.dtype",
    "train_on_inputs": "data.train_on",
    "val_set_size": "data.held_out_fraction",
    "validation_split": "data.held_out_fraction",
    "warmup": "training.warmup_steps",
    "warmup_ratio": "training.warmup_steps",
}
# What pydantic finds, as the end of a sentence that begins with the key.
_WORDS: Mapping[str, str] = {
    "bool": "true or false",
    "float": "a number",
    "int": "a whole number",
    "string": "text, in quotes",
    "tuple": "a list, in brackets",
    "finite_number": "a finite number",
    "path_type": "a path, in quotes",
    "model": "a table",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "literal_error": "{expected}",
}
LONGEST_VALUE = 80


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return what is wrong with settings of `model` as one sentence."""
    return "; ".join(faults(error, model))


def faults(
    error: ValidationError,
    model: type[BaseModel],
    text: str = "",
    *,
    variable_of: Callable[[str], str] = lambda name: "",
) -> list[str]:
    """Return what is wrong with settings of `model`, a sentence each: `[table] key is ... (got VALUE)`.

    `text`: the TOML that they were read from, for the numbers of lines. `variable_of`: the variable that set a name instead.
    """
    known = tuple(_names(model))
    found: dict[str, tuple[list[str], str]] = {}  # name -> what it may be, and the rest: of a union, several
    sentences: list[str] = []
    for item in error.errors(include_url=False):
        name = ".".join(str(part) for part in item["loc"])
        while name and name not in known and item["type"] != "extra_forbidden":  # a branch of a union, or a list's item
            name = name.rpartition(".")[0]
        origin = variable_of(name) or (f"line {line}" if (line := line_of(text, name)) else "")
        start = f"{origin}: " if origin else ""
        said = next((words for kind, words in _WORDS.items() if item["type"].startswith(kind)), None)
        if item["type"] == "extra_forbidden":
            right = nearest(name, known)
            shown = place(name) if "." in name else name
            sentences.append(f"{start}unknown key {shown}" + (f"; is {right} meant?" if right else ""))
        elif said is None:
            message = item["msg"].removeprefix("Value error, ")
            # About a whole table, it names what it is about; the table says no more.
            got = "" if isinstance(item["input"], Mapping) else f" (got {_shown(item['input'])})"
            sentences.append(f"{start}{place(name)}: {message}{got}")
        else:
            may_be, _ = found.setdefault(f"{start}{place(name)}", ([], f"(got {_shown(item['input'])})"))
            may_be.append(said.format(**_plain_numbers(item.get("ctx", {}))))
            if item["type"] == "tuple_type" and isinstance(item["input"], str | int | float):
                may_be[-1] += f": [{_shown(item['input'])}]"
    sentences += [f"{start} is {' or '.join(dict.fromkeys(may_be))} {rest}" for start, (may_be, rest) in found.items()]
    return list(dict.fromkeys(sentences))


def _plain_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bounds as people write them: 0, not 0.0."""
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() else value for name, value in values.items()
    }


def line_of(text: str, name: str) -> int | None:
    """Return the number of the line of a TOML text on which `name` (`table.key`, or a table) stands; None when none does."""
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if header := re.fullmatch(r"\[\s*([\w.\s-]+?)\s*\](\s*#.*)?", stripped):
            table = header[1].replace(" ", "")
            if table == name:
                return number
        elif key := re.match(r"[\w.\s-]+?(?=\s*=)", stripped):
            full = f"{table}.{key[0]}" if table else key[0]
            if full.replace(" ", "") == name:
                return number
    return None


def nearest(name: str, known: tuple[str, ...]) -> str:
    """Return the setting that `name` (`table.key`, or a table) probably means, as it is written; empty when none is near."""
    table, _, key = name.rpartition(".")
    alias = ALIASES.get(key.lower())
    if alias in known:
        return place(alias)
    near = get_close_matches(key, [full.rpartition(".")[2] for full in known if full.rpartition(".")[0] == table], 1)
    if near:
        return place(f"{table}.{near[0]}" if table else near[0])
    elsewhere = [full for full in known if full.rpartition(".")[2] == key]
    if not elsewhere and (close := get_close_matches(key, [full.rpartition(".")[2] for full in known], 1, 0.8)):
        elsewhere = [full for full in known if full.rpartition(".")[2] == close[0]]
    return " or ".join(map(place, elsewhere))


def place(name: str) -> str:
    """`table.key` as a reader of the file finds it."""
    table, dot, key = name.partition(".")
    return f"[{table}] {key}" if dot else f"[{table}]"


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _names(inner, f"{prefix}{name}.")


def _shown(value: Any) -> str:
    """A value as the file may hold it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
