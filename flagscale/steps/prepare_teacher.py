"""Step 2: a Hugging Face model -> a `teacher` artifact, proven to be the same model.

The ranks read their slices of the source's safetensors and write them as Megatron-Core's
distributed checkpoint, in the source's own dtype. What is proven is the artifact: it is loaded as
every later step will load it, and compared with transformers' model of the source.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from flagscale.artifacts import Staging, open_artifact
from flagscale.checkpoint import save_weights
from flagscale.checkpoint.agreement import on_first_rank
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.models import pretrained
from flagscale.models.megatron import WEIGHTS, build_model
from flagscale.models.origin import keep_origin
from flagscale.models.pretrained import Pretrained, open_pretrained, prove
from flagscale.models.source import weights_folder
from flagscale.models.tokenizers import load_tokenizer, pipeline_hash
from flagscale.recipe import ModelsRecipe, TeacherRecipe
from flagscale.steps.on_ranks import tracked, written

_SECTION = "teacher"


def prepare_teacher(
    teacher: TeacherRecipe, dataset: Path, output: Path, models: ModelsRecipe = ModelsRecipe()
) -> dict[str, float]:
    """Import the teacher into Megatron-Core and prove the import.

    Args:
        teacher: the recipe's section.
        dataset: a `dataset` artifact, tokenised with the teacher's tokenizer.
        output: folder of the `teacher` artifact.
        models: how the step is spread over processes.

    Returns:
        The figures of `flagscale.models.pretrained.prove`, `parameters` and `layers`.

    Raises:
        UserError: the teacher cannot be read or is not supported, its tokenizer is not the
            dataset's, or a proof failed. Nothing is left at `output`.
    """
    facts = open_artifact(dataset, "dataset", check_files=False).facts
    _check_tokenizer(teacher, dataset)
    pretrained.check_early(_SECTION, teacher, facts, models.sizes)
    with weights_folder(teacher.source, teacher.revision) as folder:
        return call_on_ranks(
            "prepare-teacher",
            prepare_on_rank,
            models.processes,
            teacher=teacher,
            folder=folder,
            dataset=dataset,
            output=output,
            models=models,
        )


def prepare_on_rank(
    teacher: TeacherRecipe, folder: Path, dataset: Path, output: Path, models: ModelsRecipe
) -> dict[str, float]:
    """The work of one rank, or of the only process; see `prepare_teacher`.

    Args:
        teacher: see there.
        folder: with the source's configuration and safetensors.
        dataset: see there.
        output: see there.
        models: see there.
    """
    parents = {"dataset": open_artifact(dataset, "dataset", check_files=is_first_rank())}
    facts = parents["dataset"].facts
    recipe = {"teacher": teacher.model_dump(mode="json")}
    source = open_pretrained(_SECTION, teacher, folder, facts)
    with tracked("prepare-teacher", recipe, parents=parents) as run:
        with (
            platform.runtime(parallelism=models.sizes),
            written(output, "teacher", recipe, parents, run) as staging,
        ):
            describe = partial(_describe, staging, source, dataset)
            on_first_rank(folder, "could not be described", describe)
            staging.facts["zero_weights"] = _import(source, models, staging)
            figures = prove(source, staging.path, dataset, models.sizes)
            figures |= {
                "parameters": float(source.num_parameters),
                "layers": float(source.shape.num_layers),
            }
            staging.facts |= figures | {"seq_length": facts["seq_length"]}
            staging.tokenizer_hash = parents["dataset"].tokenizer_hash
        run.log_metrics(figures)
    return figures


def _check_tokenizer(teacher: TeacherRecipe, dataset: Path) -> None:
    """The dataset's tokens must be the teacher's own.

    Which of them are special may differ, as of an instruct model's tokenizer from its base's.
    """
    own = pipeline_hash(load_tokenizer(teacher.source, teacher.revision))
    used = pipeline_hash(load_tokenizer(dataset / "tokenizer"))
    if own != used:
        raise UserError(
            f"{dataset} was made with a tokenizer that does not match the teacher "
            f"{teacher.source} ({used[:19]}, not {own[:19]}): a text has other ids; leave "
            "data.tokenizer out of the recipe, or give the teacher's source there. Where the "
            "teacher lacks a chat template, give one in data.chat_template"
        )


def _import(source: Pretrained, models: ModelsRecipe, staging: Staging) -> int:
    """Write the source's weights, in its dtype, as Megatron-Core's checkpoint.

    Returns:
        How many weights are all zero.
    """
    model = build_model(source.shape, 1, models.sizes, source.source.dtype())
    zero = source.fill(model)
    if is_first_rank():
        source.shape.save(staging.path)
    save_weights(model, staging.path / WEIGHTS)
    return zero


def _describe(staging: Staging, source: Pretrained, dataset: Path) -> None:
    """What is no weights: configurations, tokenizer, origin."""
    folder = staging.path / "hf"
    pretrained.describe(source, dataset, folder)
    origin = keep_origin(source.recipe.source, source.recipe.revision, folder)
    staging.facts |= {"origin": asdict(origin), **source.facts()}
