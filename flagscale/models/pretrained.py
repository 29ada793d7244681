"""A Hugging Face model that becomes the teacher, or a student: what it must be, and the proofs.

What is proven is the artifact: it is loaded as every later step will load it, and compared with
transformers' model of the source.
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedConfig

from flagscale.artifacts import read_manifest
from flagscale.checkpoint.agreement import on_first_rank
from flagscale.data.loader import prepare_validation_index, validation_batches
from flagscale.errors import UserError
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
from flagscale.models.megatron import load_model
from flagscale.models.parity import (
    check_layers,
    check_logits,
    compare_logits,
    fixed_tokens,
    layer_differences,
)
from flagscale.models.source import load_hf_config
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import ParallelismRecipe, SourceRecipe
from flagscale.train.batches import reads_data
from flagscale.train.loop import evaluate_loss

logger = logging.getLogger(__name__)

_VALIDATION_SEQUENCES = 8


@dataclass(frozen=True)
class Pretrained:
    """A model that can be imported.

    Attributes:
        section: of the recipe that names it, `teacher` or `student`.
        recipe: where it comes from, and how exact its import must be.
        source: its tensors.
        shape: with the tokenizer's vocabulary: of padding it has none but Megatron-Core's.
        num_rows: of its embedding as the source has it.
    """

    section: str
    recipe: SourceRecipe
    source: HFFolder
    shape: ModelShape
    num_rows: int

    @property
    def num_parameters(self) -> int:
        """Of its own, without padding."""
        return sum(math.prod(size) for size in WeightMap(self.shape).shapes().values())

    def fill(self, model: GPTModel) -> int:
        """Read this rank's part of the model from the source; see `hf_import.fill`.

        Returns:
            How many weights are all zero.
        """
        return fill(
            model,
            self.source,
            WeightMap(self.shape),
            allow_zero_weights=self.recipe.allow_zero_weights,
            section=self.section,
        )

    def facts(self) -> dict[str, Any]:
        """What an artifact of it says of the source."""
        return {
            "dtype": str(self.source.dtype()).removeprefix("torch."),
            "vocabulary_rows_left_out": self.num_rows - self.shape.vocab_size,
        }


def shape_in(
    section: str, recipe: SourceRecipe, config: PreTrainedConfig, facts: Mapping[str, Any]
) -> ModelShape:
    """The shape of a model that can take a dataset's tokens and sequences.

    Args:
        section: see `Pretrained`.
        recipe: see there.
        config: of the source.
        facts: of the dataset's manifest.

    Raises:
        UserError: it is not supported, or it cannot take them.
    """
    shape = from_hf_config(config, ignored=recipe.ignored_config_fields, who=section)
    if facts["highest_id"] >= shape.vocab_size:
        raise UserError(
            f"tokenizer that does not match the {section}: the dataset has token "
            f"{facts['highest_id']}, the model's vocab_size={shape.vocab_size}"
        )
    shape.check_seq_length(facts["seq_length"], section)
    return shape.with_vocabulary(facts["vocab_size"])


def check_early(
    section: str, recipe: SourceRecipe, facts: Mapping[str, Any], sizes: ParallelismRecipe
) -> ModelShape | None:
    """Refuse a model by its configuration, before its weights, which may be long in coming.

    Args:
        section: see `Pretrained`.
        recipe: see there.
        facts: of the dataset's manifest.
        sizes: that it is to be divided by.

    Returns:
        Its shape; None where it is in a GGUF file, whose configuration comes with the weights.

    Raises:
        UserError: see `shape_in`; or it cannot be divided so.
    """
    if is_gguf(recipe.source):
        return None
    config = load_hf_config(recipe.source, recipe.revision)
    shape = shape_in(section, recipe, config, facts)
    check_layout(shape, sizes, facts["seq_length"], section="models", who=f"the {section}")
    return shape


def open_pretrained(
    section: str, recipe: SourceRecipe, folder: Path, facts: Mapping[str, Any]
) -> Pretrained:
    """Read the headers of a model's files, and refuse those that are not what its configuration is.

    Args:
        section: see `Pretrained`.
        recipe: see there.
        folder: from `flagscale.models.source.weights_folder`.
        facts: of the dataset's manifest.

    Raises:
        UserError: see `shape_in` and `check_tensors`.
    """
    config, source = load_hf_config(folder), HFFolder(folder, recipe.source)
    shape = shape_in(section, recipe, config, facts)
    rows = config.vocab_size
    check_tensors(source, shape.with_rows(rows))
    if rows > shape.vocab_size:
        logger.info(
            "%s: %d of the %d rows of its vocabulary are no tokens, and left out",
            *(recipe.source, rows - shape.vocab_size, rows),
        )
    return Pretrained(section, recipe, source, shape, rows)


def describe(pretrained: Pretrained, dataset: Path, folder: Path) -> None:
    """Write what is no weights: configurations and tokenizer.

    The tokenizer is the dataset's: with the chat template that the student is trained on.

    Args:
        pretrained: the model.
        dataset: the artifact.
        folder: to be made.
    """
    recipe, source = pretrained.recipe, pretrained.source
    config = hf_config_for(pretrained.shape, load_hf_config(source.path))
    for name in recipe.ignored_config_fields:
        config.__dict__.pop(name, None)
    config.dtype = source.dtype()
    folder.mkdir()
    write_config(config, folder)
    corpora = read_manifest(dataset).facts["corpora"]
    ends = {number for corpus in corpora for number in corpus.get("end_ids", ())}
    write_generation_config(source.path, config, folder, ends)
    tokenizer = load_tokenizer(dataset / "tokenizer")
    write_tokenizer(tokenizer, folder)
    check_loads(tokenizer, folder, f"tokenizer of {recipe.source}")


def prove(
    pretrained: Pretrained, artifact: Path, dataset: Path, sizes: ParallelismRecipe
) -> dict[str, float]:
    """Layers and logits against transformers' own, and the loss of a model that has learnt.

    All ranks call it.

    Args:
        pretrained: the model.
        artifact: with its shape and weights.
        dataset: the artifact.
        sizes: that the runtime was started with.

    Returns:
        `max_logit_difference` and `mean_logit_difference` to transformers, `logit_spread`,
        `kl_divergence` (nats a token) and `top1_agreement` of the same, `max_layer_difference` (of
        the layer that differs most, as a share of what it adds) and `validation_loss` (nats a
        token).

    Raises:
        UserError: it is not the source's model, or none that was trained.
    """
    seq_length = read_manifest(dataset).facts["seq_length"]
    source, limit = pretrained.source, pretrained.recipe.max_logit_difference
    dtype = platform.inference_dtype(source.dtype())
    tokens = fixed_tokens(load_tokenizer(dataset / "tokenizer"), seq_length)
    model = load_model(artifact, seq_length, sizes, dtype)
    ours = layer_outputs(model, tokens)
    loss = _validation_loss(model, pretrained.shape, dataset, seq_length, sizes)
    del model
    gc.collect()  # its modules know each other; and before transformers' layers come

    def compare() -> dict[str, float]:
        vocab_size = pretrained.shape.vocab_size
        theirs = in_transformers(source.path, tokens, ours.hidden_bsh, dtype, vocab_size)
        differences = layer_differences(ours, theirs, dtype)
        rounding = layer_differences(ours, theirs, dtype, theirs.rounded) if theirs.rounded else []
        parity = compare_logits(ours.logits_bsv, theirs.logits_bsv, dtype)
        logger.info(
            "in %s a layer differs by at most %.3g of what it adds from transformers', logits by "
            "%.3g over %d positions",
            *(dtype, max(differences), parity.max_logit_difference, parity.num_tokens),
        )
        where = f"{pretrained.section}.max_logit_difference"
        check_layers(differences, dtype, limit, where, rounding)
        check_logits(parity, limit, where)
        return parity.figures() | {"max_layer_difference": max(differences)}

    figures = on_first_rank(source.path, "could not be read", compare)
    _check_loss(pretrained, loss)
    return figures | {"validation_loss": loss}


def _validation_loss(
    model: GPTModel, shape: ModelShape, dataset: Path, seq_length: int, sizes: ParallelismRecipe
) -> float:
    """LM loss on the validation split, nats a token."""
    args = replace(
        model_arguments(
            shape, seq_length, parallelism=sizes, params_dtype=model.config.params_dtype
        ),
        # Data-parallel ranks, which hold other experts, read the same samples.
        global_batch_size=parallel_state.get_data_parallel_world_size(),
    )

    def read() -> list[dict[str, torch.Tensor]]:
        with tempfile.TemporaryDirectory(prefix="flagscale-validation-") as cache:
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


def _check_loss(pretrained: Pretrained, loss: float) -> None:
    """Above the limit it is no trained model."""
    section, own = pretrained.section, pretrained.recipe.max_validation_loss
    limit = own or math.log(pretrained.shape.vocab_size)
    if not loss <= limit:
        meaning = "" if own else " (what guessing all tokens alike gives)"
        raise UserError(
            f"{section} {pretrained.recipe.source}: LM loss on the validation split is {loss:.3f}, "
            f"above the limit of {limit:.3f}{meaning}; set {section}.max_validation_loss otherwise"
        )
    logger.info("LM loss on the validation split: %.3f nats a token", loss)
