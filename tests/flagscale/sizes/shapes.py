"""Models that sizes are measured on: small, but of several megabytes."""

from dataclasses import replace

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ArchitectureRecipe

TEACHER = ModelShape(
    model_type="llama",
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=768,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=32,
    vocab_size=8192,
    padded_vocab_size=8192,
    max_position_embeddings=2048,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
STUDENT = replace(TEACHER, num_layers=4)
EXPERTS = ArchitectureRecipe(
    num_experts=4, moe_ffn_hidden_size=256, moe_shared_expert_intermediate_size=128
)
LATENT = ArchitectureRecipe(multi_latent_attention=True)
