"""`prepare_data` as all that a process does: such a process can do without torch.

A tokenizer needs none, but wherever transformers finds torch it takes it along, with half of what
models are made of: as long to import as all the rest of the step. Without torch transformers has
tokenizers and configurations, as it says itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from flagscale.imports import uncollected, without
from flagscale.recipe import DataRecipe


def prepare_data_alone(data: DataRecipe, output: Path) -> dict[str, float]:
    """See `prepare_data`. Afterwards transformers builds no models in this process.

    Args:
        data: see there.
        output: see there.
    """
    begun = "torch" in sys.modules or "transformers" in sys.modules  # too late, as in tests
    with without(*() if begun else ("torch",)):
        with uncollected():
            from flagscale.steps.prepare_data import prepare_data
        return prepare_data(data, output)
