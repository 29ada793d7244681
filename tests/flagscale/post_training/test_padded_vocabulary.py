"""Rows that are no tokens, in a teacher and a student of different families, have no influence."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from padding_worker import distil_on_rank

from flagscale.execution.launch import call_on_ranks
from flagscale.post_training.divergences.reference import reference_loss
from flagscale.recipe import DistillationRecipe, LayoutRecipe, ModelsRecipe

DIVERGENCES = get_args(DistillationRecipe.model_fields["divergence"].annotation)
RECIPES: dict[str, dict[str, Any]] = {
    "with the LM loss": {"skip_lm_loss": False, "temperature": 2.0},
    "fused": {"fuse_output_layer": True},
    **{name: {"divergence": name} for name in DIVERGENCES},
    # As many tokens as there are: were columns of padding among them, they would count.
    "top_k_kl": {"divergence": "top_k_kl", "top_k": 40},
}


def distil(vocab_size: int, padding: float, recipe: dict[str, Any], ranks: int = 1) -> Any:
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=ranks))
    given = {"vocab_size": vocab_size, "padding": padding, "distillation": recipe, "models": models}
    if ranks == 1:
        return distil_on_rank(**given)
    return call_on_ranks("test", distil_on_rank, ranks, **given)


def by_hand(logits: dict[str, Any], recipe: dict[str, Any]) -> float:
    """In float64, of logits that have no column of padding; a token."""
    student, teacher = (torch.tensor(logits[name]) for name in ("student", "teacher"))
    return reference_loss(student, teacher, DistillationRecipe(**recipe)).mean().item()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_padding_has_no_influence(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on losses, gradients and the next token, nor where ranks share the vocabulary."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    for vocab_size in (100, 50):  # of 128: of two ranks the second has none of 50
        expected = distil(vocab_size, 0.0, recipe)
        loss = expected["reports"]["logits distillation loss"]
        assert loss == pytest.approx(by_hand(expected["logits"], recipe), rel=1e-4)
        assert loss > 1e-4  # the models differ
        found = distil(vocab_size, 7.0, recipe, ranks=2)
        assert found["reports"] == pytest.approx(expected["reports"], rel=1e-4, abs=1e-6)
        assert found["next token"] == expected["next token"]
        assert found["of padding"] == 0


def test_padding_changes_no_gradient() -> None:
    recipe = RECIPES["with the LM loss"]
    expected, found = (distil(100, padding, recipe)["gradients"] for padding in (0.0, 7.0))
    assert found == pytest.approx(expected, rel=1e-4)
