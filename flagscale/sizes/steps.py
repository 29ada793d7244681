"""What each step of a recipe needs: memory, storage, operations, time, money."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe
from flagscale.sizes import models
from flagscale.sizes.codecs import bytes_per_token
from flagscale.sizes.intermediate import Terms
from flagscale.sizes.job import Job
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import PROCESS, Machine
from flagscale.sizes.models import ModelSteps
from flagscale.sizes.parameters import parameters
from flagscale.sizes.training import (
    Parts,
    optimizer_share,
    saved_bytes,
    training_peak,
)
from flagscale.sizes.work import forward_flops, sent_a_step, training_flops

# Shares of the accelerators' peak at which time is estimated, and bytes a second that a pod reads
# or writes. Assumptions, not measurements: the table says them.
TRAINING_EFFICIENCY = 0.4
FORWARD_EFFICIENCY = 0.25
BANDWIDTH_EFFICIENCY = 0.7
FLOPS_A_BYTE = 300  # of an accelerator whose memory's speed is not known: as an H100's
STORAGE_RATE = 1e9

MODEL_STEPS: dict[str, Callable[[ModelSteps, Layout, int], Parts]] = {
    "prepare-teacher": models.prepare_teacher,
    "convert-student": models.convert_student,
    "evaluate": models.evaluate,
    "export-student": models.export_student,
}
_VALIDATED = 8  # sequences that prepare-teacher takes the LM loss of


@dataclass(frozen=True)
class StepPlan:
    """One step on its machine.

    Attributes:
        step: its name.
        machine: of one of its pods.
        layout: of its ranks.
        rank: bytes of the fullest rank, by what they are for: of its accelerator, or of the host.
        host: bytes of a pod's memory.
        artifact: bytes that it leaves on the volume.
        most_stored: bytes on the volume of what only this step needs: checkpoints.
        scratch: bytes of a pod's own disk.
        moved: bytes read and written by all its pods.
        sent: bytes that one rank sends to others.
        touched: bytes of accelerators' memory that take time of their own: attention terms' scores.
        flops: of all ranks.
        efficiency: share of the accelerators' peak that time is estimated at.
    """

    step: str
    machine: Machine
    layout: Layout
    rank: Parts
    host: float
    artifact: float
    most_stored: float
    scratch: float
    moved: float
    sent: float
    flops: float
    efficiency: float
    touched: float = 0.0

    @property
    def rank_bytes(self) -> int:
        """Of the fullest rank."""
        return sum(self.rank.values())

    @property
    def seconds(self) -> float | None:
        """An estimate; None where the accelerator's speed is not known."""
        accelerator = self.machine.accelerator
        if accelerator is None or accelerator.flops is None:
            return None
        peak = self.layout.ranks * accelerator.flops
        seconds = self.flops / (peak * self.efficiency) + self.moved / STORAGE_RATE
        if self.touched:
            bandwidth = accelerator.bandwidth or accelerator.flops / FLOPS_A_BYTE
            seconds += self.touched / (self.layout.ranks * bandwidth * BANDWIDTH_EFFICIENCY)
        return seconds

    @property
    def gpu_hours(self) -> float | None:
        """Of all accelerators that its pods hold, used or not."""
        if self.seconds is None:
            return None
        return self.machine.accelerators * self.machine.pods * self.seconds / 3600

    @property
    def price(self) -> float | None:
        """Of its pods for that time."""
        if self.seconds is None or self.machine.price_per_hour is None:
            return None
        return self.machine.price_per_hour * self.machine.pods * self.seconds / 3600

    @property
    def lacks(self) -> str | None:
        """What there is too little of, with both numbers; None if it fits."""
        room, memory = self.machine.room, self.machine.memory
        if self.machine.accelerators and room is not None and self.rank_bytes > room:
            return (
                f"a rank ({self.layout}) needs {gb(self.rank_bytes)} of an accelerator that has "
                f"{gb(room)} for tensors"
            )
        if memory is not None and self.host > memory:
            return f"its pod ({self.layout}) needs {gb(self.host)} of memory, and has {gb(memory)}"
        return None


def gb(count: float) -> str:
    """Bytes for people: `17.6 GB`."""
    return f"{count / 1e9:.1f} GB" if count < 99.95e9 else f"{count / 1e9:.0f} GB"


def model_step(job: Job, step: str, sizes: ParallelismRecipe) -> StepPlan:
    """One of the four steps that hold models, on a layout."""
    layout, setup = Layout.of(sizes), job.model_steps
    of_rank = MODEL_STEPS[step]
    rank = _fullest([of_rank(setup, layout, stage) for stage in range(layout.pipeline)])
    machine = job.models
    held = sum(rank.values()) if machine.device == "cpu" else 0
    host = layout.ranks * (PROCESS[machine.device] + held)
    reads, writes, flops = _model_work(job, step)
    if machine.device == "cuda":
        host += writes if step != "export-student" else 2 * models.SHARD
        host += models.proof_bytes(job.teacher.shape, setup) if step == "prepare-teacher" else 0
        if step == "convert-student" and job.student_source is not None:
            host += models.proof_bytes(job.student, setup)
    if step == "export-student":  # transformers loads the model in a process of its own
        host += PROCESS["cpu"] + models.proof_bytes(job.student, setup)
    return StepPlan(
        step=step,
        machine=machine,
        layout=layout,
        rank=rank,
        host=host,
        artifact=writes,
        most_stored=0.0,
        scratch=_scratch(job, step),
        moved=reads + writes,
        sent=0.0,
        flops=flops,
        efficiency=FORWARD_EFFICIENCY,
    )


def training_step(job: Job, layout: Layout | None = None) -> StepPlan:
    """distil-student, on the recipe's layout or another."""
    layout = layout or job.training_layout
    setup, recipe, machine = job.training_setup, job.recipe, job.training
    rank = _fullest(
        [
            training_peak(job.student, job.distilled_from, setup, layout, stage)
            for stage in range(layout.pipeline)
        ]
    )
    training, seq_length = recipe.training, recipe.data.seq_length
    tokens = training.train_iters * training.global_batch_size * seq_length
    live = job.runs_in_training
    flops = training_flops(job.student, live, tokens, seq_length, training.recompute_granularity)
    validations = 1 + training.train_iters // training.eval_interval
    validated = validations * training.eval_iters * training.global_batch_size * seq_length
    for shape in filter(None, (job.student, live)):
        flops += forward_flops(shape, validated, seq_length)
    if job.reads_outputs and setup.teacher_logits:  # of hidden states, the output layer makes them
        shape = job.teacher.shape
        flops += 2.0 * (tokens + validated) * shape.padded_vocab_size * shape.hidden_size
    touched, size = 0.0, setup.computation.dtype_bytes
    if live is not None:
        terms = Terms(recipe.distillation, job.student, live, layout, size)
        for count, trains in ((tokens, True), (validated, False)):
            work = (count, training.micro_batch_size, seq_length)
            flops += terms.flops(*work, trains=trains)
            touched += terms.touched(*work, trains=trains)
    saved = saved_bytes(job.student, setup)
    reads = 2.0 * (job.student_bytes + (job.teacher_bytes if job.distilled_from else 0))
    if job.reads_outputs:
        a_token = bytes_per_token(recipe.teacher_outputs, job.teacher.shape, size, seq_length)
        reads += int((tokens + validated) * a_token)
    saves = -(-training.train_iters // training.save_interval)
    ranks_a_pod = -(-layout.ranks // machine.pods)
    staged = _staged(job, layout)
    held = staged if machine.device == "cuda" else sum(rank.values())
    keep = training.keep_checkpoints + 1 + (training.keep_weights == "best")
    a_step = sent_a_step(
        job.student,
        live,
        layout,
        setup.computation.dtype_bytes,
        seq_length * training.global_batch_size // (layout.data * layout.context),
    )
    return StepPlan(
        step="distil-student",
        machine=machine,
        layout=layout,
        rank=rank,
        host=ranks_a_pod * (PROCESS[machine.device] + held),
        artifact=job.distilled_bytes,
        most_stored=min(keep, saves) * saved,
        scratch=0.0,
        moved=reads + saves * saved + job.distilled_bytes,
        sent=training.train_iters * a_step,
        flops=flops,
        efficiency=TRAINING_EFFICIENCY,
        touched=touched,
    )


def _staged(job: Job, layout: Layout) -> float:
    """Bytes that a rank copies to the host to write its share of a checkpoint."""
    share = optimizer_share(job.student, job.training_setup, layout, 0)
    return share * saved_bytes(job.student, job.training_setup) / max(1, _count(job))


def _count(job: Job) -> int:
    return parameters(job.student).total


def _fullest(ranks: list[Parts]) -> Parts:
    return max(ranks, key=lambda parts: sum(parts.values()))


def _model_work(job: Job, step: str) -> tuple[float, float, float]:
    """Bytes read and written, and operations. Inputs are read twice: to be checked, to be used."""
    teacher, student = job.teacher.shape, job.student
    seq_length = job.recipe.data.seq_length

    def forward(*models_and_tokens: tuple[ModelShape, int]) -> float:
        return sum(forward_flops(shape, tokens, seq_length) for shape, tokens in models_and_tokens)

    if step == "prepare-teacher":
        work = forward((teacher, (_VALIDATED + 1) * seq_length))
        return 2.0 * job.teacher_bytes, float(job.teacher_bytes), work
    if step == "convert-student":
        reads = 2.0 * job.teacher_bytes + 2.0 * job.student_bytes
        setup = job.model_steps
        fitted = setup.fitted_tokens
        work = forward((teacher, 3 * seq_length + fitted), (student, 4 * seq_length + 2 * fitted))
        work += measuring_flops(teacher, student.num_layers, setup.measured_tokens, seq_length)
        if job.student_source is not None:  # which is imported and proven as the teacher is
            reads += 2.0 * job.student_bytes
            work += forward((student, (_VALIDATED + 1) * seq_length))
        return reads, float(job.student_bytes), work
    if step == "evaluate":
        reads = 2.0 * (job.teacher_bytes + job.student_bytes + job.distilled_bytes)
        tokens = evaluated_tokens(job)
        return reads, 0.0, forward((teacher, tokens), (student, 2 * tokens))
    work = forward((student, 2 * models.PROOF_TOKENS))
    return 2.0 * job.distilled_bytes + job.exported_bytes, float(job.exported_bytes), work


def measuring_flops(teacher: ModelShape, kept: int, tokens: int, seq_length: int) -> float:
    """Of the choice of layers, at most.

    For each layer that goes: without each of the others, half a forward pass.

    Args:
        teacher: its shape.
        kept: how many layers stay.
        tokens: of the text.
        seq_length: tokens a sequence of it.
    """
    looked_at = (teacher.num_layers - kept) * (teacher.num_layers + kept) // 4
    return forward_flops(teacher, looked_at * tokens, seq_length)


def evaluated_tokens(job: Job) -> int:
    """The most tokens that evaluate reads, as far as the recipe bounds them."""
    evaluation, data = job.recipe.evaluation, job.recipe.data
    documents = evaluation.max_documents
    if documents is None:
        read = sum(corpus.max_documents or 0 for corpus in data.corpora)
        documents = int(read * data.test_fraction)
    return documents * (evaluation.max_document_tokens or data.seq_length)


def _scratch(job: Job, step: str) -> float:
    """What comes from the Hub lies in the pod's cache; what the teacher predicted in its /tmp."""
    if step == "prepare-teacher":
        return float(job.teacher_bytes)
    if step == "convert-student" and job.student_source is not None:
        return float(job.student_bytes)
    if step == "evaluate":
        hidden = job.teacher.shape.hidden_size * job.model_steps.computed_bytes
        return float(hidden * evaluated_tokens(job))
    return 0.0
