"""What to say of a row of no known format: what it is, and settings that would make it one.

A setting is only proposed when the row passes under it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from daemon.dataset.keys import Place, is_given, refuses
from daemon.dataset.rows import (
    AS_CHAT,
    ONE_TURN,
    WHOLE_CONVERSATION,
    Columns,
    Format,
    Rules,
    detect_format,
    joins_words,
    normalise,
)
from daemon.dataset.values import RowError

PROMPT_NAMES = (
    "prompt", "question", "query", "instruction", "input", "problem", "request", "user", "human", "ask", "source",
    "context", "article", "document", "inputs",
)  # fmt: skip
COMPLETION_NAMES = (
    "completion", "response", "answer", "output", "solution", "reply", "assistant", "target", "ideal", "expected",
    "generation", "generated_text", "answers", "summary", "highlights", "translation", "label_text", "cot",
    "generated_solution", "targets",
)  # fmt: skip
TEXT_NAMES = (
    "text",
    "content",
    "body",
    "document",
    "article",
    "passage",
    "sentence",
    "story",
    "code",
    "raw",
    "page_content",
)
NOT_LEARNED = (
    "id", "uuid", "source", "url", "split", "lang", "language", "category", "subcategory", "topic", "date", "system",
    "data_source", "ability", "dataset", "subset", "model", "generator", "type", "task", "difficulty", "level", "domain",
    "license", "version", "name", "author", "tags", "label", "hash", "status", "conversation_id", "timestamp", "role",
    "path", "file", "filename", "file_path", "repo", "repo_name", "size", "title",
)  # fmt: skip
ASKING_NAMES = PROMPT_NAMES[:8]  # a text of these alone is a question without its answer
KEYS_SHOWN = 8


def describe_unknown(row: Mapping[str, Any], rules: Rules) -> tuple[str, str]:
    """Reason and hint for a row that has no known format."""
    for key, value in row.items():
        if (group := refuses(key, value, Place.ROW, answers=True)) is not None:
            return group.reason(key), group.advice
    shown = ", ".join(json.dumps(key) for key in list(row)[:KEYS_SHOWN]) or "no keys"
    reason = f"no known format has these keys: {shown}{', …' if len(row) > KEYS_SHOWN else ''}"
    if isinstance(row.get("role"), str) and isinstance(row.get("content"), str):
        return f"{reason}; {ONE_TURN}", WHOLE_CONVERSATION
    for name, inner in row.items():
        if isinstance(inner, dict) and _passes(inner, rules):
            return (
                f"{reason}; a row is inside {json.dumps(name)}",
                f"take it out: jq -c '.[{json.dumps(name)}]' FILE > NEW.jsonl",
            )
    if (renamed := _in_small_letters(row)) != row and _passes(renamed, rules):
        return (
            f"{reason}; a format has them in small letters",
            "rename the keys: jq -c 'with_entries(.key |= ascii_downcase)' FILE > NEW.jsonl",
        )
    for columns in _columns(row):
        if (proposal := _proposal(row, columns, rules)) is not None:
            return f"{reason}; perhaps {proposal}", f"if those are the columns, set {proposal}"
    return reason, ""


def _passes(row: Mapping[str, Any], rules: Rules) -> bool:
    """Whether a row would be taken."""
    format_ = detect_format(row, rules.columns)
    if format_ is None:
        return False
    try:
        normalise(row, format_, rules)
    except RowError:
        return False
    return True


def _in_small_letters(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its own keys in small letters; itself where that would make one key of two."""
    renamed = {key.lower(): value for key, value in row.items()}
    return renamed if len(renamed) == len(row) else dict(row)


def _columns(row: Mapping[str, Any]) -> Iterator[Columns]:
    """Likely columns, the likeliest first."""
    texts = {key: key.casefold() for key, value in row.items() if isinstance(value, str) and is_given(value)}
    prompts = sorted((PROMPT_NAMES.index(name), key) for key, name in texts.items() if name in PROMPT_NAMES)
    completions = sorted((COMPLETION_NAMES.index(n), key) for key, n in texts.items() if n in COMPLETION_NAMES)
    for _, prompt in prompts:
        for _, completion in completions:
            yield Columns(prompt=prompt, completion=completion)
    if any(isinstance(value, list | dict) and is_given(value) for value in row.values()):
        return  # what such a row means is not in its texts
    rest = [key for key, name in texts.items() if name not in NOT_LEARNED and not name.endswith(("_id", "_url"))]
    if len(rest) == 2:
        yield Columns(prompt=rest[0], completion=rest[1])
    named = [key for key in rest if texts[key] in TEXT_NAMES]
    if named or (len(rest) == 1 and texts[rest[0]] not in ASKING_NAMES):
        yield Columns(text=(named or rest)[0])


def _proposal(row: Mapping[str, Any], columns: Columns, rules: Rules) -> str | None:
    """The settings in words, when the row passes under them."""
    for style in ("as_is", "chat"):
        proposed = replace(rules, columns=columns, prompt_completion=style)
        try:
            content = normalise(row, Format.COLUMNS, proposed)
        except RowError:
            continue
        if columns.text is not None:
            words = f"[data.columns] text = {json.dumps(columns.text)}"
        else:
            prompt, completion = json.dumps(columns.prompt), json.dumps(columns.completion)
            words = f"[data.columns] prompt = {prompt}, completion = {completion}"
        if style == "chat" or joins_words(content):
            words += f" and, for a chat model, {AS_CHAT}" if style == "as_is" else f" and {AS_CHAT}"
        left = ", ".join(json.dumps(key) for key in content.unused_keys[:KEYS_SHOWN])
        return f"{words} (not used then: {left})" if left else words
    return None
