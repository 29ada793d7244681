"""Section `teacher_outputs`: what is kept of the teacher's answers, and of which samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import NUMBER, Section, Width

# A count of draws is stored in 16 bits.
Draws = Annotated[int, Field(ge=1, le=2**16 - 1), NUMBER]

_OF_ONE_CODEC = {"dtype": "hidden", "draws": "sampled", "top_k": "topk"}


class TeacherOutputsRecipe(Section):
    """What cache-teacher keeps (distillation.teacher_outputs: cached)."""

    codec: Literal["hidden", "sampled", "topk"] = Field(
        "hidden",
        description="hidden: the last hidden states, of which every loss is exact; sampled: draws "
        "from the teacher's distribution, unbiased; topk: its likeliest tokens, biased",
    )
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="hidden: of the stored states; auto: as the teacher computes them, so exact",
    )
    draws: Draws = Field(
        50, description="sampled: draws a token, with replacement; some tokens come several times"
    )
    top_k: Width = Field(64, description="topk: tokens that are kept a token")
    samples: Literal["met", "all"] = Field(
        "met",
        description="met: of the samples that this recipe's trainings come by; all: of every "
        "sample of the training and validation splits, for trainings to come",
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherOutputsRecipe:
        for name, codec in _OF_ONE_CODEC.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and self.codec != codec:
                raise ValueError(
                    f"{name}={value} has no effect with codec={self.codec}: it is of {codec}; "
                    "leave it out, or choose that"
                )
        return self
