"""One rank of trainings from teacher outputs and with the live teacher: `torchrun ... FOLDER`.

Leaves in FOLDER what one step and a validation of each case reported on every layout of this number
of processes, on which the live teacher is asked again too; see `test_cached_teacher.py`. Of ranks
that share the vocabulary one reads hidden states.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from divergence_worker import DIVERGENCES, distillation
from divergence_worker import LAYOUTS as OTHERS
from teacher_outputs import CODECS, write_outputs

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.teacher_outputs import Hidden, SparseTargets, TeacherOutputs
from flagscale.train.audit import TrainingAudit
from flagscale.train.loop import evaluate_loss, train_step
from flagscale.train.outputs_audit import audit_outputs
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

LAYOUTS = {1: OTHERS[1], 2: OTHERS[2] | {"DP2": {}}}
SPARSE = {"sampled": "forward_kl", "topk": "top_k_kl"}
READ = TeacherOutputs.read
WRITES = ("one", "one, packed")  # and compares with the live teacher in the same process


def cases(layout: str) -> dict[str, tuple[DistillationRecipe, str | None]]:
    """Name -> the loss, and the codec; None: with the live teacher."""
    found: dict[str, tuple[DistillationRecipe, str | None]] = {}
    names = DIVERGENCES if layout == "one" else ("forward_kl",)
    for fuse in (False, True):
        form = "fused" if fuse else "apart"
        for name in names:
            if layout in WRITES:
                found[f"live, {name}, {form}"] = distillation(name, fuse), None
            found[f"fp32, {name}, {form}"] = distillation(name, fuse), "fp32"
        for codec, name in SPARSE.items():
            found[f"{codec}, {name}, {form}"] = distillation(name, fuse), codec
    return found


def run(layout: str, parallelism: dict[str, Any], folder: Path, inputs: dict[str, str]) -> dict:
    """What each case reports."""
    packed = "packed" in layout
    training = TrainingRecipe(
        train_iters=1,
        lr=1e-3,
        micro_batch_size=2,
        global_batch_size=4,
        seed=5,
        parallelism={**parallelism, "use_distributed_optimizer": False},
        reset_attention_mask=packed,
    )
    student, teacher, dataset = (Path(inputs[name]) for name in ("student", "teacher", "dataset"))
    plain = training_arguments(ModelShape.load(student), 64, training)
    found = {}
    with platform.runtime(training.seed, training.parallelism):
        outputs = {codec: folder / f"{codec}{'-packed' if packed else ''}" for codec in CODECS}
        if layout in WRITES:
            for codec, place in outputs.items():
                write_outputs(
                    place, teacher, dataset, codec, folder / "data", packed=packed, samples=4
                )
        for place in outputs.values():
            args = with_teacher(plain, teacher, DistillationRecipe(), place)
            with use_args(args):
                batches = RankBatches(dataset, folder / "data", args, training)
                audit_outputs(args, batches.train(0))
        for key, (recipe, codec) in cases(layout).items():
            args = with_teacher(plain, teacher, recipe, outputs[codec] if codec else None)
            with use_args(args):
                chunks = build_model_chunks(args)
                load_weights(chunks, student / "weights")
                trainer = setup_training(chunks, args, training)
                batches = RankBatches(dataset, folder / "data", args, training)
                for chunk in trainer.chunks:
                    chunk.train()
                validation = evaluate_loss(trainer.chunks, batches.validation(), 1)
                audit = TrainingAudit(trainer.chunks, args, interval=1)
                record = train_step(
                    trainer, batches.train(0), lambda step, audit=audit: audit.look(1, step)
                )
                record.pop("tokens per second", None)
                found[key] = {"training": record, "validation": validation}
    return found


def reads_no_hidden_states(outputs: TeacherOutputs, *what: object) -> Hidden | SparseTargets:
    """In place of `TeacherOutputs.read`, of a rank that is to be given them by another."""
    assert outputs.codec.temperature is not None, "they were read twice"
    return READ(outputs, *what)


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = json.loads((folder / "inputs.json").read_text())
    for layout, parallelism in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        is_second = os.environ["RANK"] == "1" and "tensor_model_parallel_size" in parallelism
        TeacherOutputs.read = reads_no_hidden_states if is_second else READ
        found = run(layout, parallelism, folder, inputs)
        if int(os.environ["RANK"]) == 0:
            (folder / f"{layout}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
