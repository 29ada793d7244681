"""Whether models' sizes can be divided over the ranks that the recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable

from flagscale.errors import UserError
from flagscale.megatron.paired_layers import check_paired_layers
from flagscale.megatron.quantized import check_quantized
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.combinations import check_combination


def check_layouts(recipe: Recipe, teacher: ModelShape, student: ModelShape) -> None:
    """Refuse a recipe whose models cannot be divided as it asks, before its first step.

    Args:
        recipe: without a sweep, or one variant of it.
        teacher: its shape.
        student: its shape.

    Raises:
        UserError: a size of `models.parallelism` or `training`, what it does not divide, and the
            sizes that would do; sequences beyond a model's positions; or a student that cannot be
            quantised on such ranks.
    """
    models, training = recipe.models.sizes, recipe.training.parallelism
    seq_length, chunks = recipe.data.seq_length, training.virtual_pipeline_model_parallel_size or 1
    both = {"the student": student, "the teacher": teacher}
    teacher.check_seq_length(seq_length)
    student.check_seq_length(seq_length, "student")
    expert = models.expert_model_parallel_size
    if expert > 1 and all(shape.architecture.num_experts is None for shape in both.values()):
        raise UserError(
            f"models.parallelism.expert_model_parallel_size={expert}: neither teacher nor student "
            "has experts; leave it out"
        )
    for who, shape in both.items():
        check_layout(shape, models, seq_length, section="models", who=who)
        if who == "the student" or recipe.distillation.loss != "none":
            check_layout(shape, training, seq_length, chunks, who=who)
    try:  # the student's architecture may be the teacher's, which the recipe alone does not know
        check_combination(recipe.distillation, recipe.training, student.architecture)
    except ValueError as error:
        raise UserError(str(error)) from None
    if recipe.student.quantization is not None:
        name = recipe.student.quantization.recipe
        check_quantized(student, name, models, calibrates=True)
        check_quantized(student, name, training, calibrates=False)
    if recipe.distillation.loss != "none":
        check_paired_layers(recipe.distillation, student, teacher, training)


def sizes_for(shape: ModelShape, sizes: ParallelismRecipe) -> ParallelismRecipe:
    """The sizes for one model of several: to one without experts their ranks are copies."""
    if shape.architecture.num_experts is not None:
        return sizes
    return sizes.model_copy(update={"expert_model_parallel_size": 1})


def sizes_to_train(sizes: ParallelismRecipe, *shapes: ModelShape) -> ParallelismRecipe:
    """The sizes of ranks that only run models, for when they prove that these can be trained.

    Megatron-Core trains experts on tensor-parallel ranks that share the sequence too, and on no
    others; to run them it needs nothing of the kind.

    Args:
        sizes: that the models are run on.
        shapes: of the models that are trained together.
    """
    has_experts = any(shape.architecture.num_experts is not None for shape in shapes)
    if not has_experts or sizes.tensor_model_parallel_size == 1:
        return sizes
    return sizes.model_copy(update={"sequence_parallel": True})


def check_layout(
    shape: ModelShape,
    sizes: ParallelismRecipe,
    seq_length: int,
    chunks_per_stage: int = 1,
    section: str = "training",
    who: str | None = None,
    *,
    trains: bool = True,
) -> None:
    """Refuse what would fail in an assertion deep inside Megatron-Core.

    Args:
        shape: of the student or the teacher: both are divided in the same way.
        sizes: of the process groups.
        seq_length: tokens a sample.
        chunks_per_stage: of the model, on each pipeline rank.
        section: of the recipe that has the sizes: `training` or `models`, whose models are proven
            to train on as many ranks.
        who: which model it is, for people.
        trains: whether it gets gradients, in whichever section.

    Raises:
        UserError: which size is not divisible by which, and the sizes that would do.
    """
    if section == "models":
        sizes = sizes_to_train(sizes, shape)
    where = f"{section}.parallelism"
    whose = f"of {who or f'the model with {shape.num_layers} layers'}"
    _check_tensor(shape, sizes.tensor_model_parallel_size, where, whose)
    _check_pipeline(shape, sizes.pipeline_model_parallel_size, chunks_per_stage, where, whose)
    _check_sequence(sizes, seq_length, where)
    if shape.architecture.num_experts is not None:
        _check_experts(shape.architecture.num_experts, sizes, where, whose, trains=trains)


def _check_tensor(shape: ModelShape, tensor: int, where: str, whose: str) -> None:
    of_tensor = f"tensor_model_parallel_size={tensor}"
    widths = _widths(shape)
    heads, kinds = shape.num_attention_heads, _groups(shape)

    def fits(size: int) -> bool:
        return all(width % size == 0 for _, width in widths) and all(
            groups % size == 0 or size % groups == 0 for groups in kinds
        )

    remedy = f"; it can be {_choices(fits, heads)}"
    for name, width in widths:
        if width % tensor:
            raise UserError(
                f"{where}: {name}={width} ({whose}) is not divisible by {of_tensor}{remedy}"
            )
    for groups in kinds:
        if groups % tensor and tensor % groups:
            raise UserError(
                f"{where}: num_query_groups={groups} ({whose}) is neither a multiple nor a divisor "
                f"of {of_tensor}{remedy}"
            )


def _widths(shape: ModelShape) -> list[tuple[str, int]]:
    """What tensor-parallel ranks have equal shares of."""
    architecture = shape.architecture
    widths = [
        ("num_attention_heads", shape.num_attention_heads),
        ("ffn_hidden_size", shape.ffn_hidden_size),
        ("padded_vocab_size", shape.padded_vocab_size),
    ]
    shared = architecture.moe_shared_expert_intermediate_size
    if shared is not None:
        widths.append(("architecture.moe_shared_expert_intermediate_size", shared))
    for number, block in enumerate(_blocks(shape), start=1):
        if "ffn_hidden_size" in block["mlp"]:
            name = f"ffn_hidden_size of heterogeneous_layers_config, layer {number}"
            widths.append((name, block["mlp"]["ffn_hidden_size"]))
    return widths


def _groups(shape: ModelShape) -> list[int]:
    """Key/value heads of each kind of layer."""
    parts = [block["attention"] for block in _blocks(shape)]
    own = {part["num_query_groups"] for part in parts if "num_query_groups" in part}
    return [shape.num_query_groups, *sorted(own)]


def _check_pipeline(
    shape: ModelShape, stages: int, chunks_per_stage: int, where: str, whose: str
) -> None:
    layers, chunks = shape.num_layers, stages * chunks_per_stage
    if layers % chunks:
        choices = _choices(lambda size: layers % (size * chunks_per_stage) == 0, layers)
        remedy = (
            f"pipeline_model_parallel_size can be {choices}"
            if choices
            else f"{chunks_per_stage} chunks a stage divide them on no number of stages"
        )
        raise UserError(
            f"{where}: num_layers={layers} ({whose}) is not divisible by the pipeline's {chunks} "
            f"chunks (pipeline_model_parallel_size={stages}, {chunks_per_stage} each); {remedy}"
        )
    further_tokens = shape.architecture.mtp_num_layers
    if further_tokens and chunks > 1 and not shape.untie_embeddings_and_output_weights:
        raise UserError(
            f"architecture.mtp_num_layers={further_tokens} with {where}."
            f"pipeline_model_parallel_size={stages} and tied embeddings: Megatron-Core cannot save "
            "the last stage's copy of the embedding; leave one of the three out"
        )


def _check_sequence(sizes: ParallelismRecipe, seq_length: int, where: str) -> None:
    tensor, context = sizes.tensor_model_parallel_size, sizes.context_parallel_size
    parts = tensor * context if sizes.sequence_parallel else 1
    halves = 2 * context if context > 1 else 1
    for size, by in (
        (halves, f"2 x context_parallel_size={halves}"),
        (parts, f"the {parts} tensor x context parallel ranks of sequence_parallel"),
    ):
        if seq_length % size:
            raise UserError(
                f"{where}: data.seq_length={seq_length} is not divisible by {by}; choose a "
                f"multiple of {math.lcm(halves, parts)}"
            )


def _check_experts(
    experts: int, sizes: ParallelismRecipe, where: str, whose: str, *, trains: bool
) -> None:
    tensor, expert_ranks = sizes.tensor_model_parallel_size, sizes.expert_model_parallel_size
    if experts % expert_ranks:
        choices = _choices(lambda size: experts % size == 0, experts)
        raise UserError(
            f"{where}: architecture.num_experts={experts} ({whose}) is not divisible by "
            f"expert_model_parallel_size={expert_ranks}; it can be {choices}"
        )
    if tensor == 1 or not trains:
        return
    what = (
        f"{where}: architecture.num_experts={experts} ({whose}) with tensor_model_parallel_size="
        f"{tensor}"
    )
    if not sizes.sequence_parallel:
        raise UserError(
            f"{what}: Megatron-Core trains experts on tensor-parallel ranks with "
            "sequence_parallel=true only"
        )
    if expert_ranks == 1:
        # Each rank holds whole experts (see platform.runtime) and sees its share of the tokens.
        raise UserError(
            f"{what} and expert_model_parallel_size=1: Megatron-Core would not add up the experts' "
            "gradients of tensor-parallel ranks; set expert_model_parallel_size above 1"
        )


def _blocks(shape: ModelShape) -> list[dict[str, dict[str, int]]]:
    config = shape.architecture.heterogeneous_layers_config or {}
    blocks: list[dict[str, dict[str, int]]] = config.get("block_configs", [])
    return blocks


def _choices(fits: Callable[[int], bool], most: int) -> str:
    """Sizes that fit, for people: `1, 2 or 4`."""
    *others, last = [str(size) for size in range(1, most + 1) if fits(size)] or [""]
    return f"{', '.join(others)} or {last}" if others else last
