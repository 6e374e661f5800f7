"""`check_files`: the daemon's verdict and more, without a daemon, without moving anything."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.cli.check import check_files, render_text
from daemon.config import Settings
from daemon.job import Dataset, Job, JobState, to_json
from daemon.store import JobStore
from guard.digest import digest_file
from tests.support.root import Root

GSM8K = Path(__file__).parent.parent / "data" / "gsm8k" / "train_head.jsonl"
ROWS = "".join(f'{{"text": "{"x" * 2**number}"}}\n' for number in range(8))


def drop(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_good_file_is_told_with_format_rows_bytes_digest_repeats_and_lengths(tmp_path: Path) -> None:
    """And stays where it is."""
    path = drop(tmp_path / "x.jsonl", ROWS + ROWS.splitlines()[2] + "\n")
    (report,) = check_files([path], Settings(root=tmp_path), None)
    assert report.accepted
    assert (report.dataset.rows, report.dataset.format, report.dataset.size_bytes) == (9, "text", path.stat().st_size)
    assert report.dataset.digest == digest_file(path).blake3_hex
    assert (report.repeats.rows, report.repeats.examples) == (1, ((9, 3),))
    assert sum(report.lengths.values()) == 9
    text = render_text(report)
    assert "line 9 repeats line 3" in text
    assert "█" in text
    assert "no base model is configured" in text
    json.loads(to_json(report.to_dict()))


def test_a_bad_file_is_refused_with_its_lines(tmp_path: Path) -> None:
    """As the daemon's report has them; escaped."""
    path = drop(tmp_path / "x.jsonl", b'{"text": "fine"}\n{"text": "\x1b[31m\xff"}\n')
    (report,) = check_files([path], Settings(root=tmp_path), None)
    assert not report.accepted
    text = render_text(report)
    assert "line 2, column 16" in text
    assert all(line.isprintable() for line in text.splitlines())


def test_a_sidecar_beside_the_file_counts(tmp_path: Path) -> None:
    """GSM8K as published, made trainable by two lines; and a bad sidecar refuses it by name."""
    path = tmp_path / "gsm8k.jsonl"
    shutil.copyfile(GSM8K, path)
    settings = Settings(root=tmp_path)
    (report,) = check_files([path], settings, None)
    assert 'prompt = "question", completion = "answer"' in report.reason
    drop(tmp_path / "gsm8k.job.toml", '[data.columns]\nprompt = "question"\ncompletion = "answer"\n')
    (report,) = check_files([path], settings, None)
    assert (report.accepted, report.dataset.rows, report.dataset.format) == (True, 40, "columns")
    drop(tmp_path / "gsm8k.job.toml", "surprise = 1\n")
    (report,) = check_files([path], settings, None)
    assert "surprise" in report.reason


def test_content_that_was_trained_before_is_told_with_job_and_version(tmp_path: Path) -> None:
    """Under whatever name."""
    path = drop(tmp_path / "new-name.jsonl", ROWS)
    settings = Settings(root=tmp_path)
    store = JobStore(settings.store_path)
    digest = digest_file(path).blake3_hex
    dataset = Dataset(name="old.jsonl", path="", size_bytes=1, rows=8, digest=digest, format="text")
    store.add(Job(id="job-1", name="old.jsonl", state=JobState.SUCCEEDED, dataset=dataset, version="0003"))
    (report,) = check_files([path], settings, store)
    store.close()
    assert report.trained_before == ({"job": "job-1", "version": "0003", "changed_settings": []},)
    assert "before, in job job-1 (version 0003)" in render_text(report)


def test_settings_under_which_other_words_would_be_learned_are_told(tmp_path: Path) -> None:
    """And that the file would therefore be trained again."""
    path = drop(tmp_path / "x.jsonl", '{"prompt": "Q", "completion": "A"}\n')
    settings = Settings(root=tmp_path)
    dataset = Dataset(
        name="x.jsonl", path="", size_bytes=1, rows=1, digest=digest_file(path).blake3_hex, format="prompt_completion"
    )
    recipe = settings.recipe.model_dump(mode="json")
    store = JobStore(settings.store_path)
    store.add(Job(id="job-1", name="x.jsonl", state=JobState.SUCCEEDED, dataset=dataset, version="0003", recipe=recipe))
    drop(tmp_path / "x.job.toml", '[data]\nprompt_completion = "chat"\n')
    (report,) = check_files([path], settings, store)
    store.close()
    told = 'version 0003, with other settings: prompt_completion = "as_is", now "chat"); so it would be trained again'
    assert told in render_text(report)


def test_the_share_of_trained_tokens_comes_from_a_child_process(tmp_path: Path) -> None:
    """Which gets the file, its format and the recipe, sidecar included; whatever goes wrong there is a reason, not an error."""
    path = drop(tmp_path / "x.jsonl", ROWS)
    drop(tmp_path / "x.job.toml", "[data]\nmax_length = 77\n")
    settings = Settings(root=tmp_path, model={"model_name_or_path": "some/model"})
    counting = (
        "import json, sys; recipe = json.loads(sys.argv[3])\n"
        "print(json.dumps({'tokens': 200, 'trained_tokens': recipe['data']['max_length'], 'rows_over_max_length': 1,"
        " 'lengths': [{'up_to': 32, 'rows': 8}]}))"
    )
    for code, expected in (
        (
            counting,
            "200, of them 77 trained (38.5%); 1 row is longer than max_length\n  trained     not before\n  tokens a row\n",
        ),
        ("raise SystemExit('no tokenizer')", "not checked: the trainer could not say: no tokenizer"),
        ("print('hello')", "not checked: the trainer's answer was not understood"),
    ):
        (report,) = check_files([path], settings, None, verdict_command=(sys.executable, "-c", code))
        assert report.accepted
        assert expected in render_text(report)
    (report,) = check_files([path], settings, None, verdict_command=("/no/such/program",))
    assert "could not be asked" in report.tokens.reason


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_steps": 39}, "it would train 40 steps, but [limits] max_steps = 39 allows no more"),
        ({"max_tokens": 999}, "its rows have 1,000 tokens, but [limits] max_tokens = 999 allows no more"),
        ({"max_steps": 40, "max_tokens": 1000}, ""),
    ],
)
def test_a_run_beyond_the_limits_is_foreseen(tmp_path: Path, limits: dict[str, int], expected: str) -> None:
    path = drop(tmp_path / "x.jsonl", ROWS)
    settings = Settings(root=tmp_path, model={"model_name_or_path": "some/model"}, limits=limits)
    counting = 'print(\'{"tokens": 1200, "trained_tokens": 800, "steps": 40, "run_tokens": 1000}\')'
    (report,) = check_files([path], settings, None, verdict_command=(sys.executable, "-c", counting))
    assert (report.accepted, report.reason) == (not expected, expected)
    assert ("raise the limit in dropforge.toml" in render_text(report)) is bool(expected)


def test_what_the_daemon_would_not_take_is_not_accepted(tmp_path: Path) -> None:
    """Names, links, and files that are not there."""
    real = drop(tmp_path / "real.jsonl", ROWS)
    link = tmp_path / "link.jsonl"
    link.symlink_to(real)
    reports = check_files([drop(tmp_path / "x.json", ROWS), link, tmp_path / "no.jsonl"], Settings(root=tmp_path), None)
    assert [report.accepted for report in reports] == [False, False, False]
    assert "it is a .json file" in reports[0].reason
    assert "dropforge submit" in reports[0].hint
    assert "symbolic link" in reports[1].reason
    assert "no such file" in reports[2].reason


def test_the_command_counts_with_the_models_own_tokenizer_and_exits_3_when_a_file_is_refused(
    make_root: Callable[..., Root], tiny_base: Path
) -> None:
    """A real process on a real model folder; `--json` is one array, in the order of the arguments."""
    root = make_root(base_model=tiny_base, tables={"data": {"max_length": 64}})
    pair = {"prompt": "How many?", "completion": "Four. " * 4}
    good = drop(
        root.path / "good.jsonl", json.dumps(pair) + "\n" + json.dumps({**pair, "prompt": "Why? " * 200}) + "\n"
    )
    bad = drop(root.path / "bad.jsonl", '{"text": 1}\n')
    done = root.run("check", str(good), str(bad), "--json")
    assert done.returncode == 3
    first, second = json.loads(done.stdout)["files"]
    assert first["tokens"]["rows_over_max_length"] == 1
    assert (first["accepted"], second["accepted"]) == (True, False)
    assert 0 < first["tokens"]["trained_share"] < 0.5  # completions are short, and prompts get no loss
    assert sum(found["rows"] for found in first["tokens"]["lengths"]) == 2
    assert second["rows"]["problems"][0]["column"] == 10
