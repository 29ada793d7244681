"""convert-student on each layout: the student of one process, byte for byte, and its figures."""

from pathlib import Path

import pytest
import torch

from flagscale.artifacts import open_artifact
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import load_model
from flagscale.recipe import ArchitectureRecipe, LayoutRecipe, ModelsRecipe, StudentRecipe
from flagscale.steps.convert_student import convert_student

TENSOR, PIPELINE, EXPERT = (
    {f"{what}_model_parallel_size": 2} for what in ("tensor", "pipeline", "expert")
)
PRUNED = StudentRecipe(num_layers=2)
EXPERTS = StudentRecipe(
    init="scratch",
    num_layers=2,
    architecture=ArchitectureRecipe(num_experts=4, moe_ffn_hidden_size=32),
)
SCRATCH = StudentRecipe(init="scratch", num_layers=2, hidden_size=32, num_attention_heads=2)
CASES = {
    "TP2": (PRUNED, TENSOR),
    "PP2": (PRUNED, PIPELINE),
    "TP2 x PP2": (PRUNED, TENSOR | PIPELINE),
    "from scratch, TP2 x PP2": (SCRATCH, TENSOR | PIPELINE),
    "EP2": (EXPERTS, EXPERT),
    "TP2 x EP2": (EXPERTS, TENSOR | EXPERT),
}


def weights(artifact: Path) -> dict[str, torch.Tensor]:
    with platform.runtime():
        return dict(load_model(artifact, 64).named_parameters())


@pytest.mark.parametrize(("recipe", "layout"), CASES.values(), ids=CASES)
def test_same_student_as_one_process_makes(recipe, layout, teacher, dataset, tmp_path):
    alone = convert_student(recipe, teacher, dataset, tmp_path / "alone")
    models = ModelsRecipe(parallelism=LayoutRecipe(**layout))
    assert models.processes == (4 if layout == TENSOR | PIPELINE else 2)
    figures = convert_student(recipe, teacher, dataset, tmp_path / "ranks", models)
    exact = ("layers", "parameters", "reload_logit_difference", "kd_loss_when_equal")
    assert {name: figures[name] for name in exact} == {name: alone[name] for name in exact}
    assert figures == pytest.approx(alone, rel=1e-5)
    ours, theirs = weights(tmp_path / "ranks"), weights(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    manifests = [open_artifact(tmp_path / name, "student") for name in ("ranks", "alone")]
    facts = [manifest.facts.get("keep_layers") for manifest in manifests]
    assert facts[0] == facts[1]
    assert manifests[0].tokenizer_hash == manifests[1].tokenizer_hash
    assert len(manifests[0].peak_memory["host"]) == models.processes
    files = [{path.name for path in (tmp_path / n / "hf").iterdir()} for n in ("ranks", "alone")]
    assert files[0] == files[1]
    shapes = [ModelShape.load(tmp_path / name) for name in ("ranks", "alone")]
    assert shapes[0] == shapes[1]


def test_layout_that_does_not_divide_the_student_is_refused_at_once(teacher, dataset, tmp_path):
    models = ModelsRecipe(parallelism=LayoutRecipe(pipeline_model_parallel_size=2))
    with pytest.raises(UserError, match=r"num_layers=3.*2 chunks"):
        convert_student(StudentRecipe(num_layers=3), teacher, dataset, tmp_path / "student", models)
    assert list(tmp_path.iterdir()) == []
