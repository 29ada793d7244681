"""What a training is known by: those fields of its sections that decide on the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale.recipe import distillation, training


def decisive(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The same sections without the fields that change no result but by rounding.

    Args:
        sections: by name, each with all its fields, as `model_dump` gives them.
    """
    without = {
        "distillation": {*distillation.CHANGES_NO_RESULT},
        "training": {*training.CHANGES_NO_RESULT},
    }
    if "training" in sections and sections["training"]["keep_weights"] == "best":
        without["training"].remove("save_interval")  # the best is one of what was saved
    return {
        name: {key: value for key, value in section.items() if key not in without[name]}
        if name in without
        else section
        for name, section in sections.items()
    }
