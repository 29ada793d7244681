"""Micro-batches through Megatron-Core's schedule for the pipeline, and what they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from flagscale.megatron.global_vars import get_args
from flagscale.post_training.pipeline_shapes import adjust_tensor_shapes_fn
from flagscale.train.batches import micro_batch_shape
from flagscale.train.train_gpt import forward_step

ValueT = TypeVar("ValueT")
Report = dict[str, torch.Tensor]
ForwardStep = Callable[..., Any]


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
    return from_last_stage(means)


def from_last_stage(value: ValueT) -> ValueT:
    """What the last stage of the pipeline has, on all of them. All ranks call it."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(
        told,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return told[0]
