"""One rank of trainings whose memory is counted: `torchrun ... training_worker.py FOLDER`.

FOLDER/cases.json holds a list of cases; of each, every rank leaves FOLDER/<case>-<rank>.json: the
peak of each phase, in bytes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from allocations import Allocations

from flagscale.data.layout import SPLITS
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train.batches import reads_data
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.loop import evaluate_loss, train_step
from flagscale.train.setup import build_model_chunks, setup_training


def batches(args):
    rows = (args.micro_batch_size, args.seq_length)
    while True:
        tokens = torch.randint(0, args.shape.vocab_size, rows)
        yield {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(rows),
            "position_ids": torch.arange(rows[1]).expand(rows).contiguous(),
            "samples": torch.arange(rows[0]),
            "split": torch.tensor(SPLITS.index("train")),
        }


def run(case: dict[str, Any], folder: Path) -> dict[str, int]:
    training = TrainingRecipe.model_validate(case["training"])
    distillation = DistillationRecipe.model_validate(case["distillation"])
    student = ModelShape.load(folder / "student")
    args = training_arguments(student, case["seq_length"], training)
    if distillation.loss != "none":
        outputs = folder / case["outputs"] if case["outputs"] else None
        args = with_teacher(args, folder / "teacher", distillation, outputs)
    peaks = {}
    with (
        platform.runtime(training.seed, training.parallelism),
        use_args(args),
        Allocations() as seen,
    ):
        trainer = setup_training(build_model_chunks(args), args, training)
        for chunk in trainer.chunks:
            chunk.train()
        stream = [batches(args) if reads_data(args) else None]
        seen.forget_peak()
        train_step(trainer, stream)
        train_step(trainer, stream)
        peaks["step"], peaks["kept"] = seen.peak, seen.now
        seen.forget_peak()
        evaluate_loss(trainer.chunks, stream, 1)
        peaks["validation"] = seen.peak
        seen.forget_peak()
        saved = TrainingCheckpoints(folder / case["name"], 2, False)
        saved.save(TrainingState(step=2), trainer)
        saved.wait()
        peaks["save"] = seen.peak
    return peaks


def main() -> None:
    folder = Path(sys.argv[1])
    for case in json.loads((folder / "cases.json").read_text()):
        if case["processes"] != int(os.environ.get("WORLD_SIZE", "1")):
            continue
        peaks = run(case, folder)
        rank = os.environ.get("RANK", "0")
        (folder / f"{case['name']}-{rank}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main()
