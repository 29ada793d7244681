"""The memory of a training's ranks: weights, gradients, optimiser, teacher, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass, field

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.activations import (
    FLOAT32,
    Computation,
    norm_activations,
    stage_activations,
)
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import parameters, stage_layers

MOMENTS = 8  # bytes a parameter: Adam's two, in fp32
# Elements of the KD loss's fp32 buffers, and how many live at a time (`kl_divergence`).
KD_CHUNK = {"cpu": 2**18, "cuda": 2**26}
KD_BUFFERS = 4
Parts = dict[str, int]


@dataclass(frozen=True)
class Training:
    """What of a training's recipe decides on its memory.

    Attributes:
        seq_length: tokens a sample.
        micro_batch_size: samples a forward pass.
        micro_batches: forward passes a step of one data-parallel rank.
        computation: dtype and layers.
        distributed_optimizer: its state is shared by the ranks with equal weights.
        skip_lm_loss: no LM loss beside the KD loss.
        device: `cuda` or `cpu`.
    """

    seq_length: int
    micro_batch_size: int = 1
    micro_batches: int = 1
    computation: Computation = field(default_factory=Computation)
    distributed_optimizer: bool = False
    skip_lm_loss: bool = True
    device: str = "cpu"


def training_peak(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    """Bytes of one rank while it trains, by what they are for.

    Args:
        student: its shape.
        teacher: its shape; None: none is run.
        training: how it is trained.
        layout: how ranks share it.
        stage: of the pipeline.
    """
    kept = training_state(student, teacher, training, layout, stage)
    tokens = training.seq_length * training.micro_batch_size // layout.context
    in_flight = min(layout.pipeline - stage, training.micro_batches)
    layers = stage_layers(student, layout, stage)
    kept["activations"] = in_flight * stage_activations(
        student, layers, layout, training.computation, tokens
    )
    if stage == layout.pipeline - 1:
        norm = norm_activations(student, layout, training.computation)
        kept["activations"] += int(tokens * norm)
        kept["logits"] = _loss(student, teacher, training, layout, tokens)
    return kept


def training_state(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    """Bytes of one rank between two steps."""
    count = parameters(student, layout, stage)
    size = training.computation.dtype_bytes
    master = 0 if size == FLOAT32 else FLOAT32
    dense, experts = count.dense, count.experts
    if training.distributed_optimizer:
        dense = -(-dense // layout.optimizer_ranks)
        experts = -(-experts // layout.expert_optimizer_ranks)
    kept = {
        "weights": size * count.total,
        "gradients": FLOAT32 * count.total,
        "optimiser": (master + MOMENTS) * (dense + experts),
    }
    if teacher is not None:
        kept["teacher"] = size * parameters(teacher, layout, stage).total
    return kept


def _loss(
    student: ModelShape,
    teacher: ModelShape | None,
    training: Training,
    layout: Layout,
    tokens: int,
) -> int:
    """Bytes of the logits, and of what makes losses and gradients of them."""
    size = training.computation.dtype_bytes
    logits = tokens * student.padded_vocab_size // layout.tensor
    table = parameters(student, layout, layout.pipeline - 1).table
    # The gradient of the output's table, before it is added to the others.
    gradient = size * (table + tokens * student.hidden_size)
    if teacher is None:
        return FLOAT32 * logits + max((size if size < FLOAT32 else 0) * logits, gradient)
    kept = 2 * size * logits
    if not training.skip_lm_loss:
        kept += FLOAT32 * logits
    chunk = FLOAT32 * min(logits, KD_CHUNK[training.device])
    return max(kept + KD_BUFFERS * chunk, kept - size * logits + gradient)
