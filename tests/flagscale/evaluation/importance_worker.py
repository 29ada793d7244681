"""One rank of the tests in test_layer_importance.py."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from flagscale.evaluation.measure.layer_importance import measure_importance
from flagscale.megatron import platform
from flagscale.models.megatron import load_model
from flagscale.recipe import ModelsRecipe


def importance_on_rank(
    artifact: Path, models: ModelsRecipe, batches: list[Any], criterion: str, count: int
) -> dict[str, Any]:
    made = [{name: torch.tensor(values) for name, values in batch.items()} for batch in batches]
    with platform.runtime(parallelism=models.sizes):
        model = load_model(artifact, made[0]["tokens"].size(1), models.sizes)
        return asdict(measure_importance(model, made, criterion, count))
