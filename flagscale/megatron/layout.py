"""Whether a model's sizes can be divided over the ranks that the recipe asks for."""

from __future__ import annotations

import difflib
import re

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, ParallelismRecipe

_MODULES = ("embedding", "decoder", "output_layer")
# Megatron-Core's names of what they hold; a model has those of its kind.
_PARTS = (
    *("word_embeddings", "embedding_dropout", "layers", "final_layernorm"),
    *("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp"),
    *("linear_qkv", "core_attention", "linear_proj", "q_layernorm", "k_layernorm"),
    *("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj", "kv_layernorm"),
    *("linear_fc1", "linear_fc2", "router", "experts", "local_experts", "shared_experts"),
)


def check_layout(
    shape: ModelShape,
    sizes: ParallelismRecipe,
    seq_length: int,
    chunks_per_stage: int = 1,
    section: str = "training",
) -> None:
    """Refuse what would fail in an assertion deep inside Megatron-Core.

    Args:
        shape: of the student or the teacher: both are divided in the same way.
        sizes: of the process groups.
        seq_length: tokens a sample.
        chunks_per_stage: of the model, on each pipeline rank.
        section: of the recipe that has the sizes: `training` or `models`.

    Raises:
        UserError: which size is not divisible by which.
    """
    tensor, context = sizes.tensor_model_parallel_size, sizes.context_parallel_size
    chunks = sizes.pipeline_model_parallel_size * chunks_per_stage
    parts = tensor * context if sizes.sequence_parallel else 1
    halves = 2 * context if context > 1 else 1
    of_tensor = f"tensor_model_parallel_size={tensor}"
    wanted = [
        ("num_layers", shape.num_layers, f"the pipeline's {chunks} chunks", chunks),
        ("num_attention_heads", shape.num_attention_heads, of_tensor, tensor),
        ("ffn_hidden_size", shape.ffn_hidden_size, of_tensor, tensor),
        ("padded_vocab_size", shape.padded_vocab_size, of_tensor, tensor),
        ("seq_length", seq_length, f"2 x context_parallel_size={halves}", halves),
        ("seq_length", seq_length, f"the {parts} tensor x context parallel ranks", parts),
    ]
    for name, value, by, size in wanted:
        if value % size:
            raise UserError(
                f"{section}.parallelism: {name}={value} (of the model with {shape.num_layers} "
                f"layers) is not divisible by {by}"
            )
    groups = shape.num_query_groups
    if groups % tensor and tensor % groups:
        raise UserError(
            f"{section}.parallelism: num_query_groups={groups} is neither a multiple nor a divisor "
            f"of {of_tensor}"
        )
    if shape.architecture.num_experts is not None:
        _check_experts(shape.architecture.num_experts, sizes)
    further_tokens = shape.architecture.mtp_num_layers
    if further_tokens and chunks > 1 and not shape.untie_embeddings_and_output_weights:
        raise UserError(
            f"architecture.mtp_num_layers={further_tokens} with pipeline_model_parallel_size="
            f"{sizes.pipeline_model_parallel_size} and tied embeddings: Megatron-Core cannot save "
            "the last stage's copy of the embedding; leave one of the three out"
        )


def _check_experts(experts: int, sizes: ParallelismRecipe) -> None:
    tensor, expert_ranks = sizes.tensor_model_parallel_size, sizes.expert_model_parallel_size
    if experts % expert_ranks:
        raise UserError(
            f"architecture.num_experts={experts} is not divisible by "
            f"expert_model_parallel_size={expert_ranks}"
        )
    if tensor > 1 and not sizes.sequence_parallel:
        raise UserError(
            f"architecture.num_experts={experts} with tensor_model_parallel_size="
            f"{tensor}: Megatron-Core trains experts on tensor-parallel "
            "ranks with sequence_parallel=true only"
        )
    if tensor > 1 and expert_ranks == 1:
        # Each rank holds whole experts (see platform.runtime) and sees its share of the tokens.
        raise UserError(
            f"architecture.num_experts={experts} with tensor_model_parallel_size="
            f"{tensor} and expert_model_parallel_size=1: Megatron-Core "
            "would not add up the experts' gradients of tensor-parallel ranks; set "
            "expert_model_parallel_size above 1"
        )


def _is_known(part: str) -> bool:
    return part in _PARTS or part.isdecimal()


def check_intermediate_layers(
    distillation: DistillationRecipe,
    student: ModelShape,
    teacher: ModelShape,
    sizes: ParallelismRecipe,
) -> None:
    """Refuse pairs of layers that do not exist, or not where losses are computed.

    Raises:
        UserError: which layer, of which model, and the layers to choose from.
    """
    stages = sizes.pipeline_model_parallel_size
    for student_layer, teacher_layer, *_ in distillation.intermediate_layer_pairs:
        for who, shape, name in (
            ("student", student, student_layer),
            ("teacher", teacher, teacher_layer),
        ):
            where = f"distillation.intermediate_layer_pairs: {name!r} of the {who}"
            first = shape.num_layers - shape.num_layers // stages
            layer = re.match(r"decoder\.layers\.(\d+)(?:\.|$)", name)
            if name.split(".")[0] not in _MODULES:
                raise UserError(f"{where}: must begin with one of {', '.join(_MODULES)}")
            unknown = [part for part in name.split(".")[1:] if not _is_known(part)]
            if unknown and shape.architecture.spec is None:
                near = difflib.get_close_matches(unknown[0], _PARTS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_PARTS)}"
                raise UserError(f"{where}: no module is called {unknown[0]}; {hint}")
            if layer and int(layer[1]) >= shape.num_layers:
                raise UserError(f"{where}: it has layers 0 to {shape.num_layers - 1}")
            if (name.startswith("embedding") and stages > 1) or (layer and int(layer[1]) < first):
                raise UserError(
                    f"{where}: not on the last of {stages} pipeline stages, which holds layers "
                    f"{first} to {shape.num_layers - 1} and is where losses are computed; pair "
                    "those, or use fewer stages"
                )
