"""Model artifacts as Megatron-Core models that compute logits, on any layout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.utils import unwrap_model

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import sizes_for
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe
from flagscale.train.train_gpt import model_provider

WEIGHTS = "weights"


def build_model(
    shape: ModelShape,
    seq_length: int,
    parallelism: ParallelismRecipe | None = None,
    params_dtype: torch.dtype = torch.float32,
    quantizers: Path | None = None,
    *,
    perform_initialization: bool = True,
) -> GPTModel:
    """This rank's part of a model with random weights, on the device, in evaluation mode.

    Args:
        shape: of the model.
        seq_length: longest sequence that it will see, tokens.
        parallelism: that the runtime was started with; default: 1 each. A model without experts is
            whole on the ranks that share another's.
        params_dtype: of its weights.
        quantizers: the artifact that has them, of a quantised model.
        perform_initialization: False: weights are not even random, for who reads all of them.

    Raises:
        UserError: the model cannot be divided so.
    """
    sizes = sizes_for(shape, parallelism or ParallelismRecipe())
    args = model_arguments(shape, seq_length, parallelism=sizes, params_dtype=params_dtype)
    args = replace(
        args,
        export_quant_load=quantizers,
        forward_only=True,
        perform_initialization=perform_initialization,
    )
    with use_args(args):
        model = model_provider(
            pre_process=is_pipeline_first_stage(), post_process=is_pipeline_last_stage()
        )
    return model.to(platform.device()).eval()


def load_model(
    artifact: Path,
    seq_length: int,
    parallelism: ParallelismRecipe | None = None,
    params_dtype: torch.dtype = torch.float32,
) -> GPTModel:
    """This rank's part of the model of a `teacher`, `student` or `distilled-student` artifact.

    Args:
        artifact: its folder, already checked with `open_artifact`.
        seq_length: see `build_model`.
        parallelism: see there.
        params_dtype: that the weights are turned into.

    Raises:
        UserError: the weights cannot be read, or the model cannot be divided so.
    """
    shape = ModelShape.load(artifact)
    model = build_model(
        shape,
        seq_length,
        parallelism,
        params_dtype,
        quantizers=artifact,
        perform_initialization=False,  # a second for each 130M of them on a CPU
    )
    load_weights(model, artifact / WEIGHTS)
    return model


@torch.no_grad()
def forward(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor | None:
    """What the model predicts after each token, as its last stage computes it. All ranks call it.

    Args:
        model: from `build_model`, or wrapped for training.
        tokens: int64 [b, s], the same on every rank.

    Returns:
        On ranks of the last pipeline stage [b, s, padded vocabulary / TP] in the model's dtype:
        this rank's slice of the vocabulary; None on the others.
    """
    with without_multi_token_prediction(unwrap_model(model)):
        return _last_stage(model, tokens)


@torch.no_grad()
def hidden_states(
    model: GPTModel, tokens: torch.Tensor, cache: StaticInferenceContext | None = None
) -> torch.Tensor | None:
    """What the model's output layer is given. All ranks call it.

    Args:
        model: see `forward`.
        tokens: see there.
        cache: keys and values of the tokens before these, of which it holds `sequence_len_offset`;
            it takes up those of these too.

    Returns:
        On ranks of the last pipeline stage [s, b, h], the same on all of them, in the model's
        dtype; None on the others.
    """
    unwrapped = unwrap_model(model)
    # A stage that does not compute the output layer returns what goes into it.
    before, unwrapped.post_process = unwrapped.post_process, False
    try:
        with without_multi_token_prediction(unwrapped):
            states_sbh = _last_stage(model, tokens, cache)
    finally:
        unwrapped.post_process = before
    if states_sbh is not None and unwrapped.config.sequence_parallel:
        states_sbh = gather_from_sequence_parallel_region(states_sbh)
    return states_sbh


def _last_stage(
    model: GPTModel, tokens: torch.Tensor, cache: StaticInferenceContext | None = None
) -> torch.Tensor | None:
    """What the model's last stage returns, there; None on other stages."""
    tokens = tokens.to(platform.device())
    start = 0 if cache is None else cache.sequence_len_offset
    positions = torch.arange(start, start + tokens.size(1), device=tokens.device)
    # Megatron-Core refuses a cache without gathered logits; nothing is gathered of hidden states.
    named: dict[str, Any] = (
        {} if cache is None else {"inference_context": cache, "runtime_gather_output": True}
    )

    def step(_batches: Any, chunk: GPTModel) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:  # noqa: ANN401
        output = chunk(tokens, positions.expand_as(tokens), None, **named)
        return output, lambda output, non_loss_data=False: output

    outputs = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[None],
        model=[model],
        num_microbatches=1,
        seq_length=tokens.size(1),
        micro_batch_size=tokens.size(0),
        decoder_seq_length=tokens.size(1),
        forward_only=True,
        collect_non_loss_data=True,
    )
    output: torch.Tensor | None = outputs[0] if is_pipeline_last_stage() else None
    return output


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """What the model predicts after each token, whole and on every rank: for a few tokens.

    Args:
        model: see `forward`.
        tokens: see there.

    Returns:
        float32 [b, s, vocabulary], without the columns of the padded vocabulary.
    """
    part_bsv = forward(model, tokens)
    unwrapped = unwrap_model(model)
    vocab_size = unwrapped.unpadded_vocab_size
    if part_bsv is not None:
        whole_bsv = gather_from_tensor_model_parallel_region(part_bsv)
        logits_bsv = whole_bsv[..., :vocab_size].float()
    else:
        logits_bsv = torch.empty(*tokens.shape, vocab_size, device=platform.device())
    return from_last_stage(logits_bsv)


def from_last_stage(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the last pipeline stage has it. All ranks call it, with one shape and dtype."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        tensor = tensor.contiguous()
        torch.distributed.broadcast(
            tensor,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return tensor


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
