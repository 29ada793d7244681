"""Sections `evaluation`, `export`, `tracking` and `resources`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from flagscale.recipe.section import (
    Positive,
    PositiveInt,
    Prose,
    Ranks,
    Section,
    Tolerance,
    one_line,
)

_LONGEST_NAME = 256  # characters that MLflow's databases keep


def _model_name(name: str) -> str:
    """MLflow's own rule, by which it would refuse the model when everything else is done."""
    if "/" in name or ":" in name:
        raise ValueError("must have no / and no :, which separate name and version in MLflow")
    if name in (".", "..") or name.startswith(".."):
        raise ValueError("must not read like a path")
    return name


ExperimentName = Annotated[
    str, Field(max_length=_LONGEST_NAME, examples=["distillation"]), AfterValidator(one_line)
]
ModelName = Annotated[
    str,
    Field(max_length=_LONGEST_NAME, examples=["acme-tiny"]),
    AfterValidator(one_line),
    AfterValidator(_model_name),
]


class EvaluationRecipe(Section):
    """How the models are compared on the held-out test split."""

    max_documents: Annotated[PositiveInt, Field(ge=2)] | None = Field(
        None, description="Evenly spread over the test split; default: the whole split"
    )
    max_document_tokens: PositiveInt | None = Field(
        None, description="Predict no more of each document's start; default: whole documents"
    )
    micro_batch_size: PositiveInt = Field(4, description="Sequences a forward pass")
    bootstrap_samples: Annotated[PositiveInt, Field(ge=100, le=10**6)] = Field(
        1000, description="Resamples of the documents for the confidence intervals"
    )
    confidence: Annotated[Positive, Field(lt=1)] = Field(0.95, description="Mass of the intervals")
    price_per_hour: Positive | None = Field(
        None,
        description="Of all that the training runs on, in any currency; default: no price in the "
        "report",
    )
    prompts: tuple[Prose, ...] = Field((), description="Continued by every model, side by side")
    max_new_tokens: Annotated[PositiveInt, Field(le=2**16)] = Field(
        40, description="Tokens a continuation"
    )


class ExportRecipe(Section):
    """The model that comes out."""

    format: Literal["huggingface", "megatron"] = Field(
        "huggingface",
        description="huggingface: what AutoModelForCausalLM loads; megatron: the distributed "
        "checkpoint, for a student.architecture that no Hugging Face configuration holds",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Weights on disk; huggingface only"
    )
    max_logit_difference: Tolerance = Field(
        1e-3,
        description="Largest |logit| difference after the round trip that is accepted in float32, "
        "as a share of the logits' standard deviation; ditto",
    )
    registered_model_name: ModelName | None = Field(
        None, description="Name in the MLflow model registry; default: the recipe's name"
    )

    @model_validator(mode="after")
    def _check(self) -> ExportRecipe:
        if self.format == "megatron":
            for name in ("dtype", "max_logit_difference"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no effect with format=megatron: the "
                        "checkpoint is passed on as it is; leave it out"
                    )
        return self


class TrackingRecipe(Section):
    """Where MLflow puts the runs. The server comes from MLFLOW_TRACKING_URI, else SQLite."""

    experiment: ExperimentName = Field("flagscale-distillation", description="Created if missing")


class ResourcesRecipe(Section):
    """What the training asks of a cluster; the platform file says what there is.

    Ignored by `pipelines run`.
    """

    nodes: Ranks = Field(
        1, description="Pods that train together; from 2 on as a TrainJob of Kubeflow Trainer"
    )
    accelerator_count: Ranks | None = Field(
        None, description="Use so many of the platform's accelerators a training pod; default: all"
    )
