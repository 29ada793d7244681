"""Section `training`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.parallelism import ParallelismRecipe
from flagscale.recipe.section import (
    NUMBER,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Seed,
    Switch,
)

OVERLAPS_AND_FUSIONS = (
    "overlap_grad_reduce",
    "overlap_param_gather",
    "tp_comm_overlap",
    "ddp_bucket_size",
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
)
# Fields that change no result but by rounding: a training may go on with others.
CHANGES_NO_RESULT = (
    "async_save",
    "audit_interval",
    "keep_checkpoints",
    "micro_batch_size",
    "parallelism",
    *OVERLAPS_AND_FUSIONS,
    "recompute_granularity",
    "recompute_modules",
    "record_memory_history",
    "log_straggler",
    "rerun_mode",
    "save_interval",
    "save_interval_minutes",
    "timing_log_level",
)


_RecomputeModule = Literal[
    "core_attn", "layernorm", "mlp", "mla_up_proj", "moe", "moe_act", "shared_experts"
]


class TrainingRecipe(Section):
    """Optimisation. Names and meanings are Megatron's."""

    train_iters: PositiveInt = Field(description="Optimiser steps")
    micro_batch_size: PositiveInt = Field(1, description="Sequences a forward pass")
    global_batch_size: PositiveInt = Field(1, description="Sequences an optimiser step")
    lr: Annotated[Positive, Field(le=1)] = Field(description="Peak learning rate")
    min_lr: NonNegative = Field(0.0, description="Learning rate at the end")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_warmup_iters: NonNegativeInt = Field(0, description="Steps of linear warmup")
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="WSD: steps of the decay")
    weight_decay: NonNegative = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    # Below, float32 knows it as 0, and divides zeros by it.
    adam_eps: Annotated[Positive, Field(ge=1e-30, le=1)] = 1e-8
    clip_grad: NonNegative = Field(1.0, description="Gradient norm limit; 0: none")
    seed: Seed = Field(1234, description="Data order and dropout")
    eval_interval: PositiveInt = Field(50, description="Steps between validations")
    eval_iters: PositiveInt = Field(4, description="Global batches a validation")
    audit_interval: NonNegativeInt = Field(
        100,
        description="Steps between audits: the losses of a micro-batch once more, in float64; the "
        "first step is always audited; 0: none",
    )
    save_interval: PositiveInt = Field(50, description="Steps between checkpoints")
    save_interval_minutes: Positive | None = Field(
        10.0,
        description="A checkpoint also when so many minutes have passed since the last; null: "
        "by steps alone",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="auto: transformer_engine on a GPU where installed, else local"
    )
    fp8: Literal["none", "e4m3", "hybrid"] = Field(
        "none", description="Matrix products in FP8; transformer_engine on a GPU only"
    )
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = Field(
        "delayed", description="How transformer-engine scales FP8 tensors"
    )
    recompute_granularity: Literal["none", "selective", "full"] = Field(
        "none", description="Recompute some modules, or whole layers, in the backward pass"
    )
    recompute_modules: tuple[_RecomputeModule, ...] | None = Field(
        None,
        description="Which, with recompute_granularity: selective; default: core_attn, which "
        "transformer-engine's attention recomputes anyway",
    )
    overlap_grad_reduce: Switch = Field(
        "auto", description="Add up gradients of DP ranks during the backward pass; auto: on a GPU"
    )
    overlap_param_gather: Switch = Field(
        "auto",
        description="Gather parameters during the forward pass; needs overlap_grad_reduce and a "
        "distributed optimiser; auto: on a GPU",
    )
    tp_comm_overlap: Switch = Field(
        "auto",
        description="Exchange tensor-parallel activations while matrices are multiplied; needs "
        "sequence_parallel, transformer_engine in bf16 and NVSwitch; auto: off",
    )
    ddp_bucket_size: PositiveInt | None = Field(
        None, description="Parameters that are communicated at once; default: Megatron-Core's"
    )
    apply_rope_fusion: Switch = Field(
        "auto", description="One kernel for positions; auto: with transformer_engine"
    )
    bias_activation_fusion: Switch = Field(
        "auto", description="One kernel for SwiGLU; auto: with transformer_engine"
    )
    bias_dropout_fusion: Switch = Field(
        "auto", description="One kernel for residuals; auto: with transformer_engine"
    )
    cross_entropy_loss_fusion: Switch = Field(
        "auto",
        description="transformer-engine's cross entropy; with distillation.loss=none only; auto: "
        "where that can be",
    )
    gradient_accumulation_fusion: Switch = Field(
        "auto",
        description="Matrix products add to a weight's gradient in place; auto: with "
        "transformer_engine or Apex, and on a CPU",
    )
    reset_attention_mask: bool = Field(
        False, description="Attention and positions start anew at each document of a sample"
    )
    parallelism: ParallelismRecipe = ParallelismRecipe()
    # Its third mode, report_determinism_stats, ends in an error in Megatron-Core 0.16.1.
    rerun_mode: Literal["disabled", "validate_results"] = Field(
        "disabled", description="Megatron-Core's rerun state machine: recompute suspicious steps"
    )
    timing_log_level: Annotated[Literal[0, 1, 2], NUMBER] = Field(
        0, description="Log where a step's time goes at each validation: not, coarse, fine"
    )
    log_straggler: bool = Field(
        False, description="Log the slowest and fastest rank at each validation; GPU only"
    )
    record_memory_history: bool = Field(
        False, description="Write a snapshot of the GPU's memory when it runs out"
    )
    async_save: bool = Field(
        False, description="Train on while a checkpoint is written; the host holds a copy of all"
    )
    keep_checkpoints: PositiveInt = Field(2, description="The newest, beside the best")
    keep_weights: Literal["last", "best"] = Field(
        "last", description="Which become the distilled student; best: by validation loss"
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingRecipe:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"lr={self.lr} with weight_decay={self.weight_decay}: a step takes lr x "
                "weight_decay of each weight away, and must leave some; it must be below 1"
            )
        if self.lr_warmup_iters >= self.train_iters:
            raise ValueError(
                f"lr_warmup_iters={self.lr_warmup_iters} must be below "
                f"train_iters={self.train_iters}"
            )
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters is not None):
            raise ValueError(
                f"lr_decay_style={self.lr_decay_style} and lr_wsd_decay_iters="
                f"{self.lr_wsd_decay_iters}: WSD needs it and nothing else takes it"
            )
        if (self.lr_wsd_decay_iters or 0) > self.train_iters - self.lr_warmup_iters:
            raise ValueError(
                f"lr_wsd_decay_iters={self.lr_wsd_decay_iters} is more than the "
                f"{self.train_iters - self.lr_warmup_iters} steps after the warmup "
                f"(train_iters={self.train_iters}, lr_warmup_iters={self.lr_warmup_iters})"
            )
        self._check_performance()
        if self.fp8 == "none" and self.fp8_recipe != type(self).model_fields["fp8_recipe"].default:
            raise ValueError(f"fp8_recipe={self.fp8_recipe} has no effect with fp8=none")
        if self.keep_weights == "best" and self.save_interval % self.eval_interval:
            raise ValueError(
                f"keep_weights=best, but save_interval={self.save_interval} is not a multiple of "
                f"eval_interval={self.eval_interval}: only a validated checkpoint can be the best"
            )
        return self

    def _check_performance(self) -> None:
        if self.recompute_modules is not None and self.recompute_granularity != "selective":
            raise ValueError(
                f"recompute_modules={', '.join(self.recompute_modules)} has no effect with "
                f"recompute_granularity={self.recompute_granularity}; set it to selective"
            )
        if self.overlap_param_gather is True and self.overlap_grad_reduce is False:
            raise ValueError("overlap_param_gather=true needs overlap_grad_reduce=true")
        if self.overlap_param_gather is True and (
            self.parallelism.use_distributed_optimizer is False
        ):
            raise ValueError(
                "overlap_param_gather=true needs parallelism.use_distributed_optimizer=true: "
                "without, every rank has all parameters"
            )
        if self.tp_comm_overlap is True and not self.parallelism.sequence_parallel:
            raise ValueError(
                "tp_comm_overlap=true needs parallelism.sequence_parallel=true: without, ranks "
                "exchange nothing that it could hide"
            )
        for name in ("apply_rope_fusion", "cross_entropy_loss_fusion", "tp_comm_overlap"):
            if self.transformer_impl == "local" and getattr(self, name) is True:
                raise ValueError(
                    f"{name}=true with transformer_impl=local: it is transformer-engine's kernel; "
                    "set one of the two to auto"
                )

    def saves_at(self, step: int) -> bool:
        """Whether there is a checkpoint after a step whatever the clock says.

        Only such a step can be the best: the result must not depend on how fast a machine is.
        """
        return step % self.save_interval == 0 or step == self.train_iters

    def check_world_size(self, world_size: int) -> None:
        """Make sure that so many processes can train this.

        Raises:
            ValueError: the layout does not divide them, or they do not divide the global batch.
        """
        self.parallelism.check_world_size(world_size)
        self.check_ranks(world_size // self.parallelism.model_parallel_size)

    def check_ranks(self, ranks: int) -> None:
        """Make sure that the global batch is whole micro-batches of each data-parallel rank.

        Args:
            ranks: of data parallelism.

        Raises:
            ValueError: it is not, or an interleaved pipeline could not run them.
        """
        micro_batches, left = divmod(self.global_batch_size, self.micro_batch_size * ranks)
        if left:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size} x {ranks} data-parallel ranks"
            )
        sizes = self.parallelism
        stages = sizes.pipeline_model_parallel_size
        if sizes.virtual_pipeline_model_parallel_size is not None and micro_batches % stages:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} makes {micro_batches} micro-batches a "
                "rank; an interleaved pipeline needs a multiple of "
                f"pipeline_model_parallel_size={stages}"
            )
