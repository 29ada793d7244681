"""What training adds to a model: data-parallel wrapper, optimiser, learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_model_config

from flagscale import platform
from flagscale.recipe import TrainingRecipe
from flagscale.train.arguments import Arguments


@dataclass(frozen=True)
class Trainer:
    """A model with what trains it."""

    model: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler


def setup_training(model: GPTModel, args: Arguments, training: TrainingRecipe) -> Trainer:
    """Wrap a model, whose weights are loaded, for training.

    Args:
        model: from `model_provider`; moved to the device.
        args: that it was built with.
        training: the recipe's optimisation.
    """
    config = get_model_config(model)
    model = model.to(platform.device())
    if args.params_dtype == torch.bfloat16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=args.check_for_nan_in_loss_and_grad,
        use_distributed_optimizer=platform.has_distributed_optimizer(),
    )
    wrapped = DistributedDataParallel(config, ddp_config, model)
    optimizer = get_megatron_optimizer(_optimizer_config(args, training), [wrapped])
    platform.tune_optimizer(optimizer)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = wrapped.no_sync
    return Trainer(wrapped, optimizer, _scheduler(optimizer, training))


def _optimizer_config(args: Arguments, training: TrainingRecipe) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=args.params_dtype == torch.bfloat16,
        params_dtype=args.params_dtype,
        use_distributed_optimizer=platform.has_distributed_optimizer(),
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
