"""Section `distillation`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from flagscale.recipe.section import (
    NUMBER,
    NonNegativeInt,
    PositiveInt,
    Scale,
    Section,
    Switch,
    Width,
)

# Beyond these, float32 has nothing left of the difference between two softened distributions.
Temperature = Annotated[float, Scale, Field(ge=0.01, le=1000)]
Weight = Annotated[float, Field(ge=0.01, le=0.99), NUMBER]  # of one of two distributions
Module = Annotated[str, Field(pattern=r"^\w+(\.\w+)*$", max_length=250)]
Loss = Annotated[str, Field(max_length=20)]
Relation = Literal["query", "key", "value", "query_key"]

_OF_ONE_DIVERGENCE = {"beta": "jensen_shannon", "alpha": "skew_kl", "top_k": "top_k_kl"}
# Fields that change no result but by rounding: a training may go on with others.
# What teacher outputs change follows from those that are read.
CHANGES_NO_RESULT = ("fuse_output_layer", "teacher_outputs")


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
    fuse_output_layer: Switch = Field(
        "auto",
        description="Make the losses in the output layers, some tokens at a time, so that no "
        "logits are held; auto: on a CPU, where the layer is a plain one",
    )
    teacher_outputs: Literal["auto", "live", "cached"] = Field(
        "auto",
        description="live: the teacher runs beside the student; cached: it runs once, before, and "
        "its outputs are read (section teacher_outputs); auto: which of the two is faster by plan",
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
            description="(student module, teacher module[, cosine|mse]) whose outputs are matched, "
            "on any pipeline stage; where widths differ, through a projection that is trained",
        )
    )
    attention_layer_pairs: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = Field(
        (), description="(student layer, teacher layer), from 0, whose attention is matched"
    )
    attention_loss_scale: Scale = Field(
        1.0, description="Weight of the attention terms' mean beside the logits term"
    )
    attention_relations: tuple[Relation, ...] = Field(
        ("query", "key", "value"),
        min_length=1,
        description="What is matched of them: how each token's query, key or value relates to the "
        "others that it may see (MiniLMv2), or query_key, the attention distribution itself",
    )
    attention_relation_heads: PositiveInt | None = Field(
        None,
        description="Heads that queries, keys and values are split into for it; default: the "
        "student's attention heads",
    )
    attention_fit: Literal["kl", "mse", "cosine"] = Field(
        "kl",
        description="How two relations are compared: KL or cosine of the distributions, or the "
        "mean squared difference of the scores that they are the softmax of",
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
        if self.loss == "none" and self.fuse_output_layer is True:
            raise ValueError("fuse_output_layer=true needs loss=logits, but loss=none")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> DistillationRecipe:
        for name in ("intermediate_layer_pairs", "attention_layer_pairs"):
            pairs = getattr(self, name)
            if self.loss == "none" and pairs:
                raise ValueError(f"{name} need loss=logits, but loss=none")
            layers = [pair[:2] for pair in pairs]
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name}={layers}: a pair of layers stands twice")
        for pair in self.intermediate_layer_pairs:
            if len(pair) == 3 and pair[2] not in ("cosine", "mse"):
                raise ValueError(f"intermediate loss {pair[2]!r}: must be cosine or mse")
        relations = self.attention_relations
        if len(set(relations)) < len(relations):
            raise ValueError(f"attention_relations={list(relations)}: one of them stands twice")
        self._check_effects("intermediate_layer_pairs", "intermediate_loss_scale")
        self._check_effects(
            "attention_layer_pairs",
            "attention_loss_scale",
            "attention_relations",
            "attention_relation_heads",
            "attention_fit",
        )
        return self

    def _check_effects(self, pairs: str, *fields: str) -> None:
        if getattr(self, pairs):
            return
        for name in fields:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value} has no effect without {pairs}")
