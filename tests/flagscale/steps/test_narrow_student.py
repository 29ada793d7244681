"""convert-student: narrower than the teacher, by given sizes or to a target, also on a pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.recipe import LayoutRecipe, ModelsRecipe, StudentRecipe
from flagscale.sizes.use import parameters_in_use
from flagscale.steps.convert_student import convert_student
from flagscale.steps.student.narrowing import WIDTH_IMPORTANCE

PIPELINE = ModelsRecipe(parallelism=LayoutRecipe(pipeline_model_parallel_size=2))
TENSOR = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=2))
CASES: dict[str, dict[str, Any]] = {
    "width": {
        "init": "width",
        "hidden_size": 48,
        "ffn_hidden_size": 80,
        "num_attention_heads": 2,
        "calibration_tokens": 256,
    },
    "both, to a target": {
        "init": "depth_and_width",
        "target_parameters": 1e5,
        "max_depth_pruning": 0.5,
        "num_layers": 2,
        "layer_importance": "kl",
    },
}


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    with platform.runtime():
        return dict(load_model(artifact, 64).named_parameters())


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_narrower_students(
    values: dict[str, Any], teacher: Path, dataset: Path, tmp_path: Path
) -> None:
    recipe = StudentRecipe(**values)
    figures = convert_student(recipe, teacher, dataset, tmp_path / "alone")
    assert figures["reload_logit_difference"] == 0
    shape, wide = ModelShape.load(tmp_path / "alone"), ModelShape.load(teacher)
    facts = open_artifact(tmp_path / "alone", "student").facts
    if recipe.has_target:
        assert 0.9 * recipe.target_parameters < parameters_in_use(shape) <= recipe.target_parameters
    for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_layers"):
        assert getattr(shape, name) == values.get(name, getattr(shape, name))
        assert facts["shape"][name] == getattr(shape, name)
    cut = facts["width_importance"]
    assert cut["sizes"]["hidden_size"] == shape.hidden_size < wide.hidden_size
    assert cut["calibration_digest"].startswith("sha256:")
    assert cut["calibration_tokens"] == values.get("calibration_tokens", cut["calibration_tokens"])
    scores = load_file(tmp_path / "alone" / WIDTH_IMPORTANCE)
    assert scores["hidden_size"].shape == (wide.hidden_size,)
    top = scores["hidden_size"].sort(descending=True).values[: shape.hidden_size]
    share = (top.sum() / scores["hidden_size"].sum()).item()
    assert share > shape.hidden_size / wide.hidden_size
    assert cut["kept_importance"]["hidden_size"] == pytest.approx(share, abs=1e-5)
    page = (tmp_path / "alone" / "report.html").read_text()
    kept = f"{shape.hidden_size} of {wide.hidden_size} hidden_size have {100 * share:.1f}%"
    assert kept in page
    assert set(scores) == {"hidden_size"} | {
        f"decoder.layers.{layer}.{part}"
        for layer in range(shape.num_layers)
        for part in ("self_attention", "mlp")
    }
    on_ranks = convert_student(recipe, teacher, dataset, tmp_path / "ranks", PIPELINE)
    assert on_ranks == pytest.approx(figures, rel=1e-5)
    ours, theirs = weights(tmp_path / "ranks"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    for name, score in load_file(tmp_path / "ranks" / WIDTH_IMPORTANCE).items():
        torch.testing.assert_close(score, scores[name])


def test_the_whole_width_is_the_teacher(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = StudentRecipe(init="width", hidden_size=64, ffn_hidden_size=128)
    figures = convert_student(recipe, teacher, dataset, tmp_path / "student")
    assert figures["kd_loss_at_start"] == figures["kd_loss_when_equal"]
    ours, theirs = weights(tmp_path / "student"), weights(teacher)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_ranks_that_share_tensors_are_refused(teacher: Path, dataset: Path, tmp_path: Path) -> None:
    recipe = StudentRecipe(init="width", hidden_size=48)
    with pytest.raises(UserError, match=r"models.parallelism.tensor_model_parallel_size=2: Model"):
        convert_student(recipe, teacher, dataset, tmp_path / "student", TENSOR)
