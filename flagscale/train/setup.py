"""What training adds to a model: data-parallel wrapper, optimiser, learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from flagscale.errors import UserError
from flagscale.imports import uncollected
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import get_timers
from flagscale.megatron.loss_checks import check_gradients, reruns
from flagscale.recipe import TrainingRecipe
from flagscale.train.train_gpt import model_provider
from flagscale.train.trainer import Trainer


def build_model_chunks(args: Arguments) -> list[GPTModel]:
    """This pipeline rank's chunks of the model, with random weights.

    Raises:
        UserError: the arguments ask for what no schedule of Megatron-Core runs.
    """
    if args.use_dualpipev:
        raise UserError(
            "use_dualpipev=True: Megatron-Core has no DualPipeV schedule to train with; use "
            "virtual_pipeline_model_parallel_size for an interleaved one"
        )
    count = args.parallelism.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if count is None else list(range(count))
    return [
        model_provider(
            pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
        )
        for stage in stages
    ]


def setup_training(chunks: list[GPTModel], args: Arguments, training: TrainingRecipe) -> Trainer:
    """Wrap a model, whose weights are loaded, for training.

    Args:
        chunks: from `build_model_chunks`; moved to the device.
        args: that they were built with.
        training: the recipe's optimisation.

    Raises:
        ValueError: the batch sizes do not fit the ranks.
        UserError: the machine lacks what was asked for.
    """
    training.check_ranks(parallel_state.get_data_parallel_world_size())
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        # With reruns, gradients are checked before they are added up, to find the faulty rank.
        check_for_nan_in_grad=args.check_for_nan_in_loss_and_grad and reruns(),
        use_distributed_optimizer=_distributed_optimizer(args),
        overlap_grad_reduce=args.overlap_grad_reduce,
        overlap_param_gather=args.overlap_param_gather,
        bucket_size=args.ddp_bucket_size,
    )
    wrapped = [
        _wrap(chunk, args, ddp_config, first=number == 0) for number, chunk in enumerate(chunks)
    ]
    with uncollected():  # torch's optimisers import its compiler when one is made
        optimizer = get_megatron_optimizer(_optimizer_config(args, training), wrapped)
    platform.tune_optimizer(optimizer)
    no_sync = [chunk.no_sync for chunk in wrapped]
    for chunk in wrapped:
        config = get_model_config(chunk)
        config.finalize_model_grads_func = partial(_finalize, args)
        config.grad_scale_func = optimizer.scale_loss
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        config.timers = get_timers()
    return Trainer(wrapped, optimizer, _scheduler(optimizer, training))


def _wrap(
    chunk: GPTModel, args: Arguments, ddp_config: DistributedDataParallelConfig, *, first: bool
) -> DistributedDataParallel:
    config = get_model_config(chunk)
    chunk = chunk.to(platform.device())
    if args.params_dtype == torch.bfloat16:
        chunk = Float16Module(config, chunk)
    # As Megatron's training does: the communication of later chunks is hidden anyway.
    return DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=not first)


def _finalize(
    args: Arguments,
    chunks: list[DistributedDataParallel],
    *rest: Any,  # noqa: ANN401 - Megatron-Core's
    **named: Any,  # noqa: ANN401
) -> None:
    """Megatron-Core's end of the backward pass, and one look at all gradients."""
    finalize_model_grads(chunks, *rest, **named)
    if args.check_for_nan_in_loss_and_grad and not reruns():
        buffers = [b for chunk in chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        check_gradients([buffer.grad_data for buffer in buffers])


def _distributed_optimizer(args: Arguments) -> bool:
    return platform.use_distributed_optimizer(args.parallelism.use_distributed_optimizer)


def _optimizer_config(args: Arguments, training: TrainingRecipe) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        # With 0, Megatron-Core would not compute the norm, which is reported.
        clip_grad=training.clip_grad or math.inf,
        bf16=args.params_dtype == torch.bfloat16,
        params_dtype=args.params_dtype,
        use_distributed_optimizer=_distributed_optimizer(args),
        overlap_param_gather=args.overlap_param_gather,
    )


def _scheduler(optimizer: MegatronOptimizer, training: TrainingRecipe) -> OptimizerParamScheduler:
    """The schedule, counted in samples as Megatron does.

    Warmup starts one notch above 0: Megatron's own default spends the first step on a rate of 0.
    """
    batch = training.global_batch_size
    wsd_iters = training.lr_wsd_decay_iters
    warmup = training.lr_warmup_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=training.lr / (warmup + 1) if warmup else 0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup * batch,
        lr_decay_steps=training.train_iters * batch,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters * batch,
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd_iters is None else wsd_iters * batch,
        lr_wsd_decay_style="minus_sqrt",  # arXiv 2405.18392 found it the best of the decays
    )
