"""Section `distillation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import NUMBER, Scale, Section, Width

# Beyond these, float32 has nothing left of the difference between two softened distributions.
Temperature = Annotated[float, Scale, Field(ge=0.01, le=1000)]
Weight = Annotated[float, Field(ge=0.01, le=0.99), NUMBER]  # of one of two distributions
Module = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=250)]
Loss = Annotated[str, Field(max_length=20)]

_OF_ONE_DIVERGENCE = {"beta": "jensen_shannon", "alpha": "skew_kl", "top_k": "top_k_kl"}


class DistillationRecipe(Section):
    """The distillation loss (ModelOpt's knowledge-distillation mode)."""

    loss: Literal["logits", "none"] = Field(
        "logits",
        description="logits: a divergence from the teacher; none: plain LM training, the baseline",
    )
    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skew_kl",
        "total_variation",
        "top_k_kl",
        "logits_mse",
    ] = Field("forward_kl", description="Of the student's logits from the teacher's")
    beta: Weight = Field(0.5, description="jensen_shannon: the teacher's weight in the mixture")
    alpha: Weight = Field(0.1, description="skew_kl: the teacher's weight in the mixture")
    top_k: Width = Field(64, description="top_k_kl: the teacher's likeliest tokens, counted singly")
    temperature: Temperature = Field(1.0, description="Softens both distributions; loss x T^2")
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
    def _check_divergence(self) -> DistillationRecipe:
        if self.loss == "none" and self.divergence != "forward_kl":
            raise ValueError(f"divergence={self.divergence} has no effect with loss=none")
        for name, divergence in _OF_ONE_DIVERGENCE.items():
            value = getattr(self, name)
            default = type(self).model_fields[name].default
            if value != default and self.divergence != divergence:
                raise ValueError(
                    f"{name}={value} has no effect with divergence={self.divergence}: it is of "
                    f"{divergence}; leave it out, or choose that"
                )
        if self.divergence == "logits_mse" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} has no effect with divergence=logits_mse: T^2 "
                "times the error of logits / T is the same; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> DistillationRecipe:
        if self.kd_loss_scale != 1 and self.skip_lm_loss:
            raise ValueError(
                f"kd_loss_scale={self.kd_loss_scale} has no effect with skip_lm_loss=true"
            )
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
