"""What the teacher's kept outputs take, and the step that makes them (`teacher_outputs`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.teacher_outputs import met_by
from flagscale.sizes.activations import FLOAT32, Computation, forward_transient
from flagscale.sizes.codecs import bytes_per_token
from flagscale.sizes.job import Job
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import PROCESS
from flagscale.sizes.parameters import parameters, stage_layers
from flagscale.sizes.steps import FORWARD_EFFICIENCY, StepPlan
from flagscale.sizes.training import Parts
from flagscale.sizes.work import forward_flops

CACHE_STEP = "cache-teacher"
# Tokens of a pass, and elements of the fp32 buffers that a codec makes of logits, of which four
# live at a time (`steps.cache_teacher`, `teacher_outputs.probabilities`).
PASS_TOKENS = {"cpu": 1024, "cuda": 8192}
_CHUNK = {"cpu": 2**22, "cuda": 2**27}
_BUFFERS = 4
BIAS_POSITIONS = 256  # of a sample, that the bias is measured on (`models.outputs_bias`)
# Float64 buffers of at most 2**22 numbers (`teacher_outputs.bias`), and logits beside them.
_MEASURED, _COMPARED = {"hidden": 8, "sampled": 11, "topk": 11}, {"hidden": 3}


def asked_tokens(recipes: Iterable[Recipe]) -> int:
    """That cache-teacher is asked for, as far as recipes tell: no dataset's size is known yet."""
    trainings = list(recipes)
    first = trainings[0]
    met = met_by(trainings, first.teacher_outputs)
    if met.everything:  # of the recipe's own trainings: how much more there is, it does not say
        met_ones = first.teacher_outputs.model_copy(update={"samples": "met"})
        met = met_by(trainings, met_ones)
    samples = sum(count for _, count in met.train) + met.validation
    return samples * first.data.seq_length


def read_tokens(recipe: Recipe) -> int:
    """That one training asks a teacher for, the same ones at each validation again."""
    training = recipe.training
    validations = 1 + training.train_iters // training.eval_interval
    samples = training.train_iters + validations * training.eval_iters
    return samples * training.global_batch_size * recipe.data.seq_length


def cache_step(
    job: Job, sizes: ParallelismRecipe, recipes: Iterable[Recipe] | None = None
) -> StepPlan:
    """cache-teacher: on as many copies of the teacher as its pod has accelerators for.

    Args:
        job: of one training that reads outputs.
        sizes: of the model steps' layout.
        recipes: of all trainings that read them; default: this one.
    """
    machine, shape = job.models, job.teacher.shape
    copies = max(1, machine.accelerators // sizes.smallest_world_size)
    layout = Layout.of(sizes, copies * sizes.smallest_world_size)
    outputs, size = job.recipe.teacher_outputs, job.training_setup.computation.dtype_bytes
    seq_length = job.recipe.data.seq_length
    teacher = AskedTeacher(shape, outputs.codec, seq_length, size, machine.device)
    rank = max(
        (cache_rank(teacher, layout, stage) for stage in range(layout.pipeline)),
        key=lambda parts: sum(parts.values()),
    )
    tokens = asked_tokens(recipes or [job.recipe])
    written = tokens * bytes_per_token(outputs, shape, size, seq_length)
    held = sum(rank.values()) if machine.device == "cpu" else 0
    return StepPlan(
        step=CACHE_STEP,
        machine=machine,
        layout=layout,
        rank=rank,
        host=layout.ranks * (PROCESS[machine.device] + held),
        artifact=written,
        most_stored=0.0,  # what was begun lies there in its place
        scratch=0.0,
        moved=2.0 * job.teacher_bytes + 2.0 * written,  # hashed once written
        sent=0.0,
        flops=forward_flops(shape, tokens, seq_length),
        efficiency=FORWARD_EFFICIENCY,
    )


@dataclass(frozen=True)
class AskedTeacher:
    """What decides on the memory of cache-teacher.

    Attributes:
        shape: of the teacher.
        codec: that its answers are kept in.
        seq_length: tokens of a sample.
        dtype_bytes: of a number that it computes with.
        device: `cuda` or `cpu`.
    """

    shape: ModelShape
    codec: str
    seq_length: int
    dtype_bytes: int
    device: str = "cpu"


def cache_rank(teacher: AskedTeacher, layout: Layout, stage: int) -> Parts:
    """Bytes of one rank: the teacher and a pass of it; then what a codec makes of a sample.

    Args:
        teacher: that is asked.
        layout: how ranks share it.
        stage: of the pipeline.
    """
    shape, size = teacher.shape, teacher.dtype_bytes
    tokens = max(PASS_TOKENS[teacher.device], teacher.seq_length)
    running = max(
        forward_transient(shape, index, layout, Computation(size), tokens)
        for index in stage_layers(shape, layout, stage)
    )
    held = {"weights": size * parameters(shape, layout, stage).total}
    phases = [held | {"activations": running}]
    if stage == layout.pipeline - 1:
        hidden = size * tokens * shape.hidden_size
        logits = teacher.seq_length * shape.padded_vocab_size // layout.tensor
        buffers = FLOAT32 * _BUFFERS * min(logits, _CHUNK[teacher.device])
        # Its bias is measured: whole rows in float64, the true ones and the decoded.
        positions = min(teacher.seq_length, BIAS_POSITIONS)
        rows = positions * shape.padded_vocab_size
        measured = FLOAT32 * _COMPARED.get(teacher.codec, 2) * rows
        measured += 8 * _MEASURED[teacher.codec] * min(rows, _CHUNK["cpu"])
        if teacher.codec != "hidden":
            phases.append(held | {"activations": hidden, "logits": size * logits + buffers})
        phases.append(held | {"activations": hidden, "logits": measured})
    return max(phases, key=lambda parts: sum(parts.values()))
