"""What the teacher's kept outputs take, and the step that makes them (`teacher_outputs`)."""

from __future__ import annotations

from collections.abc import Iterable

from flagscale.recipe import ParallelismRecipe, Recipe
from flagscale.recipe.teacher_outputs import met_by
from flagscale.sizes.activations import Computation, forward_transient
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
    rank = max(
        (_rank(job, layout, stage) for stage in range(layout.pipeline)),
        key=lambda parts: sum(parts.values()),
    )
    tokens = asked_tokens(recipes or [job.recipe])
    outputs, size = job.recipe.teacher_outputs, job.training_setup.computation.dtype_bytes
    seq_length = job.recipe.data.seq_length
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


def _rank(job: Job, layout: Layout, stage: int) -> Parts:
    """The teacher, and a pass of it; then a sample's logits and what a codec makes of them."""
    shape, device = job.teacher.shape, job.models.device
    size, seq_length = job.training_setup.computation.dtype_bytes, job.recipe.data.seq_length
    tokens = max(PASS_TOKENS[device], seq_length)
    running = max(
        forward_transient(shape, index, layout, Computation(size), tokens)
        for index in stage_layers(shape, layout, stage)
    )
    held = {"weights": size * parameters(shape, layout, stage).total}
    phases = [held | {"activations": running}]
    if stage == layout.pipeline - 1 and job.recipe.teacher_outputs.codec != "hidden":
        logits = seq_length * shape.padded_vocab_size // layout.tensor
        buffers = 4 * _BUFFERS * min(logits, _CHUNK[device])
        hidden = size * tokens * shape.hidden_size
        phases.append(held | {"activations": hidden, "logits": size * logits + buffers})
    return max(phases, key=lambda parts: sum(parts.values()))
