"""The run-wide arguments that `get_args()` gives: derived from the recipe, named as in Megatron."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from megatron.core import parallel_state

from flagscale.megatron import platform
from flagscale.megatron.performance import resolved
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, ParallelismRecipe, TrainingRecipe


@dataclass(frozen=True)
class Arguments:
    """What the core functions and the training loop need to know.

    Attributes:
        shape: of the model; Megatron's model arguments.
        seq_length: tokens a sample.
        micro_batch_size: sequences a forward pass of one data-parallel rank.
        global_batch_size: sequences an optimiser step.
        params_dtype: of the parameters.
        transformer_impl: `local` or `transformer_engine`.
        parallelism: sizes of the process groups that the model is built for.
        recompute_granularity: `none`, `selective` (some modules) or `full` (whole layers).
        recompute_modules: which, if `selective`; None: core attention.
        overlap_grad_reduce: of data-parallel ranks, with the backward pass.
        overlap_param_gather: of data-parallel ranks, with the forward pass.
        tp_comm_overlap: of tensor-parallel ranks, with their own matrix products; see
            `flagscale.megatron.user_buffers`.
        ddp_bucket_size: parameters that these two communicate at once; None: Megatron-Core's.
        apply_rope_fusion: transformer-engine's kernel for positions.
        bias_activation_fusion: one kernel for SwiGLU.
        bias_dropout_fusion: one kernel for residuals.
        cross_entropy_loss_fusion: transformer-engine's cross entropy.
        fp8: `none`, `e4m3` or `hybrid`.
        fp8_recipe: how transformer-engine scales.
        gradient_accumulation_fusion: weights' gradients are added in place to those before; needs
            Megatron-Core's data-parallel wrapper around the model.
        reset_attention_mask: samples are packed: documents do not see one another.
        use_dualpipev: chunks are placed in DualPipeV's V.
        overlap_moe_expert_parallel_comm: the schedule asks for schedule plans.
        seed: of weights, data order and dropout.
        perform_initialization: give weights random values; not where they are read at once.
        use_legacy_models: build Megatron-LM's legacy model.
        timing_log_level: 0: no timers; 1, 2: of a step's parts, coarse or fine.
        log_straggler: compare the ranks' speed.
        record_memory_history: write a snapshot when the GPU's memory runs out.
        memory_snapshot_path: where to.
        check_for_nan_in_loss_and_grad: stop at the first NaN or infinite loss.
        check_for_spiky_loss: warn of a loss far above all before.
        export_kd_teacher_load: the teacher's artifact; where set, the model is distilled.
        export_kd_cfg: the distillation, if so.
        export_kd_teacher_outputs: what the teacher answered; where set, it need not be there.
        export_quant_load: the artifact whose quantisers a quantised model gets.
        forward_only: the model is run and gets no gradients.
    """

    shape: ModelShape
    seq_length: int
    micro_batch_size: int = 1
    global_batch_size: int = 1
    params_dtype: torch.dtype = torch.float32
    transformer_impl: str = "local"
    parallelism: ParallelismRecipe = field(default_factory=ParallelismRecipe)
    recompute_granularity: str = "none"
    recompute_modules: tuple[str, ...] | None = None
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False
    ddp_bucket_size: int | None = None
    apply_rope_fusion: bool = False
    bias_activation_fusion: bool = False
    bias_dropout_fusion: bool = False
    cross_entropy_loss_fusion: bool = False
    fp8: str = "none"
    fp8_recipe: str = "delayed"
    gradient_accumulation_fusion: bool = False
    reset_attention_mask: bool = False
    use_dualpipev: bool = False
    overlap_moe_expert_parallel_comm: bool = False
    seed: int = 1234
    perform_initialization: bool = True
    use_legacy_models: bool = False
    timing_log_level: int = 0
    log_straggler: bool = False
    record_memory_history: bool = False
    memory_snapshot_path: Path = Path("memory-snapshot.pickle")
    check_for_nan_in_loss_and_grad: bool = True
    check_for_spiky_loss: bool = False
    export_kd_teacher_load: Path | None = None
    export_kd_cfg: DistillationRecipe | None = None
    export_kd_teacher_outputs: Path | None = None
    export_quant_load: Path | None = None
    forward_only: bool = False

    @property
    def num_micro_batches(self) -> int:
        """Forward passes an optimiser step of one data-parallel rank."""
        data_parallel_size = parallel_state.get_data_parallel_world_size()
        return self.global_batch_size // (self.micro_batch_size * data_parallel_size)


def model_arguments(
    shape: ModelShape,
    seq_length: int,
    micro_batch_size: int = 1,
    parallelism: ParallelismRecipe | None = None,
    params_dtype: torch.dtype = torch.float32,
) -> Arguments:
    """Arguments for running a model with the implementation that is exact everywhere.

    Args:
        shape: of the model.
        seq_length: longest sequence that it will see, tokens.
        micro_batch_size: samples a forward pass.
        parallelism: sizes of the process groups; default: 1 each.
        params_dtype: that weights and activations have.
    """
    return Arguments(
        shape=shape,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        parallelism=parallelism or ParallelismRecipe(),
        params_dtype=params_dtype,
    )


def training_arguments(shape: ModelShape, seq_length: int, training: TrainingRecipe) -> Arguments:
    """Arguments for training a standard model as the recipe says."""
    training = resolved(training, shape)
    return Arguments(
        shape=shape,
        seq_length=seq_length,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=training.global_batch_size,
        params_dtype=platform.training_dtype(training.precision),
        # Quantised layers are Megatron-Core's own.
        transformer_impl="local"
        if shape.quantization is not None
        else platform.transformer_impl(training.transformer_impl),
        parallelism=training.parallelism,
        recompute_granularity=training.recompute_granularity,
        recompute_modules=training.recompute_modules,
        overlap_grad_reduce=bool(training.overlap_grad_reduce),
        overlap_param_gather=bool(training.overlap_param_gather),
        tp_comm_overlap=bool(training.tp_comm_overlap),
        ddp_bucket_size=training.ddp_bucket_size,
        apply_rope_fusion=bool(training.apply_rope_fusion),
        bias_activation_fusion=bool(training.bias_activation_fusion),
        bias_dropout_fusion=bool(training.bias_dropout_fusion),
        cross_entropy_loss_fusion=bool(training.cross_entropy_loss_fusion),
        fp8=training.fp8,
        fp8_recipe=training.fp8_recipe,
        gradient_accumulation_fusion=bool(training.gradient_accumulation_fusion),
        reset_attention_mask=training.reset_attention_mask,
        seed=training.seed,
        timing_log_level=training.timing_log_level,
        log_straggler=training.log_straggler,
        record_memory_history=training.record_memory_history,
        check_for_spiky_loss=True,
    )


def with_teacher(
    args: Arguments,
    teacher: Path,
    distillation: DistillationRecipe,
    teacher_outputs: Path | None = None,
) -> Arguments:
    """The same arguments for the model converted for distillation from the teacher's artifact.

    Without transformer-engine's cross entropy, which would overwrite the logits that are compared.

    Args:
        args: of the student alone.
        teacher: a `teacher` artifact.
        distillation: the recipe's section.
        teacher_outputs: a `teacher-outputs` artifact, which is then read in the teacher's place.
    """
    return replace(
        args,
        export_kd_teacher_load=teacher,
        export_kd_cfg=distillation,
        export_kd_teacher_outputs=teacher_outputs,
        cross_entropy_loss_fusion=False,
    )
