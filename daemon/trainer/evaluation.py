"""What a finished run has kept of what its parent had learned: scored, judged, and mended by a blend where it can be."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from daemon.errors import DropforgeError
from daemon.evaluation.blend import Scored, choose_blend
from daemon.evaluation.budget import MOST_ROWS, ScoreBudget, Standing, choose_rows, scoring_order
from daemon.evaluation.scores import AdapterScores, best_of_line, read_scores, write_scores
from daemon.evaluation.settings import EvaluationSettings, GateSettings
from daemon.evaluation.statistics import Measured, Rows, describe, exact_share, judge, mean_loss, overall, passes
from daemon.evaluation.values import EvalAnswer, Evaluation, GateVerdict, OwnEvaluation
from daemon.fingerprint import minor_version
from daemon.job import Plan, RunSpec, claimed_on
from daemon.memory.store import decode_row, memory_dir_of
from daemon.recipe import DataSettings, Recipe
from daemon.text import escape
from daemon.trainer import distributed
from daemon.trainer.collate import Example
from daemon.trainer.memory import EarlierDataset
from daemon.trainer.model import adapter_tensors
from daemon.trainer.scoring import Scorer, by_line, interpolate, row_key, set_weights, with_weights
from daemon.trainer.tokenise import encode_rows
from daemon.versions import Version, current_version, line_of

Tensors = Mapping[str, torch.Tensor]
OWN_ROWS = 40  # trained rows that stand for the new dataset where none of it is held out


@dataclass(frozen=True, kw_only=True)
class History:
    """What the versions of the parent's line have scored, newest first."""

    memory_dir: Path | None  # None: a run without a root
    environment: str
    line: Sequence[tuple[str, str, AdapterScores]] = ()  # version, dataset that it learned, scores

    @classmethod
    def read(cls, spec: RunSpec, parent: Version | None, environment: str) -> History:
        """Read it; empty where there is none."""
        if not spec.state_dir:
            return cls(memory_dir=None, environment=environment)
        memory_dir = memory_dir_of(Path(spec.state_dir))
        line = [
            (str(record.get("version")), str(record.get("dataset_digest")), str(record.get("adapter_digest") or ""))
            for record in line_of(parent)[0]
        ]
        return cls(
            memory_dir=memory_dir,
            environment=environment,
            line=[
                (version, learned, read_scores(memory_dir, adapter, environment)) for version, learned, adapter in line
            ],
        )

    def standing(self, dataset: str) -> Standing:
        """How long ago a dataset was learned and scored, and what was lost of it in between."""
        learned = [age for age, (_, of, _) in enumerate(self.line) if of == dataset]
        scored = [(age, scores.rows(dataset)) for age, (_, _, scores) in enumerate(self.line) if scores.rows(dataset)]
        lost = 0.0
        if scored:
            (_, latest), (_, first) = scored[0], scored[-1]
            both = latest.keys() & first.keys()
            lost = mean_loss([latest[key] for key in both]) - mean_loss([first[key] for key in both])
        return Standing(
            digest=dataset,
            learned=learned[0] if learned else len(self.line),
            scored=scored[0][0] if scored else None,
            lost=lost,
        )

    def parent_scored(self, dataset: str) -> Rows:
        """The rows of a dataset that the parent scored, at the end of its own run or since."""
        return self.line[0][2].rows(dataset) if self.line else {}

    def best(self, dataset: str, rows: Sequence[str]) -> tuple[str, Rows] | None:
        """The version of the line that scored best on all of some rows, and how."""
        return best_of_line([(version, scores) for version, _, scores in self.line], dataset, rows)

    def parent_answered(self, name: str) -> Mapping[str, EvalAnswer]:
        """The rows of an eval that the parent has answered."""
        return self.line[0][2].answers(name) if self.line else {}

    def write(
        self, adapter: str, datasets: Mapping[str, Rows], evals: Mapping[str, Mapping[str, EvalAnswer]] | None = None
    ) -> None:
        """Keep what an adapter scored and answered. Raises OSError."""
        answers = {name: of for name, of in (evals or {}).items() if of}
        if self.memory_dir is not None and (answers or any(datasets.values())):
            scores = AdapterScores(environment=self.environment, datasets=datasets, evals=answers)
            write_scores(self.memory_dir, adapter, scores)


def environment_of(precision: str, recipe: Recipe, device: str) -> str:
    """Name all that changes the scores of a row besides its tokens and the adapter."""
    versions = ", ".join(f"{name} {minor_version(name)}" for name in ("torch", "transformers", "peft"))
    return f"{precision} on {device}, {recipe.model.attn_implementation}; {versions}"


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """What came of an evaluation; the model has the weights that it is about."""

    evaluation: Evaluation
    scores: Mapping[str, Rows]  # of the candidate, by dataset: to be kept under its digest


@dataclass(kw_only=True)
class Assessor:
    """Measures one finished run against its parent."""

    spec: RunSpec
    recipe: Recipe
    tokenizer: Any
    scorer: Scorer
    parent: Version | None
    parent_tensors: Tensors  # on the CPU
    earlier: Sequence[EarlierDataset]
    plan: Plan
    precision: str
    evals: int = 0  # that are judged beside the datasets
    tokens_scored: int = 0
    _encoded: dict[str, dict[str, list[Example]]] = field(default_factory=dict)  # by dataset, then by row

    def assess(self, own: Mapping[str, list[Example]], trained: Sequence[Example]) -> Assessed:
        """Score the run's own held-out rows and those of earlier datasets, judge, and blend where something was lost.

        `trained`: the run's own trained rows, of which some stand for it where none is held out. Raises Interrupted,
        RunFailure(DIVERGED), OSError.
        """
        began = time.monotonic()
        own_rows = self._score(own)
        settings, gate = self._settings()
        wanted = self.parent is not None and gate.action != "off" and settings.budget > 0
        abandoned = "" if gate.action == "off" else abandons_current(self.spec)
        evaluation = Evaluation(verdict=GateVerdict.UNMEASURED, passes=True)
        scores: dict[str, Rows] = {}
        if abandoned:
            evaluation = Evaluation(verdict=GateVerdict.REGRESSED, passes=False, reasons=(abandoned,))
        elif wanted:
            evaluation, scores, own_rows = self._compare(own, own_rows, trained, settings, gate)
        summary = None
        if own_rows:
            rows = list(own_rows.values())
            tokens = sum(row.tokens for row in rows)
            summary = OwnEvaluation(rows=len(rows), tokens=tokens, loss=mean_loss(rows), exact=exact_share(rows))
        return Assessed(
            evaluation=replace(
                evaluation, own=summary, scored_tokens=self.tokens_scored, seconds=round(time.monotonic() - began, 3)
            ),
            scores={**scores, self.spec.dataset.digest: own_rows},
        )

    def _settings(self) -> tuple[EvaluationSettings, GateSettings]:
        return EvaluationSettings.model_validate(self.spec.evaluation), GateSettings.model_validate(self.spec.gate)

    def history(self) -> History:
        """What earlier versions scored under the same conditions."""
        device = next(self.scorer.model.parameters()).device.type
        return History.read(self.spec, self.parent, environment_of(self.precision, self.recipe, device))

    def _compare(
        self,
        own: Mapping[str, list[Example]],
        own_rows: Rows,
        trained: Sequence[Example],
        settings: EvaluationSettings,
        gate: GateSettings,
    ) -> tuple[Evaluation, dict[str, Rows], Rows]:
        history = self.history()
        by_digest = {dataset.memory.meta.digest: dataset for dataset in self.earlier if dataset.held_out}
        budget = ScoreBudget.of(self.plan.tokens * self.plan.epochs, settings)
        taken = choose_rows(
            *scoring_order([history.standing(digest) for digest in by_digest]),
            lambda digest: self._costs(by_digest[digest], history),
            budget,
        )
        rows = {
            digest: dict(list(self._rows_of(by_digest[digest]).items())[:count])
            for digest, count in taken.items()
            if count
        }
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in adapter_tensors(self.scorer.model).items()}
        before = self._score_parent(rows, history, tensors)
        after = {digest: self._score(of) for digest, of in rows.items()}
        measured = []
        for digest, scored in after.items():
            best = history.best(digest, list(scored))
            measured.append(
                Measured(
                    name=by_digest[digest].memory.meta.name,
                    digest=digest,
                    before=before[digest],
                    after=scored,
                    best=best[1] if best else None,
                    best_version=best[0] if best else None,
                )
            )
        names = {digest: dataset.memory.meta.name for digest, dataset in by_digest.items()}
        evaluation = replace(
            verdict_over(measured, gate, evals=self.evals),
            unscored=tuple(name for digest, name in names.items() if digest not in rows),
            unmeasured=tuple(one.memory.meta.name for one in self.earlier if not one.held_out),
        )
        if evaluation.passes or "interpolate" not in gate.remedies:
            return evaluation, after, own_rows
        return self._mend(evaluation, measured, rows, tensors, own=own, own_rows=own_rows, trained=trained, gate=gate)

    def _mend(
        self,
        evaluation: Evaluation,
        measured: Sequence[Measured],
        rows: Mapping[str, Mapping[str, list[Example]]],
        tensors: Tensors,
        *,
        own: Mapping[str, list[Example]],
        own_rows: Rows,
        trained: Sequence[Example],
        gate: GateSettings,
    ) -> tuple[Evaluation, dict[str, Rows], Rows]:
        """Try blends of parent and candidate; the model has the accepted one afterwards, else the candidate."""
        model = self.scorer.model
        stand_ins = own or _sample(trained)
        candidate = own_rows or self._score(stand_ins)
        with with_weights(model, self.parent_tensors, tensors):
            parent = self._score(stand_ins)

        def score(alpha: float) -> Scored:
            with with_weights(model, interpolate(self.parent_tensors, tensors, alpha), tensors):
                return Scored(
                    datasets={digest: self._score(of) for digest, of in rows.items()}, own=self._score(stand_ins)
                )

        blend = choose_blend(score, measured=measured, parent=parent, candidate=candidate, gate=gate)
        if blend.alpha is None or blend.scored is None:
            after = {one.digest: one.after for one in measured}
            return replace(evaluation, tried=blend.tried), after, own_rows
        set_weights(model, interpolate(self.parent_tensors, tensors, blend.alpha))
        mended = [replace(one, after=blend.scored.datasets[one.digest]) for one in measured]
        evaluation = replace(
            verdict_over(mended, gate, evals=self.evals),
            unscored=evaluation.unscored,
            unmeasured=evaluation.unmeasured,
            alpha=blend.alpha,
            gain_kept=blend.gain_kept,
            tried=blend.tried,
        )
        return evaluation, dict(blend.scored.datasets), blend.scored.own if own else own_rows

    def _score_parent(
        self, rows: Mapping[str, Mapping[str, list[Example]]], history: History, tensors: Tensors
    ) -> dict[str, Rows]:
        """The parent's scores: those that are known, and the others scored now and kept. Raises OSError."""
        known = {digest: history.parent_scored(digest) for digest in rows}
        missing = {
            digest: {key: samples for key, samples in of.items() if key not in known[digest]}
            for digest, of in rows.items()
        }
        new: dict[str, Rows] = {}
        if any(missing.values()):
            with with_weights(self.scorer.model, self.parent_tensors, tensors):
                new = {digest: self._score(of) for digest, of in missing.items() if of}
            if self.parent is not None and distributed.is_main_process():
                history.write(self.parent.digest, new)
        return {
            digest: {key: {**known[digest], **new.get(digest, {})}[key] for key in of} for digest, of in rows.items()
        }

    def _score(self, rows: Mapping[str, list[Example]]) -> Rows:
        self.tokens_scored += sum(len(sample.input_ids) for samples in rows.values() for sample in samples)
        return self.scorer.score(rows)

    def _rows_of(self, dataset: EarlierDataset) -> dict[str, list[Example]]:
        """The first of an earlier dataset's held-out rows that can be scored, under its own `train_on`."""
        meta = dataset.memory.meta
        if meta.digest not in self._encoded:
            # Under the root's settings: with max_length = 1 in a sidecar nothing would be measured.
            own = self.recipe.data.model_dump()
            data = DataSettings.model_validate(
                {**own, **self.spec.root_recipe.get("data", {}), "train_on": meta.train_on}
            )
            rows = [decode_row(row.line) for row in dataset.held_out[:MOST_ROWS]]
            encoded = encode_rows(rows, self.tokenizer, data, day=claimed_on(self.spec.job_id))
            self._encoded[meta.digest] = keyed(encoded)
        return self._encoded[meta.digest]

    def _costs(self, dataset: EarlierDataset, history: History) -> list[int]:
        """Tokens that scoring each row takes: twice where the parent has not scored it."""
        known = history.parent_scored(dataset.memory.meta.digest)
        return [
            sum(len(sample.input_ids) for sample in samples) * (1 if key in known else 2)
            for key, samples in self._rows_of(dataset).items()
        ]


def abandons_current(spec: RunSpec) -> str:
    """Say that a sidecar leaves aside all that the current version has learned; empty where none does."""
    if spec.overrides.get("training", {}).get("start_from") != "base":
        return ""
    try:
        current = current_version(Path(spec.model_dir))
    except DropforgeError:
        named = "the current version"  # which cannot be told now
    else:
        if current is None:
            return ""
        named = f"version {current.name}"
    return f"its sidecar begins a new adapter on the base model, without what {named} has learned"


def verdict_over(measured: Sequence[Measured], gate: GateSettings, *, evals: int = 0) -> Evaluation:
    """Judge all datasets together, and with so many evals."""
    datasets = judge(measured, gate, evals=evals)
    verdict = overall(datasets)
    blocking = [one for one in datasets if not passes(one.verdict, strict=gate.strict)]
    return Evaluation(
        verdict=verdict,
        passes=passes(verdict, strict=gate.strict),
        datasets=datasets,
        reasons=tuple(f"{escape(one.name)} {describe(one)}" for one in blocking),
    )


def keyed(rows: Sequence[list[Example]]) -> dict[str, list[Example]]:
    """Rows by what they are known by; one without a trained token is left out."""
    return {row_key(samples): samples for samples in rows if samples}


def _sample(trained: Sequence[Example]) -> dict[str, list[Example]]:
    rows = sorted(by_line(trained), key=lambda samples: samples[0].content_digest)
    return keyed(rows[:OWN_ROWS])
