"""`dropforge preview` shows what a run would train, and `check` gives the verdict that the run would give."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from daemon.job import JobState, to_json
from tests.support.root import Root

MakeRoot = Callable[..., Root]
CHAT = {
    "messages": [
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "Of Spain?"},
        {"role": "assistant", "content": "Madrid."},
    ],
    "id": 7,
}
# Keeps reasoning in the last answer alone, as many templates do; asks for an answer without any.
STRIPS_REASONING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
REFUSES_TOOLS = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('this model knows no tools') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOOL = {
    "messages": [
        {"role": "user", "content": "?"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ]
}


def write(folder: Path, *rows: Any, name: str = "x.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_template(base: Path, folder: Path, template: str) -> Path:
    """The tiny model under another chat template."""
    copy = folder / "base"
    shutil.copytree(base, copy)
    (copy / "chat_template.jinja").write_text(template)
    return copy


def previewed(root: Root, path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    done = root.run("preview", str(path), "--json", *arguments)
    assert done.returncode == code, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def texts(sample: dict[str, Any], *, learned: bool) -> list[str]:
    return [segment["text"] for segment in sample["segments"] if segment["learned"] is learned]


def test_segments_are_the_rendering_and_the_answers_with_their_end_are_learned(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path
) -> None:
    root = make_root(base_model=tiny_base)
    path = write(tmp_path, CHAT, CHAT | {"id": 8}, CHAT)
    shown = previewed(root, path, "-n", "2")
    assert list(shown) == ["file", "format", "rows", "unused_keys", "refused"]
    assert (shown["file"], shown["format"]) == (str(path), "messages")
    assert [row["line"] for row in shown["rows"]] == [1, 2]
    [sample] = shown["rows"][0]["samples"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    rendered = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert "".join(segment["text"] for segment in sample["segments"]) == rendered
    assert texts(sample, learned=True) == ["Paris.<|end|>", "Madrid.<|end|>"]
    assert sample["tokens"] == len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    assert sample["learned_tokens"] == sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts(sample, learned=True)
    )
    assert sample["truncated"] is False
    assert shown["unused_keys"] == {"id": 3}
    assert shown["refused"] == []


def test_a_row_is_shown_by_its_line_and_a_bad_one_is_told(make_root: MakeRoot, tiny_base: Path, tmp_path: Path) -> None:
    root = make_root(base_model=tiny_base)
    path = write(tmp_path, CHAT, {"messages": "no"}, CHAT)
    shown = previewed(root, path, "--row", "3", code=3)
    assert [row["line"] for row in shown["rows"]] == [3]
    assert [found["line"] for found in shown["refused"]] == [2]
    shown = previewed(root, path, "--row", "2", code=3)
    assert shown["rows"] == []
    assert "expected a list" in shown["refused"][0]["reason"]


def test_what_check_warns_of_stands_at_its_row(make_root: MakeRoot, tiny_base: Path, tmp_path: Path) -> None:
    """Empty answers, and placeholders of pictures among words."""
    user = {"role": "user", "content": "Is <image> a tag?"}
    empty = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": " "}]}
    path = write(tmp_path, {"messages": [user, CHAT["messages"][1]], "id": 1}, empty)
    root = make_root(base_model=tiny_base)
    shown = json.loads(root.run("preview", str(path), "--json").stdout)
    assert [[warning.partition(";")[0] for warning in row["warnings"]] for row in shown["rows"]] == [
        ["the placeholder of a picture, video or sound in the text"],
        ["an answer that would be learned is empty or only white space"],
    ]
    assert "not used: id (1 row)" in root.run("preview", str(path)).stdout


def test_what_max_length_cuts_off_is_shown_as_cut_off(make_root: MakeRoot, tiny_base: Path, tmp_path: Path) -> None:
    root = make_root(base_model=tiny_base, tables={"data": {"max_length": 16}})
    path = write(tmp_path, {"messages": [{"role": "user", "content": "word " * 50}, CHAT["messages"][1]]})
    shown = previewed(root, path)
    [row] = shown["rows"]
    [sample] = row["samples"]
    assert sample["truncated"] is True
    assert sample["tokens"] == 16
    cut = [segment for segment in sample["segments"] if segment.get("truncated")]
    assert "word word" in "".join(segment["text"] for segment in cut)
    assert texts(sample, learned=True) == ["Paris.<|end|>"]
    assert any("max_length = 16" in warning for warning in row["warnings"])
    checked = json.loads(root.run("check", str(path), "--json").stdout)["files"][0]
    assert checked["tokens"]["rows_over_max_length"] == 1


def test_a_conversation_whose_renderings_do_not_nest_is_shown_as_several_samples(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path
) -> None:
    root = make_root(base_model=with_template(tiny_base, tmp_path, STRIPS_REASONING))
    thinking = [
        message | ({"reasoning_content": "hm"} if message["role"] == "assistant" else {})
        for message in CHAT["messages"]
    ]  # type: ignore[operator]
    shown = previewed(root, write(tmp_path, {"messages": thinking}))
    first, second = shown["rows"][0]["samples"]
    assert texts(first, learned=True) == ["<think>hm</think>Paris.<|end|>\n"]
    assert texts(second, learned=True) == ["<think>hm</think>Madrid.<|end|>\n"]
    assert "<|assistant|>\nParis.<|end|>" in "".join(texts(second, learned=False))
    assert shown["rows"][0]["warnings"], "what later turns do not see is told"


def test_on_a_terminal_without_colour_learned_text_stands_between_marks(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path
) -> None:
    """And nothing that a row holds can move the cursor."""
    root = make_root(base_model=tiny_base)
    path = write(tmp_path, {"messages": [{"role": "user", "content": "\x1b[2Jhide"}, CHAT["messages"][1]]})
    done = root.run("preview", str(path))
    assert "⟦Paris.<|end|>⟧" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\\x1b[2Jhide" in done.stdout


def test_a_preview_does_not_load_torch(tiny_base: Path, tmp_path: Path) -> None:
    """It would take longer than all the rest."""
    root_recipe = {"model": {"model_name_or_path": str(tiny_base)}}
    request = {"path": str(write(tmp_path, CHAT)), "format": "messages", "recipe": root_recipe, "rows": 1, "line": None}
    code = "import sys\nfrom daemon.trainer.preview import main\nmain()\nassert sys.modules['torch'] is None"
    done = subprocess.run(
        [sys.executable, "-c", code], input=to_json(request), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]


def test_without_a_base_model_a_preview_says_what_to_set(make_root: MakeRoot, tmp_path: Path) -> None:
    done = make_root().run("preview", str(write(tmp_path, CHAT)))
    assert done.returncode == 2
    assert "model_name_or_path" in done.stderr


@pytest.mark.parametrize("on_bad_rows", ["reject", "skip"])
def test_check_refuses_what_the_run_would_refuse(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path, on_bad_rows: str
) -> None:
    """Rows that the chat template refuses: named by check, and the job's end is the one that check foretold."""
    base = with_template(tiny_base, tmp_path, REFUSES_TOOLS)
    tables = {"data": {"on_bad_rows": on_bad_rows, "max_bad_fraction": 0.5, "held_out_fraction": 0.0}}
    root = make_root(base_model=base, tables=tables)
    rows = [CHAT, TOOL, *[{"messages": CHAT["messages"][:2], "n": n} for n in range(4)]]
    path = write(tmp_path, *rows)
    checked = root.run("check", str(path), "--json")
    report = json.loads(checked.stdout)["files"][0]
    assert [found["line"] for found in report["tokens"]["refused"]] == [2]
    assert "this model knows no tools" in report["tokens"]["refused"][0]["reason"]
    assert "line 2: " in root.run("check", str(path)).stdout
    root.drop("x.jsonl", path)
    root.run("run", "--once")
    job = root.finished("x.jsonl")
    if on_bad_rows == "reject":
        assert checked.returncode == 3
        assert "line 2" in report["reason"]
        assert (job.state, job.failure) == (JobState.FAILED, "bad_data")
        assert report["reason"] in job.reason
    else:
        assert checked.returncode == 0
        assert job.state is JobState.SUCCEEDED, job.reason
        assert job.result is not None
        assert job.result.refused_rows == 1


def test_check_names_lines_of_which_nothing_is_learned(make_root: MakeRoot, tiny_base: Path, tmp_path: Path) -> None:
    root = make_root(base_model=tiny_base)
    path = write(tmp_path, CHAT, {"messages": CHAT["messages"][:1]}, {"messages": CHAT["messages"][:3]})
    report = json.loads(root.run("check", str(path), "--json").stdout)["files"][0]
    assert report["tokens"]["unlearned_lines"] == [2]
    assert "(lines 2)" in root.run("check", str(path)).stdout


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_told_with_its_folder(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path, content: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "tokenizer.json").write_text(content)
    done = make_root(base_model=base).run("check", str(write(tmp_path, CHAT)))
    assert done.returncode == 0
    assert f"rows good, tokens not checked: the base model in {base} has no usable tokenizer" in done.stdout


def test_check_says_when_tokens_were_not_checked(make_root: MakeRoot, tmp_path: Path) -> None:
    """Never just "good"."""
    root = make_root(base_model=tmp_path / "nowhere")
    done = root.run("check", str(write(tmp_path, CHAT)))
    assert done.returncode == 0
    assert "rows good, tokens not checked: " in done.stdout
    assert ": good" not in done.stdout


def test_what_a_run_warns_of_stands_beside_the_data_and_in_show_status_and_card(
    make_root: MakeRoot, tiny_base: Path, tmp_path: Path
) -> None:
    root = make_root(base_model=tiny_base, tables={"data": {"held_out_fraction": 0.0}})
    root.drop("x.jsonl", write(tmp_path, CHAT, {"messages": CHAT["messages"][:1]}))
    root.run("run", "--once")
    job = root.finished("x.jsonl")
    assert job.state is JobState.SUCCEEDED, job.reason
    folder = root.settings.inbox_dir / "done" / job.id
    said = "rows without a token to train on: 1 (lines 2)"
    assert said in (folder / "report.txt").read_text()
    assert said in json.loads((folder / "report.json").read_text())["warnings"]
    assert said in root.run("show", job.id).stdout
    status = root.status()
    assert status is not None
    assert said in status["recent"][0]["warnings"]
    assert said in root.run("status").stdout
    assert said in (root.settings.model_dir / "latest" / "README.md").read_text()
