"""Section `student.architecture`: what a student from scratch has beyond its teacher's family."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from flagscale.recipe.section import PositiveInt, Section


class ArchitectureRecipe(Section):
    """Megatron's model arguments that no Llama or Qwen configuration holds."""

    spec: str | None = Field(None, description="Layer spec of your own: 'module:name'")
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    num_experts: PositiveInt | None = Field(None, description="Experts a layer (MoE)")
    moe_router_topk: PositiveInt = Field(2, description="Experts a token")
    moe_ffn_hidden_size: PositiveInt | None = Field(
        None, description="Width of an expert; default: ffn_hidden_size"
    )
    moe_shared_expert_intermediate_size: PositiveInt | None = Field(
        None, description="Width of the expert that every token takes; default: none"
    )
    moe_layer_freq: PositiveInt = Field(1, description="Every so many layers have experts")
    moe_grouped_gemm: bool = Field(False, description="All experts in one kernel; GPU only")
    moe_aux_loss_coeff: float = Field(0.0, ge=0, description="Weight of the load-balancing loss")
    multi_latent_attention: bool = Field(False, description="DeepSeek's MLA")
    q_lora_rank: PositiveInt | None = Field(None, description="MLA: rank of the queries")
    kv_lora_rank: PositiveInt = Field(32, description="MLA: rank of keys and values")
    qk_head_dim: PositiveInt = Field(128, description="MLA: channels without positions")
    qk_pos_emb_head_dim: PositiveInt = Field(64, description="MLA: channels with positions")
    v_head_dim: PositiveInt = Field(128, description="MLA: channels of a value head")
    mtp_num_layers: PositiveInt | None = Field(
        None, description="Multi-token prediction: depths; distillation.loss=none only"
    )
    mtp_loss_scaling_factor: float = Field(0.1, gt=0, description="Weight of the MTP losses")
    heterogeneous_layers_config: dict[str, Any] | None = Field(
        None, description="A block configuration a layer, as Megatron-Core's heterogeneous specs"
    )
