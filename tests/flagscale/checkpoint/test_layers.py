"""Layers cut out of a checkpoint, against a copy from the model itself: bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layers_worker import DEEP, KEPT, cut_on_rank, shapes

from flagscale.checkpoint import load_layers, load_weights, save_weights
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks
from flagscale.megatron import platform
from flagscale.models.megatron import build_model
from flagscale.recipe import LayoutRecipe, ModelsRecipe

TENSOR, PIPELINE, EXPERT = (
    {f"{what}_model_parallel_size": 2} for what in ("tensor", "pipeline", "expert")
)
LAYOUTS = {"TP2": TENSOR, "PP2": PIPELINE, "EP2": EXPERT, "TP2 x PP2": TENSOR | PIPELINE}
ON_RANKS = [
    ("untied, biases, q and k norms", ["TP2", "PP2"]),
    ("untied, biases, q and k norms", ["TP2 x PP2"]),
    ("experts", ["PP2", "EP2"]),
    ("layers that differ", ["PP2"]),
]


def copied(deep: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model of the layers in KEPT must hold, by its own names."""
    state = {}
    for name, value in deep.state_dict().items():
        if not name.startswith("decoder.layers."):
            state[name] = value
            continue
        _, _, layer, rest = name.split(".", 3)
        if int(layer) in KEPT:
            state[f"decoder.layers.{KEPT.index(int(layer))}.{rest}"] = value
    return {name: value for name, value in state.items() if value is not None}


def check(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = {name: value for name, value in model.state_dict().items() if value is not None}
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def deep(tmp_path: Path, request: pytest.FixtureRequest):
    """The deeper model's state dict cut by hand, its weights, and the shape of what is cut."""
    deep, student = shapes(request.param)
    with platform.runtime():
        model = build_model(deep, 16)
        for parameter in model.parameters():  # norms and biases too must tell layers apart
            torch.nn.init.normal_(parameter)
        save_weights(model, tmp_path / "deep")
        yield copied(model), tmp_path / "deep", student


MODELS = ["plain", *dict(ON_RANKS)]


@pytest.mark.parametrize("deep", MODELS, indirect=True)
def test_one_process(deep) -> None:
    expected, weights, student = deep
    model = build_model(student, 16)
    load_layers(model, weights, KEPT, DEEP)
    check(model, expected)


@pytest.mark.parametrize(
    ("deep", "names", "name"),
    [(model, names, model) for model, names in ON_RANKS],
    indirect=["deep"],
    ids=[f"{model}, {' and '.join(names)}" for model, names in ON_RANKS],
)
def test_on_ranks(deep, names, name, tmp_path, monkeypatch) -> None:
    expected, weights, student = deep
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    layouts = {one: ModelsRecipe(parallelism=LayoutRecipe(**LAYOUTS[one])) for one in names}
    call_on_ranks(
        "test",
        cut_on_rank,
        max(models.processes for models in layouts.values()),
        weights=weights,
        model=name,
        layouts=layouts,
        output=tmp_path,
    )
    for one in names:
        model = build_model(student, 16)
        load_weights(model, tmp_path / one)
        check(model, expected)


@pytest.mark.parametrize("deep", ["plain"], indirect=True)
@pytest.mark.parametrize(
    ("kept", "num_layers", "error", "message"),
    [
        ((0, 1, 2), DEEP, ValueError, "must be 4 layers"),
        ((0, 1, 2, 6), DEEP, ValueError, "out of 0 to 5"),
        (KEPT, DEEP + 1, UserError, "cannot be read"),
    ],
)
def test_layers_that_are_not_there(deep, kept, num_layers, error, message) -> None:
    _, weights, student = deep
    with pytest.raises(error, match=message):
        load_layers(build_model(student, 16), weights, kept, num_layers)


@pytest.mark.parametrize("deep", ["plain"], indirect=True)
def test_bfloat16_weights_are_widened_exactly(deep, tmp_path) -> None:
    expected, weights, student = deep
    whole = build_model(replace(student, num_layers=DEEP), 16)
    load_weights(whole, weights)
    save_weights(whole.bfloat16(), tmp_path / "bfloat16")
    model = build_model(student, 16)
    load_layers(model, tmp_path / "bfloat16", KEPT, DEEP)
    check(model, {name: value.bfloat16().float() for name, value in expected.items()})
