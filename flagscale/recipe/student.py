"""Section `student`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from flagscale.recipe.architecture import ArchitectureRecipe
from flagscale.recipe.pretrained import PretrainedFields
from flagscale.recipe.quantization import QuantizationRecipe
from flagscale.recipe.section import NonNegativeInt, Positive, PositiveInt, Section, Seed, Width
from flagscale.recipe.targets import TARGETS, TargetsRecipe

_CALIBRATION_TOKENS = 4096
_RENAMED = {"prune": "depth", "copy": "same"}
_DEPTH, _WIDTH = ("depth", "depth_and_width"), ("width", "depth_and_width")
_WIDTHS = (
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_experts",
    "moe_ffn_hidden_size",
)
# What a field is of; elsewhere it would have no effect.
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    "num_layers": (*_DEPTH, "scratch"),
    "keep_layers": _DEPTH,
    "hidden_size": (*_WIDTH, "scratch"),
    "ffn_hidden_size": (*_WIDTH, "scratch"),
    "num_attention_heads": (*_WIDTH, "scratch"),
    "num_query_groups": ("scratch",),
    "num_experts": _WIDTH,
    "moe_ffn_hidden_size": _WIDTH,
    "architecture": ("scratch",),
    **dict.fromkeys(TARGETS, ("depth", "width", "depth_and_width")),
    "max_depth_pruning": _DEPTH,
    "max_width_pruning": _WIDTH,
}
_INSTEAD = {
    "num_query_groups": "ModelOpt's mcore_minitron cannot prune key/value groups; prune "
    "num_attention_heads, to a multiple of them",
    "num_experts": "from scratch it stands in student.architecture",
    "moe_ffn_hidden_size": "from scratch it stands in student.architecture",
}


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


class StudentRecipe(TargetsRecipe, PretrainedFields):
    """What the student looks like and what its weights start from."""

    init: Annotated[
        Literal["depth", "width", "depth_and_width", "same", "pretrained", "scratch"],
        BeforeValidator(_not_renamed),
    ] = Field(
        "depth",
        description="depth: a subset of the teacher's layers; width: all of them, narrower, by "
        "activations; depth_and_width: both; same: all of the teacher; pretrained: the model "
        "`source`; scratch: random",
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
        description="Text of the train split that layers or widths are measured on, in whole "
        "sequences; default: 4096",
    )
    reconstruction: ReconstructionRecipe | None = Field(
        None,
        description="depth: fit each kept layer's down projection to what the teacher feeds its "
        "next kept layer, by ridge regression; default: the teacher's weights as they are",
    )
    hidden_size: Width | None = Field(
        None, description="width and scratch only, as the next two; default: the teacher's"
    )
    ffn_hidden_size: Width | None = Field(None, description="Width of the MLPs")
    num_attention_heads: Width | None = Field(None, description="Query heads")
    num_query_groups: Width | None = Field(None, description="KV heads; scratch only")
    num_experts: Width | None = Field(None, description="Experts a layer; width only")
    moe_ffn_hidden_size: Width | None = Field(None, description="Width of an expert; width only")
    architecture: ArchitectureRecipe | None = Field(
        None, description="scratch only: experts, latent attention, a layer spec of your own, ..."
    )
    quantization: QuantizationRecipe | None = Field(
        None, description="Quantised linear layers; default: none"
    )
    seed: Seed = Field(1234, description="Seed of random weights")

    @property
    def cuts_depth(self) -> bool:
        """Whether layers of the teacher go."""
        return self.init in _DEPTH

    @property
    def cuts_width(self) -> bool:
        """Whether the teacher's layers get narrower."""
        return self.init in _WIDTH

    @property
    def given_widths(self) -> dict[str, int]:
        """What a narrower student's widths become, as far as the recipe gives them."""
        given = {name: getattr(self, name) for name in _WIDTHS} if self.cuts_width else {}
        return {name: size for name, size in given.items() if size is not None}

    @model_validator(mode="after")
    def _check(self) -> StudentRecipe:
        if self.init in ("same", "pretrained") and (self.num_layers or self.keep_layers):
            raise ValueError(f"init={self.init} keeps every layer: remove num_layers, keep_layers")
        for name, inits in _ONLY_FOR.items():
            value = getattr(self, name)
            if value is not None and self.init not in inits:
                shown = "" if isinstance(value, ArchitectureRecipe) else f"={value}"
                hint = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise ValueError(
                    f"{name}{shown} needs init={' or '.join(inits)}, but init={self.init}{hint}"
                )
        self._check_pretrained(self.init)
        self._check_cut()
        self._check_layers()
        self._check_calibration()
        self._check_heads()
        self._check_quantization()
        return self

    @property
    def measures_layers(self) -> bool:
        """Whether calibration text decides which of the teacher's layers are kept."""
        return self.layer_importance != "even"

    @property
    def measured_tokens(self) -> int:
        """How many tokens layers or widths are measured on, at most; 0 where none are."""
        if not self.measures_layers and not self.cuts_width:
            return 0
        return self.calibration_tokens or _CALIBRATION_TOKENS

    @staticmethod
    def measured_by(students: Iterable[StudentRecipe]) -> list[StudentRecipe]:
        """Those that measure layers, each once, without what has no say in it."""
        without = {"reconstruction": None, "quantization": None}
        asking = [one.model_copy(update=without) for one in students if one.measures_layers]
        return [one for place, one in enumerate(asking) if one not in asking[:place]]

    def _check_cut(self) -> None:
        """Something must be cut, or else `same` is what is meant."""
        if self.has_target:
            return
        if self.cuts_depth and self.num_layers is None and self.keep_layers is None:
            raise ValueError(f"init={self.init} needs num_layers, keep_layers or a target")
        if self.cuts_width and not self.given_widths:
            raise ValueError(f"init={self.init} needs {', '.join(_WIDTHS)} or a target")

    def _check_layers(self) -> None:
        if self.keep_layers is not None:
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
        if self.measures_layers and not self.cuts_depth:
            raise ValueError(
                f"layer_importance={self.layer_importance} needs init={' or '.join(_DEPTH)}, but "
                f"init={self.init}"
            )
        if self.measures_layers and self.keep_layers is not None:
            raise ValueError(
                f"layer_importance={self.layer_importance} has no effect with keep_layers="
                f"{list(self.keep_layers)}: give num_layers instead"
            )
        measures = self.measures_layers or self.cuts_width
        if self.calibration_tokens is not None and not measures:
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
        # A narrower student's heads keep the teacher's width.
        if self.init == "scratch" and heads and self.hidden_size and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}"
            )

    def _check_quantization(self) -> None:
        if self.quantization is None:
            return
        if self.quantization.when == "significant" and self.init not in ("same", "pretrained"):
            raise ValueError(
                f"quantization.when=significant with init={self.init}: such a student has to be "
                "trained whatever quantisation costs; set when=always, or init=same or pretrained"
            )
        if self.architecture is not None and not self.architecture.is_default:
            changed = self.architecture.model_dump(mode="json", exclude_defaults=True)
            raise ValueError(
                f"quantization.recipe={self.quantization.recipe} with architecture={changed}: "
                "plain layers of attention and MLP are quantised; leave one of the two out"
            )
