"""One rank of trainings that are interrupted on one layout and go on on another.

`torchrun ... resume_worker.py FOLDER` runs every task of FOLDER/tasks.json that is for this number
of processes; `test_resume_layouts.py` writes them and runs those of one process by itself.
"""

import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flagscale.checkpoint import load_weights, save_weights
from flagscale.errors import Interrupted
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe, DistillationRecipe, TrainingRecipe
from flagscale.train.checkpoints import TrainingCheckpoints
from flagscale.train.loop import train
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

STEPS = 6
# Losses with tensors on every pipeline stage that are no part of the student: the student is
# narrower than the teacher.
DISTILLATION = DistillationRecipe(
    temperature=2.0,
    skip_lm_loss=False,
    kd_loss_scale=0.7,
    intermediate_loss_scale=0.5,
    intermediate_layer_pairs=(
        ("decoder.layers.0", "decoder.layers.1"),
        ("decoder.layers.0", "decoder.layers.3", "mse"),
        ("decoder.final_layernorm", "decoder.final_layernorm", "mse"),
    ),
)
EXPERTS = ArchitectureRecipe(num_experts=4, moe_ffn_hidden_size=64)


@dataclass(frozen=True)
class Task:
    """A training, or a part of one.

    Attributes:
        name: of the folder that it leaves.
        kind: `distillation` or `experts` (which is standard training).
        processes: in all.
        parallelism: the recipe's section.
        stop_after: step to be interrupted after.
        resume: name of the task that was interrupted before.
        async_save: as in the recipe.
        training: more of the recipe's section.
    """

    name: str
    kind: str
    processes: int
    parallelism: dict[str, Any] = field(default_factory=dict)
    stop_after: int | None = None
    resume: str | None = None
    async_save: bool = False
    training: dict[str, Any] = field(default_factory=dict)


class Records:
    """Keeps what the loop tells, and asks it to stop after a step."""

    def __init__(self, stop_after):
        self.training, self.validation, self.stop_after = [], [], stop_after

    def trained(self, record):
        self.training.append(record)

    def validated(self, record):
        self.validation.append(record)

    def kept(self, checkpoints):
        pass

    def stop_requested(self):
        return self.training[-1]["step"] == self.stop_after

    def clock(self):
        """24 seconds a step on the first rank; on another, which must not count, far more."""
        return len(self.training) * (24.0 if torch.distributed.get_rank() == 0 else 1e6)


def recipe(task: Task) -> TrainingRecipe:
    return TrainingRecipe(
        train_iters=STEPS,
        micro_batch_size=2,
        global_batch_size=4,
        lr=1e-3,
        min_lr=1e-4,
        lr_warmup_iters=2,
        # Above the level of rounding: Adam takes full steps along gradients far above eps.
        adam_eps=1e-5,
        weight_decay=0.1,
        clip_grad=0.5,
        seed=5,
        eval_interval=3,
        eval_iters=1,
        save_interval=STEPS,
        save_interval_minutes=1,
        async_save=task.async_save,
        parallelism=task.parallelism,
        **task.training,
    )


def shape(kind: str, teacher: Path) -> ModelShape:
    of_teacher = ModelShape.load(teacher)
    if kind == "experts":
        return replace(of_teacher, num_layers=2, architecture=EXPERTS)
    return replace(of_teacher, num_layers=2, hidden_size=32, ffn_hidden_size=64)


def arguments(task: Task, inputs: dict[str, str]):
    args = training_arguments(shape(task.kind, Path(inputs["teacher"])), 64, recipe(task))
    if task.kind == "distillation":
        return with_teacher(args, Path(inputs["teacher"]), DISTILLATION)
    return args


def build(task: Task, args, folder: Path):
    """A trainer whose weights are the same on every layout; one process makes them."""
    torch.manual_seed(0)
    chunks = build_model_chunks(args)
    if not (folder / f"weights-{task.kind}").exists():
        save_weights(chunks, folder / f"weights-{task.kind}")
    load_weights(chunks, folder / f"weights-{task.kind}")
    trainer = setup_training(chunks, args, recipe(task))
    for chunk in trainer.chunks:
        chunk.train()
    return trainer


def checkpoints_of(task: Task, folder: Path) -> TrainingCheckpoints:
    """The checkpoints of the task before, copied: several tasks go on from there."""
    path = folder / task.name / "checkpoints"
    if task.resume and torch.distributed.get_rank() == 0:
        shutil.copytree(folder / task.resume / "checkpoints", path)
    torch.distributed.barrier()
    return TrainingCheckpoints(path, keep=STEPS, async_save=task.async_save)


def run(task: Task, folder: Path, inputs: dict[str, str], spoil=lambda trainer: None) -> None:
    """Train, and leave the records in FOLDER/<task>/result.json.

    Args:
        task: what to run.
        folder: of all tasks.
        inputs: `teacher` and `dataset` artifacts.
        spoil: does something to the restored trainer.
    """
    training, args = recipe(task), arguments(task, inputs)
    with platform.runtime(training.seed, training.parallelism), use_args(args):
        trainer = build(task, args, folder)
        checkpoints = checkpoints_of(task, folder)
        state = checkpoints.restore(trainer)
        spoil(trainer)
        batches = RankBatches(Path(inputs["dataset"]), folder / "data", args, training)
        records = Records(task.stop_after)
        try:
            train(
                trainer,
                training,
                state,
                batches.train(state.step),
                batches.validation,
                checkpoints,
                records,
                records.stop_requested,
                records.clock,
            )
        except Interrupted:
            assert task.stop_after is not None
        if torch.distributed.get_rank() == 0:
            saved = [int(path.name[5:]) for path in sorted(checkpoints.folder.glob("step-*"))]
            result = {"first": records.training[0]["step"], "saved": saved, **asdict(state)}
            (folder / task.name / "result.json").write_text(json.dumps(result))


def main() -> None:
    folder = Path(sys.argv[1])
    todo = json.loads((folder / "tasks.json").read_text())
    for values in todo["tasks"]:
        task = Task(**values)
        if task.processes == int(os.environ["WORLD_SIZE"]):
            run(task, folder, todo["inputs"])


if __name__ == "__main__":
    main()
