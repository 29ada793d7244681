"""Renews the table of models in `docs/sizes.md`: `make sizes`.

Each known model, cut to about two thirds of its layers, on nodes of eight 80 GB accelerators: the
fewest nodes, and the smallest layouts, that have room.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from flagscale.recipe import Recipe
from flagscale.sizes.job import Job
from flagscale.sizes.machine import ACCELERATORS, Machine
from flagscale.sizes.parameters import parameters
from flagscale.sizes.steps import MODEL_STEPS, StepPlan, gb, model_step, training_step
from flagscale.sizes.teacher import Teacher, teacher_of
from pipelines.planning import choose, smallest_training

DOCUMENT = Path(__file__).parents[1] / "docs" / "sizes.md"
_LAYERS = {
    "HuggingFaceTB/SmolLM2-135M": 20,
    "meta-llama/Llama-3.1-8B": 20,
    "Qwen/Qwen3-8B": 24,
    "Qwen/Qwen3-32B": 40,
    "meta-llama/Llama-3.3-70B-Instruct": 48,
    "Qwen/Qwen3-30B-A3B": 32,
}
_POD = Machine(memory=1600 * 2**30, accelerators=8, accelerator=ACCELERATORS["H100-80GB"])
_BATCH, _SEQ_LENGTH = 128, 4096
_TOKENS = 1e9
_HEAD = (
    "| teacher → student | model steps | prepare, convert, evaluate, export: a rank | training | "
    "a rank: weights + gradients + optimiser + teacher + activations + logits | a node's host | "
    "checkpoints | FLOPs | GPU hours |",
    "|---|---|---|---|---|---|---|---|---|",
)


def table() -> list[str]:
    """The table's lines."""
    return [*_HEAD, *(_row(source, layers) for source, layers in _LAYERS.items())]


def renewed(text: str, name: str, lines: list[str]) -> str:
    """A document with other lines between its comments `NAME begins` and `NAME ends`."""
    begins, ends = f"<!-- {name} begins -->\n", f"<!-- {name} ends -->"
    before, rest = text.split(begins)
    _, after = rest.split(ends)
    return before + begins + "\n".join([*lines, ""]) + ends + after


def _row(source: str, layers: int) -> str:
    job = _job(source, layers)
    sizes = choose(job)
    found = smallest_training(job)
    assert sizes is not None, source
    assert found is not None, source
    nodes, layout = found
    job = replace(job, training=replace(job.training, pods=nodes))
    held = [model_step(job, step, sizes) for step in MODEL_STEPS]
    trained = training_step(job, layout)
    cells = (
        f"{source} {_size(parameters(job.teacher.shape).total)} → {layers} layers, "
        f"{_size(parameters(job.student).total)}",
        str(held[0].layout),
        ", ".join(f"{step.rank_bytes / 1e9:.0f}" for step in held) + " GB",
        f"{nodes} node{'s' * (nodes > 1)}, {layout}",
        _parts(trained),
        gb(trained.host),
        gb(trained.most_stored),
        f"{trained.flops:.1e}",
        f"{trained.gpu_hours:,.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def _job(source: str, layers: int) -> Job:
    from flagscale.models.student_shape import student_shape

    values = {
        "name": "sizes",
        "teacher": {"source": source},
        "student": {"num_layers": layers},
        "data": {"seq_length": _SEQ_LENGTH},
        "training": {
            "train_iters": round(_TOKENS / _BATCH / _SEQ_LENGTH),
            "global_batch_size": _BATCH,
            "lr": 1e-4,
            "save_interval": 500,
            "eval_interval": 500,
        },
        "export": {"dtype": "bfloat16"},
    }
    recipe = Recipe.model_validate(values)
    teacher: Teacher = teacher_of(recipe.teacher)
    return Job(recipe, teacher, student_shape(teacher.shape, recipe.student), _POD, _POD)


def _parts(step: StepPlan) -> str:
    names = ("weights", "gradients", "optimiser", "teacher", "activations", "logits")
    parts = " + ".join(f"{step.rank.get(name, 0) / 1e9:.1f}" for name in names)
    return f"{parts} = **{step.rank_bytes / 1e9:.1f} GB**"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def _main() -> int:
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(renewed(text, "models", table()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
