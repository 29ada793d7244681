"""Builds Megatron-Core's `GPTModel` from the run's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from flagscale.errors import UserError
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.layer_specs import layer_spec, mtp_block_spec
from flagscale.megatron.transformer_config import transformer_config
from flagscale.recipe import DistillationRecipe
from flagscale.recipe.combinations import check_combination

if TYPE_CHECKING:
    import megatron.legacy.model

# Far below any logit, so that its probability is 0 in every dtype and at every temperature (1000 at
# most), and finite, so that 0 x it is 0.
_PADDING_LOGIT = -1e6


def build_gpt_model(
    args: Arguments,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    layout: PipelineParallelLayerLayout | None = None,
) -> GPTModel:
    """Build the standard model, or one chunk of it, with random weights.

    The columns of the padded vocabulary are no tokens: their logits are set to probability 0, so
    that losses and teacher agree with the unpadded model.

    Args:
        args: of the run.
        pre_process: the chunk computes the embedding.
        post_process: the chunk computes the output layer and the loss.
        vp_stage: which virtual pipeline stage, with an interleaved pipeline.
        layout: which layers the chunk has; default: Megatron-Core's even distribution.

    Raises:
        UserError: something that this machine or Megatron-Core cannot honour.
    """
    shape, config = args.shape, transformer_config(args, layout)
    spec = layer_spec(args, config, vp_stage)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        rope_scaling=shape.use_rope_scaling,
        rope_scaling_factor=shape.rope_scaling_factor,
        mtp_block_spec=mtp_block_spec(args, config, spec, vp_stage),
        vp_stage=vp_stage,
    )
    model.unpadded_vocab_size = shape.vocab_size
    if args.gradient_accumulation_fusion and not config.gradient_accumulation_fusion:
        for module in model.modules():  # transformer-engine's, which need no Apex
            if hasattr(module, "fuse_wgrad_accumulation"):
                module.fuse_wgrad_accumulation = True
    if post_process:
        mask_padded_vocabulary(model.output_layer, shape.vocab_size)
    return model


def build_legacy_gpt_model(
    args: Arguments, pre_process: bool, post_process: bool
) -> megatron.legacy.model.GPTModel:
    """Build Megatron-LM's legacy model.

    Raises:
        ValueError: the model has an architecture that the legacy one lacks.
        UserError: Megatron-LM is not on the path; the message says how to get it.
    """
    # Also when the recipe is read; arguments may come from elsewhere.
    check_combination(DistillationRecipe(loss="none"), args, args.shape.architecture)
    try:
        from megatron.legacy.model import GPTModel as LegacyGPTModel
    except ImportError as error:
        raise UserError(
            f"use_legacy_models=True needs megatron.legacy ({error}): put a checkout of Megatron-"
            "LM at tag core_v0.16.1 on PYTHONPATH, or set use_legacy_models=False"
        ) from error
    return LegacyGPTModel(
        transformer_config(args),
        num_tokentypes=0,
        parallel_output=True,
        pre_process=pre_process,
        post_process=post_process,
    )


def mask_padded_vocabulary(layer: ColumnParallelLinear, vocab_size: int) -> None:
    """Let an output layer know which of its columns are tokens, and give the others no chance.

    Args:
        layer: this rank's slice of the padded vocabulary.
        vocab_size: tokens.
    """
    width = layer.output_size_per_partition
    start = torch.distributed.get_rank(layer.tp_group) * width
    layer.tokens = min(max(vocab_size - start, 0), width)  # of this rank's slice
    if layer.tokens < width:
        layer.register_forward_hook(mask_padding)


def mask_padding(module: torch.nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
    """Give the padded vocabulary's columns of an output layer's logits probability 0: a hook."""
    logits_sbv, _ = output
    if isinstance(logits_sbv, torch.Tensor):  # else the layer is fused with the loss
        lowest = torch.finfo(logits_sbv.dtype).min
        logits_sbv[..., module.tokens :] = max(_PADDING_LOGIT, lowest)
