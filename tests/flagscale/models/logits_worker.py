"""One rank of the tests in test_megatron_layouts.py."""

import os
from pathlib import Path

import torch

from flagscale.execution.launch import is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.peak_memory import peak_memory
from flagscale.models.megatron import forward, load_model, logits
from flagscale.recipe import ModelsRecipe


def logits_on_rank(
    artifact: Path, models: ModelsRecipe, tokens: list[list[int]], output: Path
) -> dict[str, list[int]]:
    """Save the logits, whole on the first rank, and what each rank's own part was."""
    ids = torch.tensor(tokens)
    with platform.runtime(parallelism=models.sizes):
        model = load_model(artifact, ids.size(1), models.sizes)
        part = forward(model, ids)
        torch.save(part, output / f"part-{os.environ.get('RANK', '0')}.pt")
        whole = logits(model, ids)
        if is_first_rank():
            torch.save(whole, output / "logits.pt")
        return peak_memory()
