"""Metrics for Prometheus: an endpoint on loopback, and a file for node_exporter's textfile collector.

Gauges are set from the status snapshot at each heartbeat; counters listen to the log's events, so that a job's end is
counted from the same line that people read. Without `[metrics]` nothing here is imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server, write_to_textfile
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from daemon.config import MetricsSettings
from daemon.job import JobState
from daemon.observability.endpoint import port_problem
from daemon.observability.status import STATES, StatusSnapshot

ADDRESS = "127.0.0.1"
# Waiting for a GPU takes from no time at all to days.
START_BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600, 7 * 24 * 3600)
_ENDS = ("job.succeeded", "job.failed", "job.cancelled", "job.rejected", "job.requeued")


class Metrics:
    """All metrics of one daemon. `observe` and `hear` are called by its one thread; the endpoint serves from another."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._snapshot = _Snapshot()
        self.registry.register(self._snapshot)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dropforge_{name}", text, labels, registry=self.registry)

        self._finished = counter(
            "attempts_finished", "Jobs, and attempts of jobs, that ended, by what became of them.", "outcome", "failure"
        )
        self._steps = counter("steps_trained", "Optimizer steps of attempts that ended.")
        self._tokens = counter("tokens_trained", "Tokens of attempts that ended, padding not counted.")
        self._replayed = counter(
            "replayed_tokens",
            "Tokens with a loss of earlier datasets' rows in runs that succeeded, those of one epoch.",
        )
        self._scanned = counter("dataset_bytes_checked", "Bytes of datasets that were read and found good.")
        self._promoted = counter("versions_promoted", "Adapters that became the current version.")
        self._holds = counter("queue_holds", "Times that the queue had to wait.", "kind")
        self._cleared = counter("checkpoints_cleared", "Checkpoints that were moved aside because they did not belong.")
        self._verdicts = counter("gate_verdicts", "Finished runs by what the gate says of them.", "verdict")
        self._evaluation_seconds = counter("evaluation_seconds", "Seconds that finished runs were scored for.")
        self._seconds_to_start = Histogram(
            "dropforge_job_seconds_to_start", "From a file's claim to its first attempt.", registry=self.registry,
            buckets=START_BUCKETS,
        )  # fmt: skip
        self._started: set[str] = set()

    def count(self, name: str, data: Mapping[str, Any]) -> None:
        """Count one event of the log."""
        if name in _ENDS:
            self._finished.labels(name.partition(".")[2], str(data.get("failure") or "none")).inc()
            if data.get("was") == JobState.RUNNING:  # else the numbers are those of an attempt that was counted
                self._steps.inc(max(0, _number(data.get("steps_run")) - _number(data.get("start_step"))))
                self._tokens.inc(max(0, _number(data.get("tokens_trained"))))
                if name == "job.succeeded":
                    self._replayed.inc(sum(max(0, _number(one.get("tokens"))) for one in data.get("replayed") or ()))
        elif name == "dataset.checked":
            self._scanned.inc(_number(data.get("size_bytes")))
        elif name == "version.promoted":
            self._promoted.inc()
        elif name == "run.gate_judged":
            self._verdicts.labels(str(data.get("verdict") or "unmeasured")).inc()
            self._evaluation_seconds.inc(max(0, _number(data.get("seconds"))))
        elif name == "queue.held":
            self._holds.labels(str(data.get("kind") or "gpu")).inc()
        elif name == "guard.checkpoints_cleared":
            self._cleared.inc(_number(data.get("cleared")))

    def observe(self, snapshot: StatusSnapshot, *, overflows: int, waited_seconds: float | None) -> None:
        """Take the daemon's present state. `waited_seconds`: how long the running job waited for its first attempt."""
        self._snapshot.take(snapshot, overflows)
        job = snapshot.job
        if job is not None and job["id"] not in self._started and job["attempt"] == 1 and waited_seconds is not None:
            self._started = {job["id"]}  # one job runs at a time
            self._seconds_to_start.observe(max(0.0, waited_seconds))

    def serve(self, port: int) -> int:
        """Open the endpoint on loopback; returns its port (another one when `port` is 0). Raises OSError."""
        self._server, self._thread = start_http_server(port, addr=ADDRESS, registry=self.registry)
        return int(self._server.server_port)

    def write(self, path: Path) -> None:
        """Replace the file by one rename. Raises OSError."""
        write_to_textfile(str(path), self.registry)


class _Snapshot(Collector):
    """Gauges that are made anew at each scrape, so that a finished job leaves no old numbers behind."""

    def __init__(self) -> None:
        self._latest: tuple[StatusSnapshot, int, float] | None = None  # replaced as a whole: another thread reads it

    def take(self, snapshot: StatusSnapshot, overflows: int) -> None:
        self._latest = (snapshot, overflows, time.time())

    def collect(self) -> list[GaugeMetricFamily]:
        """Return the gauges of the last snapshot."""
        if self._latest is None:
            return []
        snapshot, overflows, at = self._latest
        families = [
            _gauge("heartbeat_timestamp_seconds", "When the main loop last published its state.", at),
            _gauge("watcher_overflows", "Times that the kernel dropped inbox events since the start.", overflows),
            _gauge("warnings", "Warnings in the status file.", len(snapshot.warnings)),
            _labelled("jobs", "Jobs by state.", "state", dict(snapshot.queue)),
            _labelled(
                "status", "1 for what the daemon is doing.", "status", {name: float(name == snapshot.status) for name in STATES}
            ),
            _labelled("files", "Files in the inbox that are not taken.", "why",
                      {"waiting": len(snapshot.waiting), "left_alone": len(snapshot.left_alone)}),
        ]  # fmt: skip
        if snapshot.model is not None and snapshot.model["version"].isdecimal():
            families.append(_gauge("current_version", "Number of the current version.", int(snapshot.model["version"])))
        if (last := snapshot.verification) is not None:
            at = datetime.fromisoformat(last["at"]).timestamp()
            families.append(_gauge("verified_timestamp_seconds", "When all that is kept was last checked.", at))
            families.append(_gauge("verification_problems", "What that check found.", last["problems"]))
        families += _evaluation_gauges(snapshot)
        families += _memory_gauges(snapshot)
        job = snapshot.job
        if job is not None:
            for name, text, value in (
                ("job_step", "Step of the running job.", job["step"]),
                ("job_total_steps", "Steps that the running job will take.", job["total_steps"]),
                ("job_loss", "Loss of the running job's last step.", job["loss"]),
                ("job_learning_rate", "Learning rate of the running job.", job["learning_rate"]),
                ("job_tokens_per_second", "Tokens a second of the running job.", job["tokens_per_second"]),
                ("job_eta_seconds", "Seconds that the running job will still take.", job["eta_seconds"]),
            ):
                if value is not None:
                    families.append(_gauge(name, text, value))
        if snapshot.gpu:
            used = {str(number): device["used_bytes"] for number, device in enumerate(snapshot.gpu)}
            total = {str(number): device["total_bytes"] for number, device in enumerate(snapshot.gpu)}
            families.append(_labelled("gpu_memory_used_bytes", "GPU memory in use, by anybody.", "gpu", used))
            families.append(_labelled("gpu_memory_total_bytes", "GPU memory in all.", "gpu", total))
        return families


class MetricsPublisher:
    """Sends metrics where the settings say; a failure is logged once, and training goes on."""

    def __init__(self, metrics: Metrics, settings: MetricsSettings, root: Path, log: Any) -> None:
        self.metrics = metrics
        self._textfile = root / settings.textfile if settings.textfile else None
        self._failed = False
        self._log = log
        if settings.port is not None:
            try:
                metrics.serve(settings.port)
            except OSError as error:
                log.error("metrics.not_served", port=settings.port, error=port_problem(settings.port) or str(error))

    def publish(self, snapshot: StatusSnapshot, *, overflows: int, waited_seconds: float | None) -> None:
        """Take a snapshot and write the textfile, when there is one."""
        self.metrics.observe(snapshot, overflows=overflows, waited_seconds=waited_seconds)
        if self._textfile is None:
            return
        try:
            self.metrics.write(self._textfile)
        except OSError as error:
            if not self._failed:
                self._log.error("metrics.not_written", path=str(self._textfile), error=str(error))
            self._failed = True
        else:
            self._failed = False


def _evaluation_gauges(snapshot: StatusSnapshot) -> list[GaugeMetricFamily]:
    """What the current version has kept, and how many versions are held."""
    families = [_gauge("versions_held", "Versions that the gate keeps from becoming current.", len(snapshot.held))]
    if (known := snapshot.evaluation) is None:
        return families
    losses = {f"{one['dataset']} {one['digest']}": one["loss"] for one in known["datasets"]}
    text = "Held-out loss of the current version by dataset, nats a token; those that lost most."
    families.append(_labelled("held_out_loss", text, "dataset", losses))
    if known["evals"]:
        passed = {one["eval"]: one["passed"] for one in known["evals"]}
        families.append(_labelled("eval_passed_ratio", "Share of an eval's rows that pass.", "eval", passed))
    if known["backward_transfer"] is not None:
        text = "Loss of earlier datasets when learned minus now, mean; below 0: lost."
        families.append(_gauge("backward_transfer_nats", text, known["backward_transfer"]))
    return families


def _memory_gauges(snapshot: StatusSnapshot) -> list[GaugeMetricFamily]:
    """What is kept of trained datasets."""
    if (memory := snapshot.memory) is None:
        return []
    return [
        _gauge("memory_datasets", "Trained datasets of which rows are kept.", memory["datasets"]),
        _gauge("memory_rows", "Rows that later runs may train again.", memory["kept_rows"]),
        _gauge("memory_held_out_rows", "Rows that are kept to measure, and never trained.", memory["held_out_rows"]),
        _gauge("memory_used_bytes", "Bytes of the rows that later runs may train again.", memory["used_bytes"]),
        _gauge("memory_max_bytes", "What they may take at most.", memory["max_bytes"]),
        _gauge("memory_problems", "Memories that cannot be read.", memory["problems"]),
    ]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"dropforge_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"dropforge_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
