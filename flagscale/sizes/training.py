"""The memory of a training's ranks: weights, gradients, optimiser, teacher, activations, logits."""

from __future__ import annotations

from dataclasses import dataclass, field

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe
from flagscale.sizes.activations import (
    FLOAT32,
    Computation,
    backward_transient,
    layer_activations,
    norm_activations,
    stage_activations,
)
from flagscale.sizes.intermediate import Terms
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import first_projections, parameters, stage_layers
from flagscale.sizes.quantization import fake_weights, rounding

MOMENTS = 8  # bytes a parameter: Adam's two, in fp32
# Elements of the KD loss's fp32 buffers, and how many live at a time (`divergences.rows`; where
# bf16 has to be widened, two more).
KD_CHUNK = {"cpu": 2**18, "cuda": 2**24}
KD_BUFFERS = 6
# Bytes of the chunks of logits that a fused output layer holds (`linear_divergence`).
FUSED_CHUNKS = {"cpu": 26 * 2**20, "cuda": 2**30}
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
        distillation: the loss, where there is a teacher.
        device: `cuda` or `cpu`.
        quantized: whether the student's weights are rounded in every forward pass.
        outputs: codec of the teacher's outputs that are read in its place; None: it runs.
    """

    seq_length: int
    micro_batch_size: int = 1
    micro_batches: int = 1
    computation: Computation = field(default_factory=Computation)
    distributed_optimizer: bool = False
    distillation: DistillationRecipe = field(default_factory=DistillationRecipe)
    device: str = "cpu"
    quantized: bool = False
    outputs: str | None = None

    @property
    def runs_teacher(self) -> bool:
        """Whether the teacher's layers are there, where there is a teacher."""
        return self.outputs is None

    @property
    def teacher_logits(self) -> int:
        """1 where the teacher's logits are made too; 0 where a few tokens are read of them."""
        return int(self.outputs in (None, "hidden"))

    @property
    def fuses_output_layer(self) -> bool:
        """Whether the losses are made in the output layers."""
        wanted = self.distillation.fuse_output_layer
        return wanted is True or (wanted == "auto" and self.device == "cpu")


def training_peak(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    """Bytes of one rank at its fullest, in a step or a validation, by what they are for.

    Args:
        student: its shape.
        teacher: its shape; None: none is run.
        training: how it is trained.
        layout: how ranks share it.
        stage: of the pipeline.
    """
    kept = training_state(student, teacher, training, layout, stage)
    if training.quantized:
        kept["rounding"] = rounding(student, layout)
    phases = [
        kept | _step(student, teacher, training, layout, stage),
        kept | _validation(student, teacher, training, layout, stage),
        kept | {"save": saving(student, training, layout, stage)},
    ]
    if teacher is not None and not training.runs_teacher:  # it is compared with, before it goes
        weights = training.computation.dtype_bytes * parameters(teacher, layout, stage).total
        phases.append({"weights": kept["weights"], "teacher": weights})
    return max(phases, key=lambda parts: sum(parts.values()))


def training_state(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    """Bytes of one rank between two steps."""
    count = parameters(student, layout, stage)
    size = training.computation.dtype_bytes
    kept = {
        "weights": size * count.total,
        "gradients": FLOAT32 * count.total,
        "optimiser": (_master(size) + MOMENTS) * optimizer_share(student, training, layout, stage),
    }
    if teacher is not None:
        kept["teacher"] = size * _teacher_parameters(teacher, training, layout, stage)
        projected = _terms(student, teacher, training, layout).projection_parameters(stage)
        if projected:
            share = -(-projected // layout.optimizer_ranks)
            state = share if training.distributed_optimizer else projected
            kept["projections"] = (size + FLOAT32) * projected + (_master(size) + MOMENTS) * state
    if stage > 0:
        kept["received"] = _received(student, teacher, training, layout, stage)
    return kept


def _received(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> int:
    """Bytes of what came last from the stage before: it stays, with its gradient, till the next."""
    columns = student.hidden_size
    if teacher is not None:
        terms = _terms(student, teacher, training, layout)
        columns += teacher.hidden_size if training.runs_teacher else 0
        columns += terms.columns_received(stage)
    share = layout.tensor if layout.sequence_parallel else 1
    return 2 * training.computation.dtype_bytes * columns * _tokens(training, layout) // share


def _teacher_parameters(teacher: ModelShape, training: Training, layout: Layout, stage: int) -> int:
    """That a rank holds: all, or of hidden states that are read the output layer alone."""
    if training.runs_teacher:
        return parameters(teacher, layout, stage).total
    if training.teacher_logits and stage == layout.pipeline - 1:
        return teacher.padded_vocab_size * teacher.hidden_size // layout.tensor
    return 0


def _terms(student: ModelShape, teacher: ModelShape, training: Training, layout: Layout) -> Terms:
    dtype_bytes = training.computation.dtype_bytes
    return Terms(training.distillation, student, teacher, layout, dtype_bytes)


def optimizer_share(student: ModelShape, training: Training, layout: Layout, stage: int) -> int:
    """Parameters whose optimiser's state a rank has."""
    count = parameters(student, layout, stage)
    if not training.distributed_optimizer:
        return count.total
    dense, experts = -(-count.dense // layout.optimizer_ranks), count.experts
    return dense + -(-experts // layout.expert_optimizer_ranks)


def saved_bytes(student: ModelShape, training: Training) -> int:
    """Of a checkpoint of the training: weights, and the optimiser's state."""
    size = training.computation.dtype_bytes
    return (size + _master(size) + MOMENTS) * parameters(student).total


def saving(student: ModelShape, training: Training, layout: Layout, stage: int) -> int:
    """Bytes that are copied to write a checkpoint, of weights and the optimiser's state."""
    size, ranks = training.computation.dtype_bytes, 1
    if training.distributed_optimizer:
        ranks = layout.optimizer_ranks
    copied = first_projections(student, layout, stage)
    return size * copied + (_master(size) + MOMENTS) * copied // ranks


def _master(dtype_bytes: int) -> int:
    """Bytes a parameter of the fp32 copy that a step changes, where the model has it in bf16."""
    return 0 if dtype_bytes == FLOAT32 else FLOAT32


def _tokens(training: Training, layout: Layout) -> int:
    return training.seq_length * training.micro_batch_size // layout.context


def _step(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    computation, tokens = training.computation, _tokens(training, layout)
    layers = stage_layers(student, layout, stage)
    in_flight = min(layout.pipeline - stage, training.micro_batches)
    kept = in_flight * stage_activations(student, layers, layout, computation, tokens)
    if training.quantized:
        recompute = computation.recompute
        size = computation.dtype_bytes
        kept += in_flight * fake_weights(student, layout, stage, size, recompute)
    again = max(backward_transient(student, i, layout, computation, tokens) for i in layers)
    if computation.recompute == "full":
        again += max(layer_activations(student, i, layout, computation, tokens) for i in layers)
    scores = 0
    if teacher is not None:
        terms = _terms(student, teacher, training, layout)
        kept += in_flight * terms.kept(stage, tokens)
        scores = terms.transient(stage, tokens, training.seq_length)
        again = max(again, scores)
    loss = 0
    if stage == layout.pipeline - 1:
        kept += int(tokens * norm_activations(student, layout, computation))
        loss = _loss(student, teacher, training, layout, tokens)
        if scores:  # made when both models' logits are there
            logits = 2 * computation.dtype_bytes * student.padded_vocab_size // layout.tensor
            loss = max(loss, tokens * logits + scores)
    # The loss comes and goes before the backward pass reaches the layers.
    if loss > again:
        return {"activations": kept, "logits": loss}
    return {"activations": kept + again}


def _validation(
    student: ModelShape, teacher: ModelShape | None, training: Training, layout: Layout, stage: int
) -> Parts:
    """One layer at a time, and always the LM loss, which works on an fp32 copy of the logits."""
    computation, tokens = training.computation, _tokens(training, layout)
    models = [student]
    if teacher is not None and training.runs_teacher:
        models.append(teacher)
    layer = max(
        layer_activations(shape, i, layout, computation, tokens)
        for shape in models
        for i in stage_layers(shape, layout, stage)
    )
    if stage < layout.pipeline - 1:
        return {"activations": layer}
    logits = tokens * student.padded_vocab_size // layout.tensor
    if teacher is not None and training.fuses_output_layer:
        chunks = _fused_chunks(logits, training, with_lm_loss=True)
        return {"logits": chunks} if chunks > layer else {"activations": layer}
    copy = FLOAT32 * logits if teacher is not None or computation.dtype_bytes < FLOAT32 else 0
    both = (1 + (teacher is not None and training.teacher_logits)) * logits
    both = both * computation.dtype_bytes + copy
    return {"logits": both} if both > layer else {"activations": layer}


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
    if training.fuses_output_layer:
        # Made in fp32, beside the chunks; autograd is given it in the table's own type.
        gradient = FLOAT32 * table + size * tokens * student.hidden_size
        own = size * table if size < FLOAT32 else 0
        return gradient + max(
            _fused_chunks(logits, training, not training.distillation.skip_lm_loss), own
        )
    kept = (1 + training.teacher_logits) * size * logits
    if not training.distillation.skip_lm_loss:
        kept += FLOAT32 * logits
    chunk = FLOAT32 * min(logits, KD_CHUNK[training.device])
    return max(kept + KD_BUFFERS * chunk, kept - size * logits + gradient)


def _fused_chunks(logits: int, training: Training, with_lm_loss: bool) -> int:
    """Bytes of a fused output layer's chunks of logits, and of what makes the loss of them."""
    held = FLOAT32 * (3 if with_lm_loss else 2) * logits
    chunk = FLOAT32 * min(logits, KD_CHUNK[training.device])
    return min(held, FUSED_CHUNKS[training.device]) + KD_BUFFERS * chunk
