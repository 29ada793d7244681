"""The training loop: Megatron-Core's schedule, optimiser and scheduler, step after step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunDataIterator, get_rerun_state_machine

from flagscale.checkpoint import TrainingCheckpoints, TrainingState
from flagscale.errors import Interrupted
from flagscale.recipe import TrainingRecipe
from flagscale.train.global_vars import get_args
from flagscale.train.setup import Trainer
from flagscale.train.train_gpt import forward_step

Batches = Iterator[dict[str, torch.Tensor]]


class Observer(Protocol):
    """Who is told how training goes."""

    def trained(self, record: dict[str, float]) -> None:
        """A step is done: its losses, learning rate, gradient norm and speed."""

    def validated(self, record: dict[str, float]) -> None:
        """A validation is done: its losses, after how many steps."""


def train(
    trainer: Trainer,
    training: TrainingRecipe,
    state: TrainingState,
    train_batches: Batches,
    validation_batches: Iterable[dict[str, torch.Tensor]],
    checkpoints: TrainingCheckpoints,
    observer: Observer,
    stop_requested: Callable[[], bool],
) -> None:
    """Train from `state.step` to `training.train_iters`.

    Args:
        trainer: model, optimiser and scheduler, restored to `state` if that is not the beginning.
        training: the recipe's optimisation.
        state: updated in place, one record a step and a validation.
        train_batches: micro-batches, from step `state.step` on.
        validation_batches: gives the same micro-batches at every iteration.
        checkpoints: where to save every `save_interval` steps and at the end.
        observer: told of every record.
        stop_requested: asked after every step.

    Raises:
        Interrupted: it was asked to stop, and has saved a checkpoint.
    """

    def validate() -> None:
        losses = evaluate_loss(trainer.model, iter(validation_batches), training.eval_iters)
        state.validation.append({"step": state.step, **losses})
        observer.validated(state.validation[-1])

    def save() -> None:
        checkpoints.save(state, trainer.model, trainer.optimizer, trainer.scheduler)

    if state.step == 0:
        validate()
    while state.step < training.train_iters:
        record = train_step(trainer, train_batches)
        state.step += 1
        state.training.append({"step": state.step, **record})
        observer.trained(state.training[-1])
        finished = state.step == training.train_iters
        if finished or state.step % training.eval_interval == 0:
            validate()
        if finished or state.step % training.save_interval == 0:
            save()
        if not finished and stop_requested():
            save()
            raise Interrupted(f"stopped after step {state.step} of {training.train_iters}")


def train_step(trainer: Trainer, batches: Batches) -> dict[str, float]:
    """One optimiser step.

    Returns:
        Each reported loss (nats a token, over the global batch), the learning rate it was taken
        with, the gradient norm before clipping, and this process' tokens a second.
    """
    args = get_args()
    start = time.perf_counter()
    learning_rate = get_canonical_lr_for_logging(trainer.optimizer.param_groups)
    machine = get_rerun_state_machine()
    data_iterator = RerunDataIterator(batches)
    while machine.should_run_forward_backward(data_iterator):
        trainer.model.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data_iterator,
            model=[trainer.model],
            num_microbatches=args.num_micro_batches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
    _, grad_norm, _ = trainer.optimizer.step()
    trainer.scheduler.step(increment=args.global_batch_size)
    losses = reduce_reports(reports)
    seconds = time.perf_counter() - start
    return {
        **losses,
        "learning rate": float(learning_rate or 0.0),
        "grad norm": float(grad_norm or 0.0),
        "tokens per second": args.global_batch_size * args.seq_length / seconds,
    }


@torch.no_grad()
def evaluate_loss(model: GPTModel, batches: Batches, num_batches: int) -> dict[str, float]:
    """Losses over some global batches, in evaluation mode, through `forward_step`.

    Args:
        model: wrapped or not; its mode is put back afterwards.
        batches: micro-batches.
        num_batches: global batches to take from them.

    Returns:
        Each reported loss, nats a token.
    """
    args = get_args()
    was_training = model.training
    model.eval()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches,
        model=[model],
        num_microbatches=num_batches * args.num_micro_batches,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
    )
    model.train(was_training)
    return reduce_reports(reports)


def reduce_reports(reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Mean of every reported loss over micro-batches and data-parallel ranks.

    Args:
        reports: one a micro-batch: name -> `[sum, count]`.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    means = {}
    for name in reports[0]:
        total = torch.stack([report[name].double() for report in reports]).sum(dim=0)
        torch.distributed.all_reduce(total, group=group)
        means[name] = float(total[0] / total[1].clamp(min=1))
    return means
