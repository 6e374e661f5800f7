"""What is kept is read again, on demand and in the background, and what is not as it was recorded is told."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import versions
from daemon.cli import doctor
from daemon.lineage import LINEAGE, read_lineage
from daemon.memory.store import ROWS_NAME, DatasetMeta, dataset_dir, memory_dir_of, write_memory
from daemon.verification import RESULT_NAME, verify
from guard.digest import digest_file
from tests.support.root import Root, children_of, wait_until

MakeRoot = Callable[..., Root]
SECONDS_AS_DAYS = 1 / 86_400


@pytest.fixture
def kept(make_root: MakeRoot) -> Root:
    """A root with two versions and their trained files, whose daemon has stopped."""
    root = make_root(behaviour={})
    for name in ("a", "b"):
        root.drop(f"{name}.jsonl", [{"text": f"{name} {number}"} for number in range(8)])
        assert root.run("run", "--once").returncode == 0
    return root


def version(root: Root, name: str) -> Path:
    return root.settings.model_dir / "versions" / name


def flip_last(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])


def damage_adapter(root: Root) -> None:
    flip_last(version(root, "0001") / "adapter_model.safetensors")


def damage_dataset(root: Root) -> None:
    [path] = root.settings.inbox_dir.glob("done/*/b.jsonl")
    flip_last(path)


def replace_base(root: Root) -> None:
    (root.path / "base" / "model.safetensors").write_bytes(b"heights")


def edit_record(root: Root) -> None:
    path = version(root, "0001") / versions.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "dataset": "another.jsonl"}))


def lose_file(root: Root) -> None:
    (version(root, "0002") / "adapter_config.json").unlink()


def edit_lineage(root: Root) -> None:
    path = root.settings.model_dir / LINEAGE
    path.write_text(path.read_text().replace('"a.jsonl"', '"z.jsonl"'))


def cut_lineage(root: Root) -> None:
    path = root.settings.model_dir / LINEAGE
    path.write_text(path.read_text().splitlines(keepends=True)[0])


def move_latest(root: Root) -> None:
    link = root.settings.model_dir / versions.LATEST
    link.unlink()
    link.symlink_to("versions/0001")


def lose_mark(root: Root) -> None:
    (root.settings.inbox_dir / ".dropforge-root.json").unlink()


def damage_memory(root: Root) -> None:
    meta = DatasetMeta(
        name="a.jsonl", digest="ab" * 32, job="j", trained_rows=1, trained_tokens=1, train_on="all", created_at="2026"
    )
    folder = dataset_dir(memory_dir_of(root.settings.state_dir), meta.digest)
    write_memory(folder, meta, rows=[b'{"digest": "1", "asks": ""}\n'])
    assert verify(root.settings).problems == ()
    flip_last(folder / ROWS_NAME)


DAMAGES = [
    (damage_memory, "is not as it was written"),
    (damage_adapter, "version 0001: adapter_model.safetensors is not the file that was promoted"),
    (damage_dataset, "b.jsonl is not the file that was trained"),
    (replace_base, "version 0002 was trained on another base model"),
    (edit_record, "version 0001: training_record.json says something else than lineage.jsonl"),
    (lose_file, "version 0002 lacks adapter_config.json"),
    (edit_lineage, "line 2 of lineage.jsonl does not follow from the line before it"),
    (cut_lineage, "version 0002 has no line in lineage.jsonl"),
    (move_latest, "`latest` leads to version 0001, and the lineage says 0002"),
    (lose_mark, "carries no mark of this root"),
]


@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_doctor_verify_tells_each_kind_of_damage_and_its_exit_code_says_so(
    kept: Root, damage: Callable[[Root], None], says: str
) -> None:
    sound = kept.run("doctor", "--verify")
    assert sound.returncode == 0, sound.stdout
    assert "2 versions and 2 trained files" in sound.stdout
    damage(kept)
    damaged = kept.run("doctor", "--verify", "--json")
    assert damaged.returncode == 1
    told: list[dict[str, Any]] = [
        finding for finding in json.loads(damaged.stdout)["findings"] if finding["name"] == "kept"
    ]
    assert {finding["verdict"] for finding in told} == {"fail"}
    assert any(says in finding["told"] for finding in told), told


def test_what_a_person_may_do_is_no_damage(kept: Root) -> None:
    """An old version and a trained file may be deleted, and the card may be edited."""
    shutil.rmtree(version(kept, "0001"))
    (version(kept, "0002") / versions.CARD).write_text("my own words")
    [path] = kept.settings.inbox_dir.glob("done/*/a.jsonl")
    path.unlink()
    found = verify(kept.settings)
    assert (found.problems, found.versions, found.datasets) == ((), 1, 1)


def test_a_line_that_a_crash_tore_is_no_damage(kept: Root) -> None:
    path = kept.settings.model_dir / LINEAGE
    path.write_text(path.read_text() + '{"event": "promo\n')
    assert verify(kept.settings).problems == ()
    kept.drop("c.jsonl", [{"text": f"c {number}"} for number in range(8)])
    assert kept.run("run", "--once").returncode == 0
    assert verify(kept.settings).problems == ()


def test_the_background_pass_tells_in_status_log_and_metrics_until_it_is_mended(kept: Root, tmp_path: Path) -> None:
    metrics = tmp_path / "dropforge.prom"
    kept.configure(guard={"verify_days": SECONDS_AS_DAYS / 2}, metrics={"textfile": str(metrics)})
    adapter = version(kept, "0001") / "adapter_model.safetensors"
    content = adapter.read_bytes()
    flip_last(adapter)
    kept.start()

    def told() -> list[str]:
        found = (kept.status() or {}).get("warnings", [])
        return [warning for warning in found if "is not the file that was promoted" in warning]

    [warning] = wait_until(told, what="a warning in the status")
    assert "`dropforge doctor --verify`" in warning
    assert kept.events("root.damaged")[0]["level"] == "error"
    wait_until(lambda: "dropforge_verification_problems 1.0" in metrics.read_text(), what="the metric")
    assert "is not the file that was promoted" in " ".join(kept.run("status").stdout.split())
    adapter.write_bytes(content)
    wait_until(lambda: not told(), what="the warning to go")
    status = kept.status() or {}
    assert status["verification"]["versions"] == 2
    assert status["verification"]["problems"] == 0
    assert kept.stop() == 0


def test_what_a_pass_found_is_known_after_a_restart(kept: Root) -> None:
    kept.configure(guard={"verify_days": SECONDS_AS_DAYS / 2})
    damage_dataset(kept)
    kept.start()
    wait_until(lambda: kept.events("root.damaged"), what="a pass")
    assert kept.stop() == 0
    kept.configure(guard={"verify_days": 7})
    kept.start()
    assert any("is not the file that was trained" in warning for warning in (kept.status() or {})["warnings"])
    assert kept.stop() == 0
    assert json.loads((kept.settings.state_dir / RESULT_NAME).read_text())["problems"]
    [told] = doctor.CHECKS["kept"](kept.settings)
    assert (told.verdict, "doctor --verify" in told.hint) == (doctor.Severity.WARN, True)


def test_the_pass_reads_behind_everybody_else_and_ends_with_the_daemon(kept: Root) -> None:
    """Nice 19, a quarter of the time, in a child that is gone when the daemon is."""
    large = version(kept, "0001") / "zz-large.bin"
    with large.open("wb") as file:
        file.truncate(2**31)  # read in no time, digested slowly
    line = read_lineage(kept.settings.model_dir).recorded()["0001"]
    files = {**line["files"], large.name: "0" * 64}
    path = kept.settings.model_dir / LINEAGE
    path.write_text(json.dumps({**line, "files": files}) + "\n")
    kept.configure(guard={"verify_days": SECONDS_AS_DAYS / 2})
    daemon = kept.start()

    def verifier() -> int:
        found = [pid for pid, command in children_of(daemon.pid) if "daemon.verification" in command]
        return found[0] if found and os.getpriority(os.PRIO_PROCESS, found[0]) == 19 else 0

    pid = wait_until(verifier, what="a child at nice 19")
    kept.kill()

    def has_ended() -> bool:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        return state in "ZX"  # nobody may have taken note of its end

    wait_until(has_ended, what="the child to end with its daemon")


def test_a_digest_that_is_in_no_hurry_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(5_000_000))
    assert digest_file(path, rest=0.5) == digest_file(path)


def test_zero_days_mean_never(kept: Root) -> None:
    kept.configure(guard={"verify_days": 0})
    damage_adapter(kept)
    kept.start()
    kept.drop("c.jsonl", [{"text": f"c {number}"} for number in range(8)])
    kept.finished("c.jsonl")
    assert kept.stop() == 0
    assert not (kept.settings.state_dir / RESULT_NAME).exists()
