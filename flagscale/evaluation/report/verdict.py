"""The verdict: one sentence that says how much of the teacher a student keeps, and how surely.

On tasks, where there are any: a student may be far from its teacher's distribution and as good at
what it is asked, or the other way round, so losses alone rank students wrongly. The share that is
kept is a mean over tasks of the student's figure divided by that of the teacher's, as Sreenivas et
al. (2024, Minitron) report it; its interval is a bootstrap over each task's examples, the same
examples for all models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flagscale.evaluation import bootstrap
from flagscale.evaluation.bootstrap import Estimate, Interval
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE
from flagscale.evaluation.report.data import Other, ReportData
from flagscale.evaluation.tasks.scores import TaskScores

_BESIDE = ("kl", "lm_loss", "accuracy")


@dataclass(frozen=True)
class Kept:
    """How much of its teacher a model keeps.

    Attributes:
        share: of the teacher's figure, with its interval; None where the teacher's is 0.
        measured_on: what the figure is, for a sentence.
        left_out: tasks that the share does not cover.
    """

    share: Interval | None
    measured_on: str
    left_out: tuple[str, ...] = ()


def verdict(data: ReportData, tasks: Sequence[TaskScores] = ()) -> str:
    """What of the teacher the student keeps, at what size, and whether it leads.

    Args:
        data: of the evaluation.
        tasks: what the models scored on tasks; none: token accuracy on held-out text is told.

    Returns:
        One sentence, without a full stop.
    """
    found = kept(data, tasks)
    share = data.parameters[AFTER] / data.parameters[TEACHER]
    size = f"at {100 * share:.0f}% of its size"
    if found.share is None:
        said = f"The teacher has nothing to keep of {found.measured_on}; the student is {size}"
    else:
        low, high = percent(found.share.low), percent(found.share.high)
        said = f"Keeps {percent(found.share.value)} [{low}, {high}] of {found.measured_on} {size}"
    beside = runner_up(data)
    return f"{said}; {beside}" if beside else said


def kept(data: ReportData, tasks: Sequence[TaskScores] = ()) -> Kept:
    """The share of the teacher's figure that the distilled student has.

    The first metric of each task counts, if more of it is better and it has a value for each
    example; without such tasks it is the token accuracy on the test split.
    """
    scored = [task for task in _first_metrics(tasks) if _is_scored(task)]
    left_out = tuple(task.task for task in _first_metrics(tasks) if not _is_scored(task))
    samples, seed = data.metrics["bootstrap_samples"], data.metrics["seed"]
    if not scored:
        accuracy = {m: data.fidelity.sums[m]["accuracy"] for m in (TEACHER, AFTER)}
        teacher, student = bootstrap.totals(list(accuracy.values()), samples, seed)
        where = f"the teacher's token accuracy on {data.metrics['documents']:,} held-out documents"
        return Kept(_share(student, teacher, data), where, left_out)
    means = {m: mean_of_tasks(scored, m, samples, seed) for m in (TEACHER, AFTER)}
    where = "the teacher on " + (scored[0].task if len(scored) == 1 else f"{len(scored)} tasks")
    return Kept(_share(means[AFTER], means[TEACHER], data), where, left_out)


def mean_of_tasks(tasks: Sequence[TaskScores], model: str, samples: int, seed: int = 0) -> Estimate:
    """The mean over tasks of a model's figure; the draws of a task are the same for all models."""
    total: Estimate | None = None
    for number, task in enumerate(tasks):
        values_e = task.values[model]
        (one,) = bootstrap.totals([values_e / len(values_e)], samples, seed + number)
        total = one if total is None else total + one
    assert total is not None, "at least one task"
    return total.times(1 / len(tasks))


@dataclass(frozen=True)
class Beside:
    """A model beside others, on the same documents.

    Attributes:
        name: of the run.
        kind: as an `Other`'s; `own` for this run's student.
        figures: `kl`, `lm_loss`, `accuracy` with their intervals.
        difference: of the KL, this one less this run's student, paired; None of itself.
    """

    name: str
    kind: str
    figures: dict[str, Interval]
    difference: Interval | None


def others_figures(data: ReportData) -> list[Beside]:
    """This run's student and those of the others, the closest to the teacher first."""
    own = Other("This run", "own", data.fidelity.sums[AFTER])
    runs = [own, *data.others]
    found = bootstrap.ratios(
        {f"{i} {f}": one.sums[f] for i, one in enumerate(runs) for f in _BESIDE},
        data.fidelity.tokens_d,
        data.metrics["bootstrap_samples"],
        data.metrics["seed"],
    )
    confidence = data.metrics["confidence"]
    rows = []
    for i, one in enumerate(runs):
        difference = found[f"{i} kl"] - found["0 kl"]
        rows.append(
            Beside(
                name=one.name,
                kind=one.kind,
                figures={f: found[f"{i} {f}"].interval(confidence) for f in _BESIDE},
                difference=None if one is own else difference.interval(confidence),
            )
        )
    return sorted(rows, key=lambda row: row.figures["kl"].value)


def runner_up(data: ReportData) -> str:
    """How the student stands beside the best of the others, by KL, paired by document.

    Seeds of the same recipe are no rivals. Without other runs it is the student before training.
    """
    rivals = [one for one in data.others if one.kind != "seed"]
    before = Other(f"it was before {data.method}", "before", data.fidelity.sums[BEFORE])
    rows = others_figures(replace(data, others=rivals or [before]))
    best = next(row for row in rows if row.kind != "own")
    assert best.difference is not None, "of another run"
    low, high = best.difference.low, best.difference.high
    if best.kind == "before":
        name = best.name
    else:
        name = f"the runner-up, {best.name}" if best.difference.value >= 0 else best.name
    if low <= 0 <= high:
        same = "the same as" if low == high else "not distinguishable from"
        return f"by KL to the teacher {same} {'what ' if best.kind == 'before' else ''}{name}"
    return f"clearly {'closer to the teacher' if low > 0 else 'further from it'} than {name}"


def seeds_spread(data: ReportData) -> str:
    """What another seed makes of the same recipe, in a sentence; empty without seeds."""
    seeds = [one.sums["kl"] for one in data.others if one.kind == "seed"]
    if not seeds:
        return ""
    own = data.fidelity.sums[AFTER]["kl"]
    kl = [sums_d.sum() / data.fidelity.tokens_d.sum() for sums_d in (own, *seeds)]
    return (
        f"{len(kl)} seeds: KL {np.mean(kl):.4g} on average, standard deviation "
        f"{np.std(kl, ddof=1):.2g}, from {min(kl):.4g} to {max(kl):.4g}. Intervals over documents "
        "do not hold this spread."
    )


def percent(share: float) -> str:
    """With the digits that matter: never a 100% that is not one."""
    if share != 1 and 0.995 <= share < 1.005:
        return f"{100 * share:.2f}%"
    return f"{100 * share:.1f}%"


def _share(student: Estimate, teacher: Estimate, data: ReportData) -> Interval | None:
    if teacher.resamples_r.min() <= 0:
        return None
    return (student / teacher).interval(data.metrics["confidence"])


def _first_metrics(tasks: Iterable[TaskScores]) -> list[TaskScores]:
    first: dict[str, TaskScores] = {}
    for task in tasks:
        first.setdefault(task.task, task)
    return list(first.values())


def _is_scored(task: TaskScores) -> bool:
    """Whether a share of the teacher's figure means something, and has an interval."""
    values = [task.values.get(model) for model in (TEACHER, AFTER)]
    return task.higher_is_better and all(v is not None and len(v) > 1 for v in values)
