"""One rank of a layout with intermediate terms: `torchrun ... terms_worker.py FOLDER`.

See `test_intermediate_terms.py`. Leaves in FOLDER/<layout>.pt the losses of two steps and of a
validation, and every gradient of the first, gathered over pipeline stages under the names that
checkpoints have; FOLDER/inputs.json names the artifacts and the layouts.
"""

import json
import logging.handlers
import os
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from flagscale.checkpoint import load_weights, save_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.post_training.export import plain_student
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.combinations import check_combination
from flagscale.train.audit import TrainingAudit
from flagscale.train.checkpoints.training_state import sharded_state
from flagscale.train.loop import evaluate_loss, train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

STEPS = 2
audits = logging.handlers.BufferingHandler(1000)  # what the audit says
audit_logger = logging.getLogger("flagscale.train.audit")
audit_logger.addHandler(audits)
audit_logger.setLevel(logging.INFO)

# The student is narrower, and has half the heads. With pipeline stages: pairs that meet on any of
# them, and halves of pairs that travel, from either model, some of them past a stage.
DISTILLATION = DistillationRecipe(
    temperature=2.0,
    skip_lm_loss=False,
    kd_loss_scale=0.7,
    intermediate_loss_scale=0.5,
    attention_loss_scale=2.0,
    intermediate_layer_pairs=(
        ("embedding", "embedding", "mse"),
        ("decoder.layers.0.mlp", "decoder.layers.1.mlp", "mse"),
        ("decoder.layers.0", "decoder.layers.3"),
        ("decoder.layers.3", "decoder.layers.0", "mse"),
        ("decoder.layers.3", "decoder.layers.1.self_attention"),
        ("decoder.final_layernorm", "decoder.final_layernorm"),
    ),
    attention_layer_pairs=((0, 0), (0, 3), (3, 0), (3, 3)),
    attention_relations=("query", "key", "value", "query_key"),
    attention_relation_heads=4,
)


@dataclass(frozen=True)
class Layout:
    """Parallel sizes, more of the recipe's section `training`, and what of the loss is another."""

    name: str
    processes: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    distillation: dict[str, Any] = field(default_factory=dict)


TENSOR, SEQUENCE = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}
PIPELINE, CONTEXT = {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}
PACKED = {"reset_attention_mask": True}
WHOLE_LAYERS = {
    "intermediate_layer_pairs": [
        ["decoder.layers.0", "decoder.layers.1"],
        ["decoder.layers.3", "decoder.layers.3", "mse"],
    ],
    "attention_layer_pairs": [],
    "attention_loss_scale": 1.0,
    "attention_relations": ["query", "key", "value"],
    "attention_relation_heads": None,
}
REFERENCES = {  # of what a layout must equal, by how its name ends
    "packed": Layout("one, packed", training=PACKED),
    "whole layers": Layout("one, whole layers", distillation=WHOLE_LAYERS),
    "mse": Layout("one, mse", distillation={"attention_fit": "mse"}),
    "": Layout("one"),
}
BF16 = [
    Layout("one, bf16", training={"precision": "bf16"}),
    Layout("PP2, bf16", 2, PIPELINE, {"precision": "bf16"}),
]
LAYOUTS = [
    Layout(
        "recompute full, whole layers",
        training={"recompute_granularity": "full"},
        distillation=WHOLE_LAYERS,
    ),
    Layout("TP2", 2, TENSOR),
    Layout("TP2 SP", 2, TENSOR | SEQUENCE),
    Layout("PP2", 2, PIPELINE),
    Layout(
        "PP2, recompute full, whole layers",
        2,
        PIPELINE,
        {"recompute_granularity": "full"},
        WHOLE_LAYERS,
    ),
    Layout("CP2", 2, CONTEXT),
    Layout("CP2, mse", 2, CONTEXT, distillation={"attention_fit": "mse"}),
    Layout("PP2, packed", 2, PIPELINE, PACKED),
    Layout("PP4", 4, {"pipeline_model_parallel_size": 4}),
    Layout("TP2 x PP2", 4, TENSOR | PIPELINE),
    Layout("TP2 x PP2 SP", 4, TENSOR | PIPELINE | SEQUENCE),
    Layout("PP2 x CP2", 4, PIPELINE | CONTEXT),
]


def run(layout: Layout, folder: Path, inputs: dict[str, Any]) -> None:
    """All ranks call it; the first writes."""
    training = TrainingRecipe(
        train_iters=STEPS,
        micro_batch_size=2,
        global_batch_size=4,
        lr=1e-3,
        adam_eps=1e-5,  # above the level of rounding, see `layout_worker`
        clip_grad=0.1,
        seed=5,
        parallelism={**layout.parallelism, "use_distributed_optimizer": False},
        **layout.training,
    )
    values = DISTILLATION.model_dump() | layout.distillation
    distillation = DistillationRecipe.model_validate(values)
    check_combination(distillation, training, None)
    shape = replace(
        ModelShape.load(Path(inputs["teacher"])),
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=2,
    )
    args = training_arguments(shape, 64, training)
    args = with_teacher(args, Path(inputs["teacher"]), distillation)
    with platform.runtime(training.seed, training.parallelism), use_args(args):
        torch.manual_seed(0)
        chunks = build_model_chunks(args)
        if not (folder / "weights").exists():  # one process comes first
            save_weights(chunks, folder / "weights")
        load_weights(chunks, folder / "weights")
        trainer = setup_training(chunks, args, training)
        batches = RankBatches(Path(inputs["dataset"]), folder / "data", args, training)
        for chunk in trainer.chunks:
            chunk.train()
        validation = evaluate_loss(trainer.chunks, batches.validation(), 1)
        if layout in BF16:  # in which a CPU takes many times as long: forwards alone
            if torch.distributed.get_rank() == 0:
                torch.save({"validation": validation}, folder / f"{layout.name}.pt")
            return
        gradients = keep_gradients(trainer)
        stream = batches.train(0)
        audits.buffer.clear()
        audit = TrainingAudit(trainer.chunks, args, interval=1)
        records = [
            train_step(trainer, stream, partial(audit.look, step + 1)) for step in range(STEPS)
        ]
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, gradients)
        state = sharded_state(trainer)["model"]
        plain = plain_student(unwrap_model(trainer.chunks[0]))
        if torch.distributed.get_rank() == 0:
            result = {
                "records": records,
                "audits": [record.getMessage() for record in audits.buffer],
                "validation": validation,
                "gradients": [one for rank in found for one in rank.items()],
                "projections": sorted(name for name in state if "_loss_modules" in name),
                "student": sorted(name for name, _ in plain.named_parameters()),
                "hooks": sum(len(m._forward_hooks) for m in plain.decoder.modules()),
            }
            torch.save(result, folder / f"{layout.name}.pt")


def keep_gradients(trainer) -> dict[str, torch.Tensor]:
    """Filled at the first step: those of tensors that every rank has whole, under their own name.

    Layers' numbers are those of the stage: the tests look at what is in no layer, projections.
    """
    kept: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def keeping_step():
        if not kept:
            for name, parameter in unwrap_model(trainer.chunks[0]).named_parameters():
                if "projections" in name:
                    kept[name.split("projections.")[1]] = parameter.main_grad.clone()
        return step()

    trainer.optimizer.step = keeping_step
    return kept


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = json.loads((folder / "inputs.json").read_text())
    for layout in [*REFERENCES.values(), *LAYOUTS, *BF16]:
        if layout.processes == int(os.environ["WORLD_SIZE"]):
            run(layout, folder, inputs)


if __name__ == "__main__":
    main()
