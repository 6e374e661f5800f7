"""The first hour as docs/operations.md tells it: its own commands, on a clean machine, with the real trainer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.documents import OPERATIONS, README, commands_of
from tests.support.root import wait_until
from tests.system.machine import HOME, Machine, Service

ROOT = "/var/lib/dropforge"
OLDER_STORE = HOME / "tests" / "data" / "queue-v1.sqlite3"


@pytest.fixture
def clean(machine: Machine) -> Iterator[Machine]:
    """A machine without account, unit or root."""
    erase = f"""
        systemctl stop dropforge.service 2>/dev/null || true
        rm -rf {ROOT} /var/log/dropforge /run/dropforge /etc/systemd/system/dropforge.service*
        systemctl daemon-reload
        userdel dropforge 2>/dev/null || true
        groupdel dropforge 2>/dev/null || true
        getent passwd alice >/dev/null || useradd --create-home alice
        """
    machine.shell(f"{erase} cp -a {HOME}/.venv /opt/venv")
    yield machine
    machine.shell(f"{erase} rm -rf {HOME}/.venv; mv /opt/venv {HOME}/.venv")


@pytest.mark.chaos  # it trains with the real trainer, and upgrades: a minute and more
def test_the_first_hour_as_the_document_tells_it(clean: Machine) -> None:
    """Account, init, doctor, service install, drop, watch, stop, start, upgrade, uninstall - and what was made stays.

    All of it with the wheel that `pip install` made, so that a file that is missing from it is missed here.
    """
    service = Service(clean)
    clean.write(
        "/etc/systemd/system/dropforge.service.d/50-test.conf",
        f"[Service]\n{clean.unit_environment} OMP_NUM_THREADS=1"
        " DROPFORGE_TRAINING__MAX_STEPS=6 DROPFORGE_DATA__MAX_LENGTH=96 DROPFORGE_DATA__HELD_OUT_MAX_ROWS=16\n",
    )
    imported = clean.run(
        f"{HOME}/.venv/bin/python", "-P", "-c", "import daemon, guard; print(daemon.__file__, guard.__file__)"
    )
    assert imported.stdout.count(f"{HOME}/.venv/lib/") == 2
    account, init, install, drop, watch, stop = commands_of(OPERATIONS, "First hour")
    clean.shell(account)
    told = clean.shell(init)
    assert "fail" not in told.split("initialised")[-1].split()
    printed = clean.shell(install)
    assert "wrote /etc/systemd/system/dropforge.service" in printed
    unit = clean.path("/etc/systemd/system/dropforge.service").read_text()
    assert f"ExecStart={HOME}/.venv/bin/python -P -m daemon --root {ROOT} run" in unit
    assert clean.run("systemd-analyze", "verify", "/etc/systemd/system/dropforge.service").stderr == ""
    clean.shell(drop)
    service.wait_for("monday.jsonl", "succeeded", timeout=240)
    (ended,) = (event for event in service.log() if event["event"] == "job.succeeded")
    assert ended["steps_run"] == ended["steps_planned"] == 6
    assert ended["held_out_after"] < ended["held_out_before"]
    seen = clean.shell(watch)
    assert "monday.jsonl" in seen
    assert "0001" in seen
    assert "job.succeeded" in seen
    clean.shell(stop)
    assert service.value("ActiveState") == "active"

    (upgrade,) = commands_of(OPERATIONS, "Upgrade")
    service.systemctl("stop")
    clean.shell(
        f"rm {ROOT}/state/queue.sqlite3*; install -o dropforge -g dropforge {OLDER_STORE} {ROOT}/state/queue.sqlite3"
    )
    clean.shell(upgrade)
    wait_until(lambda: (service.status() or {}).get("queue", {}).get("rejected") == 1, what="the older state")
    assert "0.jsonl" in clean.shell(f"{HOME}/.venv/bin/dropforge --root {ROOT} jobs")

    (uninstall,) = commands_of(OPERATIONS, "Uninstall")
    clean.shell(uninstall)
    assert service.value("LoadState") == "not-found"
    assert clean.path(f"{ROOT}/current_model/versions/0001/adapter_model.safetensors").is_file()


def test_the_commands_that_service_install_prints(clean: Machine) -> None:
    """As the README has it: one command, and then what it printed, word for word but for the editor and the name."""
    service = Service(clean)
    (install,) = commands_of(README, "As a service")
    printed = clean.shell(install).partition("next:\n")[2].splitlines()
    assert [line.split()[0] for line in printed] == [
        "getent", "install", "install", "runuser", "editor", "runuser", "systemd-tmpfiles", "systemctl", "systemctl",
        "systemctl", "usermod",
    ]  # fmt: skip
    service.configure(f"[Service]\n{clean.unit_environment}\n")
    for line in printed:
        command = line.partition("#")[0].strip().replace("ALICE", "alice")
        if "editor" in command:  # what a person does there
            command = f"""sed -i 's|^# model_name_or_path = .*|model_name_or_path = "base"|' {ROOT}/dropforge.toml"""
        is_doctor = command.endswith("doctor")  # it misses the model
        done = clean.run("sh", "-euc", command, check=not is_doctor)
        assert done.returncode == (1 if is_doctor else 0)
    assert service.value("ActiveState") == "active"
    service.drop("by alice.jsonl", 0, user="alice")
    service.wait_for("by alice.jsonl", "rejected")


def test_a_user_s_own_service(clean: Machine) -> None:
    """`service install --user`: the printed commands, under alice's own systemd."""
    uid = clean.run("id", "-u", "alice").stdout.strip()
    clean.shell(f"install -d -o alice -m 0700 /run/user/{uid}; mkdir -p /home/alice; chown alice: /home/alice")
    clean.run(
        "systemd-run", "--unit=alice-manager", "--uid=alice", "--property=Delegate=yes", "--property=PAMName=",
        f"--setenv=XDG_RUNTIME_DIR=/run/user/{uid}", "--setenv=HOME=/home/alice",
        *(f"--setenv={key}={value}" for key, value in clean.python_environment.items()), "/lib/systemd/systemd", "--user",
    )  # fmt: skip
    environment = {"XDG_RUNTIME_DIR": f"/run/user/{uid}", "HOME": "/home/alice"}
    try:
        wait_until(
            lambda: clean.run(
                "systemctl", "--user", "is-active", "basic.target", user="alice", env=environment, check=False
            ).returncode == 0,
            what="alice's manager",
        )  # fmt: skip
        dropforge = [f"{HOME}/.venv/bin/dropforge", "--root", "/home/alice/forge"]
        clean.run(*dropforge, "init", user="alice", env=environment)
        printed = clean.run(*dropforge, "service", "install", "--user", user="alice", env=environment).stdout
        commands = [line.strip() for line in printed.splitlines() if line.startswith("  systemctl --user")]
        assert len(commands) == 3
        for command in commands:
            clean.run("sh", "-c", command, user="alice", env=environment)
        status = clean.run(*dropforge, "status", "--json", user="alice", env=environment)
        assert '"liveness": "alive"' in status.stdout
        clean.run("systemctl", "--user", "stop", "dropforge", user="alice", env=environment)
    finally:
        clean.shell("systemctl stop alice-manager.service || true")
