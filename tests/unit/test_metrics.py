"""Metrics: what Prometheus reads is what status and log say, on loopback and in a file."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from daemon.config import MetricsSettings
from daemon.job import Job, JobState, Progress
from daemon.observability.metrics import Metrics, MetricsPublisher
from daemon.observability.status import StatusSnapshot, running_job
from tests.support.inbox import Record
from tests.support.root import REPOSITORY

SNAPSHOT = StatusSnapshot(
    status="training",
    reason="",
    queue={"queued": 3, "running": 1},
    job=running_job(
        Job(id="j", name="a.jsonl", state=JobState.RUNNING, attempt=1),
        Progress(phase="training", step=5, total_steps=9, loss=1.5),
    ),
    model={"version": "0007", "dataset": "d", "created_at": None},
    gpu=({"name": "G", "used_bytes": 5, "total_bytes": 10, "utilization": None},),
    verification={"at": "2026-11-25T10:00:00.000Z", "versions": 3, "datasets": 3, "problems": 2},
    memory={
        "datasets": 2,
        "kept_rows": 70,
        "held_out_rows": 40,
        "used_bytes": 9000,
        "max_bytes": 10_000,
        "problems": 1,
    },
    warnings=("w",),
)


def values(text: str) -> dict[str, float]:
    """`name{label="value"}` to value, as Prometheus' own reader has it."""
    return {
        sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def told(metrics: Metrics) -> dict[str, float]:
    port = metrics.serve(0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return values(answer.read().decode())


def test_the_endpoint_tells_the_snapshot_and_the_log_s_events() -> None:
    metrics = Metrics()
    metrics.observe(SNAPSHOT, overflows=2, waited_seconds=12.0)
    metrics.observe(SNAPSHOT, overflows=2, waited_seconds=12.0)
    replayed = [{"name": "a.jsonl", "tokens": 30}, {"name": "b.jsonl", "tokens": 12}]
    metrics.count(
        "job.succeeded",
        {"was": "running", "steps_run": 90, "start_step": 40, "tokens_trained": 1000, "replayed": replayed},
    )
    # A person cancelled it after an attempt that was counted when it ended.
    metrics.count("job.cancelled", {"was": "queued", "steps_run": 7, "start_step": 0, "tokens_trained": 70})
    metrics.count("job.failed", {"failure": "diverged"})
    metrics.count("dataset.checked", {"size_bytes": 77})
    metrics.count("queue.held", {"kind": "no_space"})
    metrics.count("something.else", {"steps_run": "odd"})
    found = told(metrics)
    expected = {
        "dropforge_jobs{state=queued}": 3,
        "dropforge_replayed_tokens_total": 42,
        "dropforge_status{status=training}": 1,
        "dropforge_status{status=idle}": 0,
        "dropforge_job_step": 5,
        "dropforge_job_loss": 1.5,
        "dropforge_current_version": 7,
        "dropforge_gpu_memory_used_bytes{gpu=0}": 5,
        "dropforge_watcher_overflows": 2,
        "dropforge_warnings": 1,
        "dropforge_memory_datasets": 2,
        "dropforge_memory_rows": 70,
        "dropforge_memory_held_out_rows": 40,
        "dropforge_memory_used_bytes": 9000,
        "dropforge_memory_max_bytes": 10_000,
        "dropforge_memory_problems": 1,
        "dropforge_verification_problems": 2,
        "dropforge_verified_timestamp_seconds": 1_795_600_800,
        "dropforge_steps_trained_total": 50,
        "dropforge_tokens_trained_total": 1000,
        "dropforge_dataset_bytes_checked_total": 77,
        "dropforge_attempts_finished_total{failure=none}{outcome=succeeded}": 1,
        "dropforge_attempts_finished_total{failure=diverged}{outcome=failed}": 1,
        "dropforge_queue_holds_total{kind=no_space}": 1,
        "dropforge_job_seconds_to_start_count": 1,
        "dropforge_job_seconds_to_start_sum": 12,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["dropforge_heartbeat_timestamp_seconds"] > 1.7e9
    metrics.observe(StatusSnapshot(status="idle", reason=""), overflows=2, waited_seconds=None)
    assert "dropforge_job_step" not in told(metrics)  # a job that is over leaves no number behind


def test_the_file_is_what_the_endpoint_says_and_replaced_whole(tmp_path: Path) -> None:
    log = Record()
    reporter = MetricsPublisher(Metrics(), MetricsSettings(textfile=Path("dropforge.prom")), tmp_path, log)
    reporter.publish(SNAPSHOT, overflows=0, waited_seconds=None)
    assert values((tmp_path / "dropforge.prom").read_text())["dropforge_job_step"] == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["dropforge.prom"]


def test_a_place_that_cannot_be_reached_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    log = Record()
    first = Metrics()
    port = first.serve(0)
    reporter = MetricsPublisher(
        Metrics(), MetricsSettings(port=port, textfile=Path("none/dropforge.prom")), tmp_path, log
    )
    for _ in range(3):
        reporter.publish(SNAPSHOT, overflows=0, waited_seconds=None)
    assert len(log.events("metrics.not_served")) == 1
    assert len(log.events("metrics.not_written")) == 1


def names_that_exist() -> set[str]:
    metrics = Metrics()
    metrics.observe(SNAPSHOT, overflows=0, waited_seconds=1.0)
    families: Any = metrics.registry.collect()
    names = {sample.name for family in families for sample in family.samples}
    job = {f"dropforge_job_{key}" for key in ("learning_rate", "tokens_per_second", "eta_seconds")}
    labelled = {f"dropforge_{name}_total" for name in ("attempts_finished", "queue_holds")}
    return names | job | labelled


@pytest.mark.parametrize("name", ["alerts.yml", "grafana.json"])
def test_the_examples_name_metrics_that_exist(name: str) -> None:
    text = (REPOSITORY / "docs" / name).read_text()
    document: Any = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    rules = document["panels"] if "panels" in document else document["groups"][0]["rules"]
    expressions = [target["expr"] for rule in rules for target in rule.get("targets", [rule])]
    named = {word for expression in expressions for word in re.findall(r"\bdropforge_\w+", expression)}
    assert len(expressions) >= 5
    assert named <= names_that_exist()
