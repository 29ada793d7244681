"""Section `student.architecture`: what a model has beyond layers of attention and one MLP each.

A student from scratch gets it from its recipe; a teacher with experts, and what is pruned from it,
has it too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from flagscale.recipe.section import NonNegative, Scale, Section, Width

_MOE = (
    "moe_router_topk",
    "moe_router_pre_softmax",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "moe_grouped_gemm",
    "moe_aux_loss_coeff",
)
# Training and kernels aside, what a Hugging Face configuration of experts says.
_EXPERTS = {"num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size"}
_NOT_OF_THE_MODEL = {"moe_grouped_gemm", "moe_aux_loss_coeff"}
_SPEC = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
_SIZE: TypeAdapter[Any] = TypeAdapter(Width | None)
_SWITCH: TypeAdapter[Any] = TypeAdapter(bool)
_MLA = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


class ArchitectureRecipe(Section):
    """Megatron's model arguments that a plain Llama or Qwen lacks."""

    spec: Annotated[str, Field(max_length=1000, pattern=_SPEC)] | None = Field(
        None,
        description="Layer spec of your own: 'module:name' of a Megatron-Core ModuleSpec, or of a "
        "function that makes one of the TransformerConfig",
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    qk_layernorm: bool | None = Field(
        None, description="Norm on queries and keys (MLA: on the latents); default: the teacher's"
    )
    num_experts: Width | None = Field(None, description="Experts a layer (MoE)")
    moe_router_topk: Width = Field(2, description="Experts a token")
    moe_router_pre_softmax: bool | None = Field(
        None,
        description="Weigh the chosen experts by a softmax over all, not over the chosen; default: "
        "with one expert a token only",
    )
    moe_ffn_hidden_size: Width | None = Field(
        None, description="Width of an expert; default: ffn_hidden_size"
    )
    moe_shared_expert_intermediate_size: Width | None = Field(
        None, description="Width of the expert that every token takes; default: none"
    )
    moe_layer_freq: Width = Field(
        1, description="Layers 1, 1 + this, ... have experts, the others one MLP"
    )
    moe_grouped_gemm: bool = Field(False, description="All experts in one kernel; GPU only")
    moe_aux_loss_coeff: NonNegative = Field(
        0.0, le=1e6, description="Weight of the load-balancing loss"
    )
    multi_latent_attention: bool = Field(False, description="DeepSeek's MLA")
    q_lora_rank: Width | None = Field(None, description="MLA: rank of the queries; default: whole")
    kv_lora_rank: Width = Field(32, description="MLA: rank of keys and values")
    qk_head_dim: Width = Field(128, description="MLA: channels without positions")
    qk_pos_emb_head_dim: Width = Field(64, description="MLA: channels with positions; even")
    v_head_dim: Width = Field(128, description="MLA: channels of a value head")
    mtp_num_layers: Width | None = Field(
        None, description="Multi-token prediction: depths; distillation.loss=none only"
    )
    mtp_loss_scaling_factor: Scale = Field(0.1, description="Weight of the MTP losses")
    heterogeneous_layers_config: dict[str, Any] | None = Field(
        None,
        description="{block_configs: [{attention: ..., mlp: ...}, one a layer]}, as in Megatron-"
        "Core's HeterogeneousTransformerConfig",
    )

    @model_validator(mode="after")
    def _check(self) -> ArchitectureRecipe:
        if self.num_experts is None:
            self._check_unused(_MOE, "num_experts")
        elif self.moe_router_topk > self.num_experts:
            raise ValueError(
                f"moe_router_topk={self.moe_router_topk} is above num_experts={self.num_experts}"
            )
        elif self.moe_router_topk == 1 and self.moe_router_pre_softmax is False:
            raise ValueError(
                "moe_router_pre_softmax=false with moe_router_topk=1: a softmax over one expert is "
                "always 1, and the router would not learn; leave it out"
            )
        if not self.multi_latent_attention:
            self._check_unused(_MLA, "multi_latent_attention: true")
        if self.qk_pos_emb_head_dim % 2:
            raise ValueError(
                f"qk_pos_emb_head_dim={self.qk_pos_emb_head_dim}: must be even, rotary embeddings "
                "turn pairs of channels"
            )
        if self.mtp_num_layers is None:
            self._check_unused(("mtp_loss_scaling_factor",), "mtp_num_layers")
        if self.heterogeneous_layers_config is not None:
            self._check_heterogeneous(self.heterogeneous_layers_config)
        return self

    @field_validator("heterogeneous_layers_config", mode="before")
    @classmethod
    def _whole_numbers(cls, value: Any) -> Any:  # noqa: ANN401 - whatever YAML held
        """KFP hands whole numbers inside a mapping over as floats."""
        if isinstance(value, dict):
            return {key: cls._whole_numbers(item) for key, item in value.items()}
        if isinstance(value, list):
            return [cls._whole_numbers(item) for item in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    def _check_unused(self, names: tuple[str, ...], needed: str) -> None:
        """Refuse an option that would do nothing."""
        for name in names:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}={getattr(self, name)} has no effect without {needed}")

    def _check_heterogeneous(self, config: dict[str, Any]) -> None:
        for name in ("spec", "num_experts", "multi_latent_attention", "mtp_num_layers"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)} with heterogeneous_layers_config: Megatron-"
                    "Core's heterogeneous layers are plain attention and MLP; choose one of the two"
                )
        blocks = config.get("block_configs")
        if set(config) != {"block_configs"} or not isinstance(blocks, list) or not blocks:
            held = ", ".join(map(repr, config)) or "nothing"
            raise ValueError(
                "heterogeneous_layers_config: must hold block_configs alone, a list of "
                f"{{attention, mlp}}, one a layer, and holds {held}"
            )
        for number, block in enumerate(blocks, start=1):
            _check_block(number, block)

    @property
    def has_linear_block(self) -> bool:
        """Whether a layer's attention or MLP is one matrix."""
        blocks = (self.heterogeneous_layers_config or {}).get("block_configs", [])
        return any(part.get("replace_with_linear") for block in blocks for part in block.values())

    @property
    def is_softmax_first(self) -> bool:
        """Whether the chosen experts are weighed by a softmax over all of them."""
        if self.moe_router_pre_softmax is None:
            return self.moe_router_topk == 1
        return self.moe_router_pre_softmax

    @property
    def is_default(self) -> bool:
        """Whether nothing here is set: layers of attention and one MLP each."""
        return self == type(self)()

    @property
    def has_only_experts(self) -> bool:
        """Whether every layer is attention and experts, and nothing else is set."""
        changed = self.model_dump(exclude_defaults=True).keys()
        return self.num_experts is not None and changed <= _EXPERTS | _NOT_OF_THE_MODEL


def _check_block(number: int, block: Any) -> None:  # noqa: ANN401 - whatever YAML held
    where = f"heterogeneous_layers_config, layer {number}"
    known = {"attention": "num_query_groups", "mlp": "ffn_hidden_size"}
    if not isinstance(block, dict) or set(block) != set(known):
        raise ValueError(f"{where}: must be {{attention: ..., mlp: ...}}, and is {block!r}")
    for name, size in known.items():
        allowed = {"no_op", "replace_with_linear", size}
        part = block[name]
        if not isinstance(part, dict) or not set(part) <= allowed:
            raise ValueError(
                f"{where}: {name}={part!r}: must be a mapping of {', '.join(sorted(allowed))}"
            )
        chosen = [key for key in allowed if part.get(key)]
        if len(chosen) != 1:
            raise ValueError(
                f"{where}: {name}={part!r}: must say exactly one of no_op: true, "
                f"replace_with_linear: true, {size}: N"
            )
        for key, value in part.items():
            try:
                (_SIZE if key == size else _SWITCH).validate_python(value)
            except ValidationError as error:
                raise ValueError(
                    f"{where}: {name}.{key}={value!r}: {error.errors()[0]['msg']}"
                ) from None
