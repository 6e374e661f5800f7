"""`python -m daemon.trainer.preview`: rows as the samples that a run would train, from a request as JSON on stdin.

The tokenizer is all that is loaded. Nothing here computes, and importing torch would take longer than all the rest: it is
kept out, which transformers takes for a machine without it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daemon.dataset.rows import Format, RowReader, count_answers
from daemon.dataset.scan import NO_ANSWER, WARNINGS, row_warnings
from daemon.dataset.source import SourceError
from daemon.dataset.strict_json import LineError
from daemon.recipe import Recipe
from daemon.trainer.errors import RunFailure

if TYPE_CHECKING:
    from daemon.trainer.encode import EncodedRow
    from daemon.trainer.text_tokens import Sample


def preview(path: Path, format_: str, recipe: Recipe, *, rows: int, line: int | None) -> dict[str, Any]:
    """Show the first `rows` rows of a dataset, or the row on `line`.

    Returns `rows` ({line, samples, warnings}) and `refused` ({line, reason}). A sample has `segments`, which together are
    its whole text, `tokens` and `learned_tokens` after truncation, and whether it is `truncated`. A segment has `text`,
    `learned`, and where there is one `truncated` (cut off by max_length) and `control` (the special tokens in it). Raises RunFailure(CONFIG), SourceError, OSError.
    """
    from daemon.trainer.base_model import load_tokenizer, resolve_base
    from daemon.trainer.encode import Encoder, RefusedRow

    tokenizer = load_tokenizer(resolve_base(recipe.model))
    data = recipe.data.model_copy(update={"on_bad_rows": "reject"})  # a row that a run would skip is told, not skipped
    encoder = Encoder(tokenizer, data)
    reader = RowReader(path, Format(format_), data)
    shown: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for number, text in reader.lines():
        if line is not None and number != line:
            continue
        try:
            row = reader.row((number, text))
        except LineError as error:
            refused.append({"line": number, "reason": error.reason})
        else:
            if row is not None:
                [encoded] = encoder.encode([row])
                if isinstance(encoded, RefusedRow):
                    reason = f"{encoded.reason}; {encoded.hint}" if encoded.hint else encoded.reason
                    refused.append({"line": number, "reason": reason})
                else:
                    told = row_warnings(row, count_answers(row, data.train_on))
                    warnings = [WARNINGS[code] for code in told if code != NO_ANSWER]  # told by the tokens themselves
                    shown.append(_row(encoded, tokenizer, data.max_length, warnings))
        if number == line or len(shown) >= rows:
            break
    return {"rows": shown, "refused": refused}


def _row(encoded: EncodedRow, tokenizer: Any, max_length: int, told: Sequence[str]) -> dict[str, Any]:
    samples = [_sample(sample, tokenizer, max_length) for sample in encoded.samples]
    warnings = [*told, *(f"rows like this {note}" for note in sorted(encoded.notes))]
    if not any(sample["learned_tokens"] for sample in samples):
        warnings.append("nothing of it is learned")
    if any(sample.spells_special for sample in encoded.samples):
        warnings.append("it holds the text of special tokens, which is read as text")
    if any(sample["truncated"] for sample in samples):
        warnings.append(f"it is longer than max_length = {max_length}; what is cut off is not seen")
    return {"line": encoded.line, "samples": samples, "warnings": warnings}


def _sample(sample: Sample, tokenizer: Any, max_length: int) -> dict[str, Any]:
    from daemon.trainer.encode import kept_from, trained_tokens, truncate

    total = len(sample.ids)
    kept = truncate(sample, max_length, tokenizer.bos_token_id)
    begin = kept_from(sample, max_length) if total > max_length else 0
    end = min(begin + max_length, total)
    segments = []
    before = ""
    for start, stop in pairwise(sorted({0, begin, end, total, *chain.from_iterable(sample.learned)})):
        # Token by token, parts of a character would be lost: the text so far is what a token adds to.
        so_far = _text(tokenizer, sample.ids[:stop])
        segment: dict[str, Any] = {
            "text": so_far[len(before) :],
            "learned": any(first <= start < last for first, last in sample.learned),
        }
        if not begin <= start < end:
            segment |= {"learned": False, "truncated": True}
        if control := _control(tokenizer, sample.ids[start:stop]):
            segment["control"] = control
        segments.append(segment)
        before = so_far
    return {
        "segments": segments,
        "tokens": len(kept.ids),
        "learned_tokens": trained_tokens(kept.learned),
        "truncated": total > max_length,
    }


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _control(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The special tokens among `ids`, each once; the same text where a row spells it is made of other tokens."""
    special = set(tokenizer.all_special_ids)
    return sorted({tokenizer.convert_ids_to_tokens(id_) for id_ in ids if id_ in special})


def main() -> None:
    """Answer the request on stdin: {path, format, recipe, rows, line}."""
    sys.modules["torch"] = None  # type: ignore[assignment]  # before transformers looks for it
    request = json.load(sys.stdin)
    try:
        answer = preview(
            Path(request["path"]),
            request["format"],
            Recipe.model_validate(request["recipe"]),
            rows=request["rows"],
            line=request["line"],
        )
    except RunFailure as failure:
        answer = {"error": failure.message, "hint": failure.hint}
    except (SourceError, OSError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
