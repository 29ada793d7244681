"""What terms of the distillation loss inside the models cost a rank: projections, kept states."""

from __future__ import annotations

from collections.abc import Iterable

from flagscale.megatron.paired_layers import (
    AttentionPair,
    HiddenPair,
    Pair,
    attention_pairs,
    hidden_pairs,
)
from flagscale.megatron.pipeline_cargo import Cargo, cargo_of, leaving
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe
from flagscale.sizes.activations import FLOAT32, Computation
from flagscale.sizes.layout import Layout


def projection_parameters(
    distillation: DistillationRecipe,
    student: ModelShape,
    teacher: ModelShape,
    layout: Layout,
    stage: int,
) -> int:
    """Parameters of a stage's projections; every tensor-parallel rank has all of each."""
    return sum(
        (pair.student.width + 1) * pair.teacher.width
        for pair in hidden_pairs(distillation, student, teacher, layout.pipeline)
        if pair.stage == stage and pair.needs_projection
    )


def term_activations(
    distillation: DistillationRecipe,
    student: ModelShape,
    teacher: ModelShape,
    layout: Layout,
    stage: int,
    computation: Computation,
    tokens: int,
) -> int:
    """Bytes that one micro-batch leaves on a rank for the terms' backward pass.

    And what it received of other stages' outputs, and passes on of its own.

    Args:
        distillation: the recipe's section.
        student: its shape.
        teacher: its shape.
        layout: how ranks share the models.
        stage: of the pipeline.
        computation: how they are run.
        tokens: of the micro-batch, on this rank.
    """
    of_models = (distillation, student, teacher, layout.pipeline)
    hidden, attention = hidden_pairs(*of_models), attention_pairs(*of_models)
    share = layout.tensor if layout.sequence_parallel else 1
    size = computation.dtype_bytes
    kept = sum(_hidden(pair, size) for pair in hidden if pair.stage == stage) / share
    kept += sum(_attention(pair, size) for pair in attention if pair.stage == stage) / layout.tensor
    pairs: list[Pair] = [*hidden, *attention]
    cargo = cargo_of(
        pairs, layout.pipeline, size, layout.tensor, sequence_parallel=layout.sequence_parallel
    )
    columns = _columns(leaving(cargo, stage - 1)) + _columns(leaving(cargo, stage))
    return int(tokens * (kept + size * columns / share))


def _hidden(pair: HiddenPair, size: int) -> int:
    """Bytes a token of one pair: the difference; or both states in fp32, and the projected one."""
    width = pair.teacher.width
    copied = size < FLOAT32 or pair.needs_projection
    kept = FLOAT32 * width * (1 if pair.fit == "mse" else 1 + copied)
    return kept + (size * width if pair.needs_projection and size < FLOAT32 else 0)


def _attention(pair: AttentionPair, size: int) -> int:
    """Bytes a token of one pair: both models' queries, keys and values, each for every head."""
    return size * sum(layer.width for _, layer in pair.layers)


def _columns(cargo: Iterable[Cargo]) -> int:
    return sum(one.columns for one in cargo)
