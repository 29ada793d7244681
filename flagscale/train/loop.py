"""The training loop: Megatron-Core's schedule, optimiser and scheduler, step after step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import (
    RerunDataIterator,
    RerunMode,
    get_rerun_state_machine,
)

from flagscale.errors import Interrupted
from flagscale.megatron import platform
from flagscale.megatron.global_vars import get_args
from flagscale.post_training.pipeline_shapes import adjust_tensor_shapes_fn
from flagscale.recipe import TrainingRecipe
from flagscale.train.audit import AuditError, TrainingAudit
from flagscale.train.auxiliary_losses import (
    balance_losses,
    forget_auxiliary_losses,
    prediction_losses,
)
from flagscale.train.batches import ChunkBatches, micro_batch_shape
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.checkpoints.save_timer import SaveTimer
from flagscale.train.diagnostics import Diagnostics
from flagscale.train.train_gpt import forward_step
from flagscale.train.trainer import Trainer

Report = dict[str, torch.Tensor]
ForwardStep = Callable[..., Any]
Look = Callable[[ForwardStep], AbstractContextManager[ForwardStep]]


class Observer(Protocol):
    """Who is told how training goes."""

    def trained(self, record: dict[str, float]) -> None:
        """A step is done: its losses, learning rate, gradient norm and speed."""

    def validated(self, record: dict[str, float]) -> None:
        """A validation is done: its losses, after how many steps."""


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

    if state.step == 0:
        validate()
    while state.step < training.train_iters:
        try:
            record = train_step(trainer, train_batches, partial(audit.look, state.step + 1))
        except (SuspiciousResultError, AuditError):
            save()
            checkpoints.wait()
            raise
        state.step += 1
        state.training.append({"step": state.step, **record})
        observer.trained(state.training[-1])
        checkpoints.poll()
        finished = state.step == training.train_iters
        if finished or state.step % training.eval_interval == 0:
            validate()
        stop, due = _any_rank(stop_requested(), timer.due())
        if stop or due or training.saves_at(state.step):
            timer.restart()
            save()
        if stop and not finished:
            checkpoints.wait()
            raise Interrupted(f"stopped after step {state.step} of {training.train_iters}")
    checkpoints.wait()


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
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    num_micro_batches = num_batches * get_args().num_micro_batches
    with _no_reruns():
        reports = run_schedule(chunks, batches, num_micro_batches, forward_only=True)
    for chunk, mode in zip(chunks, modes, strict=True):
        chunk.train(mode)
    forget_auxiliary_losses()
    return reduce_reports(reports)


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


def run_schedule(
    chunks: Sequence[GPTModel],
    data_iterators: Sequence[Any],
    num_micro_batches: int,
    forward_only: bool = False,
    step: ForwardStep = forward_step,
) -> list[Report]:
    """Run `forward_step` on micro-batches by Megatron-Core's schedule for the pipeline.

    Args:
        chunks: of the model, wrapped or not.
        data_iterators: one a chunk; see `flagscale.train.batches.get_batch`.
        num_micro_batches: how many to take of each.
        forward_only: compute no gradients.
        step: `forward_step`, or one around it.

    Returns:
        What the loss function reported, one a micro-batch; empty but on the last stage.
    """
    args = get_args()
    seq_length, micro_batch_size = micro_batch_shape(args)
    sizes: dict[str, Any] = {
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "decoder_seq_length": seq_length,
    }
    reports: list[Report] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(data_iterators) if len(chunks) > 1 else data_iterators[0],
        model=list(chunks),
        num_microbatches=num_micro_batches,
        forward_only=forward_only,
        adjust_tensor_shapes_fn=adjust_tensor_shapes_fn(chunks, sizes),
        **sizes,
    )
    return reports


def reduce_reports(
    reports: list[Report], others: dict[str, float] | None = None
) -> dict[str, float]:
    """Mean of every reported loss over micro-batches and data-parallel ranks, known to all ranks.

    Args:
        reports: one a micro-batch: name -> `[sum, count]`; empty but on the last pipeline stage.
        others: means that this stage knows already.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    means = dict(others or {})
    if reports:
        # One collective, and one wait for the GPU, for all losses.
        losses = [torch.stack(list(report.values())).double() for report in reports]
        totals = torch.stack(losses).sum(dim=0)
        torch.distributed.all_reduce(totals, group=group)
        mean = totals[:, 0] / totals[:, 1].clamp(min=1)
        means |= dict(zip(reports[0], mean.tolist(), strict=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        told = [means]
        torch.distributed.broadcast_object_list(
            told,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
        means = told[0]
    return means


def _any_rank(*mine: bool) -> list[bool]:
    """Which hold on any rank: all must agree to save or stop, or the next collective hangs."""
    flags = torch.tensor(mine, dtype=torch.float, device=platform.device())
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]
