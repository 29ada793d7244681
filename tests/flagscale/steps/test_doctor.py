"""The audit alone: the recipe's own loss, and the same figures on two tensor-parallel ranks."""

from flagscale.post_training import conversion
from flagscale.post_training.divergences import divergence_of
from flagscale.post_training.findings import failures
from flagscale.recipe import DistillationRecipe, TrainingRecipe
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
    recipe = DistillationRecipe(divergence="reverse_kl")
    found = failures(doctor(recipe, TRAINING, Paths(teacher, student, dataset)))
    assert any("KD loss is reported as" in one and "it is the forward KL" in one for one in found)
