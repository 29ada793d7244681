"""The memory of the steps that hold models and train none, of one rank.

On a GPU a model has its source's dtype there; on a CPU it is widened to fp32, which is exact and,
without bf16 units, faster. Only convert-student holds two models at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.activations import (
    FLOAT32,
    Computation,
    backward_transient,
    forward_transient,
    stage_activations,
)
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import (
    first_projections,
    parameters,
    stage_layers,
)
from flagscale.sizes.training import KD_BUFFERS, KD_CHUNK, Parts

PROOF_TOKENS = 128  # about, of the fixed text that proofs run on
SHARD = 5e9  # bytes of an exported file
# Elements of evaluate's buffers (`evaluation.fidelity`, `token_figures`): a model's logits, and
# what figures are made of.
_LOGITS = {"cpu": 2**23, "cuda": 2**26}
_FIGURES = {"cpu": 2**19, "cuda": 2**26}


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
        proof_tokens: of the fixed text.
        measured_tokens: that the importance of layers is measured on; 0: it is not.
        fitted_tokens: that kept layers are fitted on; 0: they are not.
        student_source_bytes: of a weight of a student that is a model of its own.
    """

    teacher: ModelShape
    student: ModelShape
    source_bytes: int
    export_bytes: int
    seq_length: int
    evaluated: int = 4
    device: str = "cpu"
    proof_tokens: int = PROOF_TOKENS
    measured_tokens: int = 0
    fitted_tokens: int = 0
    student_source_bytes: int | None = None

    @property
    def computed_bytes(self) -> int:
        """Of a weight of a loaded model."""
        return FLOAT32 if self.device == "cpu" else self.source_bytes


def prepare_teacher(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """The teacher as its source has it; then as it computes, with a validation sample.

    On a CPU also the proof, on the first rank: see `proof_bytes`.
    """
    shape, size = steps.teacher, steps.computed_bytes
    weights = {"weights": size * parameters(shape, layout, stage).total}
    layer = _layer(shape, layout, stage, Computation(size), steps.seq_length)
    phases = [
        _saved(shape, steps, layout, stage),
        _loaded(shape, steps, layout, stage),
        weights | {"activations": layer},
        weights | {"logits": _gathered(shape, steps, layout, stage) + _hidden(shape, steps)},
    ]
    if stage == layout.pipeline - 1:
        logits = steps.seq_length * shape.padded_vocab_size // layout.tensor
        widened = 0 if size == FLOAT32 else FLOAT32 * logits
        phases.append(weights | {"logits": size * logits + widened})
    if stage == 0 and steps.device == "cpu":
        phases.append({"logits": proof_bytes(shape, steps)})
    return _fullest(phases)


def proof_bytes(shape: ModelShape, steps: ModelSteps) -> int:
    """Bytes of the host where the first rank compares a model with transformers' own.

    transformers' layers come one by one, in fp32 beside what is read of the file; the largest is a
    table. Then logits are compared: ours, transformers' of its own states and of ours, and the
    logarithms of two.
    """
    logits = FLOAT32 * steps.proof_tokens * shape.padded_vocab_size
    table = (FLOAT32 + steps.source_bytes) * shape.padded_vocab_size * shape.hidden_size
    return max(5 * logits, table + 2 * logits) + 2 * _hidden(shape, steps)


def convert_student(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """Teacher and student with one sample's activations; gradients go as soon as they are seen.

    A student that is a model of its own is first imported and proven, as the teacher was. One that
    is cut is measured and fitted first: the teacher alone with what goes into each of its layers,
    then the student with what each of its layers is fitted to.
    """
    phases = _calibrated(steps, layout, stage)
    if steps.student_source_bytes is not None:
        steps = replace(steps, source_bytes=steps.student_source_bytes)
        phases = [prepare_teacher(replace(steps, teacher=steps.student), layout, stage)]
    size = steps.computed_bytes
    student = parameters(steps.student, layout, stage)
    computation = Computation(size)
    layers = stage_layers(steps.student, layout, stage)
    held = {
        "weights": size * student.total,
        "teacher": size * parameters(steps.teacher, layout, stage).total,
    }
    step = {
        "activations": stage_activations(
            steps.student, layers, layout, computation, steps.seq_length
        )
        + max(
            backward_transient(steps.student, index, layout, computation, steps.seq_length)
            for index in layers
        )
    }
    phases.append(held | step)
    if stage == layout.pipeline - 1:
        logits = steps.seq_length * steps.student.padded_vocab_size // layout.tensor
        chunks = KD_BUFFERS * FLOAT32 * min(logits, KD_CHUNK[steps.device])
        # Both models', those of before the student was stored, and what the LM loss works on.
        loss = (3 * size + FLOAT32) * logits + max(chunks, size * student.table)
        kept = stage_activations(steps.student, layers, layout, computation, steps.seq_length)
        phases.append(held | {"activations": kept, "logits": loss})
    return _fullest(phases)


def _calibrated(steps: ModelSteps, layout: Layout, stage: int) -> list[Parts]:
    """convert-student before the proofs: importance measured, targets taken, layers fitted."""
    size, hidden = steps.computed_bytes, steps.teacher.hidden_size
    computation = Computation(size)
    teacher = {"weights": size * parameters(steps.teacher, layout, stage).total}
    phases: list[Parts] = []
    if steps.measured_tokens:
        phases.append(_measured(steps, layout, stage))
    if steps.fitted_tokens:
        tokens, width = steps.fitted_tokens, steps.student.ffn_hidden_size
        targets = steps.student.num_layers * size * tokens * hidden
        running = _layer(steps.teacher, layout, stage, computation, tokens)
        phases.append(teacher | {"activations": targets + running})
        # The MLP's inputs, as they are and weighed; their products, in both precisions, factored.
        fit = 3 * FLOAT32 * tokens * width + (FLOAT32 + 16) * min(tokens, width) ** 2
        student = {"weights": size * parameters(steps.student, layout, stage).total}
        phases.append(student | {"activations": targets + running, "logits": fit})
    return phases


def measure_layers(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """The teacher as it is read; then with what goes into each of its layers, and logits of two."""
    loaded = _loaded(steps.teacher, steps, layout, stage)
    return _fullest([loaded, _measured(steps, layout, stage)])


def _measured(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    size, tokens, hidden = steps.computed_bytes, steps.measured_tokens, steps.teacher.hidden_size
    states = (len(stage_layers(steps.teacher, layout, stage)) + 2) * size * tokens * hidden
    logits = tokens * steps.teacher.padded_vocab_size // layout.tensor
    # Of little text the teacher's logits are held (`evaluation.layer_importance`).
    chunk = _LOGITS[steps.device]
    buffers = size * (logits if logits <= 4 * chunk else chunk) + size * min(logits, chunk)
    buffers += 3 * FLOAT32 * min(logits, _FIGURES[steps.device])
    layer = _layer(steps.teacher, layout, stage, Computation(size), tokens)
    return {
        "weights": size * parameters(steps.teacher, layout, stage).total,
        "activations": states + layer,
        "logits": buffers if stage == layout.pipeline - 1 else 0,
    }


def evaluate(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """One model at a time; of the teacher, its output layer stays and its hidden states return."""
    size, tokens = steps.computed_bytes, steps.evaluated * steps.seq_length
    computation = Computation(size)
    last = stage == layout.pipeline - 1
    phases = []
    for shape, is_student in ((steps.teacher, False), (steps.student, True)):
        held = {"weights": size * parameters(shape, layout, stage).total}
        if is_student and last:
            held["teacher"] = size * parameters(steps.teacher, layout, stage).table
        loading = {"save": _loaded(shape, steps, layout, stage)["save"]}
        running = {"activations": _layer(shape, layout, stage, computation, tokens)}
        phases += [held | loading, held | running]
        if last:
            logits = tokens * shape.padded_vocab_size // layout.tensor
            models = 2 if is_student else 1
            buffers = models * size * min(logits, _LOGITS[steps.device])
            buffers += 3 * FLOAT32 * min(logits, _FIGURES[steps.device])
            hidden = (1 + models) * size * tokens * shape.hidden_size
            phases.append(held | {"logits": buffers + hidden})
    return _fullest(phases)


def export_student(steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """No model: a file's tensors at a time; then the model, for the proof and a look at it."""
    size = steps.computed_bytes
    student = parameters(steps.student, layout, stage)
    shard = min(int(SHARD), steps.export_bytes * parameters(steps.student).total)
    largest = max(student.table, _matrix(steps.student, layout))
    looked_at = (size + 3) * largest  # is each value finite? Its magnitude, and three answers
    layer = _layer(steps.student, layout, stage, Computation(size), steps.proof_tokens)
    weights = {"weights": size * student.total}
    return _fullest(
        [
            {"save": shard},
            _loaded(steps.student, steps, layout, stage),
            weights | {"save": looked_at},
            weights | {"activations": layer},
            weights | {"logits": _gathered(steps.student, steps, layout, stage)},
        ]
    )


def _gathered(shape: ModelShape, steps: ModelSteps, layout: Layout, stage: int) -> int:
    """Bytes of the fixed text's logits, which every rank gets; the last stage makes them."""
    copies = 2.5 if stage == layout.pipeline - 1 else 1.5
    return int(copies * FLOAT32 * steps.proof_tokens * shape.padded_vocab_size)


def _hidden(shape: ModelShape, steps: ModelSteps) -> int:
    """Bytes of what every layer makes of the fixed text."""
    return FLOAT32 * steps.proof_tokens * shape.hidden_size * (shape.num_layers + 1)


def _loaded(shape: ModelShape, steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """A model while its weights are read, one stored tensor at a time."""
    count = parameters(shape, layout, stage)
    return {
        "weights": steps.computed_bytes * count.total,
        "save": steps.source_bytes * max(count.table, _matrix(shape, layout)),
    }


def _saved(shape: ModelShape, steps: ModelSteps, layout: Layout, stage: int) -> Parts:
    """A model in its source's dtype while it is written.

    A checkpoint has the MLPs' gates and values apart, and Megatron-Core copies all layers' at once.
    """
    return {
        "weights": steps.source_bytes * parameters(shape, layout, stage).total,
        "save": steps.source_bytes * first_projections(shape, layout, stage),
    }


def _matrix(shape: ModelShape, layout: Layout) -> int:
    """Numbers of a layer's largest weight."""
    return 2 * shape.hidden_size * shape.ffn_hidden_size // layout.tensor


def _layer(
    shape: ModelShape, layout: Layout, stage: int, computation: Computation, tokens: int
) -> int:
    """Bytes of the layer that needs most, of those that a rank has, while it runs."""
    return max(
        forward_transient(shape, index, layout, computation, tokens)
        for index in stage_layers(shape, layout, stage)
    )


def _fullest(phases: list[Parts]) -> Parts:
    return max(phases, key=lambda parts: sum(parts.values()))
