"""Layers fitted to their teacher: against transformers' layers in float64, and on ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reconstruction_worker import reconstruct_on_rank
from transformers import AutoModelForCausalLM

from flagscale.checkpoint import load_weights
from flagscale.execution.launch import call_on_ranks
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model
from flagscale.recipe import LayoutRecipe, ModelsRecipe

KEPT = [0, 2]
LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2 x PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


@pytest.fixture(scope="module")
def tokens() -> list[list[int]]:
    return torch.randint(1000, (12, 20), generator=torch.Generator().manual_seed(0)).tolist()


def weights(teacher: Path, folder: Path) -> dict[str, torch.Tensor]:
    with platform.runtime():
        model = build_model(replace(ModelShape.load(teacher), num_layers=len(KEPT)), 20)
        load_weights(model, folder)
        return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def by_transformers(folder: Path, tokens: list[Any], ridge: float) -> list[torch.Tensor]:
    """The down projections [h, f], fitted one after the other, in float64."""
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder).double().eval() for _ in "12")
    into: list[torch.Tensor] = []
    for layer in teacher.model.layers:
        layer.register_forward_pre_hook(lambda _, inputs: into.append(inputs[0].flatten(0, 1)))
    teacher(torch.tensor(tokens), use_cache=False)
    targets = [into[2], into[3]]  # what the next kept layer is fed; the last one's output is
    teacher.model.norm.register_forward_pre_hook(lambda _, x: into.append(x[0].flatten(0, 1)))
    teacher(torch.tensor(tokens), use_cache=False)
    targets[1] = into[-1]
    student.model.layers = torch.nn.ModuleList([student.model.layers[i] for i in KEPT])
    fitted = []
    for layer, target in zip(student.model.layers, targets, strict=True):
        seen: dict[str, torch.Tensor] = {}
        projection = layer.mlp.down_proj
        handles = [
            projection.register_forward_pre_hook(
                lambda _, x, seen=seen: seen.update(x=x[0].flatten(0, 1))
            ),
            layer.register_forward_hook(
                lambda _, __, y, seen=seen: seen.update(
                    y=(y[0] if isinstance(y, tuple) else y).flatten(0, 1)
                )
            ),
        ]
        student(torch.tensor(tokens), use_cache=False)
        for handle in handles:
            handle.remove()
        weigh = 1 / target.norm(dim=-1, keepdim=True)
        x, error = seen["x"] * weigh, (target - seen["y"]) * weigh
        # |X D - E|^2 + r |D|^2 as an ordinary least squares problem of more rows.
        width = x.size(1)
        more = (ridge * x.pow(2).sum() / width).sqrt() * torch.eye(width, dtype=torch.float64)
        zeros = torch.zeros(width, error.size(1), dtype=torch.float64)
        change = torch.linalg.lstsq(torch.cat([x, more]), torch.cat([error, zeros])).solution
        projection.weight += change.T
        fitted.append(projection.weight.clone())
    return fitted


@pytest.mark.parametrize("ridge", [0.1, 2.0])
@pytest.mark.parametrize("rows", [12, 3], ids=["more tokens than width", "fewer"])
def test_down_projections_are_the_ridge_regressions(
    ridge: float, rows: int, teacher: Path, tiny_teacher: Path, tokens: list[Any], tmp_path: Path
) -> None:
    fits = reconstruct_on_rank(
        teacher, ModelsRecipe(), tokens[:rows], KEPT, ridge, tmp_path / "weights"
    )
    ours = weights(teacher, tmp_path / "weights")
    expected = by_transformers(tiny_teacher, tokens[:rows], ridge)
    whole = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    for index, (kept, fitted) in enumerate(zip(KEPT, expected, strict=True)):
        found = ours[f"decoder.layers.{index}.mlp.linear_fc2.weight"]
        torch.testing.assert_close(found.double(), fitted, atol=2e-5, rtol=1e-4)
        before = whole.model.layers[kept].mlp.down_proj.weight
        assert (found - before).abs().max() > 1e-2
        assert fits[index]["after"] < fits[index]["before"]


def test_nothing_changes_where_no_layer_is_missing(
    teacher: Path, tokens: list[Any], tmp_path: Path
) -> None:
    fits = reconstruct_on_rank(
        teacher, ModelsRecipe(), tokens, [0, 1, 2, 3], 0.5, tmp_path / "weights"
    )
    for fit in fits:
        assert fit == pytest.approx({"before": 0.0, "after": 0.0}, abs=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_on_ranks_it_is_that_of_one_process(
    layout: dict[str, int],
    teacher: Path,
    tokens: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    models = ModelsRecipe(parallelism=LayoutRecipe(**layout))
    ranks = call_on_ranks(
        "test",
        reconstruct_on_rank,
        models.processes,
        artifact=teacher,
        models=models,
        tokens=tokens,
        kept=KEPT,
        ridge=1.0,
        to=tmp_path / "ranks",
    )
    alone = reconstruct_on_rank(teacher, ModelsRecipe(), tokens, KEPT, 1.0, tmp_path / "alone")
    for ours, theirs in zip(ranks, alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = weights(teacher, tmp_path / "ranks"), weights(teacher, tmp_path / "alone")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-5, rtol=1e-4)
