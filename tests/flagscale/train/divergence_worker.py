"""One rank of trainings with every divergence: `torchrun ... divergence_worker.py FOLDER`.

Leaves in FOLDER what one step of each reported, on every layout of this number of processes; see
`test_divergences_on_layouts.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

import torch

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.post_training.divergences import cpu_kernel
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.train.loop import evaluate_loss, train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

DIVERGENCES = get_args(DistillationRecipe.model_fields["divergence"].annotation)
OWN = {"jensen_shannon": {"beta": 0.3}, "skew_kl": {"alpha": 0.2}, "top_k_kl": {"top_k": 9}}
TENSOR = {"tensor_model_parallel_size": 2}
LAYOUTS = {
    1: {"one": {}, "one, packed": {}},
    2: {
        "TP2": TENSOR,
        "TP2, sequence parallel": TENSOR | {"sequence_parallel": True},
        "PP2": {"pipeline_model_parallel_size": 2},
        "CP2": {"context_parallel_size": 2},
        "TP2, packed": TENSOR,
    },
}

# By C++ instead of in chunks of rows, whatever the vocabulary's size.
COMPILED = ("one, packed", "TP2")
FUSED = ("one", "TP2, sequence parallel")  # what the fusion has to do with


def distillation(name: str, fuse: bool) -> DistillationRecipe:
    values: dict[str, Any] = {"divergence": name, "skip_lm_loss": False, "kd_loss_scale": 0.7}
    if name != "logits_mse":
        values["temperature"] = 2.0
    return DistillationRecipe(fuse_output_layer=fuse, **values, **OWN.get(name, {}))


def run(layout: str, parallelism: dict[str, Any], folder: Path, inputs: dict[str, str]) -> dict:
    """What each divergence reports, apart from the output layer and fused with it."""
    training = TrainingRecipe(
        train_iters=1,
        lr=1e-3,
        micro_batch_size=2,
        global_batch_size=4,
        seed=5,
        parallelism={**parallelism, "use_distributed_optimizer": False},
        reset_attention_mask="packed" in layout,
    )
    student, teacher = Path(inputs["student"]), Path(inputs["teacher"])
    plain = training_arguments(ModelShape.load(student), 64, training)
    found = {}
    with platform.runtime(training.seed, training.parallelism):
        for name in DIVERGENCES:
            for fuse in (False, True) if layout in FUSED else (False,):
                args = with_teacher(plain, teacher, distillation(name, fuse))
                with use_args(args):
                    chunks = build_model_chunks(args)
                    load_weights(chunks, student / "weights")
                    trainer = setup_training(chunks, args, training)
                    batches = RankBatches(Path(inputs["dataset"]), folder / "data", args, training)
                    for chunk in trainer.chunks:
                        chunk.train()
                    validation = evaluate_loss(trainer.chunks, batches.validation(), 1)
                    record = train_step(trainer, batches.train(0))
                    record.pop("tokens per second", None)
                    key = f"{name}, {'fused' if fuse else 'apart'}"
                    found[key] = {"training": record, "validation": validation}
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = json.loads((folder / "inputs.json").read_text())
    from_columns = cpu_kernel.MIN_COLUMNS
    for layout, parallelism in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        cpu_kernel.MIN_COLUMNS = 0 if layout in COMPILED else from_columns
        found = run(layout, parallelism, folder, inputs)
        if int(os.environ["RANK"]) == 0:
            (folder / f"{layout}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
