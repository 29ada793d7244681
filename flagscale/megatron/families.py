"""The families of models that a teacher may be of: one entry each, and what follows from it.

A new family is an entry in `FAMILIES`, if its layers are made of what is there; `docs/models.md`
and the tests of every family are made from this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError
from flagscale.recipe import ArchitectureRecipe, parse_section

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Fields of a configuration that Megatron-Core's model would not honour: what they may be.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
}


@dataclass(frozen=True)
class Family:
    """What transformers' models of one `model_type` have in common.

    Attributes:
        models: some that people know.
        causal_lm: transformers' class.
        qk_layernorm: norm on every query and key head.
        add_qkv_bias: bias on the query, key and value projections.
        has_experts: every layer is a router and experts, in place of one MLP.
        hidden_size_of_whole_heads: transformers refuses another, even where `head_dim` is given.
        further: fields of its configuration, beyond those of all families, that have one supported
            value: what they may be.
    """

    models: str
    causal_lm: str
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    has_experts: bool = False
    hidden_size_of_whole_heads: bool = False
    further: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def expected(self) -> Mapping[str, tuple[Any, ...]]:
        """Fields of a configuration, and what they may be."""
        return {**_PLAIN, **self.further}

    def holds(self, architecture: ArchitectureRecipe) -> bool:
        """Whether a configuration of the family can describe the architecture."""
        return architecture.has_only_experts == self.has_experts and (
            self.has_experts or architecture.is_default
        )


FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2", "LlamaForCausalLM", hidden_size_of_whole_heads=True
    ),
    "mistral": Family("Mistral 7B v0.2, v0.3; Nemo; Small 24B", "MistralForCausalLM"),
    "qwen2": Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", add_qkv_bias=True),
    "qwen3": Family("Qwen3", "Qwen3ForCausalLM", qk_layernorm=True),
    "qwen3_moe": Family(
        "Qwen3-30B-A3B, Qwen3-235B-A22B",
        "Qwen3MoeForCausalLM",
        qk_layernorm=True,
        has_experts=True,
        further={"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    ),
}


def family_of(model_type: str | None, who: str = "teacher") -> Family:
    """The family of a configuration.

    Args:
        model_type: as it names it.
        who: see `flagscale.megatron.shape.from_hf_config`.

    Raises:
        UserError: it is not supported, with those that are.
    """
    if model_type is None or model_type not in FAMILIES:
        raise UserError(
            f"{who}: model_type={model_type!r} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))} (see docs/models.md)"
        )
    return FAMILIES[model_type]


def read_experts(config: PreTrainedConfig, who: str = "teacher") -> ArchitectureRecipe:
    """What a configuration of a family with experts says of them.

    The weight of the balance loss is not taken over: it is a matter of training, and distillation
    has the teacher's routing to learn from.

    Args:
        config: of a model of a family with experts.
        who: see `flagscale.megatron.shape.from_hf_config`.

    Raises:
        UserError: a router that Megatron-Core does not have.
    """
    chosen, is_rescaled = config.num_experts_per_tok, config.norm_topk_prob
    if chosen == 1 and is_rescaled:
        raise UserError(
            f"{config.model_type} {who}: norm_topk_prob=True with num_experts_per_tok=1 is not "
            "supported: every expert's weight would be 1, and the router would not learn"
        )
    values = {
        "num_experts": config.num_experts,
        "moe_router_topk": chosen,
        "moe_ffn_hidden_size": config.moe_intermediate_size,
        # Rescaled to a sum of 1, the chosen experts' shares are a softmax over these alone.
        "moe_router_pre_softmax": not is_rescaled,
    }
    return parse_section(ArchitectureRecipe, values, where=f"{config.model_type} {who}")


def write_experts(
    config: PreTrainedConfig, architecture: ArchitectureRecipe, ffn_hidden_size: int
) -> None:
    """Describe experts in a configuration of a family that has them, in place.

    Args:
        config: of such a family.
        architecture: that it `holds`.
        ffn_hidden_size: the model's, which is an expert's width where none is set.
    """
    config.num_experts = architecture.num_experts
    config.num_experts_per_tok = architecture.moe_router_topk
    config.moe_intermediate_size = architecture.moe_ffn_hidden_size or ffn_hidden_size
    config.norm_topk_prob = not architecture.is_softmax_first
