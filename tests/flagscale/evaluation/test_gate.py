"""Conditions are judged by the whole interval of a paired difference, as others compute it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.gate import Judgement, judge, markdown
from flagscale.evaluation.tasks.scores import TaskScores
from flagscale.recipe.conditions import parse_condition

SAMPLES = 8_000


def scores(task: str, metric: str = "acc", **values: Any) -> TaskScores:
    count = len(next(iter(values.values())))
    found = {model: np.asarray(v, dtype=np.float64) for model, v in values.items()}
    reported = {model: (float(v.mean()), None) for model, v in found.items()}
    return TaskScores(
        task, metric, True, tuple(f"{task} {i}" for i in range(count)), found, reported
    )


def paired(examples: int, seed: int, lost: float = 0.1) -> dict[str, np.ndarray]:
    """What teacher and student get right, mostly the same."""
    generator = np.random.default_rng(seed)
    teacher = generator.random(examples) < 0.6
    return {
        "teacher": teacher,
        "distilled": np.where(generator.random(examples) < lost, ~teacher, teacher),
    }


@pytest.fixture
def judged(fidelity_of: Callable[..., Fidelity]) -> Callable[..., Judgement]:
    fidelity = fidelity_of()

    def one(condition: str, *tasks: TaskScores, samples: int = SAMPLES) -> Judgement:
        metrics = summarise(fidelity, samples, 0.95, 0)
        (found,) = judge([parse_condition(condition)], metrics, fidelity, tasks)
        return found

    return one


def close(margin: Mapping[str, float], value: float, low: float, high: float) -> None:
    """Ends of two bootstraps of so many resamples differ by some hundredths of the width."""
    assert margin["value"] == pytest.approx(value, rel=1e-12)
    for found, expected in ((margin["low"], low), (margin["high"], high)):
        assert abs(found - expected) < 0.05 * (high - low)


def test_a_tasks_margin_is_scipys_paired_bootstrap(judged: Callable[..., Judgement]) -> None:
    values = paired(300, 1)
    found = judged(
        "distilled/arc_easy >= 0.97 * teacher/arc_easy at 90%", scores("arc_easy", **values)
    )
    one, other = (values[model].astype(float) for model in ("distilled", "teacher"))
    expected = stats.bootstrap(
        (one, other),
        lambda a, b, axis: a.mean(axis=axis) - 0.97 * b.mean(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=SAMPLES,
        confidence_level=0.9,
        method="percentile",
        rng=3,
    ).confidence_interval
    close(found.margin, one.mean() - 0.97 * other.mean(), expected.low, expected.high)
    assert found.confidence == pytest.approx(0.9)
    alone = stats.bootstrap(
        (one,), np.mean, n_resamples=SAMPLES, confidence_level=0.9, method="percentile", rng=3
    ).confidence_interval
    close(found.figures["distilled/arc_easy"], one.mean(), alone.low, alone.high)


def test_figures_of_the_test_split_are_paired_by_document(
    judged: Callable[..., Judgement], fidelity_of: Callable[..., Fidelity]
) -> None:
    found = judged("distilled/lm_loss <= 1.8 * teacher/lm_loss")
    fidelity = fidelity_of()
    after, before = (fidelity.sums[m]["lm_loss"] for m in ("distilled", "teacher"))
    generator = np.random.default_rng(9)
    drawn = generator.integers(0, len(after), (SAMPLES, len(after)))
    tokens = fidelity.tokens_d[drawn].sum(axis=1)
    margins = (1.8 * before[drawn].sum(axis=1) - after[drawn].sum(axis=1)) / tokens
    value = (1.8 * before.sum() - after.sum()) / fidelity.tokens_d.sum()
    # Percentiles as far out as Student's t is, of a spread that is that of n - 1.
    tail = stats.norm.cdf(
        stats.t.ppf(0.025, len(after) - 1) * np.sqrt(len(after) / (len(after) - 1))
    )
    close(found.margin, value, *np.quantile(margins, (tail, 1 - tail)))


def test_two_tasks_are_two_samples(judged: Callable[..., Judgement]) -> None:
    """Variances of independent means add up; those of one task, which share examples, do not."""
    one, two = paired(200, 1), paired(200, 2)
    first, second = scores("a", **one), scores("b", **two)
    wide = judged("distilled/a + distilled/b >= 1", first, second).margin
    error = np.hypot(*(x["distilled"].std() / 200**0.5 for x in (one, two)))
    low, high = (wide["value"] + z * error for z in (-1.96, 1.96))
    close(wide, wide["value"], low, high)
    twin = scores("a", "acc_norm", **one)  # of the same examples: draws are shared
    same = judged("distilled/a >= distilled/a:acc_norm", first, twin, samples=500)
    assert same.margin == {"value": 0, "low": 0, "high": 0}
    assert same.holds
    assert not judged("distilled/a > distilled/a:acc_norm", first, twin, samples=500).holds


def test_a_first_metric_has_two_names(judged: Callable[..., Judgement]) -> None:
    one = scores("a", **paired(50, 1))
    assert judged("distilled/a:acc >= 0.1", one).margin == judged("distilled/a >= 0.1", one).margin


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("distilled/kl <= {high}", True),
        ("distilled/kl <= {inside}", False),  # the figure is below, its interval is not
        ("distilled/kl >= {low}", True),
        ("distilled/kl >= {inside}", False),
        ("distilled/kl < 0.1", False),
        ("distilled/perplexity <= 1e9 at 50%", True),
    ],
)
def test_it_holds_only_where_the_whole_interval_does(
    judged: Callable[..., Judgement], condition: str, holds: bool
) -> None:
    interval = judged("distilled/kl >= 0").figures["distilled/kl"]
    inside = (interval["value"] + interval["high"]) / 2
    ends = {"low": interval["low"] - 1e-9, "high": interval["high"] + 1e-9, "inside": inside}
    assert judged(condition.format(**ends)).holds is holds


def test_students_at_the_border_rarely_pass() -> None:
    """Of students that just do not keep 95% of the teacher, 2.5% pass a gate of 95% intervals."""
    condition = parse_condition("distilled/t >= 0.95 * teacher/t at 95%")
    fidelity = Fidelity(
        ("x", "y"),
        np.ones(2),
        {
            m: {f: np.ones(2) for f in ("lm_loss", "kl", "top1_agreement", "accuracy")}
            for m in ("teacher", "student", "distilled")
        },
    )
    metrics = {"bootstrap_samples": 300, "seed": 0, "confidence": 0.95}
    generator = np.random.default_rng(4)
    passed, cases = 0, 300
    for case in range(cases):
        teacher = generator.random(120) < 0.6
        # Right where the teacher is in 90%, elsewhere in 7.5%: 0.57 = 0.95 x 0.6 on average.
        right = generator.random(120) < np.where(teacher, 0.9, 0.075)
        values = scores(f"t{case}", teacher=teacher, distilled=right)
        renamed = TaskScores("t", "acc", True, values.examples, values.values, values.reported)
        passed += judge([condition], metrics, fidelity, [renamed])[0].holds
    # As a binomial of 2.5% has it with a probability of 0.99.
    assert stats.binom.cdf(passed, cases, 0.025) > 0.005
    assert stats.binom.sf(passed - 1, cases, 0.025) > 0.005


def test_what_was_not_measured_is_told(judged: Callable[..., Judgement]) -> None:
    given = scores("a", **paired(50, 1))
    bleu = TaskScores("wmt", "bleu", True, ("x", "y"), {}, {"distilled": (30.0, 0.4)})
    with pytest.raises(UserError, match="distilled/b: was not measured; measured were distilled/a"):
        judged("distilled/b >= 0.1", given)
    with pytest.raises(UserError, match="distilled/a:f1: was not measured"):
        judged("distilled/a:f1 >= 0.1", given)
    with pytest.raises(UserError, match="one figure of all examples together"):
        judged("distilled/wmt >= 20", given, bleu)
    with pytest.raises(UserError, match="task a has 1 example"):
        judged("distilled/a >= 0.1", scores("a", distilled=[1.0], teacher=[1.0]))


def test_the_table_says_which_holds_and_by_how_much(judged: Callable[..., Judgement]) -> None:
    yes, no = judged("distilled/kl <= 9"), judged("distilled/kl <= 1")
    lines = markdown([yes, no], "Not promoted").splitlines()
    assert lines[0] == "**Not promoted**"
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:6]]
    assert [row[:2] for row in cells] == [
        ["`distilled/kl <= 9`", "yes"],
        ["`distilled/kl <= 1`", "**no**"],
    ]
    assert cells[1][2].startswith("-")
    assert cells[0][3].startswith("distilled/kl ")
