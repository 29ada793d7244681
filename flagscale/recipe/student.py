"""Section `student`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.section import NonNegativeInt, Positive, PositiveInt, Section, Seed, Width

_CALIBRATION_TOKENS = 2048
_RENAMED = {"prune": "depth", "copy": "same"}


def _not_renamed(value: object) -> object:
    if isinstance(value, str) and value in _RENAMED:
        raise ValueError(f"is called {_RENAMED[value]} now")
    return value


class ReconstructionRecipe(Section):
    """Kept layers are fitted to what the teacher makes of the same text, before any training."""

    tokens: PositiveInt = Field(
        4096, description="Text of the train split that they are fitted on, in whole sequences"
    )
    ridge: Positive = Field(
        1.0,
        description="How much changed weights cost, as a share of their inputs' mean square: more "
        "for less text",
    )


class StudentRecipe(Section):
    """What the student looks like and what its weights start from."""

    init: Annotated[Literal["depth", "same", "scratch"], BeforeValidator(_not_renamed)] = Field(
        "depth",
        description="depth: a subset of the teacher's layers; same: all of them; scratch: random",
    )
    num_layers: Width | None = Field(None, description="Layers; default: the teacher's")
    keep_layers: tuple[NonNegativeInt, ...] | None = Field(
        None, description="Teacher layers to keep, from 0; default: chosen by layer_importance"
    )
    layer_importance: Literal["even", "kl", "block_influence"] = Field(
        "even",
        description="depth: even: layers are kept spread evenly, ends included; kl: those go, one "
        "by one, without which the teacher stays closest to itself; block_influence: those go that "
        "turn their input the least (ShortGPT)",
    )
    calibration_tokens: PositiveInt | None = Field(
        None,
        description="Text of the train split that importance is measured on, in whole sequences; "
        "default: 2048",
    )
    reconstruction: ReconstructionRecipe | None = Field(
        None,
        description="depth: fit each kept layer's down projection to what the teacher feeds its "
        "next kept layer, by ridge regression; default: the teacher's weights as they are",
    )
    hidden_size: Width | None = Field(None, description="scratch only; default: teacher's")
    ffn_hidden_size: Width | None = Field(None, description="scratch only; ditto")
    num_attention_heads: Width | None = Field(None, description="scratch only; ditto")
    num_query_groups: Width | None = Field(None, description="KV heads; scratch only; ditto")
    architecture: ArchitectureRecipe | None = Field(
        None, description="scratch only: experts, latent attention, a layer spec of your own, ..."
    )
    seed: Seed = Field(1234, description="Seed of random weights")

    @model_validator(mode="after")
    def _check(self) -> StudentRecipe:
        widths = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        given = [name for name in widths if getattr(self, name) is not None]
        if given and self.init != "scratch":
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} needs init=scratch, but init={self.init}: "
                "its width is the teacher's"
            )
        if self.architecture is not None and self.init != "scratch":
            raise ValueError(f"architecture needs init=scratch, but init={self.init}")
        self._check_layers()
        self._check_calibration()
        self._check_heads()
        return self

    @property
    def measures_layers(self) -> bool:
        """Whether calibration text decides which of the teacher's layers are kept."""
        return self.layer_importance != "even"

    @property
    def measured_tokens(self) -> int:
        """How many tokens of it there are at most; 0 where nothing is measured."""
        if not self.measures_layers:
            return 0
        return self.calibration_tokens or _CALIBRATION_TOKENS

    def _check_layers(self) -> None:
        if self.init == "depth" and self.num_layers is None and self.keep_layers is None:
            raise ValueError("init=depth needs num_layers or keep_layers")
        if self.init == "same" and (self.num_layers or self.keep_layers):
            raise ValueError("init=same keeps every layer: remove num_layers and keep_layers")
        if self.keep_layers is not None:
            if self.init != "depth":
                raise ValueError(f"keep_layers needs init=depth, but init={self.init}")
            if list(self.keep_layers) != sorted(set(self.keep_layers)) or not self.keep_layers:
                raise ValueError(f"keep_layers={list(self.keep_layers)} must rise, without repeats")
            if self.num_layers not in (None, len(self.keep_layers)):
                raise ValueError(
                    f"num_layers={self.num_layers} but keep_layers names {len(self.keep_layers)}"
                )

    def _check_calibration(self) -> None:
        if self.reconstruction is not None and self.init != "depth":
            raise ValueError(
                f"reconstruction needs init=depth, but init={self.init}: no layer is missing"
            )
        if self.measures_layers and self.init != "depth":
            raise ValueError(
                f"layer_importance={self.layer_importance} needs init=depth, but init={self.init}"
            )
        if self.measures_layers and self.keep_layers is not None:
            raise ValueError(
                f"layer_importance={self.layer_importance} has no effect with keep_layers="
                f"{list(self.keep_layers)}: give num_layers instead"
            )
        if self.calibration_tokens is not None and not self.measures_layers:
            raise ValueError(
                f"calibration_tokens={self.calibration_tokens} has no effect with "
                f"layer_importance={self.layer_importance}: nothing is measured"
            )

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads and groups and heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} is not divisible by num_query_groups={groups}"
            )
        if heads and self.hidden_size and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}"
            )
