"""What quantisation costs a student, and what distillation gives back (QAD against PTQ).

    python benchmarks/quantization.py TEACHER DATASET WORK --recipes fp8 int8 int4_awq_64 --steps 30

TEACHER and DATASET are artifacts, e.g. of `pipelines run`. For each recipe the teacher itself is
quantised (`student.init: same`), measured, trained against the unquantised teacher, and measured
again, by the pipeline's own steps; what WORK has already is not made again. Prints a Markdown
table: forward KL to the teacher, nats a
token, with 95% intervals, and the paired difference over the same test documents.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from flagscale.artifacts import open_artifact
from flagscale.recipe import (
    DistillationRecipe,
    EvaluationRecipe,
    QuantizationRecipe,
    StudentRecipe,
    TrainingRecipe,
)
from flagscale.recipe.quantization import FORMATS

_HEAD = (
    *("recipe", "PTQ: KL", "QAD: KL", "QAD - PTQ (paired)"),
    *("top-1 PTQ", "QAD", "LM loss, PTQ - unquantised (validation)"),
)


def make(options: argparse.Namespace, recipe: str) -> None:
    """The student, quantised and then trained, and the evaluation of both."""
    from flagscale.steps.convert_student import convert_student
    from flagscale.steps.distil_student import distil_student
    from flagscale.steps.evaluate import evaluate

    work = options.work / recipe
    shutil.rmtree(work, ignore_errors=True)
    student, distilled = work / "student", work / "distilled"
    quantization = QuantizationRecipe(
        recipe=recipe, calibration_tokens=options.calibration_tokens, documents=options.documents
    )
    training = TrainingRecipe(
        train_iters=options.steps,
        global_batch_size=options.batch,
        lr=options.lr,
        lr_warmup_iters=min(3, options.steps - 1),
        eval_interval=options.steps,
        eval_iters=1,
        save_interval=options.steps,
    )
    convert_student(
        StudentRecipe(init="same", quantization=quantization),
        options.teacher,
        options.dataset,
        student,
    )
    distil_student(
        DistillationRecipe(),
        training,
        options.teacher,
        student,
        options.dataset,
        work / "checkpoints",
        distilled,
    )
    evaluate(
        EvaluationRecipe(
            max_documents=options.documents, max_document_tokens=options.document_tokens
        ),
        options.teacher,
        student,
        distilled,
        options.dataset,
        work / "evaluation",
    )


def row(work: Path) -> tuple[str, ...]:
    """One row of the table, from what was made."""
    metrics = open_artifact(work / "evaluation", "evaluation").facts["metrics"]
    facts = open_artifact(work / "student", "student").facts
    cost = facts["quantization"]["cost"]["paired"]["lm_loss"]
    before, after = (metrics["models"][name] for name in ("student", "distilled"))
    return (
        work.name,
        _text(before["kl"]),
        _text(after["kl"]),
        _text(metrics["paired"]["kl"], "+"),
        f"{before['top1_agreement']['value']:.1%}",
        f"{after['top1_agreement']['value']:.1%}",
        _text(cost, "+"),
    )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("teacher", "dataset", "work"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--recipes", nargs="+", choices=FORMATS, default=["fp8", "int8"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--document-tokens", type=int, default=128)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    options = parser.parse_args()
    _row(_HEAD)
    _row(["---", *["---:"] * (len(_HEAD) - 1)])
    for recipe in options.recipes:
        if not (options.work / recipe / "evaluation").exists():
            make(options, recipe)
        _row(row(options.work / recipe))


def _text(interval: dict[str, Any], sign: str = "") -> str:
    value, low, high = (f"{interval[key]:{sign}.4f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _row(cells: Any) -> None:  # noqa: ANN401 - of texts
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
