"""A team on one machine: who drops, who operates the queue, who administers the service; what each types and reads."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.root import wait_until
from tests.system.machine import HOME, Machine, Service, as_toml
from tests.system.test_service import PYTHON, ROOT, TABLES, behave, configure, service

__all__ = ["service"]  # the fixture
DROPFORGE = f"{HOME}/.venv/bin/dropforge"


class Team:
    """The people, by what they type on the service's root."""

    def __init__(self, service: Service) -> None:
        self.machine = service.machine

    def _types(self, user: str, line: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run(DROPFORGE, "--root", ROOT, *line.split(), user=user, check=False)

    def alice(self, line: str) -> subprocess.CompletedProcess[str]:
        """A member of the group, who drops."""
        return self._types("alice", line)

    def operator(self, line: str) -> subprocess.CompletedProcess[str]:
        """Who may become the service's account."""
        return self._types("dropforge", line)

    def root(self, line: str) -> subprocess.CompletedProcess[str]:
        """Who administers the machine."""
        return self._types("", line)


@pytest.fixture
def team(service: Service) -> Team:
    service.systemctl("start")
    return Team(service)


def liveness(done: subprocess.CompletedProcess[str]) -> str:
    return str(json.loads(done.stdout)["liveness"])


def test_a_dropper_an_operator_and_an_administrator(service: Service, team: Team) -> None:
    machine = service.machine
    machine.write("/home/alice/mine.jsonl", '{"text": "mine"}\n')
    assert team.alice("submit /home/alice/mine.jsonl --no-check").returncode == 0
    service.wait_for("mine.jsonl", "succeeded")
    assert "mine.jsonl" in team.alice("jobs").stdout
    assert liveness(team.alice("status --json")) == "alive"
    # A container's own boot_id over the kernel's, as systemd-nspawn mounts one: the lock that the daemon holds tells.
    elsewhere = machine.shell(
        "echo 00000000-0000-4000-8000-000000000000 > /run/boot_id; unshare --mount sh -euc"
        " 'mount --bind /run/boot_id /proc/sys/kernel/random/boot_id;"
        f" exec runuser -u alice -- {DROPFORGE} --root {ROOT} status --json'"
    )
    assert json.loads(elsewhere)["boot_id"] != "00000000-0000-4000-8000-000000000000"
    assert json.loads(elsewhere)["liveness"] == "alive"

    refused = team.alice("pause")
    assert refused.returncode == 2
    assert "it belongs to dropforge, and alice may read and drop files, and no more" in refused.stderr
    assert f"`sudo -u dropforge dropforge --root {ROOT} ...`" in refused.stderr
    assert team.root("pause").returncode == 2
    assert team.operator("pause").returncode == 0
    wait_until(lambda: "paused by a person" in team.alice("status").stdout, what="what alice reads")
    assert team.operator("resume").returncode == 0
    held = team.operator("run")
    assert held.returncode == 5
    assert f"process {service.main_pid()} on" in held.stderr

    service.systemctl("stop")
    assert "mine.jsonl" in team.alice("jobs").stdout  # without a daemon, and without a right to write beside the store
    said = team.alice("submit /home/alice/mine.jsonl --no-check --force").stdout
    assert f"`sudo -u dropforge dropforge --root {ROOT} run`" in said


def test_the_administrator_is_told_at_the_reload_what_a_restart_would_meet(service: Service, team: Team) -> None:
    machine = service.machine
    machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "lora": {"r": 0}}))
    assert service.systemctl("reload", check=False).returncode != 0
    wait_until(lambda: "[lora] r is at least 1" in str((service.status() or {}).get("warnings")), what="the fault")
    machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "metrics": {"port": 9101}}))
    service.systemctl("reload")
    wait_until(lambda: "cannot open [metrics] port 9101" in str((service.status() or {}).get("warnings")), what="why")
    assert "`dropforge service install` adds the drop-in metrics.conf" in str((service.status() or {})["warnings"])
    machine.write(f"{ROOT}/dropforge.toml", as_toml(TABLES))
    service.systemctl("reload")
    wait_until(lambda: not (service.status() or {"warnings": 1})["warnings"], what="no warning")
    # Half of the drop-in: the port can be opened, in a network that nobody else is in.
    configure(service, "RestrictAddressFamilies=AF_INET")
    service.systemctl("restart")
    machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "metrics": {"port": 9101}}))
    service.systemctl("reload")
    wait_until(
        lambda: "nobody can reach [metrics] port 9101" in str((service.status() or {}).get("warnings")), what="it"
    )
    machine.write(f"{ROOT}/dropforge.toml", as_toml(TABLES))
    configure(service)

    # A restart in mid-run is no attempt.
    behave(service, step_seconds=0.02)
    service.drop("long.jsonl", 300)
    service.training_step(12)
    service.systemctl("restart")
    behave(service)
    service.wait_for("long.jsonl", "succeeded")
    (ended,) = (event for event in service.log() if event["event"] == "job.succeeded")
    assert (ended["attempt"], ended["start_step"] >= 10) == (1, True)


PEOPLE = """
import http.server

class People(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        with open("/run/notices", "ab") as file:
            file.write(self.rfile.read(int(self.headers["Content-Length"])) + b"\\n")
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", 8090), People).serve_forever()
"""


def test_a_notice_leaves_the_unit_by_its_drop_in_alone(service: Service) -> None:
    """Without it the status names it; with it, what could not be sent before arrives as well."""
    pytest.importorskip("apprise", reason="apprise (extra notify) is not installed")
    machine = service.machine
    machine.write("/run/people.py", PEOPLE)
    notify = {"urls": ["json://127.0.0.1:8090"], "summary_seconds": 0.2}
    machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "notify": notify}))
    environment = [f"--setenv={key}={value}" for key, value in machine.python_environment.items()]
    machine.run("systemd-run", "--unit=people", *environment, PYTHON, "/run/people.py")
    try:
        service.systemctl("start")
        service.drop("bad.jsonl", 0)
        wait_until(
            lambda: "adds the drop-in notices.conf" in str((service.status() or {}).get("warnings")), what="the warning"
        )
        machine.shell(
            f"cp {HOME}/systemd/drop-ins/notices.conf /etc/systemd/system/dropforge.service.d/; systemctl daemon-reload"
        )
        service.systemctl("restart")
        service.drop("worse.jsonl", 0)
        taken = machine.path("/run/notices")
        wait_until(
            lambda: taken.exists() and {"bad.jsonl", "worse.jsonl"} <= set(taken.read_text().replace(":", " ").split()),
            what="the notices",
        )
    finally:
        machine.shell("systemctl stop people; rm -f /run/notices")


def test_jobs_wait_under_the_unit_while_somebody_is_logged_in(service: Service) -> None:
    """Told by what systemd-logind writes down, which the unit's protections leave open; without it nothing starts."""
    machine = service.machine
    machine.write(f"{ROOT}/dropforge.toml", as_toml({**TABLES, "schedule": {"nobody_logged_in": True}}))
    machine.shell("rm -rf /run/systemd/sessions")
    service.systemctl("start")
    service.drop("a.jsonl", 3)

    def waits(words: str) -> None:
        wait_until(lambda: words in (service.status() or {"reason": ""})["reason"], what=words)

    waits("systemd-logind does not run here")
    alice = machine.run("id", "-u", "alice").stdout.strip()
    session = f"UID={alice}\\nUSER=alice\\nACTIVE=1\\nSTATE=active\\nREMOTE=0\\nTYPE=tty\\nCLASS=user\\n"
    machine.shell(f"mkdir /run/systemd/sessions; printf '{session}' > /run/systemd/sessions/1")
    waits("alice is logged in")
    assert service.jobs()["a.jsonl"] == "queued"
    machine.shell("rm /run/systemd/sessions/1")
    service.wait_for("a.jsonl", "succeeded")


def test_an_interpreter_in_a_closed_home_is_refused_before_anything_is_written(machine: Machine) -> None:
    """What would end in 203/EXEC; the folder that is closed is named, and what to do."""
    unit = "/etc/systemd/system/dropforge.service"
    try:
        machine.shell(
            f"getent passwd bob >/dev/null || useradd --create-home bob; chmod 0700 /home/bob; rm -f {unit};"
            f" cp -a {HOME}/.venv /home/bob/venv"
        )
        command = ("/home/bob/venv/bin/python", "-P", "-m", "daemon", "--root", ROOT, "service", "install")
        refused = machine.run(*command, check=False)
        assert refused.returncode == 2, refused
        assert "dropforge cannot run /home/bob/venv/bin/python: /home/bob is closed to it" in refused.stderr
        assert "python3 -m venv /opt/dropforge/.venv" in refused.stderr
        assert not machine.path(unit).exists()
        machine.shell("chmod 0755 /home/bob")
        machine.run(*command)
        assert "ProtectHome=read-only" in machine.path(unit).read_text()
    finally:
        machine.shell(f"rm -rf /home/bob/venv {unit} {unit}.d")
