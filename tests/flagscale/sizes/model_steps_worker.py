"""One rank of the steps that hold models: `torchrun ... model_steps_worker.py FOLDER`.

FOLDER holds `source`, `dataset` and `layouts.json`, {name: [processes, layout]}. For each layout
every rank leaves FOLDER/<name>/<step>-<rank>.json: the most bytes of tensors at a time.
"""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from allocations import Allocations

from flagscale.evaluation.tasks.language_models import MegatronLM, of_folder
from flagscale.megatron import platform
from flagscale.models.megatron import load_model
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    ExportRecipe,
    LayoutRecipe,
    MetRecipe,
    ModelsRecipe,
    StudentRecipe,
    TeacherOutputsRecipe,
    TeacherRecipe,
    TrainingRecipe,
)
from flagscale.steps import (
    cache_teacher,
    convert_student,
    distil_student,
    evaluate,
    export_student,
    measure_layers,
    prepare_teacher,
)


def steps(folder: Path, source: Path, dataset: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """The work of a rank of each step, in their order."""
    models = ModelsRecipe(parallelism=LayoutRecipe(**sizes))
    teacher, student, distilled, evaluation = (
        folder / name for name in ("teacher", "student", "distilled", "evaluation")
    )
    training = TrainingRecipe(
        train_iters=1,
        eval_iters=1,
        lr=1e-4,
        parallelism=models.sizes,
        save_interval_minutes=None,
    )
    return {
        "prepare-teacher": lambda: prepare_teacher.prepare_on_rank(
            TeacherRecipe(source=str(source), max_validation_loss=100),
            source, dataset, teacher, models,
        ),
        **{
            f"cache-teacher, {codec}": partial(
                cache_teacher.cache_on_rank,
                TeacherOutputsRecipe(codec=codec),
                MetRecipe(train=((0, 4),), validation=4),
                cache_teacher.Paths(teacher, dataset, str(folder / "kept"), folder / codec),
                models,
            )
            for codec in ("hidden", "topk")
        },
        "measure-layers": lambda: measure_layers.measure_on_rank(
            [StudentRecipe(num_layers=4, layer_importance="kl", calibration_tokens=512)],
            teacher, dataset, folder / "importance", models,
        ),
        "convert-student": lambda: convert_student.convert_on_rank(
            StudentRecipe(num_layers=4), None, teacher, dataset, student, models
        ),
        "distil-student": lambda: distil_student.distil_on_rank(
            DistillationRecipe(),
            training,
            distil_student.Paths(teacher, student, dataset, str(folder / "checkpoints"), distilled),
        ),
        "evaluate": lambda: evaluate.evaluate_on_rank(
            EvaluationRecipe(
                max_documents=4,
                max_document_tokens=1100,  # a whole micro-batch and more
                micro_batch_size=4,
                bootstrap_samples=100,
            ),
            evaluate.Paths(teacher, student, distilled, dataset, evaluation, folder / "scratch"),
            models,
        ),
        "export-student": lambda: export_student.export_on_rank(
            ExportRecipe(dtype="bfloat16"), distilled, evaluation, folder / "export", models
        ),
        "evaluate-tasks": lambda: ask_megatron(teacher, dataset, models),
    }  # fmt: skip


BATCH, TOKENS, SCORED = 4, 96, 48  # of questions: predictions hold more than a layer


def ask(lm: Any) -> None:
    """One batch of texts that have nothing in common, and one of answers to a question."""
    answers = [[4 + number] * SCORED for number in range(BATCH)]
    apart = [(None, [3 + n] * (TOKENS - SCORED + 1), answer) for n, answer in enumerate(answers)]
    together = [(None, [3] * (TOKENS - SCORED + 1), answer) for answer in answers]
    for requests in (apart, together):
        lm._loglikelihood_tokens(requests, disable_tqdm=True)


def ask_megatron(teacher: Path, dataset: Path, models: ModelsRecipe) -> None:
    with platform.runtime(parallelism=models.sizes):
        ask(
            MegatronLM(
                load_model(teacher, TOKENS, models.sizes, torch.float32),
                load_tokenizer(dataset / "tokenizer"),
                max_length=TOKENS,
                batch_size=BATCH,
                can_cache=True,
            )
        )


def ask_transformers(source: Path) -> int:
    """Bytes that reading takes beside the weights, which transformers' threads load unseen."""
    lm = of_folder(source, BATCH)
    weights = sum(weight.numel() * weight.element_size() for weight in lm.model.parameters())
    return weights + peak(lambda: ask(lm))


def peak(step: Callable[[], object]) -> int:
    with Allocations() as seen:
        step()
    return seen.peak


def wait_for_all(store: torch.distributed.Store, what: str, rank: str, world_size: int) -> None:
    """The first rank publishes an artifact, which the others then read."""
    store.set(f"{what} {rank}", "done")
    store.wait([f"{what} {other}" for other in range(world_size)])


def main() -> None:
    folder = Path(sys.argv[1])
    rank, world_size = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore(address, port, is_master=False)  # torchrun's own
    for name, (processes, sizes) in json.loads((folder / "layouts.json").read_text()).items():
        if processes != world_size:
            continue
        (folder / name / "scratch").mkdir(parents=True, exist_ok=True)
        for step, work in steps(
            folder / name, folder / "source", folder / "dataset", sizes
        ).items():
            found = peak(work)
            (folder / name / f"{step}-{rank}.json").write_text(json.dumps(found))
            wait_for_all(store, f"{name} {step}", rank, world_size)


if __name__ == "__main__":
    main()
