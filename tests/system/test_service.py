"""The service under a real systemd: started, watched over, killed, stopped, with the hardened unit as it is shipped."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.documents import OPERATIONS, commands_of
from tests.support.root import wait_until
from tests.system.machine import HOME, Machine, Service, as_toml

ROOT = "/var/lib/dropforge"
PYTHON = f"{HOME}/.venv/bin/python"
FAKE = (PYTHON, "-P", f"{HOME}/tests/support/fake_trainer.py", f"{ROOT}/behaviour.json")
TABLES: dict[str, dict[str, Any]] = {
    "model": {"model_name_or_path": "base"},
    "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_steps": 10},
    "inbox": {"settle_seconds": 0.1, "rescan_seconds": 0.5},
    "queue": {"retry_seconds": 0.1, "stop_timeout": 20.0},
    "status": {"status_interval": 0.2},
    "executor": {"command": FAKE},
}


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    """The shipped unit over a new root with the quick trainer; the unit differs in its environment alone."""
    found = Service(machine)
    machine.shell(
        f"""
        systemctl stop dropforge.service 2>/dev/null || true
        rm -rf {ROOT} /var/log/dropforge /etc/systemd/system/dropforge.service.d
        cp {HOME}/systemd/dropforge.service /etc/systemd/system/
        getent passwd dropforge >/dev/null || useradd --system --user-group --home-dir {ROOT} dropforge
        getent passwd alice >/dev/null || useradd --create-home alice
        usermod --append --groups dropforge alice
        install -d -o dropforge -g dropforge -m 0750 {ROOT} {ROOT}/base
        install -d -o dropforge -g dropforge -m 3770 {ROOT}/inbox {ROOT}/inbox/high {ROOT}/inbox/low
        echo '{{}}' | tee {ROOT}/base/config.json > {ROOT}/base/tokenizer.json
        echo weights > {ROOT}/base/model.safetensors
        """
    )
    machine.write(f"{ROOT}/dropforge.toml", as_toml(TABLES))
    behave(found)
    configure(found)
    yield found
    machine.shell("systemctl stop dropforge.service || true; systemctl reset-failed dropforge.service || true")


def configure(service: Service, *lines: str) -> None:
    """The environment of the checkout, and what a test sets besides."""
    service.configure("\n".join(["[Service]", service.machine.unit_environment, "RestartSec=100ms", *lines, ""]))


def behave(service: Service, **behaviour: Any) -> None:
    service.machine.write(f"{ROOT}/behaviour.json", json.dumps({"*": behaviour}))


def test_it_is_active_only_when_it_watches_and_a_group_member_s_file_is_trained(service: Service) -> None:
    service.systemctl("start")
    status = service.status()
    assert status is not None
    assert status["status"] != "starting"  # `start` returned, so READY=1 had come: recovery is done
    assert service.log()[0]["event"] == "daemon.started"
    assert service.show("ActiveState", "User", "NRestarts") == {
        "ActiveState": "active", "User": "dropforge", "NRestarts": "0",
    }  # fmt: skip
    service.drop("a.jsonl", 20, user="alice")
    service.wait_for("a.jsonl", "succeeded")
    wait_until(lambda: service.value("StatusText") == "idle", what="STATUS=")
    # What was dropped belongs to the daemon's folders now, and a dropper cannot reach it there.
    for what in (f"{ROOT}/inbox/processing", f"{ROOT}/inbox/done", f"{ROOT}/current_model/latest"):
        assert service.machine.run("mv", what, f"{ROOT}/inbox/mine", user="alice", check=False).returncode != 0
    assert service.machine.run("cat", f"{ROOT}/state/status.json", user="alice").stdout


def test_a_loop_that_hangs_is_ended_by_the_watchdog_and_its_job_resumes(service: Service) -> None:
    behave(service, step_seconds=0.02)
    configure(service, "WatchdogSec=2")
    service.systemctl("start")
    service.drop("a.jsonl", 400)
    service.training_step(15)
    before = service.main_pid()
    service.signal_main(signal.SIGSTOP)
    wait_until(lambda: service.main_pid() not in (0, before), 60, "a new daemon")
    behave(service)
    service.wait_for("a.jsonl", "succeeded")
    assert service.show("NRestarts", "ActiveState") == {"NRestarts": "1", "ActiveState": "active"}
    ended = next(event for event in service.log() if event["event"] == "job.succeeded")
    assert ended["start_step"] >= 10
    assert ended["steps_run"] == 400
    assert "watchdog timeout" in service.journal_text().lower()


def test_a_tick_is_heard_more_often_than_the_watchdog_asks_for(service: Service) -> None:
    """Also when heartbeats of the status file are rare: what keeps the service alive is not how often people look."""
    service.machine.write(
        f"{ROOT}/dropforge.toml",
        as_toml({**TABLES, "status": {"status_interval": 60.0}, "inbox": {"rescan_seconds": 60.0}}),
    )
    configure(service, "WatchdogSec=1")
    service.systemctl("start")
    begun = int(service.value("WatchdogTimestampMonotonic"))
    wait_until(
        lambda: int(service.value("WatchdogTimestampMonotonic")) > begun + 3_000_000, what="three seconds of heartbeats"
    )
    # Nor does a checkpoint that takes four times as long as the watchdog waits hold it up.
    behave(service, step_seconds=0.02, seal_seconds=4)
    service.drop("a.jsonl", 300)
    wait_until(lambda: any(event["event"] == "run.started" for event in service.log()), what="the first step")
    service.machine.run(f"{HOME}/.venv/bin/dropforge", "--root", ROOT, "pause", user="dropforge")
    service.wait_for("a.jsonl", "queued")
    assert any(event["event"] == "checkpoint.sealed" for event in service.log())
    assert service.value("NRestarts") == "0"


def test_kill_9_is_followed_by_a_daemon_that_finishes_the_job(service: Service) -> None:
    behave(service, step_seconds=0.02)
    service.systemctl("start")
    service.drop("a.jsonl", 300)
    service.training_step(15)
    service.signal_main(signal.SIGKILL)
    wait_until(lambda: service.value("NRestarts") == "1", what="a restart")
    behave(service)
    service.wait_for("a.jsonl", "succeeded")
    assert service.value("ActiveState") == "active"


def test_stop_in_mid_training_seals_a_checkpoint_and_leaves_no_process(service: Service) -> None:
    """Also when sealing takes longer than TimeoutStopSec: the daemon asks for more time while it waits."""
    behave(service, step_seconds=0.02, seal_seconds=3)
    configure(service, "TimeoutStopSec=1500ms")
    service.systemctl("start")
    service.drop("a.jsonl", 300)
    service.training_step(5)
    assert len(service.processes()) >= 2
    service.systemctl("stop")
    assert service.show("ActiveState", "Result", "ExecMainStatus") == {
        "ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0",
    }  # fmt: skip
    assert service.processes() == []
    assert service.jobs()["a.jsonl"] == "queued"
    last = [event["event"] for event in service.log()]
    assert last[-1] == "daemon.stopped"
    assert "checkpoint.sealed" in last[last.index("daemon.stopping") :]
    assert "trainer.ended" not in last  # it left by itself
    behave(service)
    service.systemctl("start")
    service.wait_for("a.jsonl", "succeeded")
    assert service.log()[-1]["start_step"] > 0 or any(
        event.get("start_step", 0) > 0 for event in service.log() if event["event"] == "job.succeeded"
    )


def test_reload_opens_the_log_again_and_nothing_is_interrupted(service: Service) -> None:
    service.systemctl("start")
    pid = service.main_pid()
    log = "/var/log/dropforge/dropforge.jsonl"
    service.machine.run("mv", log, f"{log}.old")
    service.systemctl("reload")
    wait_until(lambda: any(event["event"] == "daemon.reloaded" for event in service.log()), what="the new log")
    wait_until(lambda: service.value("SubState") == "running", what="the reload to end")
    assert service.main_pid() == pid
    service.drop("a.jsonl", 5)
    service.wait_for("a.jsonl", "succeeded")


def test_a_reload_of_settings_with_a_fault_fails_and_the_daemon_goes_on(service: Service) -> None:
    """Who reloads is told at once; the daemon stays the same one, and takes the mended file."""
    service.systemctl("start")
    pid = service.main_pid()
    service.machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "lora": {"r": 0}}))
    assert service.systemctl("reload", check=False).returncode != 0
    wait_until(lambda: service.value("SubState") == "running", what="the reload to end")
    assert "[lora] r is at least 1" in service.journal_text()
    assert any(event["event"] == "daemon.not_reloaded" for event in service.log())
    service.machine.write(f"{ROOT}/dropforge.toml", as_toml(TABLES))
    service.systemctl("reload")
    wait_until(lambda: any(event["event"] == "daemon.reloaded" for event in service.log()), what="the reload")
    assert service.main_pid() == pid


@pytest.mark.skipif(shutil.which("logrotate") is None, reason="logrotate is not installed (Debian package: logrotate)")
def test_logrotate_rotates_as_the_document_tells_it_and_no_line_is_lost(service: Service) -> None:
    service.machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "logging": {"max_bytes": 0}}))
    (rules,) = commands_of(OPERATIONS, "Logs", "logrotate")
    service.machine.write("/etc/logrotate.d/dropforge", rules + "\n")
    service.systemctl("start")
    service.drop("a.jsonl", 5)
    service.wait_for("a.jsonl", "succeeded")
    service.machine.run("logrotate", "--force", "/etc/logrotate.d/dropforge")
    wait_until(lambda: any(event["event"] == "daemon.reloaded" for event in service.log()), what="the new log")
    service.drop("b.jsonl", 5)
    wait_until(lambda: any(event["event"] == "job.succeeded" for event in service.log()), what="the second job")
    told = service.machine.run(f"{HOME}/.venv/bin/dropforge", "--root", ROOT, "logs", "--json", "-n", "1000").stdout
    assert told.count('"job.succeeded"') == 2
    assert told.count('"daemon.started"') == 1


def test_the_journal_has_priority_and_fields_and_drops_nothing(service: Service) -> None:
    service.systemctl("start")
    service.drop("häßlich\n[31m x=1.jsonl".replace("/", "_"), 5)
    wait_until(lambda: "succeeded" in service.jobs().values(), what="the job")
    service.drop("bad.jsonl", 0)
    service.wait_for("bad.jsonl", "rejected")
    wait_until(lambda: service.journal("DROPFORGE_EVENT=job.rejected"), what="the journal")
    (entry,) = service.journal("DROPFORGE_EVENT=job.succeeded")
    logged = next(event for event in service.log() if event["event"] == "job.succeeded")
    assert entry["DROPFORGE_JOB"] == logged["job"]
    assert entry["DROPFORGE_STEPS_RUN"] == "5"
    assert entry["SYSLOG_IDENTIFIER"] == "dropforge"
    assert (entry["PRIORITY"], entry["_SYSTEMD_UNIT"]) == ("6", "dropforge.service")
    assert "\n" not in entry["MESSAGE"]
    assert "\x1b" not in entry["MESSAGE"]
    (rejected,) = service.journal("DROPFORGE_EVENT=job.rejected")
    assert rejected["PRIORITY"] == "4"
    written = [event["event"] for event in service.log()]
    told = [entry["DROPFORGE_EVENT"] for entry in service.journal() if "DROPFORGE_EVENT" in entry]
    assert told == written


def test_a_wrong_configuration_is_told_once_and_not_tried_again(service: Service) -> None:
    service.machine.write(f"{ROOT}/dropforge.toml", "[training]\nlearning_rat = 1\n")
    service.systemctl("start", check=False)
    wait_until(lambda: service.value("ActiveState") == "failed", what="the service to give up")
    assert service.show("NRestarts", "ExecMainStatus") == {"NRestarts": "0", "ExecMainStatus": "2"}
    assert "unknown key [training] learning_rat" in service.journal_text()


def test_two_instances_train_one_at_a_time(machine: Machine, service: Service) -> None:
    """dropforge@a and dropforge@b share a lock; the one that waits says for whom."""
    machine.run("cp", f"{HOME}/systemd/dropforge@.service", "/etc/systemd/system/")
    machine.shell(
        f"cp {HOME}/systemd/tmpfiles.d/dropforge.conf /etc/tmpfiles.d/; systemd-tmpfiles --create dropforge.conf"
    )
    instances = []
    for name in ("a", "b"):
        root = f"/var/lib/dropforge-{name}"
        machine.shell(f"rm -rf {root}; cp -a {ROOT} {root}")
        machine.write(f"{root}/behaviour.json", json.dumps({"*": {"step_seconds": 0.02}}))
        tables = {**TABLES, "executor": {"command": (*FAKE[:-1], f"{root}/behaviour.json")}}
        machine.write(f"{root}/dropforge.toml", as_toml(tables))
        instance = Service(machine, f"dropforge@{name}.service", root)
        configure(instance)
        instances.append(instance)
    a, b = instances
    try:
        a.systemctl("start")
        b.systemctl("start")
        a.drop("a.jsonl", 120)
        a.training_step(3)
        b.drop("b.jsonl", 5)
        reason = wait_until(lambda: (b.status() or {})["reason"].startswith("the GPU") and (b.status() or {})["reason"])
        assert "/var/lib/dropforge-a" in reason
        assert b.jobs()["b.jsonl"] == "queued"
        a.wait_for("a.jsonl", "succeeded")
        b.wait_for("b.jsonl", "succeeded")
        # What the daemon of a tells comes after its trainer has let the lock go; the result's file before.
        [result] = machine.path("/var/lib/dropforge-a/state/runs").glob("*/result.json")
        end = datetime.fromtimestamp(result.stat().st_mtime, UTC)
        start = next(event["timestamp"] for event in b.log() if event["event"] == "job.started")
        assert end <= datetime.fromisoformat(start)
    finally:
        machine.shell("systemctl stop 'dropforge@*.service'")


def test_a_hardened_service_is_measured_as_such(machine: Machine) -> None:
    """Exposure of the shipped units, drop-ins included, in systemd's own measure (a tenth of what --threshold takes)."""
    for drop_ins, threshold in (
        ((), 5),
        (("nvidia",), 5),
        (("downloads",), 16),
        (("nvidia", "downloads", "metrics"), 16),
    ):
        for unit in ("dropforge.service", "dropforge@.service"):
            folder = f"/tmp/security-{time.monotonic_ns()}"
            name = unit.replace("@", "@x")
            machine.shell(f"mkdir -p {folder}/{name}.d; cp {HOME}/systemd/{unit} {folder}/{name}")
            for kind in drop_ins:
                machine.shell(f"cp {HOME}/systemd/drop-ins/{kind}.conf {folder}/{name}.d/")
            done = machine.run(
                "systemd-analyze",
                "security",
                "--offline=true",
                f"--threshold={threshold}",
                f"{folder}/{name}",
                check=False,
            )
            assert done.returncode == 0, f"{name} with {drop_ins}: {done.stdout[-200:]}"
