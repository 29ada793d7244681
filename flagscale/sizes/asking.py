"""What evaluate-tasks needs: questions about a text are asked of one model at a time.

In the format `huggingface` one process asks transformers' models, whose layers lie on all
accelerators of its pod; in the format `megatron` the ranks of the model steps do. How long a task's
questions are, and how many it has, a recipe does not say: `QUESTION_TOKENS` are taken for each, of
which `ANSWER_TOKENS` are predicted, and work is counted where `tasks.limit` bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe
from flagscale.sizes.activations import FLOAT32, Computation, forward_transient
from flagscale.sizes.job import Job
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import PROCESS
from flagscale.sizes.parameters import has_experts, parameters, stage_layers
from flagscale.sizes.steps import FORWARD_EFFICIENCY, StepPlan
from flagscale.sizes.training import Parts
from flagscale.sizes.use import exported, weight_bytes
from flagscale.sizes.work import forward_flops

ASK_STEP = "evaluate-tasks"
QUESTION_TOKENS, ANSWER_TOKENS = 256, 32
_REPEATS = 3  # of each text whose generation is timed; the first token of one more


@dataclass(frozen=True)
class Asked:
    """What decides on the memory of one model that is asked.

    Attributes:
        shape: of the model.
        dtype_bytes: of a number that it computes with.
        source_bytes: of a weight as it is stored.
        batch_size: texts of a forward pass.
        tokens: of a text.
        scored: of them, those that are predicted.
        on_ranks: Megatron-Core's model; else transformers'.
    """

    shape: ModelShape
    dtype_bytes: int
    source_bytes: int
    batch_size: int
    tokens: int = QUESTION_TOKENS
    scored: int = ANSWER_TOKENS
    on_ranks: bool = False

    @property
    def read(self) -> int:
        """Tokens of a forward pass."""
        return self.batch_size * self.tokens


def ask_rank(asked: Asked, layout: Layout, stage: int) -> Parts:
    """Bytes of one rank: the model while it is read; a layer at work; predictions.

    Args:
        asked: the model, and what it reads.
        layout: how ranks share it.
        stage: of the pipeline.
    """
    shape, size = asked.shape, asked.dtype_bytes
    count = parameters(shape, layout, stage)
    held = {"weights": size * count.total}
    running = max(_layer(asked, index, layout) for index in stage_layers(shape, layout, stage))
    return max(
        (
            held | {"save": asked.source_bytes * count.table},
            held | {"activations": running},
            held | _predicting(asked, layout, stage),
        ),
        key=lambda parts: sum(parts.values()),
    )


def _layer(asked: Asked, index: int, layout: Layout) -> int:
    shape, computation = asked.shape, Computation(asked.dtype_bytes)
    if asked.on_ranks or has_experts(shape, index):
        return forward_transient(shape, index, layout, computation, asked.read)
    # Residual, its sum, a norm's input and output; the MLP's gates, values, and products.
    return asked.read * asked.dtype_bytes * (4 * shape.hidden_size + 3 * shape.ffn_hidden_size)


def _predicting(asked: Asked, layout: Layout, stage: int) -> Parts:
    """Logits of all texts, log-probabilities of two; and what the texts' beginnings have left."""
    shape, size = asked.shape, asked.dtype_bytes
    rows = asked.batch_size * asked.scored
    if not asked.on_ranks:
        kept = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * size
        logits = size * (rows + 2 * asked.scored) * shape.vocab_size
        return {"activations": asked.read * kept, "logits": logits}
    logits = FLOAT32 * (rows + 2 * asked.scored) * shape.vocab_size  # whole on every rank
    hidden = 0
    if stage == layout.pipeline - 1:
        hidden = asked.read * size * shape.hidden_size
        widened = shape.padded_vocab_size if size != FLOAT32 else 0
        logits += size * rows * widened
        if layout.tensor > 1:  # a slice, all slices one after the other, and side by side
            slices = 2 * shape.padded_vocab_size + shape.padded_vocab_size // layout.tensor
            logits = max(logits, size * rows * slices)
    return {"activations": hidden, "logits": logits}


def ask_step(job: Job, sizes: ParallelismRecipe) -> StepPlan:
    """The step of a recipe that asks tasks.

    Args:
        job: with models and machines.
        sizes: of the model steps' layout.
    """
    machine, tasks = job.models, job.recipe.tasks
    on_ranks = job.recipe.export.format == "megatron"
    layout = Layout.of(sizes) if on_ranks else Layout()
    spread = 1 if on_ranks else max(1, machine.accelerators)
    size = weight_bytes(machine.device)
    # Shape, bytes of a weight as it is stored, bytes of all.
    models = [
        (exported(job.teacher.shape), job.teacher.dtype_bytes, job.teacher_bytes),
        (exported(job.student), job.model_steps.export_bytes, job.exported_bytes),
    ]
    ranks = [
        ask_rank(Asked(shape, size, source, tasks.batch_size, on_ranks=on_ranks), layout, stage)
        for shape, source, _ in models
        for stage in range(layout.pipeline)
    ]
    rank = max(ranks, key=lambda parts: sum(parts.values()))
    rank["weights"] //= spread
    host = layout.ranks * PROCESS[machine.device]
    if machine.device == "cpu":
        host += layout.ranks * sum(rank.values())
    elif not on_ranks and spread == 1:
        host += max(stored for _, _, stored in models)  # whole, before it is moved
    written = 0 if on_ranks else job.teacher_bytes  # as a folder that transformers reads
    questions = len(tasks.all_names) * (tasks.limit or 0)
    timed = (_REPEATS + 1) * tasks.prompt_tokens + _REPEATS * tasks.new_tokens
    flops = sum(
        forward_flops(shape, questions * QUESTION_TOKENS, QUESTION_TOKENS)
        + forward_flops(shape, timed, tasks.prompt_tokens)
        for shape, _, _ in models
    )
    # Each token that is written reads all weights.
    weights = sum(size * parameters(shape).total for shape, _, _ in models)
    return StepPlan(
        step=ASK_STEP,
        machine=machine,
        layout=layout,
        rank=rank,
        host=host,
        artifact=0.0,
        most_stored=0.0,
        scratch=float(written),
        moved=2.0 * sum(stored for _, _, stored in models) + 2.0 * written,
        sent=0.0,
        flops=flops if questions else 0.0,
        efficiency=FORWARD_EFFICIENCY,
        touched=float(_REPEATS * tasks.new_tokens * weights),
    )
