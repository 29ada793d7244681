"""Section `distillation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import Scale, Section, Switch

# Beyond these, float32 has nothing left of the difference between two softened distributions.
Temperature = Annotated[float, Scale, Field(ge=0.01, le=1000)]
Module = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=250)]
Loss = Annotated[str, Field(max_length=20)]

# Fields that change no result but by rounding: a training may go on with others.
CHANGES_NO_RESULT = ("fuse_output_layer",)


class DistillationRecipe(Section):
    """The distillation loss (ModelOpt's knowledge-distillation mode)."""

    loss: Literal["logits", "none"] = Field(
        "logits", description="logits: KL to the teacher; none: plain LM training, the baseline"
    )
    temperature: Temperature = Field(1.0, description="Softens both distributions; loss x T^2")
    fuse_output_layer: Switch = Field(
        "auto",
        description="Make the losses in the output layers, some tokens at a time, so that no "
        "logits are held; auto: on a CPU, where the layer is a plain one",
    )
    skip_lm_loss: bool = Field(True, description="Train on the KD loss alone")
    kd_loss_scale: Scale = Field(
        1.0, description="Weight of the KD loss beside the LM loss (skip_lm_loss: false)"
    )
    intermediate_loss_scale: Scale = Field(
        1.0, description="Weight of the intermediate terms' mean beside the logits term"
    )
    intermediate_layer_pairs: tuple[tuple[Module, Module] | tuple[Module, Module, Loss], ...] = (
        Field(
            (),
            description="(student module, teacher module[, cosine|mse]) whose outputs are matched",
        )
    )

    @model_validator(mode="after")
    def _check(self) -> DistillationRecipe:
        if self.kd_loss_scale != 1 and self.skip_lm_loss:
            raise ValueError(
                f"kd_loss_scale={self.kd_loss_scale} has no effect with skip_lm_loss=true"
            )
        if self.loss == "none" and self.fuse_output_layer is True:
            raise ValueError("fuse_output_layer=true needs loss=logits, but loss=none")
        if self.loss == "none" and self.intermediate_layer_pairs:
            raise ValueError("intermediate_layer_pairs need loss=logits, but loss=none")
        if self.intermediate_loss_scale != 1 and not self.intermediate_layer_pairs:
            raise ValueError(
                f"intermediate_loss_scale={self.intermediate_loss_scale} has no effect without "
                "intermediate_layer_pairs"
            )
        layers = [pair[:2] for pair in self.intermediate_layer_pairs]
        if len(set(layers)) < len(layers):
            raise ValueError(f"intermediate_layer_pairs={layers}: a pair of layers stands twice")
        for pair in self.intermediate_layer_pairs:
            if len(pair) == 3 and pair[2] not in ("cosine", "mse"):
                raise ValueError(f"intermediate loss {pair[2]!r}: must be cosine or mse")
        return self
