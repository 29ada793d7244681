"""One rank of a layout's training: `torchrun ... layout_worker.py FOLDER`, see `test_layouts.py`.

Trains every case of this number of processes for a few steps, standard and distillation, and
leaves in FOLDER/<case>/<kind> the records (result.json) and the first step's gradients, in the
form of a checkpoint of weights, so that one process can read them whatever the layout.

FOLDER/inputs.json names the artifacts, and may name `cases` (default: all of CASES), `kinds`,
`training` (more of the section, as the precision) and `weights` (a folder of first weights that
several FOLDERs share).
"""

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from layout_cases import CASES, KINDS, ON_GPU, WITH_LOGITS, Case
from megatron.core.utils import unwrap_model

from flagscale.checkpoint import load_weights, save_weights
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.megatron.user_buffers import user_buffers
from flagscale.post_training.export import plain_student
from flagscale.recipe import ArchitectureRecipe, DistillationRecipe, TrainingRecipe
from flagscale.recipe.combinations import check_combination
from flagscale.train.audit import TrainingAudit
from flagscale.train.loop import evaluate_loss, train_step
from flagscale.train.rank_batches import RankBatches
from flagscale.train.setup import build_model_chunks, setup_training

STEPS = 2
DISTILLATION = {
    "standard": DistillationRecipe(loss="none"),
    "distillation": DistillationRecipe(
        temperature=2.0,
        skip_lm_loss=False,
        kd_loss_scale=0.7,
        intermediate_loss_scale=0.5,
        # The student has layers 0 and 1, the teacher 0 to 3: with two pipeline stages there are
        # pairs on the first and on the last, and pairs whose earlier half has to travel.
        intermediate_layer_pairs=(
            ("decoder.layers.1", "decoder.layers.3"),
            ("decoder.final_layernorm", "decoder.final_layernorm", "mse"),
            ("embedding", "decoder.layers.0"),
            ("decoder.layers.0", "decoder.layers.2", "mse"),
            ("decoder.layers.1", "embedding"),
        ),
    ),
}
EXPERTS = ArchitectureRecipe(
    num_experts=4,
    moe_ffn_hidden_size=64,
    moe_shared_expert_intermediate_size=32,
    moe_aux_loss_coeff=0.01,
)
MODELS = {
    "dense": {},
    "experts": {"architecture": EXPERTS},
    "grouped experts": {"architecture": EXPERTS.model_copy(update={"moe_grouped_gemm": True})},
    "mtp": {
        "architecture": ArchitectureRecipe(mtp_num_layers=1),
        "untie_embeddings_and_output_weights": True,
    },
}


def recipe(case: Case, more: dict[str, str]) -> TrainingRecipe:
    return TrainingRecipe(
        train_iters=STEPS,
        micro_batch_size=2,
        global_batch_size=8,
        lr=1e-3,
        # Above the level of rounding: Adam takes full steps along gradients far above eps.
        adam_eps=1e-5,
        clip_grad=0.1,
        seed=5,
        # Sharded, a rank would have its share of the gradients alone.
        parallelism={**case.parallelism, "use_distributed_optimizer": False},
        **case.training,
        **more,
    )


def weights(case: Case, kind: str, folder: Path, inputs: dict[str, Any]) -> Path:
    """What the case starts from: the teacher trains on, the student is distilled."""
    if case.model != "dense":
        model = case.model.removeprefix("grouped ")
        return Path(inputs.get("weights", folder)) / f"{model}-{kind}"
    return Path(inputs["teacher" if kind == "standard" else "student"]) / "weights"


def run(case: Case, kind: str, folder: Path, inputs: dict[str, Any]) -> None:
    training, distillation = recipe(case, inputs.get("training", {})), DISTILLATION[kind]
    if case in WITH_LOGITS:
        distillation = distillation.model_copy(update={"fuse_output_layer": False})
    shape = ModelShape.load(Path(inputs["teacher" if kind == "standard" else "student"]))
    shape = replace(shape, **MODELS[case.model])
    check_combination(distillation, training, shape.architecture)
    args = training_arguments(shape, 64, training)
    if kind == "distillation":
        args = with_teacher(args, Path(inputs["teacher"]), distillation)
    runtime = platform.runtime(training.seed, training.parallelism)
    with runtime, use_args(args), user_buffers(args):
        chunks = build_model_chunks(args)
        start = weights(case, kind, folder, inputs)
        if not start.exists():  # one process comes first
            save_weights(chunks, start)
        load_weights(chunks, start)
        trainer = setup_training(chunks, args, training)
        for chunk in trainer.chunks:
            chunk.train()
        batches = RankBatches(Path(inputs["dataset"]), folder / "data", args, training)
        validation = evaluate_loss(trainer.chunks, batches.validation(), 1)
        gradients = keep_gradients(trainer)
        stream = batches.train(0)
        audit = TrainingAudit(trainer.chunks, args, interval=1)
        records = [
            train_step(trainer, stream, partial(audit.look, step + 1)) for step in range(STEPS)
        ]
        result = folder / case.name / kind
        save_gradients(trainer, gradients, result / "gradients")
        if torch.distributed.get_rank() == 0:
            write(result, {"records": records, "validation": validation})


def keep_gradients(trainer) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Filled at the first optimiser step: every gradient, reduced, before it is clipped."""
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}
    step = trainer.optimizer.step

    def keeping_step():
        if not kept:
            for chunk in trainer.chunks:
                for parameter in chunk.parameters():
                    if parameter.requires_grad:
                        kept[parameter] = parameter.main_grad.clone()
        return step()

    trainer.optimizer.step = keeping_step
    return kept


def save_gradients(trainer, gradients: dict[torch.nn.Parameter, torch.Tensor], to: Path) -> None:
    for parameter, gradient in gradients.items():
        parameter.data.copy_(gradient)
    save_weights([plain_student(unwrap_model(chunk)) for chunk in trainer.chunks], to)


def write(folder: Path, result: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))


def forget_fp8_scales() -> None:
    """transformer-engine keeps those of models that are gone, with groups that are gone."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    FP8GlobalStateManager.reset()


def main() -> None:
    folder = Path(sys.argv[1])
    inputs = json.loads((folder / "inputs.json").read_text())
    for case in [*CASES, *ON_GPU, *WITH_LOGITS]:
        wanted = case.name in inputs["cases"] if "cases" in inputs else case in CASES
        if not wanted or case.processes != int(os.environ["WORLD_SIZE"]):
            continue
        for kind in inputs.get("kinds", KINDS):
            try:
                run(case, kind, folder, inputs)
            except (UserError, ValueError) as error:
                if os.environ["RANK"] == "0":
                    write(folder / case.name / kind, {"error": f"{type(error).__name__}: {error}"})
            if "fp8" in inputs.get("training", {}):
                forget_fp8_scales()


if __name__ == "__main__":
    main()
