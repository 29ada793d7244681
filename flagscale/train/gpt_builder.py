"""Builds Megatron-Core's `GPTModel` from the run's arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.errors import UserError
from flagscale.train.arguments import Arguments
from flagscale.train.attention import SDPACoreAttention

if TYPE_CHECKING:
    import megatron.legacy.model

# Far below any logit, so that its probability is 0 in every dtype, and finite, so that 0 x it is 0.
_PADDING_LOGIT = -1e4


def build_gpt_model(
    args: Arguments,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
) -> GPTModel:
    """Build the standard model, with random weights.

    The columns of the padded vocabulary are no tokens: their logits are set to probability 0, so
    that losses and teacher agree with the unpadded model.
    """
    shape = args.shape
    model = GPTModel(
        config=transformer_config(args),
        transformer_layer_spec=layer_spec(args),
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=args.seq_length,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,
        rope_scaling=shape.use_rope_scaling,
        rope_scaling_factor=shape.rope_scaling_factor,
        vp_stage=vp_stage,
    )
    model.unpadded_vocab_size = shape.vocab_size
    if post_process and shape.padded_vocab_size > shape.vocab_size:
        _mask_padded_vocabulary(model, shape.vocab_size)
    return model


def transformer_config(args: Arguments) -> TransformerConfig:
    """Megatron-Core's configuration for the arguments."""
    shape = args.shape
    recompute: dict[str, Any] = {}
    if args.recompute_granularity == "selective":
        recompute = {"recompute_granularity": "selective"}
    if args.recompute_granularity == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=args.params_dtype == torch.bfloat16,
        params_dtype=args.params_dtype,
        pipeline_dtype=args.params_dtype,
        # Losses are sums: the gradient is divided once, by the tokens of the whole global batch.
        calculate_per_token_loss=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **recompute,
    )


def layer_spec(args: Arguments) -> ModuleSpec:
    """The transformer layer: transformer-engine's, or Megatron-Core's own with torch's SDPA."""
    qk_layernorm = args.shape.qk_layernorm
    if args.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return spec


def build_legacy_gpt_model(
    args: Arguments, pre_process: bool, post_process: bool
) -> megatron.legacy.model.GPTModel:
    """Build Megatron-LM's legacy model.

    Raises:
        UserError: Megatron-LM is not on the path; the message says how to get it.
    """
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


def _mask_padded_vocabulary(model: GPTModel, vocab_size: int) -> None:
    layer = model.output_layer
    start = torch.distributed.get_rank(layer.tp_group) * layer.output_size_per_partition
    first = max(vocab_size - start, 0)
    if first >= layer.output_size_per_partition:
        return

    def mask(module: torch.nn.Module, inputs: Any, output: Any) -> None:  # noqa: ANN401
        logits_sbv, _ = output
        logits_sbv[..., first:] = _PADDING_LOGIT

    layer.register_forward_hook(mask)
