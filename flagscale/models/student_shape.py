"""The student's shape, from the teacher's and the recipe."""

from __future__ import annotations

from dataclasses import replace

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape, check_divides
from flagscale.models.cut_shape import check_cut, cut_shape
from flagscale.models.targets import meet_targets
from flagscale.recipe import ArchitectureRecipe, StudentRecipe


def num_layers(teacher_layers: int, student: StudentRecipe) -> int:
    """How many layers the student has.

    Raises:
        UserError: more than the teacher.
    """
    count = student.num_layers or len(student.keep_layers or ()) or teacher_layers
    if count > teacher_layers:
        raise UserError(
            f"student.num_layers={count}: the teacher has only {teacher_layers} layers; "
            f"choose at most {teacher_layers}"
        )
    return count


def layers_to_keep(teacher_layers: int, student: StudentRecipe) -> tuple[int, ...]:
    """Which of the teacher's layers, counted from 0, the student starts from; all for `same`.

    Those of `keep_layers`, else spread evenly, first and last included. Not where they are measured
    (`flagscale.evaluation.measure.layer_importance`).

    Raises:
        UserError: more layers than the teacher has, or a layer that it does not have.
    """
    count = num_layers(teacher_layers, student)
    if student.keep_layers is not None:
        if student.keep_layers[-1] >= teacher_layers:
            raise UserError(
                f"student.keep_layers={list(student.keep_layers)}: the teacher's layers are "
                f"0 to {teacher_layers - 1}"
            )
        return student.keep_layers
    if count == 1:
        return (0,)
    return tuple(round(i * (teacher_layers - 1) / (count - 1)) for i in range(count))


def student_shape(teacher: ModelShape, student: StudentRecipe) -> ModelShape:
    """The shape that the recipe gives the student of `teacher`.

    Heads keep the teacher's width if that is independent of the hidden size (Qwen3); else it
    follows from the student's hidden size and heads. Latent attention has neither key/value groups
    nor biases, and rotary embeddings of its own, without Llama 3's scaling. A teacher's experts
    are the student's, unless the recipe gives an architecture.

    Raises:
        ValueError: the student is a model of its own.
        UserError: deeper than the teacher, a layer that it lacks, head counts that do not divide,
            or not one block configuration a layer.
    """
    if student.init == "pretrained":
        raise ValueError("init=pretrained: the shape is the source's, not the teacher's")
    student = meet_targets(teacher, student)
    layers = num_layers(teacher.num_layers, student)
    if student.keep_layers is not None:
        layers_to_keep(teacher.num_layers, student)  # the teacher has them
    if student.init != "scratch":
        check_cut(teacher, student.given_widths)
        return cut_shape(teacher, student.given_widths | {"num_layers": layers})
    hidden = student.hidden_size or teacher.hidden_size
    heads = student.num_attention_heads or teacher.num_attention_heads
    groups = student.num_query_groups or teacher.num_query_groups
    if heads % groups:
        raise UserError(
            f"student.num_attention_heads={heads} is not divisible by num_query_groups={groups} "
            "(what the recipe leaves out is the teacher's)"
        )
    kv_channels = teacher.kv_channels
    if kv_channels * teacher.num_attention_heads == teacher.hidden_size:
        check_divides("student", "hidden_size", hidden, heads)
        kv_channels = hidden // heads
    if kv_channels % 2:
        raise UserError(
            f"student.hidden_size={hidden} over {heads} heads makes heads of {kv_channels} "
            "channels; rotary embeddings need an even number"
        )
    shape = replace(
        teacher,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=student.ffn_hidden_size or teacher.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=kv_channels,
    )
    if student.architecture is not None:
        return _with_architecture(shape, student.architecture)
    width = teacher.architecture.moe_ffn_hidden_size
    if student.ffn_hidden_size is not None and width is not None:
        raise UserError(
            f"student.ffn_hidden_size={student.ffn_hidden_size} has no effect: the teacher has "
            f"experts of width {width}; give student.architecture with num_experts, "
            "moe_router_topk and moe_ffn_hidden_size"
        )
    return shape


def _with_architecture(shape: ModelShape, architecture: ArchitectureRecipe) -> ModelShape:
    shape = replace(shape, architecture=architecture)
    if architecture.qk_layernorm is not None:
        shape = replace(shape, qk_layernorm=architecture.qk_layernorm)
    if architecture.multi_latent_attention:
        shape = replace(
            shape,
            num_query_groups=shape.num_attention_heads,
            add_qkv_bias=False,
            use_rope_scaling=False,
        )
    if architecture.heterogeneous_layers_config is not None:
        blocks = len(architecture.heterogeneous_layers_config["block_configs"])
        if blocks != shape.num_layers:
            raise UserError(
                f"student.architecture.heterogeneous_layers_config has {blocks} block_configs, "
                f"but the student has {shape.num_layers} layers: give one a layer"
            )
    return shape
