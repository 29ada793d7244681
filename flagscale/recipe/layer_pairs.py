"""Which layers' outputs a distillation term can be made of, by how the student is trained."""

from __future__ import annotations

import re
from typing import Protocol

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.parallelism import ParallelismRecipe

# A layer, and what inside it gives one vector a token: [s, b, ...].
OF_HIDDEN_SIZE = (
    *("input_layernorm", "self_attention", "self_attention.linear_proj"),
    *("pre_mlp_layernorm", "mlp", "mlp.linear_fc2"),
)
# Of other widths, and with its channels spread over tensor-parallel ranks.
SPLIT_OVER_TENSOR_RANKS = (
    "self_attention.linear_qkv",
    "self_attention.core_attention",
    "mlp.linear_fc1",
)
_LAYER = re.compile(r"decoder\.layers\.(\d+)(?:\.(.+))?")
_SELECTIVE = ("core_attn",)  # Megatron-Core's default of `recompute_modules`
# Of a module that is recomputed, the backward pass knows the output, and nothing from inside it.
_INSIDE = {"mlp": "mlp.", "moe": "mlp."}


class TrainedSo(Protocol):
    """What matters here of a `TrainingRecipe`, or of the `Arguments` made of it."""

    @property
    def parallelism(self) -> ParallelismRecipe:
        """Sizes of the process groups."""

    @property
    def transformer_impl(self) -> str:
        """Which layers are used."""

    @property
    def recompute_granularity(self) -> str:
        """What is computed again in the backward pass."""

    @property
    def recompute_modules(self) -> tuple[str, ...] | None:
        """Which modules are, where only some are."""


def layer_of(name: str) -> tuple[int, str] | None:
    """Number of a module's layer, from 0 over the whole model, and its name inside it, or "".

    None for what is in no layer.
    """
    layer = _LAYER.fullmatch(name)
    return None if layer is None else (int(layer[1]), layer[2] or "")


def check_layer_pairs(
    distillation: DistillationRecipe, training: TrainedSo, architecture: ArchitectureRecipe
) -> None:
    """Refuse terms whose value or gradient would be wrong under the training's other options.

    Args:
        distillation: the recipe's section.
        training: the recipe's section, or a run's arguments.
        architecture: the student's.

    Raises:
        ValueError: both options with their values, and what would be right.
    """
    for student, teacher, *_ in distillation.intermediate_layer_pairs:
        for name in (student, teacher):
            _check_tensor_ranks(name, training.parallelism.tensor_model_parallel_size)
            if not architecture.multi_latent_attention:
                _check_norm(name, training.transformer_impl)
        _check_recompute(student, training)
    if distillation.attention_layer_pairs:
        _check_attention(distillation, training)


def _check_tensor_ranks(name: str, tensor: int) -> None:
    layer = layer_of(name)
    if tensor > 1 and layer is not None and layer[1] in SPLIT_OVER_TENSOR_RANKS:
        raise ValueError(
            f"distillation.intermediate_layer_pairs: {name} with training.parallelism."
            f"tensor_model_parallel_size={tensor}: each rank has a part of its channels, and "
            "the loss would be of that part; pair layers, norms, self_attention, mlp or their "
            "last projections (linear_proj, linear_fc2)"
        )


def _check_norm(name: str, transformer_impl: str) -> None:
    if transformer_impl == "transformer_engine" and name.endswith(".input_layernorm"):
        raise ValueError(
            f"distillation.intermediate_layer_pairs: {name} with training.transformer_impl="
            "transformer_engine: there the norm is a part of the projection behind it; pair the "
            "layer before, whose output it normalises"
        )


def _check_recompute(name: str, training: TrainedSo) -> None:
    granularity, inside = training.recompute_granularity, (layer_of(name) or (0, ""))[1]
    if granularity == "full" and inside:
        raise ValueError(
            f"distillation.intermediate_layer_pairs: {name} with training.recompute_granularity="
            "full: what is inside a layer is forgotten, and the term would have no gradient; pair "
            "whole layers, or set recompute_granularity to selective or none"
        )
    modules = _recomputed(training)
    for module in modules:
        if inside.startswith(_INSIDE.get(module, "\0")) or (
            module == "layernorm" and inside.endswith("layernorm")
        ):
            raise ValueError(
                f"distillation.intermediate_layer_pairs: {name} with training.recompute_modules="
                f"{', '.join(modules)}: its output is forgotten, and the term would have no "
                f"gradient; leave {module} out, or pair whole layers"
            )


def _check_attention(distillation: DistillationRecipe, training: TrainedSo) -> None:
    tensor = training.parallelism.tensor_model_parallel_size
    heads = distillation.attention_relation_heads
    if heads is not None and heads % tensor:
        raise ValueError(
            f"distillation.attention_relation_heads={heads} with training.parallelism."
            f"tensor_model_parallel_size={tensor}: each rank has whole heads; choose a multiple"
        )
    granularity = training.recompute_granularity
    if granularity == "full" or "core_attn" in _recomputed(training):
        raise ValueError(
            "distillation.attention_layer_pairs with training.recompute_granularity="
            f"{granularity} of core_attn: queries, keys and values are forgotten, and the term "
            "would have no gradient; set recompute_granularity=none, or selective with "
            "recompute_modules that leave core_attn out"
        )


def _recomputed(training: TrainedSo) -> tuple[str, ...]:
    """The modules that are, where only some are."""
    if training.recompute_granularity != "selective":
        return ()
    return _SELECTIVE if training.recompute_modules is None else training.recompute_modules
