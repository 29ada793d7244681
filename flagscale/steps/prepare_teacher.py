"""Step 2: a Hugging Face model -> a `teacher` artifact, proven to be the same model."""

from __future__ import annotations

import logging
import math
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flagscale import tracking
from flagscale.artifacts import Manifest, Staging, new_artifact, open_artifact
from flagscale.checkpoint import save_weights
from flagscale.data.loader import validation_batches
from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape, from_hf_config, hf_config_for
from flagscale.models.hf_import import import_from_hf
from flagscale.models.megatron import WEIGHTS
from flagscale.models.origin import find_origin
from flagscale.models.parity import (
    check_logits,
    check_weights,
    count_parameters,
    fixed_tokens,
    logit_difference,
)
from flagscale.models.source import (
    is_gguf,
    load_hf_config,
    load_hf_model,
    load_tokenizer,
    tokenizer_hash,
)
from flagscale.recipe import ModelsRecipe, TeacherRecipe
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
        `max_logit_difference` and `mean_logit_difference` to transformers, `top1_agreement` with
        it, `validation_loss` (nats a token), `parameters` and `layers`.

    Raises:
        UserError: the teacher cannot be read or is not supported, its tokenizer is not the
            dataset's, or a proof failed. Nothing is left at `output`.
    """
    parents = {"dataset": open_artifact(dataset, "dataset")}
    recipe = {"teacher": teacher.model_dump(mode="json")}
    with tracking.step_run("prepare-teacher", recipe, parents=parents) as run:
        tokenizer = _load_tokenizer(teacher, dataset)
        if not is_gguf(teacher.source):  # before the weights, which may be long in coming
            _check_fits(from_hf_config(load_hf_config(teacher.source, teacher.revision)), parents)
        hf_model = load_hf_model(teacher.source, teacher.revision)
        shape = from_hf_config(hf_model.config)
        _check_fits(shape, parents)
        check_weights(hf_model, f"teacher {teacher.source}")
        with (
            new_artifact(output, "teacher", recipe, parents, run.log_artifact) as staging,
            platform.runtime(parallelism=models.sizes),
        ):
            seq_length = parents["dataset"].facts["seq_length"]
            model = import_from_hf(hf_model, shape, seq_length, staging.path)
            figures = _prove(teacher, model, hf_model, shape, tokenizer, seq_length)
            config, generation_config = hf_model.config, hf_model.generation_config
            del hf_model
            figures["validation_loss"] = _validation_loss(
                teacher, model, shape, dataset, seq_length
            )
            _save(staging, teacher, model, shape, config, generation_config, tokenizer)
            staging.facts.update(figures, seq_length=seq_length)
            staging.tokenizer_hash = parents["dataset"].tokenizer_hash
        run.log_metrics(figures)
    return figures


def _load_tokenizer(teacher: TeacherRecipe, dataset: Path) -> PreTrainedTokenizerFast:
    """The teacher's tokenizer, which must be the one that made the dataset."""
    tokenizer = load_tokenizer(teacher.source, teacher.revision)
    own, used = tokenizer_hash(tokenizer), tokenizer_hash(load_tokenizer(dataset / "tokenizer"))
    if own != used:
        raise UserError(
            f"{dataset} was made with a tokenizer that does not match the teacher "
            f"{teacher.source} ({used[:19]}, not {own[:19]}); leave data.tokenizer out of the "
            "recipe, or give the teacher's source there"
        )
    return tokenizer


def _check_fits(shape: ModelShape, parents: dict[str, Manifest]) -> None:
    """Whether the model can take the dataset's tokens and sequences."""
    facts = parents["dataset"].facts
    highest = max(facts["vocab_size"] - 1, facts["eod_id"])
    if highest >= shape.vocab_size:
        raise UserError(
            f"tokenizer that does not match the teacher: it has token {highest}, the model's "
            f"vocab_size={shape.vocab_size}"
        )
    if facts["seq_length"] > shape.max_position_embeddings:
        raise UserError(
            f"data.seq_length={facts['seq_length']} is more than the teacher's "
            f"max_position_embeddings={shape.max_position_embeddings}"
        )


def _prove(
    teacher: TeacherRecipe,
    model: GPTModel,
    hf_model: PreTrainedModel,
    shape: ModelShape,
    tokenizer: PreTrainedTokenizerFast,
    seq_length: int,
) -> dict[str, float]:
    """Logits, weights and parameter count of the imported model against transformers' own."""
    parity = logit_difference(model, hf_model, fixed_tokens(tokenizer, seq_length))
    logger.info(
        "logits differ by at most %.3g from transformers' over %d positions",
        parity.max_abs_difference,
        parity.num_tokens,
    )
    check_logits(parity, teacher.max_logit_difference, "teacher.max_logit_difference")
    check_weights(model, f"imported teacher {teacher.source}")
    imported, expected = count_parameters(model, shape), count_parameters(hf_model)
    if imported != expected:
        raise RuntimeError(f"{imported} parameters were imported, transformers has {expected}")
    return {
        "max_logit_difference": parity.max_abs_difference,
        "mean_logit_difference": parity.mean_abs_difference,
        "top1_agreement": parity.top1_agreement,
        "parameters": float(imported),
        "layers": float(shape.num_layers),
    }


def _validation_loss(
    teacher: TeacherRecipe, model: GPTModel, shape: ModelShape, dataset: Path, seq_length: int
) -> float:
    """LM loss on the validation split, nats a token; above the limit it is no trained model."""
    with (
        tempfile.TemporaryDirectory(prefix="flagscale-teacher-") as cache,
        use_args(model_arguments(shape, seq_length)),
    ):
        batches = validation_batches(
            dataset,
            Path(cache),
            micro_batch_size=1,
            global_batch_size=1,
            eval_iters=_VALIDATION_SEQUENCES,
        )
        loss = evaluate_loss([model], [iter(batches)], _VALIDATION_SEQUENCES)["lm loss"]
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
    return loss


def _save(
    staging: Staging,
    teacher: TeacherRecipe,
    model: GPTModel,
    shape: ModelShape,
    config: Any,  # noqa: ANN401 - transformers' configurations
    generation_config: Any,  # noqa: ANN401
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    shape.save(staging.path)
    save_weights(model, staging.path / WEIGHTS)
    hf_folder = staging.path / "hf"
    plain = hf_config_for(shape, config)
    plain.dtype = torch.float32
    plain.save_pretrained(hf_folder)
    if generation_config is not None:
        generation_config.save_pretrained(hf_folder)
    tokenizer.save_pretrained(hf_folder)
    origin = find_origin(teacher.source, teacher.revision)
    origin.save(hf_folder)
    staging.facts["origin"] = asdict(origin)
