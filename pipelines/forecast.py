"""What `plan --after RUN` says: the loss of a training that has not been run, from one that has.

A run, or the rungs of a search, left losses by optimiser steps. A curve that is fitted to them says
where the same training would be after other numbers of steps, with its own schedule of learning
rates. Whatever else decides on losses must be the same: teacher, student, data, loss, optimiser.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.artifacts import read_manifest
from flagscale.errors import UserError
from flagscale.recipe import Recipe, TrainingRecipe, load_recipe
from flagscale.recipe.decisive import decisive
from flagscale.sizes.parameters import parameters
from flagscale.sizes.teacher import known_models
from pipelines.plan_text import indented
from pipelines.planning import Plan

if TYPE_CHECKING:
    from flagscale.evaluation.forecast.learning_curve import Forecast, LearningCurve
    from flagscale.megatron.shape import ModelShape

_TRAINED = ("distilled-student", "candidate")
# How long a training is, and its schedule: what a forecast is for.
_LENGTH = {
    "train_iters", "lr_decay_style", "lr_warmup_iters", "lr_wsd_decay_iters", "min_lr",
    "eval_interval", "keep_weights", "save_interval", "seed", "precision", "transformer_impl",
}  # fmt: skip
_OF_A_RUN = ("teacher", "data")
_TIMES = (0.5, 1.0, 2.0, 4.0)  # of the recipe's own length
_MOST = 10**7  # steps; beyond them a schedule is too long to write down


@dataclass
class Trained:
    """A training, as far as it went.

    Attributes:
        distillation: its section.
        training: its section.
        logs: rows of training.jsonl and of validation.jsonl.
        samples: of a search: kind of loss -> steps at a rung's end -> held-out loss.
    """

    distillation: dict[str, Any]
    training: dict[str, Any]
    logs: tuple[list[dict[str, float]], list[dict[str, float]]]
    samples: dict[str, dict[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Done."""
        return len(self.logs[0])

    def curve(self, key: str) -> LearningCurve:
        """Of its validation loss.

        Raises:
            ValueError: there is too little to fit.
        """
        from flagscale.evaluation.forecast.accounts import curve_of
        from flagscale.evaluation.forecast.learning_rates import learning_rates

        rates = learning_rates(TrainingRecipe.model_validate(self.training))
        return curve_of(*self.logs, rates, key, samples=self.samples.get(key))


@dataclass(frozen=True)
class Row:
    """Forecasts for one length of a training.

    Attributes:
        tokens: that it takes.
        losses: kind of loss -> forecast.
        ahead: of the LM loss on text alone, less that of distillation: value, low, high; and
            `chance`: how probable it is that distillation is ahead. None without a baseline.
    """

    tokens: int
    losses: dict[str, Forecast]
    ahead: dict[str, float] | None = None


def forecasts(recipe: Recipe, after: Path, baseline: Path | None = None) -> list[Row]:
    """The recipe's validation losses, at its own length and at others.

    Args:
        recipe: of one training, without a sweep or a search.
        after: folder of a local run, finished or not, or one that holds a run's recipe.yaml and
            its artifacts `student`, `distilled_student`.
        baseline: the same of a run without a teacher.

    Raises:
        UserError: there is no training of this student there, another kind of one, or too little
            of it to forecast from.
    """
    from flagscale.evaluation.forecast.accounts import LM_LOSS, decisive_loss

    trained = find(recipe, after)
    main = decisive_loss(trained.logs[0])
    curves = {key: _curve(trained, key, after) for key in dict.fromkeys((main, LM_LOSS))}
    other = None
    if baseline is not None:
        off = recipe.model_copy(
            update={"distillation": recipe.distillation.model_copy(update={"loss": "none"})}
        )
        other = _curve(find(off, baseline), LM_LOSS, baseline)
    return [_row(recipe, times, curves, other) for times in _TIMES]


def find(recipe: Recipe, run: Path) -> Trained:
    """The training in a run's folder that the recipe's is the like of; of several the longest.

    Raises:
        UserError: as `forecasts`.
    """
    file = run / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run}: has no recipe.yaml: give the folder of a run, as runs/latest")
    _check_same(recipe, load_recipe(file), run)
    students = dict(_students(run))
    wanted = _without_fingerprint(recipe.student.model_dump(mode="json"))
    found = [one for student, one in _trainings(run) if students.get(student, wanted) == wanted]
    if not found:
        raise UserError(f"{run}: no training of the recipe's student was begun there")
    longest = max(found, key=lambda one: one.steps)
    _check_training(recipe, longest, run)
    for one in found:
        for key, losses in one.samples.items():
            longest.samples.setdefault(key, {}).update(losses)
    return longest


def _check_same(recipe: Recipe, other: Recipe, run: Path) -> None:
    for section in _OF_A_RUN:
        mine, theirs = (
            _without_fingerprint(one.model_dump(mode="json", include={section})[section])
            for one in (recipe, other)
        )
        _refuse(section, mine, theirs, run)


def _check_training(recipe: Recipe, trained: Trained, run: Path) -> None:
    mine = recipe.model_dump(mode="json", include={"distillation", "training"})
    theirs = {"distillation": trained.distillation, "training": trained.training}
    mine, theirs = decisive(mine), decisive(theirs)
    for section in mine:
        kept, made = (
            {key: value for key, value in one[section].items() if key not in _LENGTH}
            for one in (mine, theirs)
        )
        _refuse(section, kept, made, run)


def _refuse(section: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], run: Path) -> None:
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise UserError(
                f"{section}.{key}={value}, but {run} was made with {theirs.get(key)}: its curve "
                f"says nothing of this recipe; --set {section}.{key}={theirs.get(key)}"
            )


def _without_fingerprint(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "fingerprint"}


def _students(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in sorted(run.glob("student*")):
        if (folder / "manifest.json").is_file():
            manifest = read_manifest(folder, "student")
            if manifest.kind == "student":
                yield manifest.digest, _without_fingerprint(manifest.recipe["student"])


def _trainings(run: Path) -> Iterator[tuple[str, Trained]]:
    """Digest of the student that each started from, and the training."""
    for folder in sorted(run.glob("distilled_student*")):
        if not (folder / "manifest.json").is_file():
            continue
        manifest = read_manifest(folder, _TRAINED[0])
        if manifest.kind in _TRAINED:
            sections = manifest.recipe
            logs = (_rows(folder / "training.jsonl"), _rows(folder / "validation.jsonl"))
            own = Trained(sections["distillation"], sections["training"], logs)
            own.samples = _samples(folder, own.steps)
            yield manifest.parents["student"], own


def _samples(folder: Path, steps: int) -> dict[str, dict[float, float]]:
    from flagscale.steps.search.rung import SAMPLE_LOSSES

    if not (folder / SAMPLE_LOSSES).is_file():
        return {}
    found = json.loads((folder / SAMPLE_LOSSES).read_text(encoding="utf-8"))
    return {
        key: {steps: sum(total for total, _ in pairs.values()) / sum(n for _, n in pairs.values())}
        for key, pairs in found.items()
    }


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _curve(trained: Trained, key: str, run: Path) -> LearningCurve:
    try:
        return trained.curve(key)
    except ValueError as error:
        raise UserError(f"{run}: {key}: {error}") from error


def _row(
    recipe: Recipe, times: float, curves: Mapping[str, LearningCurve], other: LearningCurve | None
) -> Row:
    from flagscale.evaluation.forecast.accounts import CONFIDENCE, LM_LOSS
    from flagscale.evaluation.forecast.learning_rates import learning_rates

    training = stretched(recipe.training, times)
    rates, steps = learning_rates(training), training.train_iters
    tokens = steps * training.global_batch_size * recipe.data.seq_length
    losses = {key: curve.forecast(steps, CONFIDENCE, rates) for key, curve in curves.items()}
    if other is None:
        return Row(tokens, losses)
    return Row(tokens, losses, _ahead(curves[LM_LOSS], other, steps, rates))


def stretched(training: TrainingRecipe, times: float) -> TrainingRecipe:
    """The training with so many times the steps, its warmup and decay in proportion."""
    steps = max(1, round(training.train_iters * times))
    if steps > _MOST:
        raise UserError(f"training.train_iters={steps}: forecasts are made up to {_MOST}")
    decay = training.lr_wsd_decay_iters
    return training.model_copy(
        update={
            "train_iters": steps,
            "lr_warmup_iters": min(round(training.lr_warmup_iters * times), steps - 1),
            "lr_wsd_decay_iters": None if decay is None else max(1, round(decay * times)),
        }
    )


def _ahead(
    distilled: LearningCurve, text: LearningCurve, steps: int, rates: Sequence[float]
) -> dict[str, float]:
    import numpy as np

    from flagscale.evaluation.forecast.accounts import CONFIDENCE

    mine = np.exp(distilled.log_losses(steps, rates))
    # Each curve has the same stream of random numbers; in another order they are independent.
    theirs = np.exp(np.random.default_rng(1).permutation(text.log_losses(steps, rates)))
    tail = (1 - CONFIDENCE) / 2
    low, value, high = np.quantile(theirs - mine, (tail, 0.5, 1 - tail))
    chance = float(np.mean(theirs > mine))
    return {"value": float(value), "low": float(low), "high": float(high), "chance": chance}


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The forecasts for programs."""
    return [
        {
            "tokens": row.tokens,
            "losses": {key: asdict(one) for key, one in row.losses.items()},
            "text alone less distilled": row.ahead,
        }
        for row in rows
    ]


def as_text(rows: Sequence[Row], after: Path) -> str:
    """The forecasts as a table.

    Args:
        rows: of one recipe.
        after: the run that they are made from.
    """
    kinds = [*rows[0].losses]
    made = rows[0].losses[kinds[0]].made_at
    head = ["tokens", "steps", *kinds]
    compared = rows[0].ahead is not None
    if compared:
        head += ["text alone less distilled", "distilled is ahead"]
    table = [head]
    for row in rows:
        first = row.losses[kinds[0]]
        cells = [f"{row.tokens:,}", f"{first.step:,}"]
        cells += [_interval(one.value, one.low, one.high) for one in row.losses.values()]
        if row.ahead is not None:
            cells.append(_interval(*(row.ahead[name] for name in ("value", "low", "high"))))
            cells.append(f"{row.ahead['chance']:.0%}")
        table.append(cells)
    return (
        f"validation losses, forecast from the {made} steps of {after}, nats a token: median and "
        f"90% interval\n{indented(table)}\n"
        "each length with its own schedule; far beyond the run it is a guess (docs/forecast.md)"
    )


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.4g} ({low:.4g} to {high:.4g})"


def law(plan: Plan) -> str:
    """What the law of arXiv 2502.08606 says of a recipe's models, in a sentence or two.

    Nothing where it is not known how long the teacher was trained, or models have experts.
    """
    from flagscale.evaluation.forecast.scaling_law import MOST_TOKENS, overtaken, text_alone

    job = plan.job
    known = known_models().get(job.recipe.teacher.source, {}).get("trained_tokens")
    shapes = (job.teacher.shape, job.student)
    if known is None or any(shape.architecture.num_experts for shape in shapes):
        return ""
    teacher, student = (_without_embedding(shape) for shape in shapes)
    own = text_alone(teacher, known)
    until = overtaken(student, own)
    training = job.recipe.training
    tokens = training.train_iters * training.global_batch_size * job.recipe.data.seq_length
    when = "at no number of tokens" if math.isinf(until) else f"from {until:.0e} tokens on"
    beyond = " (beyond the 5e+11 that it was fitted to)" if until > MOST_TOKENS else ""
    side = "a teacher helps" if tokens < until else "text alone does as well"
    return (
        f"by the law of arXiv 2502.08606 text alone gives the better student {when}{beyond}; at "
        f"{tokens:.0e}, {side}.\nThe law is of students that begin with random weights, on C4, "
        "where one that begins with its teacher's layers is far ahead (docs/forecast.md)."
    )


def _without_embedding(shape: ModelShape) -> float:
    tables = 2 if shape.untie_embeddings_and_output_weights else 1
    return parameters(shape).total - tables * shape.padded_vocab_size * shape.hidden_size
