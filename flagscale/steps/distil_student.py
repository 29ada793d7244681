"""distil-student: trains the student, with the teacher's help, from where it was last stopped."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state

from flagscale import tracking
from flagscale.artifacts import (
    Manifest,
    Staging,
    new_artifact,
    open_artifact,
    staging_path,
)
from flagscale.checkpoint import load_weights, save_weights
from flagscale.execution import launch
from flagscale.execution.step_process import keep_exclusive, when_published
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments, training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import MODEL_JSON, ModelShape
from flagscale.models.megatron import WEIGHTS
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe, TrainingRecipe, parse_section
from flagscale.steps.fingerprint import fingerprint, sections
from flagscale.steps.observers import observer
from flagscale.steps.training_check import check_training
from flagscale.stop import deferred_stop, stop_requested
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState, mirror
from flagscale.train.loop import train
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training
from flagscale.train.trainer import Trainer

logger = logging.getLogger(__name__)


class _Paths(NamedTuple):
    """The arguments of `distil_student` that are places."""

    teacher: Path
    student: Path
    dataset: Path
    checkpoints: str
    output: Path


def distil_student(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    student: Path,
    dataset: Path,
    checkpoints: str | Path,
    output: Path,
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

    Returns:
        The last losses, and the speed.

    Raises:
        UserError: an input is missing, damaged, or does not fit the others.
        Interrupted: it was asked to stop, and has saved a checkpoint.
    """
    processes = platform.processes(training.parallelism)
    paths = _Paths(teacher, student, dataset, str(checkpoints), output)
    check_training(distillation, training, student, processes)
    name = fingerprint(sections(distillation, training), _parents(paths, check_files=False))
    # Other trainings, e.g. of the same sweep, may use `checkpoints` at the same time.
    keep_exclusive(f"{paths.checkpoints}/{name}")
    figures = _run(distillation, training, paths, processes)
    when_published(lambda: mirror.forget(paths.checkpoints, name))
    return figures


def _run(
    distillation: DistillationRecipe, training: TrainingRecipe, paths: _Paths, processes: int
) -> dict[str, float]:
    """Train in this process, or in as many others."""
    if processes == 1:
        return _train(distillation, training, paths)
    request = {
        **sections(distillation, training),
        **{name: str(path) for name, path in paths._asdict().items()},
    }
    figures: dict[str, float] = launch.run_on_ranks(
        "distil-student", f"{__name__}:run_rank", request, processes
    )
    return figures


def _train(
    distillation: DistillationRecipe, training: TrainingRecipe, paths: _Paths
) -> dict[str, float]:
    """The work of one rank, or of the only process."""
    parents = _parents(paths, check_files=launch.is_first_rank())
    recipe = sections(distillation, training)
    folder, remote = mirror.place(paths.checkpoints, fingerprint(recipe, parents))
    seq_length = parents["dataset"].facts["seq_length"]
    args = training_arguments(ModelShape.load(paths.student), seq_length, training)
    if distillation.loss != "none":
        args = with_teacher(args, paths.teacher, distillation)
    with (
        _tracked(recipe, f"{paths.checkpoints}/{folder.name}") as run,
        platform.runtime(training.seed, training.parallelism, training.rerun_mode),
        use_args(args),
    ):
        trainer = _trainer(args, training, paths.student)
        saved = TrainingCheckpoints(
            folder,
            training.keep_checkpoints,
            training.async_save,
            best_by="lm loss" if distillation.loss == "none" else "logits distillation loss",
            mirror=remote,
            may_be_best=training.saves_at,
        )
        state = _restore(trainer, saved)
        batches = RankBatches(paths.dataset, folder / "data", args, training)
        with observer(run, state, training.train_iters) as told, deferred_stop():
            train(
                trainer,
                training,
                state,
                batches.train(state.step),
                batches.validation,
                saved,
                told,
                stop_requested,
            )
        step = saved.restore_best(trainer) if training.keep_weights == "best" else state.step
        figures = _figures(state, step)
        with _written(paths.output, recipe, parents, run) as staging:
            _save(trainer, state, paths.student, staging.path)
            staging.facts.update(figures, seq_length=seq_length)
            staging.tokenizer_hash = parents["student"].tokenizer_hash
        speed = "median tokens per second"
        run.log_metrics({speed: figures[speed]})
    return figures


def _parents(paths: _Paths, *, check_files: bool) -> dict[str, Manifest]:
    return {
        name: open_artifact(getattr(paths, name), name, check_files)
        for name in ("teacher", "student", "dataset")
    }


@contextmanager
def _tracked(recipe: dict[str, dict[str, object]], training: str) -> Iterator[tracking.StepRun]:
    """The step's run on the first rank; elsewhere one that tells nobody."""
    if not launch.is_first_rank():
        yield tracking.StepRun(None, None)
        return
    with tracking.step_run("distil-student", recipe, training) as run:
        yield run


@contextmanager
def _written(
    output: Path,
    recipe: dict[str, dict[str, object]],
    parents: dict[str, Manifest],
    run: tracking.StepRun,
) -> Iterator[Staging]:
    """The artifact: the first rank's, into whose folder the others write their weights."""
    if launch.is_first_rank():
        kind = "distilled-student"
        with new_artifact(output, kind, recipe, parents, run.log_artifact) as staging:
            torch.distributed.barrier()
            yield staging
    else:
        torch.distributed.barrier()
        yield Staging(staging_path(output))


def _trainer(args: Arguments, training: TrainingRecipe, student: Path) -> Trainer:
    chunks = build_model_chunks(args)
    load_weights(chunks, student / WEIGHTS)
    trainer = setup_training(chunks, args, training)
    for chunk in trainer.chunks:
        chunk.train()
    logger.info(
        "training %.1fM parameters in %s on %s",
        sum(p.numel() for chunk in trainer.chunks for p in chunk.parameters() if p.requires_grad)
        / 1e6,
        str(args.params_dtype).removeprefix("torch."),
        _layout_text(args),
    )
    return trainer


def _layout_text(args: Arguments) -> str:
    world_size = torch.distributed.get_world_size()
    if world_size == 1:
        return str(platform.device())
    sizes = args.parallelism
    names = {
        "tensor": sizes.tensor_model_parallel_size,
        "pipeline": sizes.pipeline_model_parallel_size,
        "context": sizes.context_parallel_size,
        "expert": sizes.expert_model_parallel_size,
        "data": parallel_state.get_data_parallel_world_size(),
    }
    split = " x ".join(f"{name} {size}" for name, size in names.items() if size > 1)
    return f"this rank of {world_size} {platform.device().type} processes ({split})"


def _restore(trainer: Trainer, checkpoints: TrainingCheckpoints) -> TrainingState:
    state = checkpoints.restore(trainer)
    if state.step:
        logger.info("resuming after step %d from %s", state.step, checkpoints.folder)
    return state


def _figures(state: TrainingState, step: int) -> dict[str, float]:
    """Of the weights after `step`, which are the artifact's, and of the training."""
    speeds = sorted(record["tokens per second"] for record in state.training)
    validated = [record for record in state.validation if record["step"] == step][-1]
    losses = {f"validation {k}": v for k, v in validated.items() if k != "step"}
    return {
        **losses,
        "steps": float(step),
        "median tokens per second": speeds[len(speeds) // 2],
    }


def _save(trainer: Trainer, state: TrainingState, student: Path, folder: Path) -> None:
    save_weights([plain_student(chunk) for chunk in trainer.chunks], folder / WEIGHTS)
    if not launch.is_first_rank():
        return
    shutil.copy(student / MODEL_JSON, folder / MODEL_JSON)
    shutil.copytree(student / "hf", folder / "hf")
    for name, records in (("training", state.training), ("validation", state.validation)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run_rank(distillation: dict[str, Any], training: dict[str, Any], **paths: str) -> Any:  # noqa: ANN401
    """`distil_student` on one of several ranks, from JSON values."""
    return _train(
        parse_section(DistillationRecipe, distillation, where="distil-student"),
        parse_section(TrainingRecipe, training, where="distil-student"),
        _Paths(
            checkpoints=paths.pop("checkpoints"),
            **{name: Path(path) for name, path in paths.items()},
        ),
    )
