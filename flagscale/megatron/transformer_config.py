"""Megatron-Core's `TransformerConfig` from the run's arguments."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from flagscale.errors import UserError
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.fp8 import check_fp8
from flagscale.megatron.layout import check_layout
from flagscale.recipe import ArchitectureRecipe


def transformer_config(
    args: Arguments, layout: PipelineParallelLayerLayout | None = None
) -> TransformerConfig:
    """Megatron-Core's configuration for the arguments, of the class that the architecture needs.

    Args:
        args: of the run.
        layout: which layers each pipeline rank has; default: Megatron-Core's even distribution.

    Raises:
        UserError: something that this machine or Megatron-Core cannot honour.
    """
    chunks = 2 if args.use_dualpipev else args.parallelism.virtual_pipeline_model_parallel_size or 1
    trains = not args.forward_only
    check_layout(args.shape, args.parallelism, args.seq_length, chunks, trains=trains)
    check_fp8(args)
    architecture = args.shape.architecture
    values = (
        _model(args)
        | _parallelism(args)
        | _numerics(args)
        | _recompute(args)
        | _experts(args, architecture)
    )
    values["pipeline_model_parallel_layout"] = layout
    values["perform_initialization"] = args.perform_initialization
    if architecture.mtp_num_layers is not None:
        values["mtp_num_layers"] = architecture.mtp_num_layers
        values["mtp_loss_scaling_factor"] = architecture.mtp_loss_scaling_factor
    if architecture.multi_latent_attention:
        return MLATransformerConfig(**values, **_latent_attention(args, architecture))
    if architecture.heterogeneous_layers_config is not None:
        if architecture.has_linear_block and args.parallelism.sequence_parallel:
            raise UserError(
                "replace_with_linear in architecture.heterogeneous_layers_config with "
                "sequence_parallel=true: Megatron-Core computes it without only; set it to false"
            )
        return HeterogeneousTransformerConfig(
            **values,
            heterogeneous_layers_config_encoded_json=_blocks(
                architecture.heterogeneous_layers_config
            ),
        )
    return TransformerConfig(**values)


def _model(args: Arguments) -> dict[str, Any]:
    shape = args.shape
    return {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.kv_channels,
        "normalization": shape.architecture.normalization,
        "layernorm_epsilon": shape.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": shape.add_qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _parallelism(args: Arguments) -> dict[str, Any]:
    sizes = args.parallelism
    values: dict[str, Any] = {
        "tensor_model_parallel_size": sizes.tensor_model_parallel_size,
        "sequence_parallel": sizes.sequence_parallel,
        "pipeline_model_parallel_size": sizes.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline_model_parallel_size,
        "context_parallel_size": sizes.context_parallel_size,
        "expert_model_parallel_size": sizes.expert_model_parallel_size,
        "expert_tensor_parallel_size": 1,
        "pipeline_dtype": args.params_dtype,
        "tp_comm_overlap": args.tp_comm_overlap,
    }
    if sizes.virtual_pipeline_model_parallel_size is not None:
        # The batched exchange mixes up chunks where two ranks are each other's both neighbours.
        values |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return values


def _numerics(args: Arguments) -> dict[str, Any]:
    values: dict[str, Any] = {
        "bf16": args.params_dtype == torch.bfloat16,
        "params_dtype": args.params_dtype,
        # Losses are sums: the gradient is divided once, by the tokens of the whole global batch.
        "calculate_per_token_loss": True,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        # Without Apex, Megatron-Core's own layers cannot; see `gpt_builder`.
        "gradient_accumulation_fusion": args.gradient_accumulation_fusion
        and platform.has_gradient_accumulation(),
        "apply_rope_fusion": args.apply_rope_fusion,
        "bias_activation_fusion": args.bias_activation_fusion,
        "bias_dropout_fusion": args.bias_dropout_fusion,
        "cross_entropy_loss_fusion": args.cross_entropy_loss_fusion,
        "cross_entropy_fusion_impl": "te",
    }
    if args.fp8 != "none":
        values |= {"fp8": args.fp8, "fp8_recipe": args.fp8_recipe}
    return values


def _recompute(args: Arguments) -> dict[str, Any]:
    if args.recompute_granularity == "selective":
        modules = args.recompute_modules
        return {
            "recompute_granularity": "selective",
            "recompute_modules": None if modules is None else list(modules),
        }
    if args.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    return {}


def _experts(args: Arguments, architecture: ArchitectureRecipe) -> dict[str, Any]:
    experts, sizes = architecture.num_experts, args.parallelism
    expert_ranks = sizes.expert_model_parallel_size
    if experts is None:
        if expert_ranks > 1 or args.overlap_moe_expert_parallel_comm:
            raise UserError(
                f"expert_model_parallel_size={expert_ranks}, overlap_moe_expert_parallel_comm="
                f"{args.overlap_moe_expert_parallel_comm}: the model has no experts "
                "(architecture.num_experts); leave them out"
            )
        return {}
    if architecture.moe_grouped_gemm and not _has_transformer_engine(args):
        raise UserError(
            "architecture.moe_grouped_gemm=true needs training.transformer_impl="
            f"transformer_engine on a GPU, but it is {args.transformer_impl} on {platform.device()}"
        )
    balanced = architecture.moe_aux_loss_coeff > 0
    return {
        "num_moe_experts": experts,
        "moe_router_topk": architecture.moe_router_topk,
        "moe_router_pre_softmax": architecture.is_softmax_first,
        "moe_router_dtype": "fp32",
        "moe_ffn_hidden_size": architecture.moe_ffn_hidden_size or args.shape.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": architecture.moe_shared_expert_intermediate_size,
        "moe_layer_freq": architecture.moe_layer_freq,
        "moe_grouped_gemm": architecture.moe_grouped_gemm,
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        # Megatron-Core weighs a rank's share of this loss by the rank's tokens alone, and divides
        # by those of all ranks: on tensor and context ranks it would be as much too small.
        "moe_aux_loss_coeff": architecture.moe_aux_loss_coeff
        * sizes.tensor_model_parallel_size
        * sizes.context_parallel_size,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_moe_expert_parallel_comm": args.overlap_moe_expert_parallel_comm,
    }


def _latent_attention(args: Arguments, architecture: ArchitectureRecipe) -> dict[str, Any]:
    shape, sizes = args.shape, args.parallelism
    if shape.use_rope_scaling or shape.add_qkv_bias:
        raise UserError(
            f"architecture.multi_latent_attention=true with use_rope_scaling="
            f"{shape.use_rope_scaling}, add_qkv_bias={shape.add_qkv_bias}: it has neither"
        )
    whole = args.transformer_impl == "transformer_engine" and sizes.sequence_parallel
    if sizes.tensor_model_parallel_size > 1 and not whole:
        # Megatron-Core's plain layers split the projection that makes the one key with positions;
        # its gradient then holds one rank's heads only.
        raise UserError(
            "architecture.multi_latent_attention=true with tensor_model_parallel_size="
            f"{sizes.tensor_model_parallel_size}, transformer_impl={args.transformer_impl}, "
            f"sequence_parallel={sizes.sequence_parallel}: gradients are whole only with "
            "transformer_impl=transformer_engine and sequence_parallel=true; or take "
            "tensor_model_parallel_size=1"
        )
    return {
        "q_lora_rank": architecture.q_lora_rank,
        "kv_lora_rank": architecture.kv_lora_rank,
        "qk_head_dim": architecture.qk_head_dim,
        "qk_pos_emb_head_dim": architecture.qk_pos_emb_head_dim,
        "v_head_dim": architecture.v_head_dim,
        "rope_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_scaling_factor": 1.0,  # no change of the softmax's scale
    }


def _blocks(heterogeneous_layers_config: dict[str, Any]) -> str:
    """The block configurations as Megatron-Core reads them, each with its size, if only None."""
    blocks = [
        {
            "attention": {"num_query_groups": None, **block["attention"]},
            "mlp": {"ffn_hidden_size": None, **block["mlp"]},
        }
        for block in heterogeneous_layers_config["block_configs"]
    ]
    return json.dumps({"block_configs": blocks})


def _has_transformer_engine(args: Arguments) -> bool:
    return args.transformer_impl == "transformer_engine" and platform.HAS_GPU
