"""The memory of the steps that hold models and train none, of one rank.

On a GPU a model has its source's dtype there; on a CPU it is widened to fp32, which is exact and,
without bf16 units, faster. None of these steps holds more than the teacher and one student.
"""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.activations import FLOAT32, Computation, layer_activations, stage_activations
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import parameters, stage_layers
from flagscale.sizes.training import KD_BUFFERS, KD_CHUNK, Parts

PROOF_TOKENS = 128  # at most, of the fixed text that proofs run on
SHARD = 5e9  # bytes of an exported file


@dataclass(frozen=True)
class ModelSteps:
    """What decides on the memory of these steps.

    Attributes:
        teacher: its shape.
        student: its shape.
        source_bytes: of a weight in artifacts: the source's dtype.
        export_bytes: of a weight in the exported model.
        seq_length: tokens a sample.
        evaluated: sequences of a forward pass of evaluate.
        device: `cuda` or `cpu`.
    """

    teacher: ModelShape
    student: ModelShape
    source_bytes: int
    export_bytes: int
    seq_length: int
    evaluated: int = 4
    device: str = "cpu"

    @property
    def computed_bytes(self) -> int:
        """Of a weight of a loaded model."""
        return FLOAT32 if self.device == "cpu" else self.source_bytes


def prepare_teacher(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """The teacher, as its source has it, then as it computes; and a sample through it."""
    weights = steps.computed_bytes * parameters(steps.teacher, layout, stage).total
    return {"weights": weights, **_forward(steps, [steps.teacher], 1, layout, stage)}


def convert_student(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """Teacher and student with one sample's activations; gradients go as soon as they are seen."""
    size = steps.computed_bytes
    student = parameters(steps.student, layout, stage)
    computation = Computation(size)
    layers = stage_layers(steps.student, layout, stage)
    parts = {
        "weights": size * student.total,
        "teacher": size * parameters(steps.teacher, layout, stage).total,
        "activations": stage_activations(
            steps.student, layers, layout, computation, steps.seq_length
        ),
    }
    if stage == layout.pipeline - 1:
        logits = steps.seq_length * steps.student.padded_vocab_size // layout.tensor
        chunks = KD_BUFFERS * FLOAT32 * min(logits, KD_CHUNK[steps.device])
        parts["logits"] = (2 * size + FLOAT32) * logits + max(chunks, size * student.table)
    return parts


def evaluate(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """The teacher and one student at a time, each with a batch's logits."""
    size = steps.computed_bytes
    return {
        "weights": size * parameters(steps.student, layout, stage).total,
        "teacher": size * parameters(steps.teacher, layout, stage).total,
        **_forward(steps, [steps.teacher, steps.student], steps.evaluated, layout, stage),
    }


def export_student(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """No model: a file's tensors at a time; then the proof, of the model and of a layer."""
    student = parameters(steps.student, layout, stage)
    shard = min(int(SHARD), steps.export_bytes * student.total)
    proof = {
        "weights": steps.computed_bytes * student.total,
        **_forward(steps, [steps.student], 1, layout, stage, PROOF_TOKENS),
    }
    return max({"save": shard}, proof, key=lambda parts: sum(parts.values()))


def _forward(
    steps: ModelSteps,
    shapes: list[ModelShape],
    sequences: int,
    layout: Layout,
    stage: int,
    seq_length: int | None = None,
) -> Parts:
    """One layer at a time; then all models' logits."""
    tokens = sequences * (seq_length or steps.seq_length)
    computation = Computation(steps.computed_bytes)
    layer = max(
        layer_activations(shape, index, layout, computation, tokens)
        for shape in shapes
        for index in stage_layers(shape, layout, stage)
    )
    if stage < layout.pipeline - 1:
        return {"activations": layer}
    logits = tokens * shapes[0].padded_vocab_size // layout.tensor
    chunks = KD_BUFFERS * FLOAT32 * min(logits, KD_CHUNK[steps.device])
    held = len(shapes) * steps.computed_bytes * logits + chunks
    return {"logits": held} if held > layer else {"activations": layer}
