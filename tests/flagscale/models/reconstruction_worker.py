"""One rank of the tests in test_reconstruction.py."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from flagscale.checkpoint import load_layers, save_weights
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import WEIGHTS, build_model, load_model
from flagscale.models.reconstruction import layer_targets, reconstruct
from flagscale.recipe import ModelsRecipe


def reconstruct_on_rank(
    artifact: Path, models: ModelsRecipe, tokens: list[Any], kept: list[int], ridge: float, to: Path
) -> list[dict[str, float]]:
    ids = torch.tensor(tokens)
    shape = ModelShape.load(artifact)
    with platform.runtime(parallelism=models.sizes):
        targets = layer_targets(load_model(artifact, ids.size(1), models.sizes), ids, kept)
        student = build_model(replace(shape, num_layers=len(kept)), ids.size(1), models.sizes)
        load_layers(student, artifact / WEIGHTS, kept, shape.num_layers)
        fits = reconstruct(student, ids, targets, ridge)
        save_weights(student, to)
    return [asdict(fit) for fit in fits]
