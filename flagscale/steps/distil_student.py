"""distil-student: trains the student, with the teacher's help, from where it was last stopped."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from flagscale import platform, tracking
from flagscale.artifacts import Manifest, digest, new_artifact, open_artifact
from flagscale.checkpoint import TrainingCheckpoints, TrainingState, load_weights, save_weights
from flagscale.data.loader import train_iterator, validation_batches
from flagscale.models.megatron import WEIGHTS
from flagscale.models.shape import MODEL_JSON, ModelShape
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.step_process import deferred_stop, stop_requested
from flagscale.train.arguments import Arguments, training_arguments, with_teacher
from flagscale.train.global_vars import use_args
from flagscale.train.loop import train
from flagscale.train.progress import Progress
from flagscale.train.setup import Trainer, setup_training
from flagscale.train.train_gpt import model_provider

logger = logging.getLogger(__name__)


def distil_student(
    distillation: DistillationRecipe,
    training: TrainingRecipe,
    teacher: Path,
    student: Path,
    dataset: Path,
    checkpoints: Path,
    output: Path,
) -> dict[str, float]:
    """Train the student; go on from the last checkpoint of the same training, if there is one.

    Args:
        distillation: the loss; `loss: none` trains without the teacher.
        training: the optimisation.
        teacher: a `teacher` artifact.
        student: a `student` artifact.
        dataset: a `dataset` artifact.
        checkpoints: folder that outlives the process; the training keeps to a folder inside it
            whose name follows from everything that its result depends on.
        output: the `distilled-student` artifact to write.

    Returns:
        The last losses, and the speed.

    Raises:
        UserError: an input is missing, damaged, or does not fit the others.
        Interrupted: it was asked to stop, and has saved a checkpoint.
    """
    parents = {
        "teacher": open_artifact(teacher, "teacher"),
        "student": open_artifact(student, "student"),
        "dataset": open_artifact(dataset, "dataset"),
    }
    recipe = {
        "distillation": distillation.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
    }
    folder = checkpoints / _fingerprint(recipe, parents)
    seq_length = parents["dataset"].facts["seq_length"]
    args = training_arguments(ModelShape.load(student), seq_length, training)
    if distillation.loss != "none":
        args = with_teacher(args, teacher, distillation)
    with (
        tracking.step_run("distil-student", recipe) as run,
        platform.runtime(training.seed),
        use_args(args),
    ):
        trainer = _trainer(args, training, student)
        state, saved = _restore(trainer, folder)
        sizes = {
            "micro_batch_size": training.micro_batch_size,
            "global_batch_size": training.global_batch_size,
        }
        cache = folder / "data"
        with Progress(state.step, training.train_iters) as progress, deferred_stop():
            train(
                trainer,
                training,
                state,
                train_iterator(dataset, cache, seed=training.seed, start_step=state.step, **sizes),
                validation_batches(dataset, cache, eval_iters=training.eval_iters, **sizes),
                saved,
                _Observers(progress, run, state),
                stop_requested,
            )
        figures = _figures(state)
        with new_artifact(
            output, "distilled-student", recipe, parents, run.log_artifact
        ) as staging:
            _save(trainer, state, student, staging.path)
            staging.facts.update(figures, seq_length=seq_length)
            staging.tokenizer_hash = parents["student"].tokenizer_hash
        speed = "median tokens per second"
        run.log_metrics({speed: figures[speed]})
        shutil.rmtree(folder)
    return figures


def _fingerprint(recipe: dict[str, dict[str, object]], parents: dict[str, Manifest]) -> str:
    """Name of the checkpoints that may be resumed from: same inputs, same recipe, same result.

    How often checkpoints are saved changes no result.
    """
    training = {k: v for k, v in recipe["training"].items() if k != "save_interval"}
    origin = {name: manifest.digest for name, manifest in parents.items()}
    return digest([recipe["distillation"], training, origin]).removeprefix("sha256:")[:16]


def _trainer(args: Arguments, training: TrainingRecipe, student: Path) -> Trainer:
    model = model_provider()
    load_weights(model, student / WEIGHTS)
    trainer = setup_training(model, args, training)
    trainer.model.train()
    logger.info(
        "training %.1fM parameters in %s on %s",
        sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) / 1e6,
        str(args.params_dtype).removeprefix("torch."),
        platform.device(),
    )
    return trainer


def _restore(trainer: Trainer, folder: Path) -> tuple[TrainingState, TrainingCheckpoints]:
    checkpoints = TrainingCheckpoints(folder)
    state = checkpoints.restore(trainer.model, trainer.optimizer, trainer.scheduler)
    if state.step:
        logger.info("resuming after step %d from %s", state.step, folder)
    return state, checkpoints


class _Observers:
    """Passes every record on to the progress and to MLflow."""

    def __init__(self, progress: Progress, run: tracking.StepRun, state: TrainingState) -> None:
        """Give MLflow the curve up to here first, so that a resumed run shows all of it."""
        self._progress, self._run = progress, run
        for record in state.training:
            self._log("train", record)
        for record in state.validation:
            self._log("validation", record)

    def trained(self, record: dict[str, float]) -> None:
        self._progress.trained(record)
        self._log("train", record)

    def validated(self, record: dict[str, float]) -> None:
        self._progress.validated(record)
        self._log("validation", record)

    def _log(self, prefix: str, record: dict[str, float]) -> None:
        metrics = {f"{prefix}/{name}": value for name, value in record.items() if name != "step"}
        self._run.log_metrics(metrics, step=int(record["step"]))


def _figures(state: TrainingState) -> dict[str, float]:
    speeds = sorted(record["tokens per second"] for record in state.training)
    losses = {f"validation {k}": v for k, v in state.validation[-1].items() if k != "step"}
    return {
        **losses,
        "steps": float(state.step),
        "median tokens per second": speeds[len(speeds) // 2],
    }


def _save(trainer: Trainer, state: TrainingState, student: Path, folder: Path) -> None:
    save_weights(plain_student(trainer.model), folder / WEIGHTS)
    shutil.copy(student / MODEL_JSON, folder / MODEL_JSON)
    shutil.copytree(student / "hf", folder / "hf")
    for name, records in (("training", state.training), ("validation", state.validation)):
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
