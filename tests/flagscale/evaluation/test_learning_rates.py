"""The schedule of learning rates beside Megatron-Core's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flagscale.evaluation.forecast.learning_rates import learning_rates
from flagscale.recipe import TrainingRecipe
from flagscale.train.setup import _scheduler


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "inverse-square-root", "WSD"])
def test_every_schedule_is_megatrons(style: str, warmup: int, batch: int) -> None:
    training = TrainingRecipe(
        train_iters=40,
        lr=1e-3,
        min_lr=1e-5,
        lr_warmup_iters=warmup,
        lr_decay_style=style,
        global_batch_size=batch,
        lr_wsd_decay_iters=10 if style == "WSD" else None,
    )
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    scheduler = _scheduler(optimizer, training)
    wanted = []
    for _ in range(training.train_iters):
        wanted.append(optimizer.param_groups[0]["lr"])
        scheduler.step(batch)
    assert learning_rates(training) == pytest.approx(wanted, rel=1e-12)
