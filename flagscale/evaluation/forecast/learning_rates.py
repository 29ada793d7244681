"""The learning rates that a training will have, by Megatron-Core's schedules."""

from __future__ import annotations

import math

from flagscale.recipe import TrainingRecipe


def learning_rates(training: TrainingRecipe) -> list[float]:
    """Of each optimiser step, as Megatron-Core's `OptimizerParamScheduler` gives them.

    Args:
        training: the recipe's section.
    """
    return [_rate(training, done) for done in range(training.train_iters)]


def _rate(training: TrainingRecipe, done: int) -> float:
    """Of the step after `done` steps."""
    lr, warmup = training.lr, training.lr_warmup_iters
    if warmup and done <= warmup:
        start = lr / (warmup + 1)
        return start + (lr - start) * done / warmup
    if training.lr_decay_style == "constant":
        return lr
    if training.lr_decay_style == "inverse-square-root":
        # Megatron-Core counts samples here, and warmup is at least one.
        batch = training.global_batch_size
        share = math.sqrt(max(warmup * batch, 1) / max(done * batch, 1))
        return max(training.min_lr, lr * share)
    return training.min_lr + (lr - training.min_lr) * _left(training, done)


def _left(training: TrainingRecipe, done: int) -> float:
    """The part of the decay that is still to come."""
    warmup, decay = training.lr_warmup_iters, training.lr_wsd_decay_iters
    passed = (done - warmup) / (training.train_iters - warmup)
    if training.lr_decay_style == "linear":
        return 1 - passed
    if training.lr_decay_style == "cosine":
        return 0.5 * (1 + math.cos(math.pi * passed))
    assert decay is not None, "WSD needs it"
    return 1 - math.sqrt(max(0, done - (training.train_iters - decay)) / decay)
