"""Model artifacts as Megatron-Core models that compute logits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.train.train_gpt import model_provider

WEIGHTS = "weights"


def build_model(shape: ModelShape, seq_length: int) -> GPTModel:
    """An fp32 model of `shape` with random weights, on the device, in evaluation mode."""
    with use_args(model_arguments(shape, seq_length)):
        return model_provider().to(platform.device()).eval()


def load_model(artifact: Path, seq_length: int) -> GPTModel:
    """The model of a `teacher`, `student` or `distilled-student` artifact, in evaluation mode.

    Args:
        artifact: its folder, already checked with `open_artifact`.
        seq_length: longest sequence that the model will see, tokens.

    Raises:
        UserError: the weights cannot be read.
    """
    model = build_model(ModelShape.load(artifact), seq_length)
    load_weights(model, artifact / WEIGHTS)
    return model


@torch.no_grad()
def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the model predicts after each token.

    Args:
        model: from `load_model`, or wrapped for training.
        tokens: int64 [b, s].

    Returns:
        float32 [b, s, vocabulary], without the columns of the padded vocabulary.
    """
    tokens = tokens.to(platform.device())
    positions = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    with without_multi_token_prediction(unwrap_model(model)):
        logits_bsv = model(tokens, positions, None)
    vocab_size = unwrap_model(model).unpadded_vocab_size
    return logits_bsv[..., :vocab_size].float()


@contextlib.contextmanager
def without_multi_token_prediction(model: GPTModel) -> Iterator[None]:
    """Run the main model alone: its multi-token prediction only serves training, and wants labels.

    Args:
        model: not wrapped; one without multi-token prediction stays as it is.
    """
    before = model.mtp_process, model.config.mtp_num_layers
    model.mtp_process, model.config.mtp_num_layers = False, None
    try:
        yield
    finally:
        model.mtp_process, model.config.mtp_num_layers = before
