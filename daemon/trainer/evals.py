"""The administrator's evals, answered by what a run has made and by its parent, and judged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from daemon.evaluation.checks import NotRun, is_right, passes_command
from daemon.evaluation.evals import Check, Eval, EvalRow, Evals, read_evals, why_unused
from daemon.evaluation.gate import with_evals
from daemon.evaluation.settings import EvaluationSettings, GateSettings
from daemon.evaluation.statistics import MeasuredEval, judge_evals
from daemon.evaluation.values import EvalAnswer, Evaluation
from daemon.job import RunSpec, claimed_on
from daemon.recipe import DataSettings
from daemon.text import escape
from daemon.trainer import distributed
from daemon.trainer.answers import GenerationError, Writer, divide
from daemon.trainer.capacity import Capacity, padding_token
from daemon.trainer.chat_template import TemplateError
from daemon.trainer.encode import Encoder, alarm
from daemon.trainer.errors import RunFailure
from daemon.trainer.evaluation import History
from daemon.trainer.generation import ends_of
from daemon.trainer.model import adapter_tensors
from daemon.trainer.scoring import with_weights
from daemon.versions import Version

ROUND_ROWS = 16  # of each eval before the next ones of any: where time is short, all evals are answered in part
ANSWER_CHARACTERS = 2000  # of an answer that are kept
Answers = dict[str, EvalAnswer]  # by the row's key


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A row with its prompt as tokens."""

    name: str  # of its eval
    row: EvalRow
    ids: Sequence[int]
    key: str  # of the row, its tokens and the longest answer: another template or tokenizer makes it another one


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came of the evals."""

    measured: tuple[MeasuredEval, ...] = ()
    candidate: Mapping[str, Answers] = field(default_factory=dict)  # by eval, to be kept under its digest
    parent: Mapping[str, Answers] = field(
        default_factory=dict
    )  # what it has answered only now, with what it had before
    problems: tuple[str, ...] = ()
    seconds: float = 0.0
    gate: GateSettings = field(default_factory=GateSettings)

    def added_to(self, evaluation: Evaluation) -> Evaluation:
        """An evaluation of datasets with these evals judged beside them."""
        judged = judge_evals(self.measured, self.gate, datasets=len(evaluation.datasets))
        seconds = round(evaluation.seconds + self.seconds, 3)
        return replace(with_evals(evaluation, judged, self.gate), eval_problems=self.problems, seconds=seconds)


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run whose training has ended; the model has the weights that count."""

    model: PeftModel
    tokenizer: Any
    capacity: Capacity
    base_path: Path
    learned_ends: Iterable[int]  # tokens that the run's rows end with
    parent: Version | None
    parent_tensors: Mapping[str, torch.Tensor]  # on the CPU


def evals_of(spec: RunSpec) -> Evals:
    """The evals that a run answers: none where nothing is scored."""
    settings, gate = EvaluationSettings.model_validate(spec.evaluation), GateSettings.model_validate(spec.gate)
    if not spec.evals_dir or why_unused(settings, gate):
        return Evals(folder=Path(spec.evals_dir))
    return read_evals(Path(spec.evals_dir))


def ask_evals(spec: RunSpec, run: Finished, *, history: History, tick: Callable[[], None]) -> Answered:
    """Let a finished run and its parent answer all evals, in the process that writes the candidate.

    Raises what `tick` raises, OSError.
    """
    evals, gate = evals_of(spec), GateSettings.model_validate(spec.gate)
    if not distributed.is_main_process() or not (evals.usable or evals.problems):
        return Answered()
    data = DataSettings.model_validate(spec.root_recipe.get("data", {}))
    examiner = Examiner(
        evals=evals,
        settings=EvaluationSettings.model_validate(spec.evaluation),
        encoder=Encoder(run.tokenizer, data, day=claimed_on(spec.job_id)),
        tokenizer=run.tokenizer,
        model=run.model,
        capacity=run.capacity,
        pad_token_id=padding_token(run.tokenizer, run.capacity.tokens),
        tick=tick,
    )
    parent_path, eos = run.parent.path if run.parent else None, run.tokenizer.eos_token_id
    try:
        answered = examiner.examine(
            ends=ends_of(run.base_path, parent_path, eos=eos, learned=run.learned_ends),
            parent=run.parent_tensors if run.parent else None,
            parent_ends=ends_of(run.base_path, parent_path, eos=eos),
            known=history.parent_answered,
        )
    except GenerationError as error:  # the run itself is whole
        return Answered(problems=(*evals.problems, f"no eval was answered: {escape(str(error), most=400)}"))
    if run.parent and answered.parent:
        history.write(run.parent.digest, {}, answered.parent)
    return replace(answered, gate=gate)


@dataclass(kw_only=True)
class Examiner:
    """Asks all evals of the model."""

    evals: Evals
    settings: EvaluationSettings
    encoder: Encoder
    tokenizer: Any
    model: PeftModel
    capacity: Capacity
    pad_token_id: int
    tick: Callable[[], None]  # raises Interrupted when a stop is requested
    problems: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)  # evals with a program that cannot be run

    def examine(
        self,
        *,
        ends: Sequence[int],
        parent: Mapping[str, torch.Tensor] | None,
        parent_ends: Sequence[int],
        known: Callable[[str], Mapping[str, EvalAnswer]],
    ) -> Answered:
        """Let the model as it is answer, then its parent what it has not answered before; both within evals_seconds.

        `known`: the parent's answers to an eval. Raises what `tick` raises.
        """
        began = time.monotonic()
        asked = self._asked()
        keys = {one.key for one in asked}
        before = {
            one.name: {key: answer for key, answer in known(one.name).items() if key in keys}
            for one in self.evals.usable
        }
        missing = [one for one in asked if one.key not in before[one.name]]
        until = began + self.settings.evals_seconds
        # Half of the time for each where both have as much to answer.
        own_until = until if parent is None else began + self.settings.evals_seconds * _share(asked, missing)
        after = self._answer(asked, ends, own_until)
        missing = [one for one in missing if one.key in after[one.name]]  # pairs alone are compared
        new: dict[str, Answers] = {}
        if parent is not None and missing:
            trained = {name: tensor.to("cpu", copy=True) for name, tensor in adapter_tensors(self.model).items()}
            with with_weights(self.model, parent, trained):
                new = self._answer(missing, parent_ends, until)
        both = {name: {**answers, **new.get(name, {})} for name, answers in before.items()}
        self._tell_unanswered(asked, after)
        return Answered(
            measured=tuple(
                MeasuredEval(name=one.name, rows=len(one.rows), before=both[one.name], after=after[one.name])
                for one in self.evals.usable
                if one.name not in self.broken and any(a.name == one.name for a in asked)
            ),
            candidate=after,
            parent={name: answers for name, answers in both.items() if new.get(name)},
            problems=(*self.evals.problems, *self.problems),
            seconds=round(time.monotonic() - began, 3),
        )

    def _asked(self) -> list[Asked]:
        """All rows in the order in which they are asked; an eval with one that cannot be rendered is left out and told."""
        rounds: list[tuple[int, int, Asked]] = []
        for number, one in enumerate(self.evals.usable):
            try:
                rows = [self._encode(one, row) for row in one.rows]
            except _Unusable as error:
                self.problems.append(str(error))
                continue
            rows.sort(key=lambda asked: asked.row.digest)  # a sample, where time is short: and always the same one
            rounds += [(at // ROUND_ROWS, number, asked) for at, asked in enumerate(rows)]
        return [asked for _, _, asked in sorted(rounds, key=lambda found: found[:2])]

    def _encode(self, one: Eval, row: EvalRow) -> Asked:
        try:
            ids = self.encoder.prompt(row.prompt, row.tools)  # type: ignore[arg-type]
        except TimeoutError as error:
            raise _Unusable(one, row, "rendering it takes longer than render_seconds allows") from error
        except TemplateError as error:
            raise _Unusable(one, row, f"the chat template cannot render it: {error}") from error
        except RunFailure as failure:
            raise _Unusable(one, row, failure.message) from failure
        most = self.capacity.positions
        if self.capacity.ends and most is not None and len(ids) + self.settings.evals_max_new_tokens > most:
            raise _Unusable(
                one, row, f"its {len(ids)} tokens and evals_max_new_tokens are more than the model's {most} positions"
            )
        if not ids or max(ids) >= self.capacity.tokens:
            raise _Unusable(one, row, "its prompt makes no tokens that the base model knows")
        said = repr((row.digest, self.settings.evals_max_new_tokens, ids)).encode("ascii")
        return Asked(name=one.name, row=row, ids=ids, key=blake2b(said, digest_size=16).hexdigest())

    def _answer(self, asked: Sequence[Asked], ends: Sequence[int], until: float) -> dict[str, Answers]:
        """The judged answers that were written by `until`, by eval."""
        answers: dict[str, Answers] = {one.name: {} for one in self.evals.usable}
        writer = Writer(
            model=self.model,
            ends=ends,
            pad_token_id=self.pad_token_id,
            max_new_tokens=self.settings.evals_max_new_tokens,
            tick=self.tick,
        )
        at_once = ROUND_ROWS * max(1, len({one.name for one in asked}))
        for start in range(0, len(asked), at_once):
            some = asked[start : start + at_once]
            for places in divide([len(one.ids) for one in some], self.settings.evals_max_new_tokens):
                for place, ids in zip(places, writer.write([some[at].ids for at in places], until), strict=True):
                    if ids is not None and some[place].name not in self.broken:
                        self._judge(some[place], ids, until, answers)
        return answers

    def _judge(self, asked: Asked, ids: Sequence[int], until: float, answers: dict[str, Answers]) -> None:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        try:
            passed = self._passes(asked, text, until)
        except NotRun as error:  # which says nothing of the model
            self.problems.append(
                f"evals/{escape(asked.name)}.jsonl line {asked.row.line}: {escape(str(error), most=400)}"
            )
            self.broken.add(asked.name)
            answers[asked.name].clear()
            return
        if passed is not None:
            answers[asked.name][asked.key] = EvalAnswer(
                line=asked.row.line, prompt=asked.row.asked, answer=text[:ANSWER_CHARACTERS], passed=passed
            )

    def _passes(self, asked: Asked, text: str, until: float) -> bool | None:
        """Whether an answer passes; None where there was no time left to tell. Raises NotRun, and what `tick` raises."""
        limit = self.settings.evals_check_seconds
        if asked.row.check is Check.COMMAND:
            seconds = min(limit, until - time.monotonic())
            if seconds <= 0:
                return None
            began = time.monotonic()
            passed = passes_command(
                asked.row, text, name=asked.name, folder=self.evals.folder, seconds=seconds, check_stop=self.tick
            )
            # It was cut short by the time of all evals, and not by its own.
            return None if not passed and seconds < limit and time.monotonic() - began >= seconds else passed
        with alarm() if asked.row.check is Check.REGEX else nullcontext(lambda seconds: None) as set_alarm:
            try:
                set_alarm(limit)
                return is_right(asked.row, text)
            except TimeoutError:
                return False

    def _tell_unanswered(self, asked: Sequence[Asked], after: Mapping[str, Answers]) -> None:
        counts: dict[str, int] = {}
        for one in asked:
            if one.name in self.broken:
                continue
            counts[one.name] = counts.get(one.name, 0) + 1
        for name, rows in counts.items():
            if (left := rows - len(after[name])) > 0:
                self.problems.append(
                    f"eval {escape(name)}: {left} of {rows} rows were not answered within [evaluation]"
                    f" evals_seconds = {self.settings.evals_seconds:g}"
                )


class _Unusable(Exception):
    """An eval that the model cannot be asked."""

    def __init__(self, one: Eval, row: EvalRow, reason: str) -> None:
        super().__init__(f"evals/{escape(one.name)}.jsonl line {row.line}: {escape(reason, most=400)}")


def _share(asked: Sequence[Asked], missing: Sequence[Asked]) -> float:
    """Of the time, the candidate's part, so that the parent has some for what it has not answered."""
    return len(asked) / max(1, len(asked) + len(missing))
