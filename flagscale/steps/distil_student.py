"""distil-student: trains the student, with the teacher's help, from where it was last stopped."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flagscale import tracking
from flagscale.artifacts import Manifest, open_artifact
from flagscale.checkpoint import load_weights, save_weights
from flagscale.evaluation.tasks.finding import check_installed
from flagscale.execution import launch
from flagscale.execution.step_process import keep_exclusive, when_published
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments, training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.performance import resolved
from flagscale.megatron.shape import MODEL_JSON, QUANTIZERS, ModelShape
from flagscale.megatron.user_buffers import user_buffers
from flagscale.models.megatron import WEIGHTS
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.steps.outputs.check import check_outputs, outputs_to_read
from flagscale.steps.recording import record_distilled, watched
from flagscale.steps.search.candidate import write_candidate
from flagscale.steps.search.rung import Rung
from flagscale.steps.training.checks import check_training
from flagscale.steps.training.file_check import files_checked
from flagscale.steps.training.fingerprint import fingerprint, sections
from flagscale.steps.training.observers import observer, tell_begin
from flagscale.steps.training.samples_check import check_met
from flagscale.stop import deferred_stop, stop_requested
from flagscale.teacher_outputs import KIND, TeacherOutputs
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState, mirror
from flagscale.train.loop import evaluate_loss, train
from flagscale.train.outputs_audit import audit_outputs
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training
from flagscale.train.trainer import Trainer

logger = logging.getLogger(__name__)

_SPEED = "median tokens per second"
_NOT_SIGNIFICANT = "student.quantization.when=significant, and what quantisation cost is not"


class Paths(NamedTuple):
    """The arguments of `distil_student` that are places."""

    teacher: Path
    student: Path
    dataset: Path
    checkpoints: str
    output: Path
    teacher_outputs: Path | None = None

    @property
    def inputs(self) -> dict[str, Path]:
        """The artifacts that are read as a whole, by kind."""
        return {"teacher": self.teacher, "student": self.student, "dataset": self.dataset}


def distil_student(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    student: Path,
    dataset: Path,
    checkpoints: str | Path,
    output: Path,
    teacher_outputs: Path | None = None,
    rung: Rung | None = None,
) -> dict[str, float]:
    """Train the student; go on from the last checkpoint of the same training, if there is one.

    With `training.parallelism` this process starts the ranks and waits for them.

    Args:
        distillation: the loss; `loss: none` trains without the teacher.
        training: the optimisation.
        teacher: a `teacher` artifact.
        student: a `student` artifact.
        dataset: a `dataset` artifact.
        checkpoints: folder that outlives the process, or URL of one in an object store; the
            training keeps to a folder inside it whose name follows from everything that its result
            depends on. That goes when the step's output is in place.
        output: the `distilled-student` artifact to write.
        teacher_outputs: a `teacher-outputs` artifact, which is then read in the teacher's place
            (`distillation.teacher_outputs`).
        rung: of a search: stop there, keep the checkpoints, and write a `candidate` artifact.

    Returns:
        The last losses, and the speed.

    Raises:
        UserError: an input is missing, damaged, or does not fit the others.
        Interrupted: it was asked to stop, and has saved a checkpoint.
    """
    if rung is not None and rung.tasks.is_asked:
        check_installed()  # before a step is trained
    processes = platform.processes(training.parallelism)
    outputs = outputs_to_read(distillation, teacher_outputs)
    paths = Paths(teacher, student, dataset, str(checkpoints), output, outputs)
    check_training(distillation, training, student, processes)
    parents = _parents(paths)
    if outputs is not None:
        check_outputs(outputs, distillation, training, teacher, parents)
    name = fingerprint(sections(distillation, training), parents)
    # Other trainings, e.g. of the same sweep, may use `checkpoints` at the same time.
    keep_exclusive(f"{paths.checkpoints}/{name}")
    figures = launch.call_on_ranks(
        "distil-student",
        distil_on_rank,
        processes,
        distillation=distillation,
        training=training,
        paths=paths,
        rung=rung,
    )
    if rung is None:
        when_published(lambda: mirror.forget(paths.checkpoints, name))
    return figures


def distil_on_rank(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    paths: Paths,
    rung: Rung | None = None,
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `distil_student`."""
    parents = _parents(paths)
    shape, distilled = ModelShape.load(paths.student), distillation.loss != "none"
    training = resolved(training, shape, distilled=distilled)
    recipe = sections(distillation, training)
    folder, remote = mirror.place(paths.checkpoints, fingerprint(recipe, parents))
    seq_length = parents["dataset"].facts["seq_length"]
    args = training_arguments(shape, seq_length, training)
    if distilled:
        args = with_teacher(args, paths.teacher, distillation, paths.teacher_outputs)
    args = replace(args, export_quant_load=paths.student)
    with (
        files_checked(paths.inputs, parents) as files_are_right,
        tracked("distil-student", recipe, f"{paths.checkpoints}/{folder.name}") as run,
        platform.runtime(training.seed, training.parallelism, training.rerun_mode),
        use_args(args),
        user_buffers(args),
    ):
        if paths.teacher_outputs is not None:
            # The teacher is asked once more, in the memory that the student will take.
            files_are_right()
            asked = RankBatches(paths.dataset, folder / "data", args, training)
            check_met(paths.teacher_outputs, paths.dataset, folder / "data", training)
            audit_outputs(args, asked.train(0))
        platform.keep_heap()
        trainer = _trainer(args, training, paths.student)
        saved = TrainingCheckpoints(
            folder,
            training.keep_checkpoints,
            training.async_save,
            best_by="logits distillation loss" if distilled else "lm loss",
            mirror=remote,
            may_be_best=training.saves_at,
        )
        state = _restore(trainer, saved, rung)
        files_are_right()  # before an index is made of them, or a step taken
        batches = RankBatches(paths.dataset, folder / "data", args, training)
        splits = [tracking.Split.of(parents["dataset"], name) for name in ("train", "validation")]
        trains = _trains(parents["student"])
        run.log_inputs(splits, ["training", "validation"])
        last_step = rung.until_step if rung else training.train_iters
        with (
            watched(run),
            observer(run, state, training, last_step, splits[1]) as told,
            deferred_stop(),
        ):
            if trains:
                tell_begin(trainer, args)
                train(
                    trainer,
                    training,
                    state,
                    batches.train(state.step),
                    batches.validation,
                    saved,
                    told,
                    stop_requested,
                    until_step=rung.until_step if rung else None,
                )
            else:
                losses = evaluate_loss(trainer.chunks, batches.validation(), training.eval_iters)
                state.validation.append({"step": 0, **losses})
                told.validated(state.validation[-1])
        if rung is not None:
            inputs = (trainer.chunks, args, state, paths.dataset, folder / "data")
            with written(paths.output, "candidate", recipe, parents, run) as staging:
                origin = (parents["student"], paths.student)
                return write_candidate(rung, *inputs, *origin, folder.name, staging)
        keeps_best = trains and training.keep_weights == "best"
        step = saved.restore_best(trainer) if keeps_best else state.step
        figures = _figures(state, step)
        with written(paths.output, "distilled-student", recipe, parents, run) as staging:
            _save(trainer, state, paths.student, staging.path)
            staging.facts.update(figures, seq_length=seq_length)
            if not trains:
                staging.facts["not trained because"] = _NOT_SIGNIFICANT
            staging.tokenizer_hash = parents["student"].tokenizer_hash
        run.log_metrics({name: figures[name] for name in figures if name == _SPEED})
        if staging.manifest is not None:
            points = told.validation_of(step)
            record_distilled(run, step, paths.output, staging.manifest, points, splits[1])
    return figures


def _parents(paths: Paths) -> dict[str, Manifest]:
    parents = {
        name: open_artifact(path, name, check_files=False) for name, path in paths.inputs.items()
    }
    if paths.teacher_outputs is not None:
        parents[KIND] = TeacherOutputs.open(paths.teacher_outputs).manifest
    return parents


def _trains(student: Manifest) -> bool:
    """Whether the student is trained: not where quantisation alone cost it nothing significant."""
    trains: bool = student.facts.get("quantization", {"trains": True})["trains"]
    if not trains:
        logger.info(
            "not trained: %s; the student stays as convert-student made it", _NOT_SIGNIFICANT
        )
    return trains


def _trainer(args: Arguments, training: TrainingRecipe, student: Path) -> Trainer:
    chunks = build_model_chunks(args)
    load_weights(chunks, student / WEIGHTS)
    trainer = setup_training(chunks, args, training)
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def _restore(
    trainer: Trainer, checkpoints: TrainingCheckpoints, rung: Rung | None
) -> TrainingState:
    state = checkpoints.restore(trainer, rung.until_step if rung else None)
    if state.step:
        logger.info("resuming after step %d from %s", state.step, checkpoints.folder)
    return state


def _figures(state: TrainingState, step: int) -> dict[str, float]:
    """Of the weights after `step`, which are the artifact's, and of the training."""
    validated = [record for record in state.validation if record["step"] == step][-1]
    losses = {f"validation {k}": v for k, v in validated.items() if k != "step"}
    figures = {**losses, "steps": float(step)}
    if state.median_speed is not None:
        figures[_SPEED] = state.median_speed
    return figures


def _save(trainer: Trainer, state: TrainingState, student: Path, folder: Path) -> None:
    save_weights([plain_student(chunk) for chunk in trainer.chunks], folder / WEIGHTS)
    if not launch.is_first_rank():
        return
    shutil.copy(student / MODEL_JSON, folder / MODEL_JSON)
    if (student / QUANTIZERS).exists():
        shutil.copy(student / QUANTIZERS, folder / QUANTIZERS)
    shutil.copytree(student / "hf", folder / "hf")
    state.write(folder)
