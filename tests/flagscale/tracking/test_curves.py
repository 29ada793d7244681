"""Which points of a training go to MLflow: few keys, no more points than a chart has."""

import logging
from collections import Counter
from typing import Any

import pytest

from flagscale.tracking import StepRun
from flagscale.tracking.curves import Curves
from flagscale.tracking.letters import Begun, Point
from flagscale.tracking.outbox import outbox_of

MIXTURE = [f"loss {number}" for number in range(9)]
OTHERS = ["learning rate", "grad norm", "tokens per second"]


def told(steps: int, eval_interval: int, names: list[str]) -> list[Point]:
    """All points that a training of so many steps gives."""

    class Kept:
        def log_metrics(self, metrics: dict[str, float], step: int) -> list[Point]:
            points = [Point(name, value, 0, step) for name, value in metrics.items()]
            found.extend(points)
            return points

    found: list[Point] = []
    run: Any = Kept()
    curves = Curves(run, steps, eval_interval)
    losses = [name for name in names if name not in OTHERS]
    for step in range(steps + 1):
        if step:
            curves.trained({"step": float(step)} | dict.fromkeys(names, float(step)))
        if step % eval_interval == 0 or step == steps:
            curves.validated({"step": float(step)} | dict.fromkeys(losses, float(step)))
    return found


@pytest.mark.parametrize(
    ("steps", "eval_interval", "trained", "validated"),
    [
        (1, 1, [1], [0, 1]),
        (5, 2, [1, 2, 3, 4, 5], [0, 2, 4, 5]),
        (1000, 100, range(1, 1001), range(0, 1001, 100)),
        (1001, 500, [1, *range(2, 1001, 2), 1001], [0, 500, 1000, 1001]),
        (2500, 1, [1, *range(3, 2500, 3), 2500], [0, 1, *range(3, 2500, 3), 2500]),
    ],
)
def test_up_to_a_thousand_steps_every_one_is_there(
    steps: int, eval_interval: int, trained: Any, validated: Any
) -> None:
    points = told(steps, eval_interval, ["lm loss", *OTHERS])
    for name, expected in (("train/lm loss", trained), ("validation/lm loss", validated)):
        found = [point for point in points if point.name == name]
        assert [point.step for point in found] == list(expected)
        assert all(point.value == point.step for point in found)
    assert max(Counter(point.name for point in points).values()) <= 1003


def test_of_many_losses_the_first_are_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = [*MIXTURE, *OTHERS]
    keys = list(dict.fromkeys(point.name for point in told(3, 3, names)))
    trained = [f"train/{name}" for name in [*MIXTURE[:4], *OTHERS]]
    assert sorted(keys) == sorted(trained + [f"validation/{name}" for name in MIXTURE[:5]])
    assert len(keys) == 12
    assert caplog.text.count("too many curves for MLflow") == 2  # once for each kind
    assert "train/loss 4, train/loss 5" in caplog.text


def test_figures_of_a_model_are_those_of_the_curve() -> None:
    curves = Curves(StepRun(None), 10, 5)
    curves.validated({"step": 5.0, "lm loss": 2.0})
    [point] = curves.validation_of(5)
    assert (point.name, point.value, point.step) == ("validation/lm loss", 2.0, 5)
    assert curves.validation_of(10) == []
    untold: Any = None
    assert StepRun(outbox_of(untold, Begun("run", "0"))).run_id == "run"
