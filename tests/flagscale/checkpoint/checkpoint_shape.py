"""The smallest model that the tests of checkpoints save."""

from flagscale.megatron.shape import ModelShape

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    padded_vocab_size=128,
    max_position_embeddings=64,
    norm_epsilon=1e-5,
    rotary_base=10000.0,
)
