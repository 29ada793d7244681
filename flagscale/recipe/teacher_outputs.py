"""Section `teacher_outputs`: what is kept of the teacher's answers, and of which samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field, model_validator

from flagscale.recipe.distillation import DistillationRecipe, Temperature
from flagscale.recipe.section import (
    NUMBER,
    NonNegativeInt,
    PositiveInt,
    Section,
    Seed,
    Width,
)
from flagscale.recipe.served import check_served
from flagscale.recipe.training import TrainingRecipe

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


class MetRecipe(Section):
    """What the trainings of a run ask of a teacher's outputs; it follows from their sections.

    Cache-teacher is given this and no training, so that KFP's cache serves every training that asks
    the same, whatever its learning rate.
    """

    train: tuple[tuple[Seed, PositiveInt], ...] = Field(
        (), description="(seed, samples): so many of the order that the seed gives"
    )
    validation: NonNegativeInt = Field(0, description="The first so many of every validation")
    everything: bool = Field(False, description="Instead: all samples of both splits")
    reset_attention_mask: bool = Field(False, description="Documents do not see one another")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="Of the teacher")
    temperature: Temperature = Field(1.0, description="Of sampled and topk")

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not (self.train or self.validation or self.everything)


class Taught(Protocol):
    """What matters here of a recipe without a sweep."""

    @property
    def distillation(self) -> DistillationRecipe:
        """The loss."""

    @property
    def training(self) -> TrainingRecipe:
        """The optimisation."""


def reads_outputs(distillation: DistillationRecipe) -> bool:
    """Whether a training reads what was kept of the teacher; `auto` has been decided before."""
    return distillation.teacher_outputs == "cached" and distillation.loss != "none"


def unserved(distillation: DistillationRecipe, outputs: TeacherOutputsRecipe) -> str | None:
    """Why a training could not read outputs of this kind; None if it can."""
    codec = {"name": outputs.codec, "temperature": distillation.temperature, "top_k": outputs.top_k}
    try:
        check_served(distillation, codec)
    except ValueError as error:
        return str(error)
    return None


RecipeT = TypeVar("RecipeT", bound=Section)


def decided(recipe: RecipeT, cached: bool) -> RecipeT:
    """A recipe without a sweep whose `distillation.teacher_outputs=auto` is decided.

    Args:
        recipe: the whole.
        cached: whether outputs are to be read, wherever they can be.
    """
    distillation: DistillationRecipe = recipe.distillation  # type: ignore[attr-defined]
    outputs: TeacherOutputsRecipe = recipe.teacher_outputs  # type: ignore[attr-defined]
    if distillation.teacher_outputs != "auto":
        return recipe
    can = distillation.loss != "none" and unserved(distillation, outputs) is None
    choice = "cached" if cached and can else "live"
    changed = distillation.model_copy(update={"teacher_outputs": choice})
    return recipe.model_copy(update={"distillation": changed})


def met_by(recipes: Iterable[Taught], outputs: TeacherOutputsRecipe, ranked: int = 0) -> MetRecipe:
    """What those of the trainings ask that read outputs; of none, nothing.

    Args:
        recipes: a run's, without a sweep: one, or its variants.
        outputs: what is kept: of `hidden` every temperature can be had.
        ranked: samples of the validation split that a search ranks its candidates on.

    Raises:
        ValueError: two of them would need different outputs of the same sample.
    """
    asked: list[tuple[DistillationRecipe, TrainingRecipe]] = [
        (one.distillation, one.training) for one in recipes if reads_outputs(one.distillation)
    ]
    if not asked:
        return MetRecipe()
    train: dict[int, int] = {}
    for _, training in asked:
        samples = training.train_iters * training.global_batch_size
        train[training.seed] = max(samples, train.get(training.seed, 0))
    shared: dict[str, set[Any]] = {
        "training.reset_attention_mask": {t.reset_attention_mask for _, t in asked},
        "training.precision": {t.precision for _, t in asked},
        "distillation.temperature": {d.temperature for d, _ in asked},
    }
    if outputs.codec == "hidden":
        shared["distillation.temperature"] = {1.0}
    for field, values in shared.items():
        if len(values) > 1:
            raise ValueError(
                f"{field}={sorted(values)} with distillation.teacher_outputs=cached: what is kept "
                f"of the teacher (codec={outputs.codec}) serves one of them; take one value, "
                + ("codec: hidden, " if "temperature" in field else "")
                + "or teacher_outputs: live"
            )
    everything = outputs.samples == "all"
    validation = max(ranked, *(t.eval_iters * t.global_batch_size for _, t in asked))
    return MetRecipe(
        train=() if everything else tuple(sorted(train.items())),
        validation=0 if everything else validation,
        everything=everything,
        reset_attention_mask=shared["training.reset_attention_mask"].pop(),
        precision=shared["training.precision"].pop(),
        temperature=shared["distillation.temperature"].pop(),
    )
