"""The training loop: Megatron-Core's schedule, optimiser and scheduler, step after step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    get_rerun_state_machine,
)

from flagscale.errors import Interrupted
from flagscale.megatron import platform
from flagscale.megatron.global_vars import get_args
from flagscale.recipe import TrainingRecipe
from flagscale.train.audit import AuditError, TrainingAudit
from flagscale.train.auxiliary_losses import (
    balance_losses,
    forget_auxiliary_losses,
    prediction_losses,
)
from flagscale.train.batches import ChunkBatches
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.checkpoints.save_timer import SaveTimer
from flagscale.train.diagnostics import Diagnostics
from flagscale.train.schedule import ForwardStep, Report, reduce_reports, run_schedule
from flagscale.train.train_gpt import forward_step
from flagscale.train.trainer import Trainer

Look = Callable[[ForwardStep], AbstractContextManager[ForwardStep]]


class Observer(Protocol):
    """Who is told how training goes."""

    def trained(self, record: dict[str, float]) -> None:
        """A step is done: its losses, learning rate, gradient norm and speed."""

    def validated(self, record: dict[str, float]) -> None:
        """A validation is done: its losses, after how many steps."""

    def kept(self, checkpoints: Sequence[Path]) -> None:
        """These checkpoints are kept; called again and again, mostly with the same."""


class SuspiciousResultError(RuntimeError):
    """Computing a step again gave another result, or a fatal one."""


def train(
    trainer: Trainer,
    training: TrainingRecipe,
    state: TrainingState,
    train_batches: ChunkBatches,
    validation_batches: Callable[[], ChunkBatches],
    checkpoints: TrainingCheckpoints,
    observer: Observer,
    stop_requested: Callable[[], bool],
    clock: Callable[[], float] = time.monotonic,
    until_step: int | None = None,
) -> None:
    """Train from `state.step` to `training.train_iters`. All ranks call it.

    Args:
        trainer: model, optimiser and scheduler, restored to `state` if that is not the beginning.
        training: the recipe's optimisation.
        state: updated in place, one record a step and a validation; the same on every rank.
        train_batches: micro-batches, from step `state.step` on.
        validation_batches: gives the same micro-batches at every call.
        checkpoints: where to save every `save_interval` steps, every `save_interval_minutes` and
            at the end.
        observer: told of every record.
        stop_requested: asked after every step; it is enough that one rank is asked to stop.
        clock: seconds; the first rank's alone counts.
        until_step: stop after this step, with a checkpoint and as if nothing had happened: nothing
            else is done than in a training that goes on.

    Raises:
        Interrupted: it was asked to stop, and has saved a checkpoint.
        SuspiciousResultError: see `train_step`; the steps before it are saved.
        AuditError: see `train_step`; the steps before it are saved.
    """
    audit = TrainingAudit(trainer.chunks, get_args(), training.audit_interval)
    diagnostics = Diagnostics(get_args(), trainer.chunks)
    timer = SaveTimer(training.save_interval_minutes, clock)

    def validate() -> None:
        with trainer.whole_parameters():
            losses = evaluate_loss(trainer.chunks, validation_batches(), training.eval_iters)
        before = state.validation[-1]["step"] if state.validation else 0
        state.validation.append({"step": state.step, **losses})
        observer.validated(state.validation[-1])
        diagnostics.report(state.step - int(before))

    def save() -> None:
        with trainer.whole_parameters():
            checkpoints.save(state, trainer)

    def wait() -> None:
        checkpoints.wait()
        observer.kept(checkpoints.kept)

    if state.step == 0:
        validate()
    last = min(until_step or training.train_iters, training.train_iters)
    while state.step < last:
        try:
            record = train_step(trainer, train_batches, partial(audit.look, state.step + 1))
        except (SuspiciousResultError, AuditError):
            save()
            wait()
            raise
        state.step += 1
        state.training.append({"step": state.step, **record})
        observer.trained(state.training[-1])
        checkpoints.poll()
        observer.kept(checkpoints.kept)
        finished = state.step == training.train_iters
        if finished or state.step % training.eval_interval == 0:
            validate()
        stop, due = _any_rank(stop_requested(), timer.due())
        if stop or due or training.saves_at(state.step) or state.step == last:
            timer.restart()
            save()
        if stop and state.step < last:
            wait()
            raise Interrupted(f"stopped after step {state.step} of {training.train_iters}")
    wait()


def train_step(
    trainer: Trainer, batches: ChunkBatches, look: Look = nullcontext
) -> dict[str, float]:
    """One optimiser step.

    Args:
        trainer: model, optimiser and scheduler.
        batches: micro-batches.
        look: around the forward and backward passes; gives what runs a micro-batch, which is
            `forward_step` or does the same and more.

    Returns:
        Each reported loss (nats a token, over the global batch), the learning rate it was taken
        with, the gradient norm before clipping, and the tokens a second of all ranks together.

    Raises:
        SuspiciousResultError: the rerun state machine computed the step again and found a fault, or
            cannot tell one on this machine.
        AuditError: `look` found a reported figure wrong; the step was not taken.
    """
    args = get_args()
    start = time.perf_counter()
    learning_rate = get_canonical_lr_for_logging(trainer.optimizer.param_groups)
    machine = get_rerun_state_machine()
    data_iterators = [None if chunk is None else RerunDataIterator(chunk) for chunk in batches]
    while machine.should_run_forward_backward(data_iterators):
        for chunk in trainer.chunks:
            chunk.zero_grad_buffer()
        trainer.optimizer.zero_grad()
        with look(forward_step) as step:
            reports = run_schedule(
                trainer.chunks, data_iterators, args.num_micro_batches, step=step
            )
    _, should_exit, exit_code = machine.should_checkpoint_and_exit()
    if should_exit:
        raise SuspiciousResultError(
            f"a suspicious result (code {exit_code}; the log above says which); the step was not "
            "taken. Run again, on another machine if you can: it goes on from the step before"
        )
    _, grad_norm, _ = trainer.optimizer.step()
    trainer.scheduler.step(increment=args.global_batch_size)
    losses = reduce_reports(reports, prediction_losses(args)) | balance_losses(args)
    seconds = time.perf_counter() - start
    return {
        **losses,
        "learning rate": float(learning_rate or 0.0),
        "grad norm": float(grad_norm or 0.0),
        "tokens per second": args.global_batch_size * args.seq_length / seconds,
    }


@torch.no_grad()
def evaluate_loss(
    chunks: Sequence[GPTModel], batches: ChunkBatches, num_batches: int
) -> dict[str, float]:
    """Losses over some global batches, in evaluation mode, through `forward_step`.

    Args:
        chunks: of the model, wrapped or not; their mode is put back afterwards.
        batches: micro-batches.
        num_batches: global batches to take from them.

    Returns:
        Each reported loss, nats a token.
    """
    return reduce_reports(evaluation_reports(chunks, batches, num_batches))


def evaluation_reports(
    chunks: Sequence[GPTModel], batches: ChunkBatches, num_batches: int
) -> list[Report]:
    """What each micro-batch reports (see `run_schedule`); takes what `evaluate_loss` takes."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    num_micro_batches = num_batches * get_args().num_micro_batches
    with _no_reruns():
        reports = run_schedule(chunks, batches, num_micro_batches, forward_only=True)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    forget_auxiliary_losses()
    return reports


@contextmanager
def _no_reruns() -> Iterator[None]:
    """Check losses once: the rerun state machine refuses to look at what is no step."""
    machine = get_rerun_state_machine()
    mode = machine.mode
    machine.mode = RerunMode.DISABLED  # `set_mode` would warn of it at every validation
    try:
        yield
    finally:
        machine.mode = mode


def _any_rank(*mine: bool) -> list[bool]:
    """Which hold on any rank: all must agree to save or stop, or the next collective hangs."""
    flags = torch.tensor(mine, dtype=torch.float, device=platform.device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
