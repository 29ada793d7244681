"""Which distillation losses what is kept of a teacher can serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale.recipe.distillation import DistillationRecipe

# Codecs that keep no logits -> the divergence that they are for.
_ONE_DIVERGENCE = {"sampled": "forward_kl", "topk": "top_k_kl"}


def check_served(distillation: DistillationRecipe, codec: Mapping[str, Any]) -> None:
    """Refuse a loss that a cache of the teacher's outputs cannot give.

    Args:
        distillation: the recipe's section.
        codec: `name`, and where it has them `temperature` and `top_k`.

    Raises:
        ValueError: the field, its value, what the codec can, and the remedy.
    """
    for name in ("intermediate_layer_pairs", "attention_layer_pairs"):
        if pairs := getattr(distillation, name):
            raise ValueError(
                f"distillation.{name}={[list(pair) for pair in pairs]}: teacher outputs have none "
                "of the teacher's inner layers; set distillation.teacher_outputs=live, or leave "
                "the pairs out"
            )
    divergence = _ONE_DIVERGENCE.get(codec["name"])
    if divergence is None:
        return
    kept = f"teacher outputs of codec {codec['name']}"
    if distillation.divergence != divergence:
        raise ValueError(
            f"distillation.divergence={distillation.divergence}: {kept} serve {divergence} alone; "
            f"set it to {divergence}, or teacher_outputs.codec=hidden"
        )
    if distillation.temperature != codec["temperature"]:
        raise ValueError(
            f"distillation.temperature={distillation.temperature}: {kept} are of temperature "
            f"{codec['temperature']} alone; set it to that, or teacher_outputs.codec=hidden"
        )
    if divergence == "top_k_kl" and distillation.top_k > codec["top_k"]:
        raise ValueError(
            f"distillation.top_k={distillation.top_k}: {kept} have {codec['top_k']} tokens; set it "
            "to at most that, or teacher_outputs.top_k higher"
        )
