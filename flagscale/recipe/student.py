"""Section `student`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.quantization import QuantizationRecipe
from flagscale.recipe.section import NonNegativeInt, Section, Seed, Width

_RENAMED = {"prune": "depth", "copy": "same"}


def _not_renamed(value: object) -> object:
    if isinstance(value, str) and value in _RENAMED:
        raise ValueError(f"is called {_RENAMED[value]} now")
    return value


class StudentRecipe(Section):
    """What the student looks like and what its weights start from."""

    init: Annotated[Literal["depth", "same", "scratch"], BeforeValidator(_not_renamed)] = Field(
        "depth",
        description="depth: a subset of the teacher's layers; same: all of them; scratch: random",
    )
    num_layers: Width | None = Field(None, description="Layers; default: the teacher's")
    keep_layers: tuple[NonNegativeInt, ...] | None = Field(
        None, description="Teacher layers to keep, from 0; default: spread evenly, ends included"
    )
    hidden_size: Width | None = Field(None, description="scratch only; default: teacher's")
    ffn_hidden_size: Width | None = Field(None, description="scratch only; ditto")
    num_attention_heads: Width | None = Field(None, description="scratch only; ditto")
    num_query_groups: Width | None = Field(None, description="KV heads; scratch only; ditto")
    architecture: ArchitectureRecipe | None = Field(
        None, description="scratch only: experts, latent attention, a layer spec of your own, ..."
    )
    quantization: QuantizationRecipe | None = Field(
        None, description="Quantised linear layers; default: none"
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
        self._check_heads()
        self._check_quantization()
        return self

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

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if self.quantization.when == "significant" and self.init != "same":
            raise ValueError(
                f"quantization.when=significant with init={self.init}: such a student has to be "
                "trained whatever quantisation costs; set when=always, or init=same"
            )
        if self.architecture is not None and not self.architecture.is_default:
            changed = self.architecture.model_dump(mode="json", exclude_defaults=True)
            raise ValueError(
                f"quantization.recipe={self.quantization.recipe} with architecture={changed}: "
                "plain layers of attention and MLP are quantised; leave one of the two out"
            )
