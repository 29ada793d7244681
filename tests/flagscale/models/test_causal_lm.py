"""Models in two halves: the same logits, and with a key-value cache the same tokens."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from flagscale.evaluation.generation.generate import continuations
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import CausalLM
from flagscale.models.megatron import build_model, logits
from flagscale.recipe import ArchitectureRecipe

SHAPE = ModelShape(
    model_type="llama",
    num_layers=3,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=300,
    padded_vocab_size=384,
    max_position_embeddings=256,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
MLA = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
BLOCKS = [
    {"attention": {"replace_with_linear": True}, "mlp": {"ffn_hidden_size": 48}},
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True}},
    {"attention": {"no_op": True}, "mlp": {"ffn_hidden_size": 64}},
]
SHAPES = {
    "llama": {},
    "whole vocabulary": {"padded_vocab_size": 300},
    "untied": {"untie_embeddings_and_output_weights": True},
    "every head its own keys": {"num_query_groups": 4},
    "qwen3": {"model_type": "qwen3", "qk_layernorm": True, "kv_channels": 16},
    "qwen2": {"model_type": "qwen2", "add_qkv_bias": True},
    "llama3 rope": {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
    "experts": {"architecture": ArchitectureRecipe(num_experts=4)},
    "latent attention": {"architecture": ArchitectureRecipe(**MLA), "num_query_groups": 4},
    "latent attention and queries, experts": {
        "architecture": ArchitectureRecipe(**MLA, q_lora_rank=16, num_experts=2),
        "num_query_groups": 4,
        "qk_layernorm": True,
    },
    "multi-token prediction": {"architecture": ArchitectureRecipe(mtp_num_layers=1)},
    "heterogeneous": {
        "architecture": ArchitectureRecipe(heterogeneous_layers_config={"block_configs": BLOCKS})
    },
}
PROMPTS = [
    torch.randint(0, 300, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 5, 2, 40, 6, 5, 7, 44, 3, 9)
]


def random_model(**changes: object) -> torch.nn.Module:
    """Weights large enough for tokens to depend on all that was before."""
    torch.manual_seed(7)
    model = build_model(replace(SHAPE, **changes), 96)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_halves_make_the_whole(runtime: None, changes: dict) -> None:
    model = random_model(**changes)
    halves = CausalLM(model, can_cache=True)
    tokens = torch.tensor([PROMPTS[3], PROMPTS[7][:40]])
    with torch.no_grad():
        found = halves.output_layer(halves.hidden_states(tokens).flatten(0, 1))
    expected = logits(model, tokens).flatten(0, 1)
    torch.testing.assert_close(found[:, :300], expected)
    assert (found[:, 300:] < -9000).all()
    assert model.post_process


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_a_cache_changes_no_token(runtime: None, changes: dict) -> None:
    model = random_model(**changes)
    found, expected = (
        continuations(CausalLM(model, can_cache=cache), PROMPTS, 12, stop_ids=(), max_length=96)
        for cache in (True, False)
    )
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) == len(
        {tuple(prompt) for prompt in PROMPTS}
    )  # they depend on the prompt
    assert max(token for tokens in found for token in tokens) < 300


def test_a_token_behind_a_cache_runs_alone(runtime: None) -> None:
    model = random_model()
    lengths = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["hidden_states"].size(0)),
        with_kwargs=True,
    )
    continuations(CausalLM(model, can_cache=True), [PROMPTS[3]], 6, stop_ids=(), max_length=96)
    assert lengths == [40, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("untied", [False, True])
def test_an_output_layer_outlives_its_model(runtime: None, untied: bool) -> None:
    model = random_model(untie_embeddings_and_output_weights=untied)
    halves = CausalLM(model, can_cache=True)
    continuations(halves, PROMPTS[:2], 3, stop_ids=(), max_length=96)
    layer = halves.output_layer
    with torch.no_grad():
        hidden_nh = halves.hidden_states(torch.tensor([PROMPTS[3]]))[0]
        expected = layer(hidden_nh)
        gone = weakref.ref(model.decoder)
        del model, halves
        gc.collect()
        assert gone() is None
        assert torch.equal(layer(hidden_nh), expected)
