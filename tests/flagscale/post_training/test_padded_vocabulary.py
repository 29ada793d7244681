"""Rows that are no tokens, in a teacher and a student of different families, have no influence."""

from pathlib import Path
from typing import Any

import pytest
import torch
from padding_worker import distil_on_rank

from flagscale.execution.launch import call_on_ranks
from flagscale.recipe import LayoutRecipe, ModelsRecipe

LM_TOO = {"skip_lm_loss": False, "temperature": 2.0}
HOT = {"temperature": 4.0}


def distil(vocab_size: int, padding: float, recipe: dict[str, Any], ranks: int = 1) -> Any:
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=ranks))
    given = {"vocab_size": vocab_size, "padding": padding, "distillation": recipe, "models": models}
    if ranks == 1:
        return distil_on_rank(**given)
    return call_on_ranks("test", distil_on_rank, ranks, **given)


def forward_kl(logits: dict[str, Any], temperature: float) -> float:
    """In float64, of logits that have no column of padding; nats a token, times T^2."""
    teacher, student = (
        (torch.tensor(logits[name], dtype=torch.float64) / temperature).log_softmax(-1)
        for name in ("teacher", "student")
    )
    loss = (teacher.exp() * (teacher - student)).sum(-1).mean()
    return temperature**2 * loss.item()


@pytest.mark.parametrize("vocab_size", [100, 50])  # of 128: of two ranks the second has none of 50
@pytest.mark.parametrize("recipe", [LM_TOO, HOT], ids=["with the LM loss", "at a temperature"])
def test_padding_has_no_influence(
    vocab_size: int, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on losses, gradients and the next token, nor under tensor parallelism."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    expected = distil(vocab_size, 0.0, recipe)
    by_hand = forward_kl(expected["logits"], recipe["temperature"])
    assert by_hand > 1e-3
    found_loss = expected["reports"]["logits distillation loss"]
    assert found_loss == pytest.approx(by_hand, rel=1e-4)
    found = {
        "other rows": distil(vocab_size, 7.0, recipe),
        "other rows, two ranks": distil(vocab_size, 7.0, recipe, ranks=2),
    }
    for name, one in found.items():
        assert one["reports"] == pytest.approx(expected["reports"], rel=1e-4, abs=1e-6), name
        assert one["next token"] == expected["next token"]
        assert one["of padding"] == 0
    assert found["other rows"]["gradients"] == pytest.approx(expected["gradients"], rel=1e-4)
