"""Step 2: a Hugging Face model -> a `teacher` artifact, proven to be the same model.

The ranks read their slices of the source's safetensors and write them as Megatron-Core's
distributed checkpoint, in the source's own dtype. What is proven is the artifact: it is loaded as
every later step will load it, and compared with transformers' model of the source.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flagscale.artifacts import Staging, open_artifact, read_manifest
from flagscale.checkpoint import save_weights
from flagscale.checkpoint.agreement import on_first_rank
from flagscale.data.loader import prepare_validation_index, validation_batches
from flagscale.errors import UserError
from flagscale.execution.launch import call_on_ranks, is_first_rank
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import check_layout
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.gguf import is_gguf
from flagscale.models.hf_description import (
    check_loads,
    write_config,
    write_generation_config,
    write_tokenizer,
)
from flagscale.models.hf_folder import HFFolder
from flagscale.models.hf_import import check_tensors, fill
from flagscale.models.hf_weights import WeightMap
from flagscale.models.layer_outputs import in_transformers, layer_outputs
from flagscale.models.megatron import WEIGHTS, build_model, load_model
from flagscale.models.origin import keep_origin
from flagscale.models.parity import (
    check_layers,
    check_logits,
    compare_logits,
    fixed_tokens,
    layer_differences,
)
from flagscale.models.source import load_hf_config, weights_folder
from flagscale.models.tokenizers import load_tokenizer, pipeline_hash
from flagscale.recipe import ModelsRecipe, TeacherRecipe
from flagscale.steps.on_ranks import tracked, written
from flagscale.train.batches import reads_data
from flagscale.train.loop import evaluate_loss

logger = logging.getLogger(__name__)

_VALIDATION_SEQUENCES = 8


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
        `max_logit_difference` and `mean_logit_difference` to transformers, `logit_spread`,
        `kl_divergence` (nats a token) and `top1_agreement` of the same, `max_layer_difference` (of
        the layer that differs most, as a share of what it adds), `validation_loss` (nats a token),
        `parameters` and `layers`.

    Raises:
        UserError: the teacher cannot be read or is not supported, its tokenizer is not the
            dataset's, or a proof failed. Nothing is left at `output`.
    """
    facts = open_artifact(dataset, "dataset", check_files=False).facts
    _check_tokenizer(teacher, dataset)
    if not is_gguf(teacher.source):  # before the weights, which may be long in coming
        config = load_hf_config(teacher.source, teacher.revision)
        shape = from_hf_config(config, ignored=teacher.ignored_config_fields)
        _check_fits(shape, facts)
        check_layout(shape, models.sizes, facts["seq_length"], section="models")
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
    shape = from_hf_config(load_hf_config(folder), ignored=teacher.ignored_config_fields)
    _check_fits(shape, facts)
    source = HFFolder(folder, teacher.source)
    with tracked("prepare-teacher", recipe, parents=parents) as run:
        check_tensors(source, shape)
        with (
            platform.runtime(parallelism=models.sizes),
            written(output, "teacher", recipe, parents, run) as staging,
        ):
            describe = partial(_describe, staging, teacher, source, shape, dataset)
            on_first_rank(source.path, "could not be described", describe)
            staging.facts["zero_weights"] = _import(teacher, source, shape, models, staging)
            figures = _prove(teacher, source, shape, dataset, models, staging.path)
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


def _check_fits(shape: ModelShape, facts: dict[str, Any]) -> None:
    """Whether the model can take the dataset's tokens and sequences."""
    if facts["highest_id"] >= shape.vocab_size:
        raise UserError(
            f"tokenizer that does not match the teacher: the dataset has token "
            f"{facts['highest_id']}, the model's vocab_size={shape.vocab_size}"
        )
    shape.check_seq_length(facts["seq_length"])


def _import(
    teacher: TeacherRecipe,
    source: HFFolder,
    shape: ModelShape,
    models: ModelsRecipe,
    staging: Staging,
) -> int:
    """Write the source's weights, in its dtype, as Megatron-Core's checkpoint.

    Returns:
        How many weights are all zero.
    """
    model = build_model(shape, 1, models.sizes, source.dtype())
    zero = fill(model, source, WeightMap(shape), allow_zero_weights=teacher.allow_zero_weights)
    if is_first_rank():
        shape.save(staging.path)
    save_weights(model, staging.path / WEIGHTS)
    return zero


def _prove(
    teacher: TeacherRecipe,
    source: HFFolder,
    shape: ModelShape,
    dataset: Path,
    models: ModelsRecipe,
    artifact: Path,
) -> dict[str, float]:
    """Layers and logits against transformers' own, and the loss of a model that has learnt.

    Returns:
        The figures of `prepare_teacher`.
    """
    seq_length = read_manifest(dataset).facts["seq_length"]
    dtype = platform.inference_dtype(source.dtype())
    tokens = fixed_tokens(load_tokenizer(dataset / "tokenizer"), seq_length)
    model = load_model(artifact, seq_length, models.sizes, dtype)
    ours = layer_outputs(model, tokens)
    loss = _validation_loss(model, shape, dataset, seq_length, models)
    del model
    gc.collect()  # its modules know each other; and before transformers' layers come

    def compare() -> dict[str, float]:
        theirs = in_transformers(source.path, tokens, ours.hidden_bsh, dtype)
        differences = layer_differences(ours, theirs, dtype)
        rounding = layer_differences(ours, theirs, dtype, theirs.rounded) if theirs.rounded else []
        parity = compare_logits(ours.logits_bsv, theirs.logits_bsv, dtype)
        logger.info(
            "in %s a layer differs by at most %.3g of what it adds from transformers', logits by "
            "%.3g over %d positions",
            *(dtype, max(differences), parity.max_logit_difference, parity.num_tokens),
        )
        where = "teacher.max_logit_difference"
        check_layers(differences, dtype, teacher.max_logit_difference, where, rounding)
        check_logits(parity, teacher.max_logit_difference, where)
        return parity.figures() | {"max_layer_difference": max(differences)}

    figures = on_first_rank(source.path, "could not be read", compare)
    _check_loss(teacher, shape, loss)
    return figures | {
        "validation_loss": loss,
        "parameters": float(sum(math.prod(size) for size in WeightMap(shape).shapes().values())),
        "layers": float(shape.num_layers),
    }


def _validation_loss(
    model: GPTModel, shape: ModelShape, dataset: Path, seq_length: int, models: ModelsRecipe
) -> float:
    """LM loss on the validation split, nats a token."""
    args = replace(
        model_arguments(
            shape, seq_length, parallelism=models.sizes, params_dtype=model.config.params_dtype
        ),
        # Data-parallel ranks, which hold other experts, read the same samples.
        global_batch_size=parallel_state.get_data_parallel_world_size(),
    )

    def read() -> list[dict[str, torch.Tensor]]:
        with tempfile.TemporaryDirectory(prefix="flagscale-teacher-") as cache:
            prepare_validation_index(dataset, Path(cache))
            batches = validation_batches(
                dataset,
                Path(cache),
                micro_batch_size=1,
                global_batch_size=1,
                eval_iters=_VALIDATION_SEQUENCES,
            )
            return list(batches)

    batches = on_first_rank(dataset, "could not be read", read)
    with use_args(args):
        chunk = iter(batches) if reads_data(args) else None
        return evaluate_loss([model], [chunk], _VALIDATION_SEQUENCES)["lm loss"]


def _check_loss(teacher: TeacherRecipe, shape: ModelShape, loss: float) -> None:
    """Above the limit it is no trained model."""
    guessing = math.log(shape.vocab_size)
    limit = teacher.max_validation_loss or guessing
    if not loss <= limit:
        meaning = "" if teacher.max_validation_loss else " (what guessing all tokens alike gives)"
        raise UserError(
            f"teacher {teacher.source}: LM loss on the validation split is {loss:.3f} nats a "
            f"token, above the limit of {limit:.3f}{meaning}; set teacher.max_validation_loss if "
            "that is right for this text"
        )
    logger.info("LM loss on the validation split: %.3f nats a token", loss)


def _describe(
    staging: Staging, teacher: TeacherRecipe, source: HFFolder, shape: ModelShape, dataset: Path
) -> None:
    """What is no weights: configurations, tokenizer, origin.

    The tokenizer is the dataset's: with the chat template that the student is trained on.
    """
    folder = staging.path / "hf"
    config = hf_config_for(shape, load_hf_config(source.path))
    for name in teacher.ignored_config_fields:
        config.__dict__.pop(name, None)
    config.dtype = source.dtype()
    folder.mkdir()
    write_config(config, folder)
    corpora = read_manifest(dataset).facts["corpora"]
    ends = {number for corpus in corpora for number in corpus.get("end_ids", ())}
    write_generation_config(source.path, config, folder, ends)
    tokenizer = load_tokenizer(dataset / "tokenizer")
    write_tokenizer(tokenizer, folder)
    check_loads(tokenizer, folder, f"tokenizer of {teacher.source}")
    origin = keep_origin(teacher.source, teacher.revision, folder)
    staging.facts |= {"origin": asdict(origin), "dtype": str(source.dtype()).removeprefix("torch.")}
