"""Students of one teacher, made in every way and of one memory, distilled alike: which is best?

    python benchmarks/students.py WORK [--steps 30] [--only fp8 ...]

The default recipe's teacher and data. The quantised student is the whole teacher in FP8; the others
hold as many bytes of weights in bfloat16. All see the same text in the same order. Each goes
through the pipeline's own steps, convert-student, distil-student and evaluate, in WORK, where what
is there already is used again. Prints the Markdown tables of docs/students.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, QuantizationRecipe, Recipe, StudentRecipe
from flagscale.recipe.quantization import FORMATS
from flagscale.recipe.reading import load_recipe
from flagscale.sizes.use import parameters_in_use

RECIPE = Path(__file__).parent.parent / "recipes/smollm2-135m-to-22-layers.yaml"
_BFLOAT16 = 2
_QUANTISED = ("fp8", "int8", "int4_awq_64")
_STUDENTS = (
    "student",
    "layers x hidden x MLP",
    "parameters",
    "weights",
    "KL before",
    "KL after",
    "top-1 before",
    "after",
    "LM loss",
)
_PTQ = ("recipe", "weights", "PTQ: KL", "QAD: KL", "QAD - PTQ, paired", "top-1 PTQ", "QAD")


def main() -> None:
    """Print two tables: students of one memory, and what distillation gives quantised ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--quantised-lr", type=float, default=1e-5)
    parser.add_argument("--only", nargs="+", help="rows, by their first cell")
    options = parser.parse_args()
    recipe = load_recipe(RECIPE)
    prepare(recipe, options.work)
    teacher = ModelShape.load(options.work / "teacher")
    students = of_one_memory(teacher)
    quantised = {
        name: StudentRecipe(init="same", quantization=_quantised(name)) for name in _QUANTISED
    }
    wanted = options.only or [*students, *quantised]
    _row(_STUDENTS, head=True)
    for name in filter(wanted.__contains__, students):
        lr = options.lr if students[name].quantization is None else options.quantised_lr
        _row(student_row(name, measure(recipe, students[name], options, name, lr)))
    sys.stdout.write("\n")
    _row(_PTQ, head=True)
    for name in filter(wanted.__contains__, quantised):
        _row(ptq_row(name, measure(recipe, quantised[name], options, name, options.quantised_lr)))


def of_one_memory(teacher: ModelShape) -> dict[str, StudentRecipe]:
    """Students whose weights take as many bytes as the teacher's in FP8."""
    target = {"target_parameters": weight_bytes(teacher, "fp8") / _BFLOAT16}
    return {
        "depth, evenly spread": StudentRecipe(init="depth", **target),
        "depth, by importance": StudentRecipe(init="depth", layer_importance="kl", **target),
        "width": StudentRecipe(init="width", **target),
        "depth and width": StudentRecipe(init="depth_and_width", layer_importance="kl", **target),
        "fp8": StudentRecipe(init="same", quantization=_quantised("fp8")),
    }


def weight_bytes(shape: ModelShape, quantization: str | None) -> int:
    """Of the exported weights: embedding, output layer and norms are never quantised."""
    whole = parameters_in_use(shape)
    if quantization is None:
        return _BFLOAT16 * whole
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    linear = shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.ffn_hidden_size)
    quantised = shape.num_layers * linear
    return _BFLOAT16 * (whole - quantised) + quantised * FORMATS[quantization].weight_bits // 8


def prepare(recipe: Recipe, work: Path) -> None:
    """Data and teacher."""
    from flagscale.steps.prepare_data import prepare_data
    from flagscale.steps.prepare_teacher import prepare_teacher

    work.mkdir(parents=True, exist_ok=True)
    dataset, teacher = work / "dataset", work / "teacher"
    _once(dataset, partial(prepare_data, recipe.data, dataset))
    _once(teacher, partial(prepare_teacher, recipe.teacher, dataset, teacher, recipe.models))


def measure(
    recipe: Recipe, student: StudentRecipe, options: argparse.Namespace, name: str, lr: float
) -> Path:
    """Make, distil and evaluate a student; its folder, with the artifacts."""
    from flagscale.steps.convert_student import convert_student
    from flagscale.steps.distil_student import distil_student
    from flagscale.steps.evaluate import evaluate

    folder = options.work / name.replace(", ", "-").replace(" ", "-")
    training = recipe.training.model_copy(
        update={
            "train_iters": options.steps,
            "lr": lr,
            "eval_interval": options.steps,
            "save_interval": options.steps,
        }
    )
    dataset, teacher = options.work / "dataset", options.work / "teacher"
    made, distilled, evaluation = (folder / one for one in ("student", "distilled", "evaluation"))
    _once(made, partial(convert_student, student, teacher, dataset, made))
    distil = partial(distil_student, DistillationRecipe(), training, teacher, made, dataset)
    _once(distilled, partial(distil, folder / "checkpoints", distilled))
    _once(
        evaluation,
        partial(evaluate, recipe.evaluation, teacher, made, distilled, dataset, evaluation),
    )
    return folder


def student_row(name: str, folder: Path) -> Sequence[str]:
    """Of the first table."""
    shape, metrics = ModelShape.load(folder / "student"), _metrics(folder)
    before, after = (metrics["models"][one] for one in ("student", "distilled"))
    return (
        name,
        f"{shape.num_layers} x {shape.hidden_size} x {shape.ffn_hidden_size}",
        f"{parameters_in_use(shape) / 1e6:.1f}M",
        f"{weight_bytes(shape, shape.quantization) / 1e6:.0f} MB",
        f"{before['kl']['value']:.3f}",
        _interval(after["kl"]),
        f"{before['top1_agreement']['value']:.1%}",
        f"{after['top1_agreement']['value']:.1%}",
        f"{after['lm_loss']['value']:.3f}",
    )


def ptq_row(name: str, folder: Path) -> Sequence[str]:
    """Of the second table."""
    shape, metrics = ModelShape.load(folder / "student"), _metrics(folder)
    before, after = (metrics["models"][one] for one in ("student", "distilled"))
    return (
        name,
        f"{weight_bytes(shape, name) / 1e6:.0f} MB",
        _interval(before["kl"], 4),
        _interval(after["kl"], 4),
        _interval(metrics["paired"]["kl"], 4, "+"),
        f"{before['top1_agreement']['value']:.1%}",
        f"{after['top1_agreement']['value']:.1%}",
    )


def _quantised(name: str) -> QuantizationRecipe:
    return QuantizationRecipe(recipe=name, calibration_tokens=8192)


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "evaluation/metrics.json").read_text())
    return metrics


def _once(folder: Path, make: partial[Any]) -> None:
    if not folder.exists():
        make()


def _interval(figure: dict[str, Any], digits: int = 3, sign: str = "") -> str:
    value, low, high = (f"{figure[key]:{sign}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _row(cells: Sequence[str], *, head: bool = False) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    if head:
        sys.stdout.write(f"|---|{'---:|' * (len(cells) - 1)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
