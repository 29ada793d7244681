"""Section `student`: what the student must come to, instead of its sizes one by one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import NUMBER, Fraction, Positive, Section, Width

Count = Annotated[float, Field(ge=1, le=1e15), NUMBER]
# `flagscale.sizes.machine` knows their memory and speed.
Platform = Literal[
    "cpu",
    "H200-141GB",
    "H100-80GB",
    "H100-PCIe-80GB",
    "A100-80GB",
    "A100-40GB",
    "L40S-48GB",
    "A10-24GB",
    "L4-24GB",
]
TARGETS = ("target_parameters", "target_active_parameters", "target_memory", "target_speed")


class TargetsRecipe(Section):
    """Bounds that a student's sizes are chosen by; all that are given hold."""

    target_parameters: Count | None = Field(
        None, description="At most so many weights, as near as sizes come; sizes given stay"
    )
    target_active_parameters: Count | None = Field(
        None, description="At most so many that a token is multiplied by (MoE: chosen experts)"
    )
    target_memory: Positive | None = Field(
        None, description="At most so many GB on target_platform: weights, keys, values, one layer"
    )
    target_speed: Positive | None = Field(
        None, description="At least so many tokens/s on target_platform, by the planner's estimate"
    )
    target_platform: Platform | None = Field(
        None, description="Accelerator, in bf16, or cpu, in fp32, of target_memory and target_speed"
    )
    target_seq_length: Width = Field(
        2048, description="Tokens of the one sequence that memory and speed are taken of"
    )
    max_depth_pruning: Fraction | None = Field(
        None, description="Most layers that a target takes; default: 0.2 beside width, else any"
    )
    max_width_pruning: Fraction | None = Field(
        None, description="Most of a width that a target takes; default: 0.4"
    )

    @property
    def has_target(self) -> bool:
        """Whether sizes are to be chosen."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @model_validator(mode="after")
    def _check_targets(self) -> TargetsRecipe:
        asked = [name for name in ("target_memory", "target_speed") if getattr(self, name)]
        if asked and self.target_platform is None:
            raise ValueError(f"{asked[0]} needs target_platform: H100-80GB, cpu, ...")
        if self.target_speed and self.target_platform == "cpu":
            raise ValueError(
                f"target_speed={self.target_speed:g} with target_platform=cpu: the planner knows "
                "the speed of accelerators alone; name one, or give target_parameters"
            )
        unused = {name for name in ("target_platform", "target_seq_length") if not asked}
        unused |= {"max_depth_pruning", "max_width_pruning"} if not self.has_target else set()
        for name in sorted(unused):
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                needed = "target_memory or target_speed" if "target" in name else "a target"
                raise ValueError(f"{name}={value} has no effect without {needed}; leave it out")
        return self
