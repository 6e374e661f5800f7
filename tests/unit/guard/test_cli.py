"""The command: its exit codes, its JSON, and the way of somebody with a directory of a plain script."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import guard
from guard.cli import OwnModel, main
from tests.unit.guard.conftest import make_checkpoint


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    code, out, err = run(capsys, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """What a plain script leaves: whole checkpoints, one that was cut off, no metadata."""
    folder = tmp_path / "plain"
    for step in (900, 2600):
        make_checkpoint(folder / f"checkpoint-{step}", step)
    (make_checkpoint(folder / "checkpoint-3000", 3000) / "optimizer.pt").unlink()
    return folder


def test_the_way_of_a_plain_script_s_directory(
    capsys: pytest.CaptureFixture[str], plain: Path, dataset: Path, tmp_path: Path
) -> None:
    """Seal what is there, verify, resume, refuse other data, clear, bring back."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[lora]\nr = 8\n[training]\nlearning_rate = 1e-4\n")
    assert run(capsys, "check", plain, "--dataset", dataset)[0] == 3

    code, _, err = run(capsys, "seal", plain / "checkpoint-3000", "--dataset", dataset, "--recipe", recipe)
    assert code == 1
    assert "optimizer.pt is missing" in err
    assert run(capsys, "seal", plain / "checkpoint-2600", "--dataset", dataset, "--recipe", recipe)[0] == 0
    assert run(capsys, "seal", plain / "checkpoint-900")[0] == 0  # as recorded by the first

    code, out, _ = run(capsys, "verify", plain)
    assert code == 1  # there is damage
    lines = [line.split(None, 3) for line in out.splitlines()]
    assert lines[0] == ["step", "state", "bytes", "why"]
    assert [line[:2] for line in lines[1:]] == [["900", "intact"], ["2600", "intact"], ["3000", "torn"]]
    assert lines[3][3] == "seal.json is missing, and optimizer.pt is missing"

    code, found = run_json(capsys, "check", plain, "--dataset", dataset)
    assert (code, found["verdict"], found["step"]) == (0, "resume", 2600)
    assert found["passed_over"][0]["step"] == 3000

    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "three"}\n')
    code, out, _ = run(capsys, "check", plain, "--dataset", other)
    assert code == 3
    assert "Dataset changed: rows.jsonl → other.jsonl" in out
    assert f"clear {plain} --dataset {other}" in out
    recipe.write_text("[lora]\nr = 16\n[training]\nlearning_rate = 1e-4\n")
    code, out, _ = run(capsys, "check", plain, "--dataset", dataset, "--recipe", recipe)
    assert code == 3
    assert "LoRA r: 8 -> 16" in out
    code, _, err = run(capsys, "seal", plain / "checkpoint-900", "--dataset", other)
    assert code == 3
    assert "is of another run" in err

    code, out, _ = run(capsys, "clear", plain, "--dataset", other, "--dry-run")
    assert code == 0
    assert "checkpoint-2600" in out
    assert (plain / "checkpoint-2600").is_dir()
    code, cleared = run_json(capsys, "clear", plain, "--dataset", other)
    assert (code, cleared["cleared"], cleared["dry_run"]) == (0, 3, False)
    assert not list(plain.glob("checkpoint-*"))
    assert run_json(capsys, "check", plain, "--dataset", other)[1]["verdict"] == "fresh"
    code, back = run_json(capsys, "clear", plain, "--restore", cleared["set"])
    assert code == 0
    assert len(back["restored"]) == 3
    assert run(capsys, "check", plain, "--dataset", dataset)[0] == 0


def test_clear_without_a_dataset_keeps_the_run_in_progress(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    (model_dir / "checkpoint-30" / "optimizer.pt").unlink()
    code, out, _ = run(capsys, "clear", model_dir)
    assert code == 0
    assert "kept: checkpoint-20" in out
    assert "bring it back with" in out
    assert sorted(path.name for path in model_dir.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-20"]


def test_fingerprints_are_printed_as_b3sum_does(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    digest = guard.digest_file(dataset).blake3_hex
    assert run(capsys, "fingerprint", dataset, dataset) == (0, f"{digest}  {dataset}\n" * 2, "")
    code, found = run_json(capsys, "fingerprint", dataset)
    assert (code, found["files"][0]["digest"]) == (0, digest)
    code, found = run_json(capsys, "fingerprint", "--mode", "name_size", dataset)
    assert found["files"][0]["digest"] == guard.compute_dataset_hash(dataset)


def test_verify_takes_a_single_checkpoint_and_names_strays(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    assert run(capsys, "verify", model_dir / "checkpoint-20")[0] == 0
    (model_dir / "checkpoint-5").symlink_to("checkpoint-10")
    code, out, _ = run(capsys, "verify", model_dir)
    assert code == 0
    assert "ignored" in out
    assert "checkpoint-5: it is a symbolic link" in out
    code, found = run_json(capsys, "verify", model_dir)
    assert [row["step"] for row in found["checkpoints"]] == [10, 20, 30]
    assert len(found["left_alone"]) == 1


def test_without_digests_only_names_and_sizes_are_compared(capsys: pytest.CaptureFixture[str], model_dir: Path) -> None:
    path = model_dir / "checkpoint-30" / "adapter_config.json"
    path.write_bytes(path.read_bytes().replace(b"8", b"9"))
    assert run(capsys, "verify", model_dir, "--no-digests")[0] == 0
    assert run(capsys, "verify", model_dir)[0] == 1


def test_a_key_file_is_used_everywhere(
    capsys: pytest.CaptureFixture[str], plain: Path, dataset: Path, tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o600)
    arguments = ("--dataset", dataset, "--key-file", key)
    assert run(capsys, "seal", plain / "checkpoint-2600", *arguments)[0] == 0
    assert run(capsys, "verify", plain / "checkpoint-2600", "--key-file", key)[0] == 0
    assert run(capsys, "verify", plain / "checkpoint-2600")[0] == 1
    assert run(capsys, "check", plain, *arguments)[0] == 0
    assert run(capsys, "check", plain, "--dataset", dataset)[0] == 3
    key.chmod(0o644)
    code, _, err = run(capsys, "check", plain, *arguments)
    assert code == 2
    assert "hint: chmod 600" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["check", "--help"], 0),
        ([], 2),
        (["unknown"], 2),
        (["check", "{model}"], 2),
        (["clear", "{model}", "--dry-run", "--restore", "x"], 2),
        (["seal", "{plain}/checkpoint-900"], 2),
        (["check", "{model}", "--dataset", "{dataset}", "--recipe", "{dataset}.nothing"], 2),
        (["check", "{model}", "--dataset", "{dataset}", "--recipe", "{dataset}"], 2),
        (["check", "{model}/nothing", "--dataset", "{dataset}"], 4),
        (["check", "{dataset}", "--dataset", "{dataset}"], 4),
        (["check", "{model}", "--dataset", "{dataset}.nothing"], 4),
        (["verify", "{model}/nothing"], 4),
        (["clear", "{model}", "--restore", "nothing"], 4),
        (["purge", "{model}"], 2),
        (["purge", "{model}", "--keep-sets", "many"], 2),
        (["purge", "{model}/nothing", "--keep-sets", "1"], 4),
        (["seal", "{model}/checkpoint-99"], 4),
        (["fingerprint", "{dataset}.nothing"], 4),
        (["fingerprint", "{model}"], 1),
    ],
)
def test_exit_codes(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    model_dir, plain, dataset = (request.getfixturevalue(name) for name in ("model_dir", "plain", "dataset"))
    filled = [text.format(model=model_dir, plain=plain, dataset=dataset) for text in arguments]
    found, _, err = run(capsys, *filled)
    assert found == code
    assert bool(err) == (code != 0)
    assert "Traceback" not in err
    if code not in (0, 2):  # usage errors of argparse come before --json is known
        found, error = run_json(capsys, *filled)
        assert (found, error["exit_code"]) == (code, code)
        assert set(error["error"]) == {"operation", "path", "cause", "hint"}


def test_purge_shows_its_plan_deletes_by_the_limits_and_always_keeps_the_newest(
    capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    for number in range(3):
        make_checkpoint(model_dir / "checkpoint-1", 1, seed=number)
        assert run(capsys, "clear", model_dir)[0] == 0
    sets = [path.name for path in guard.list_cleared_sets(model_dir)]
    assert len(sets) == 3
    limits = ("--keep-sets", "1")
    code, out, _ = run(capsys, "purge", model_dir, *limits, "--dry-run")
    assert code == 0
    assert all(name in out for name in sets[:2])
    assert "more than 1 sets" in out
    assert "kept: 1 sets" in out
    assert guard.list_cleared_sets(model_dir) == [model_dir / ".cleared" / name for name in sets]
    with guard.ModelLock(model_dir, owner="the trainer"):
        assert run(capsys, "purge", model_dir, *limits)[0] == 5
        assert run(capsys, "purge", model_dir, *limits, "--dry-run")[0] == 0
    code, done = run_json(capsys, "purge", model_dir, *limits)
    assert (code, done["dry_run"], [item["set"] for item in done["sets"]], done["kept"]) == (
        0,
        False,
        sets[:2],
        sets[2:],
    )
    assert [path.name for path in guard.list_cleared_sets(model_dir)] == sets[2:]
    assert run(capsys, "purge", model_dir, "--keep-days", "0")[1].startswith("nothing to purge")


def test_what_the_caller_knows_of_its_own_model_directory_stands_in_for_options(
    capsys: pytest.CaptureFixture[str], model_dir: Path, tmp_path: Path
) -> None:
    """Key and policy of the settings hold for that directory and its checkpoints, and for no other."""
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k" * 32)
    key_file.chmod(0o600)
    own = OwnModel(model_dir=model_dir, key_file=key_file, keep_sets=1)

    def command(*arguments: object) -> int:
        code = main([str(argument) for argument in arguments], own=own)
        capsys.readouterr()
        return code

    assert command("seal", model_dir / "checkpoint-30") == 0
    assert guard.verify_checkpoint(model_dir / "checkpoint-30", key=b"k" * 32).is_intact
    assert command("verify", model_dir / "checkpoint-30") == 0
    assert command("verify", model_dir) == 1  # the others were sealed without
    other = tmp_path / "other"
    make_checkpoint(other / "checkpoint-1", 1)
    guard.seal_checkpoint(other / "checkpoint-1", step=1, fingerprint=guard.Fingerprint({}))
    assert command("verify", other) == 0
    assert command("purge", model_dir) == 0
    assert command("purge", other) == 2


def test_without_its_key_a_run_in_progress_is_not_taken_for_damaged(
    capsys: pytest.CaptureFixture[str], model_dir: Path, fingerprint: guard.Fingerprint
) -> None:
    guard.seal_checkpoint(model_dir / "checkpoint-30", step=30, fingerprint=fingerprint, key=b"k" * 32)
    for options in ((), ("--dry-run",)):
        code, _, err = run(capsys, "clear", model_dir, *options)
        assert code == 2
        assert "checkpoint-30 is sealed with a key, and none was given" in err
    assert len(list(model_dir.glob("checkpoint-*"))) == 3


@pytest.mark.skipif(shutil.which("b3sum") is None, reason="b3sum is not installed")
@pytest.mark.parametrize("name", ["plain.jsonl", "two words", "back\\slash", "new\nline", "\u00fcn\u00efcode", "-n"])
def test_whole_lines_are_those_of_b3sum(tmp_path: Path, name: str) -> None:
    """Names that need escaping included, so that `b3sum --check` reads them."""
    (tmp_path / name).write_bytes(b"rows")
    environment = {**os.environ, "PYTHONPATH": str(Path(guard.__file__).parents[1])}
    ours = subprocess.run(
        [sys.executable, "-m", "guard", "fingerprint", "--", name],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        check=True,
    ).stdout
    assert ours == subprocess.run(["b3sum", "--", name], cwd=tmp_path, capture_output=True, check=True).stdout
    (tmp_path / "sums").write_bytes(ours)
    subprocess.run(["b3sum", "--check", "sums"], cwd=tmp_path, capture_output=True, check=True)


def test_a_name_of_any_bytes_is_printed_as_it_is(tmp_path: Path) -> None:
    name = b"\xff.jsonl"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"rows")
    done = subprocess.run(
        [os.fsencode(sys.executable), b"-m", b"guard", b"fingerprint", name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(guard.__file__).parents[1]), "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.endswith(b"  " + name + b"\n")


def test_a_model_directory_in_use_is_named_with_its_user(
    capsys: pytest.CaptureFixture[str], model_dir: Path, dataset: Path
) -> None:
    with guard.ModelLock(model_dir, owner="the trainer"):
        for arguments in (["clear", model_dir], ["seal", model_dir / "checkpoint-10"]):
            code, _, err = run(capsys, *arguments)
            assert code == 5
            assert "in use by the trainer" in err
        # Looking is allowed.
        assert run(capsys, "check", model_dir, "--dataset", dataset)[0] == 0
        assert run(capsys, "verify", model_dir)[0] == 0
        assert run(capsys, "clear", model_dir, "--dry-run")[0] == 0


def test_metadata_of_a_later_form_fails_every_command_that_would_judge_it(
    capsys: pytest.CaptureFixture[str], model_dir: Path, dataset: Path
) -> None:
    (model_dir / ".dataset_metadata.json").write_text('{"schema_version": 3}')
    for arguments in (
        ["check", model_dir, "--dataset", dataset],
        ["clear", model_dir],
        ["seal", model_dir / "checkpoint-10"],
    ):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert "schema_version is 3" in err


def test_it_runs_as_a_module_and_survives_a_reader_that_left(model_dir: Path) -> None:
    command = [sys.executable, "-m", "guard", "verify", str(model_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "intact" in done.stdout
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    broken = subprocess.run(command, stdout=write_fd, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write_fd)
    assert broken.returncode == 1
    assert broken.stderr == ""
