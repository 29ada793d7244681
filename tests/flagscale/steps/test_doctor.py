"""The audit alone: the recipe's own loss, and the same figures on two tensor-parallel ranks."""

import pytest

from flagscale.post_training import conversion
from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.findings import failures
from flagscale.recipe import DistillationRecipe, StudentRecipe, TrainingRecipe
from flagscale.steps.convert_student import convert_student
from flagscale.steps.doctor import Paths, doctor

TRAINING = TrainingRecipe(train_iters=1, lr=1e-3)


def test_a_sound_run_passes_on_two_ranks_too(teacher, student, dataset):
    recipe = DistillationRecipe(divergence="jensen_shannon", beta=0.3, temperature=4.0)
    found = doctor(recipe, TRAINING, Paths(teacher, student, dataset))
    assert {one.verdict for one in found} == {"passed"}
    last = found[-1]
    assert (last.check, last.figure is not None) == ("TP1 equals TP2", True)


def test_the_loss_that_is_audited_is_the_recipes(teacher, student, dataset, monkeypatch):
    """Which computes another divergence than it says."""
    monkeypatch.setattr(
        conversion,
        "divergence_of",
        lambda recipe: divergence_of(recipe.model_copy(update={"divergence": "forward_kl"})),
    )
    # Sharpened, or these two models are so close that both divergences have one value.
    recipe = DistillationRecipe(divergence="reverse_kl", temperature=0.2)
    found = failures(doctor(recipe, TRAINING, Paths(teacher, student, dataset)))
    assert any(
        "KD loss is reported as" in one and "it is the forward KL" in one for one in found
    ), found


def test_terms_inside_the_models_are_audited_where_ranks_can_share_them(teacher, student, dataset):
    recipe = DistillationRecipe(
        intermediate_layer_pairs=[["decoder.layers.1", "decoder.layers.3", "mse"]],
        attention_layer_pairs=[[0, 0], [1, 3]],
        attention_relation_heads=1,
    )
    *found, on_two = doctor(recipe, TRAINING, Paths(teacher, student, dataset))
    assert {one.verdict for one in found} == {"passed"}
    assert {"intermediate loss", "attention loss"} <= {one.check for one in found}
    assert on_two.verdict == "not run"
    assert "attention_relation_heads" in on_two.note


@pytest.mark.parametrize(
    "values",
    [
        {"keep_layers": [0, 3], "reconstruction": {"tokens": 256}},
        {"init": "width", "ffn_hidden_size": 96},
        {"init": "same", "quantization": {"recipe": "int8_sq", "calibration_tokens": 256}},
    ],
    ids=["fitted", "narrower", "quantised"],
)
def test_students_whose_weights_are_their_own_pass(teacher, dataset, tmp_path, values):
    student = StudentRecipe.model_validate(values)
    convert_student(student, teacher, dataset, tmp_path / "student")
    found = doctor(DistillationRecipe(), TRAINING, Paths(teacher, tmp_path / "student", dataset))
    assert failures(found) == []
