"""What cannot be trained together: options of different sections that exclude one another."""

from __future__ import annotations

from typing import Protocol

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.layer_pairs import check_layer_pairs
from flagscale.recipe.parallelism import ParallelismRecipe
from flagscale.recipe.student import StudentRecipe
from flagscale.recipe.training import TrainingRecipe

_OF_A_GPU = (
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
    "log_straggler",
    "record_memory_history",
)
# Megatron-Core 0.16.1 recomputes these with transformer-engine's help.
_OF_TRANSFORMER_ENGINE = {"layernorm", "mla_up_proj", "moe_act"}


class TrainingOptions(Protocol):
    """What matters here of a `TrainingRecipe`, or of the `Arguments` made of it."""

    @property
    def parallelism(self) -> ParallelismRecipe:
        """Sizes of the process groups."""

    @property
    def transformer_impl(self) -> str:
        """Which layers are used."""

    @property
    def reset_attention_mask(self) -> bool:
        """Whether the documents of a sample do not see one another."""

    @property
    def recompute_granularity(self) -> str:
        """What is computed again in the backward pass."""

    @property
    def recompute_modules(self) -> tuple[str, ...] | None:
        """Which modules are, where only some are."""

    @property
    def fp8(self) -> str:
        """Format of the matrix products' operands."""


def check_combination(
    distillation: DistillationRecipe,
    training: TrainingOptions,
    architecture: ArchitectureRecipe | None,
) -> None:
    """Refuse options that would not be honoured together.

    Args:
        distillation: the recipe's section.
        training: the recipe's section, or a run's arguments.
        architecture: the student's; None while it is not known, because it is the teacher's.

    Raises:
        ValueError: both options with their values, and what would be right.
    """
    known = architecture or ArchitectureRecipe()
    if distillation.loss != "none":
        _check_distillation(distillation, training, known)
    if _is_legacy(training):
        _check_legacy(training, known)
    if training.transformer_impl == "local":
        _check_local(training, known)
    ranks = training.parallelism.context_parallel_size
    if training.reset_attention_mask and ranks > 1:
        raise ValueError(
            "training.reset_attention_mask=true with training.parallelism.context_parallel_size="
            f"{ranks}: ranks hold halves of a sample, not of each document; set one of the two back"
        )
    if architecture is not None:
        _check_layout(training.parallelism, architecture)


def check_width_pruning(student: StudentRecipe, sizes: ParallelismRecipe) -> None:
    """Refuse to prune widths on ranks that share a tensor or the experts.

    Args:
        student: the recipe's section.
        sizes: of the process groups of the model steps.

    Raises:
        ValueError: the size, and what would do.
    """
    if not student.cuts_width:
        return
    for field in ("tensor_model_parallel_size", "expert_model_parallel_size"):
        if getattr(sizes, field) > 1:
            raise ValueError(
                f"student.init={student.init} with models.parallelism.{field}="
                f"{getattr(sizes, field)}: ModelOpt's mcore_minitron prunes whole tensors; set it "
                "to 1, and pipeline_model_parallel_size to as many ranks as the teacher needs"
            )


def check_on_cpu(training: TrainingRecipe, architecture: ArchitectureRecipe | None) -> None:
    """Refuse what only a GPU, or transformer-engine on it, can do.

    Args:
        training: the recipe's section, of a training without accelerators.
        architecture: the student's; None: the teacher's.

    Raises:
        ValueError: the field with its value.
    """
    asked: dict[str, object] = {name: True for name in _OF_A_GPU if getattr(training, name) is True}
    if training.fp8 != "none":
        asked["fp8"] = training.fp8
    if training.transformer_impl == "transformer_engine":
        asked["transformer_impl"] = training.transformer_impl
    modules = _OF_TRANSFORMER_ENGINE & {*(training.recompute_modules or ())}
    if modules:
        asked["recompute_modules"] = ", ".join(sorted(modules))
    named = [f"training.{name}={value}" for name, value in asked.items()]
    if architecture is not None and architecture.moe_grouped_gemm:
        named.append("student.architecture.moe_grouped_gemm=True")
    if named:
        raise ValueError(
            f"{', '.join(named)}: needs a GPU, and the training has none; leave it out, or give "
            "the training's pods accelerators"
        )


def _is_legacy(training: TrainingOptions) -> bool:
    """A run's arguments may ask for Megatron-LM's legacy model; no recipe can."""
    return getattr(training, "use_legacy_models", False)


def _check_legacy(training: TrainingOptions, architecture: ArchitectureRecipe) -> None:
    changed = architecture.model_dump(mode="json", exclude_defaults=True)
    for option, applies in (
        (f"student.architecture={changed}", not architecture.is_default),
        ("reset_attention_mask=true", training.reset_attention_mask),
        (f"fp8={training.fp8}", training.fp8 != "none"),
    ):
        if applies:
            raise ValueError(
                f"use_legacy_models=true with {option}: Megatron-LM's legacy model has none of it; "
                "leave one of the two out"
            )


def _check_distillation(
    distillation: DistillationRecipe, training: TrainingOptions, architecture: ArchitectureRecipe
) -> None:
    chunks = training.parallelism.virtual_pipeline_model_parallel_size
    reasons = {
        f"training.parallelism.virtual_pipeline_model_parallel_size={chunks}": (
            chunks is not None,
            "ModelOpt's distillation cannot be interleaved; leave it out",
        ),
        "use_legacy_models=true": (
            _is_legacy(training),
            "ModelOpt distils Megatron-Core's GPTModel only; set it to false",
        ),
        f"student.architecture.spec={architecture.spec}": (
            architecture.spec is not None,
            "what a spec of your own does under ModelOpt's conversion is not known; leave it out",
        ),
        f"student.architecture.mtp_num_layers={architecture.mtp_num_layers}": (
            architecture.mtp_num_layers is not None,
            "the output layer runs once a depth, and the distillation loss would take the wrong "
            "logits; leave it out",
        ),
    }
    for option, (applies, reason) in reasons.items():
        if applies:
            raise ValueError(
                f"{option} with distillation.loss={distillation.loss}: {reason}, or set "
                "distillation.loss=none"
            )
    check_layer_pairs(distillation, training, architecture)


def _check_local(training: TrainingOptions, architecture: ArchitectureRecipe) -> None:
    if training.fp8 != "none":
        raise ValueError(
            f"training.fp8={training.fp8} with training.transformer_impl=local: FP8 needs "
            "transformer_engine, on a GPU; set training.fp8=none"
        )
    if architecture.moe_grouped_gemm:
        raise ValueError(
            "student.architecture.moe_grouped_gemm=true with training.transformer_impl=local: it "
            "needs transformer_engine, on a GPU; set it to false"
        )
    tensor = training.parallelism.tensor_model_parallel_size
    if architecture.multi_latent_attention and tensor > 1:
        raise ValueError(
            "student.architecture.multi_latent_attention=true with training.transformer_impl=local "
            f"and training.parallelism.tensor_model_parallel_size={tensor}: gradients are whole "
            "with transformer_engine only; set tensor_model_parallel_size=1"
        )


def _check_layout(parallelism: ParallelismRecipe, architecture: ArchitectureRecipe) -> None:
    tensor, ranks = (
        parallelism.tensor_model_parallel_size,
        parallelism.expert_model_parallel_size,
    )
    where = "training.parallelism"
    experts = architecture.num_experts
    if ranks > 1 and (experts is None or experts % ranks):
        raise ValueError(
            f"{where}.expert_model_parallel_size={ranks} with student.architecture.num_experts="
            f"{experts}: must divide the experts; without experts it must be 1"
        )
    if experts is not None and tensor > 1 and ranks == 1:
        raise ValueError(
            f"student.architecture.num_experts={experts} with {where}.tensor_model_parallel_size="
            f"{tensor}: needs {where}.expert_model_parallel_size above 1, or experts' gradients "
            "would not be added up over tensor-parallel ranks"
        )
    if tensor > 1 and not parallelism.sequence_parallel:
        for option, value in (
            ("num_experts", architecture.num_experts),
            ("multi_latent_attention", architecture.multi_latent_attention),
        ):
            if value:
                raise ValueError(
                    f"student.architecture.{option}={value} with {where}."
                    f"tensor_model_parallel_size={tensor}: needs {where}.sequence_parallel=true"
                )
    if architecture.has_linear_block and parallelism.sequence_parallel:
        # Megatron-Core 0.16.1 pads the sequence where it means the hidden size.
        raise ValueError(
            "replace_with_linear in student.architecture.heterogeneous_layers_config with "
            f"{where}.sequence_parallel=true: Megatron-Core computes it without only; set "
            "sequence_parallel=false"
        )
