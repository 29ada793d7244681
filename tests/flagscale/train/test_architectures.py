"""Every architecture against another one: transformers in float64, or a model it must equal."""

from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model, logits
from flagscale.recipe import ArchitectureRecipe
from flagscale.train.train_gpt import model_provider

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
    rotary_base=1e4,
)
COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MLA = {
    "multi_latent_attention": True,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
EXPERTS = {"num_experts": 4, "moe_ffn_hidden_size": 48}
BLOCK = {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 64}}
NO_OP = {"no_op": True}
LINEAR = {"replace_with_linear": True}
TOKENS = torch.arange(2 * 24).reshape(2, 24) * 37 % 128


def blocks(*configs: dict) -> dict:
    return {"heterogeneous_layers_config": {"block_configs": list(configs)}}


def shape_with(architecture: dict, **changes) -> ModelShape:
    if architecture.get("multi_latent_attention"):
        changes["num_query_groups"] = SHAPE.num_attention_heads
    return replace(SHAPE, architecture=ArchitectureRecipe(**architecture), **changes)


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough for every part to matter, norms that are not 1."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.normal_(std=0.2)
    return model


def attention_weights(hf: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    """Queries, keys and values as Megatron-Core keeps them: group by group."""
    query, key, value = (hf[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
    groups = [x.chunk(2) for x in (query, key, value)]
    return {
        "self_attention.linear_qkv.weight": torch.cat([x[g] for g in range(2) for x in groups]),
        "self_attention.linear_proj.weight": hf[f"{layer}.self_attn.o_proj.weight"],
    }


def latent_weights(hf: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    names = {
        "linear_q_down_proj": "q_a_proj",
        "q_layernorm": "q_a_layernorm",
        "linear_q_up_proj": "q_b_proj",
        "linear_kv_down_proj": "kv_a_proj_with_mqa",
        "kv_layernorm": "kv_a_layernorm",
        "linear_kv_up_proj": "kv_b_proj",
        "linear_proj": "o_proj",
    }
    return {
        f"self_attention.{ours}.weight": hf[f"{layer}.self_attn.{theirs}.weight"]
        for ours, theirs in names.items()
    }


def mlp_weights(hf: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    gate, up, down = (hf[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up", "down"))
    return {"mlp.linear_fc1.weight": torch.cat([gate, up]), "mlp.linear_fc2.weight": down}


def expert_weights(hf: dict[str, torch.Tensor], layer: str) -> dict[str, torch.Tensor]:
    weights = {"mlp.router.weight": hf[f"{layer}.mlp.gate.weight"]}
    for ours, theirs in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        for index, weight in enumerate(hf[f"{layer}.mlp.experts.{theirs}"]):
            weights[f"mlp.experts.local_experts.{index}.{ours}.weight"] = weight
    return weights


def copy_weights(model: GPTModel, hf_model: PreTrainedModel, *parts) -> None:
    """Give `model` the weights of a transformers model, every one of them."""
    hf = hf_model.state_dict()
    state = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    for key in ("weight", "bias"):
        if f"model.norm.{key}" in hf:
            state[f"decoder.final_layernorm.{key}"] = hf[f"model.norm.{key}"]
        for index in range(2):
            for ours, theirs in norms.items():
                name = f"model.layers.{index}.{theirs}.{key}"
                if name in hf:
                    state[f"decoder.layers.{index}.{ours}.{key}"] = hf[name]
    for index in range(2):
        layer = f"model.layers.{index}"
        for part in parts:
            for name, weight in part(hf, layer).items():
                state[f"decoder.layers.{index}.{name}"] = weight
        for ours, theirs in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            if f"{layer}.self_attn.{theirs}.weight" in hf:
                weight = hf[f"{layer}.self_attn.{theirs}.weight"]
                state[f"decoder.layers.{index}.self_attention.{ours}.weight"] = weight
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert [name for name in missing if not name.endswith("_extra_state")] == []


def reference_of(hf_model: PreTrainedModel) -> PreTrainedModel:
    return randomise(hf_model).double().eval()


@pytest.mark.parametrize("normalised", [True, False], ids=["top-k of 2", "top-k of 1"])
def test_experts_and_qk_norm_are_those_of_qwen3_moe(runtime, normalised):
    topk = 2 if normalised else 1
    config = Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=topk,
        norm_topk_prob=normalised,
        rms_norm_eps=1e-5,
        experts_implementation="eager",  # the other has no float64
    )
    reference = reference_of(Qwen3MoeForCausalLM(config))
    shape = shape_with(
        {**EXPERTS, "moe_router_topk": topk},
        qk_layernorm=True,
        untie_embeddings_and_output_weights=True,
    )
    model = build_model(shape, 24)
    copy_weights(model, reference, attention_weights, expert_weights)
    expected = reference(TOKENS).logits
    torch.testing.assert_close(logits(model, TOKENS).double(), expected, rtol=0, atol=1e-5)


def test_latent_attention_is_that_of_deepseek_v3(runtime):
    config = DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
        rms_norm_eps=1e-5,
    )
    reference = reference_of(DeepseekV3ForCausalLM(config))
    shape = shape_with(
        {**MLA, "q_lora_rank": 16}, qk_layernorm=True, untie_embeddings_and_output_weights=True
    )
    model = build_model(shape, 24)
    copy_weights(model, reference, latent_weights, mlp_weights)
    # DeepSeek's latents have a norm of their own, with transformers' default epsilon.
    for name, module in reference.named_modules():
        if name.endswith("a_layernorm"):
            module.variance_epsilon = 1e-5
    expected = reference(TOKENS).logits
    torch.testing.assert_close(logits(model, TOKENS).double(), expected, rtol=0, atol=1e-5)


def test_layer_norm_is_that_of_stablelm(runtime):
    config = StableLmConfig(
        **COMMON,
        num_key_value_heads=2,
        layer_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
        },
    )
    reference = reference_of(StableLmForCausalLM(config))
    shape = shape_with({"normalization": "LayerNorm"}, untie_embeddings_and_output_weights=True)
    model = build_model(shape, 24)
    copy_weights(model, reference, attention_weights, mlp_weights)
    expected = reference(TOKENS).logits
    torch.testing.assert_close(logits(model, TOKENS).double(), expected, rtol=0, atol=1e-5)


def test_one_expert_is_a_dense_model(runtime):
    dense = randomise(build_model(SHAPE, 24))
    alone = build_model(shape_with({"num_experts": 1, "moe_router_topk": 1}), 24)
    state = {
        name.replace("mlp.", "mlp.experts.local_experts.0."): value
        for name, value in dense.state_dict().items()
    }
    missing, unexpected = alone.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {name.rsplit(".", 2)[-2] for name in missing} <= {"router", "mlp", "experts"}
    torch.testing.assert_close(logits(alone, TOKENS), logits(dense, TOKENS), rtol=0, atol=1e-6)


def test_some_layers_have_experts(runtime):
    model = build_model(shape_with({**EXPERTS, "moe_layer_freq": 2}), 24)
    assert [hasattr(layer.mlp, "experts") for layer in model.decoder.layers] == [True, False]


def test_equal_blocks_are_a_homogeneous_model(runtime):
    plain = randomise(build_model(SHAPE, 24))
    mixed = build_model(shape_with(blocks(BLOCK, BLOCK)), 24)
    mixed.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits(mixed, TOKENS), logits(plain, TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("part", "weight"),
    [("attention", "self_attention.linear_proj.weight"), ("mlp", "mlp.linear_fc2.weight")],
)
def test_a_block_without_a_part_is_one_whose_part_writes_nothing(runtime, part, weight):
    plain = randomise(build_model(SHAPE, 24))
    plain.state_dict()[f"decoder.layers.1.{weight}"].zero_()
    mixed = build_model(shape_with(blocks(BLOCK, {**BLOCK, part: NO_OP})), 24)
    _, unexpected = mixed.load_state_dict(plain.state_dict(), strict=False)
    assert {name.split(".")[2] for name in unexpected} == {"1"}
    torch.testing.assert_close(logits(mixed, TOKENS), logits(plain, TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("part", "name"), [("attention", "self_attention"), ("mlp", "mlp")], ids=["attention", "mlp"]
)
def test_a_linear_block_is_one_matrix(runtime, part, name):
    model = randomise(build_model(shape_with(blocks({**BLOCK, part: LINEAR}, BLOCK)), 24))
    assert getattr(model.decoder.layers[0], name).weight.shape == (32, 32)
    assert logits(model, TOKENS).isfinite().all()


def test_multi_token_prediction_leaves_the_main_model_as_it_is(runtime):
    plain = randomise(build_model(SHAPE, 24))
    with_mtp = build_model(shape_with({"mtp_num_layers": 2}), 24)
    missing, unexpected = with_mtp.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("mtp.") for name in missing)
    torch.testing.assert_close(logits(with_mtp, TOKENS), logits(plain, TOKENS), rtol=0, atol=0)
    positions, labels = torch.arange(24).expand(2, 24), TOKENS.roll(-1, 1)
    with torch.no_grad():
        losses = [m(TOKENS, positions, None, labels=labels) for m in (with_mtp, plain)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_multi_token_prediction_loss_trains_with_its_weight(runtime):
    """The gradient is that of `lm + scale / depths * mtp`, linear in the scale."""
    gradients = []
    for scale in (0.1, 0.2, 0.3):
        recipe = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": scale}
        model = randomise(build_model(shape_with(recipe), 24)).train()
        positions, labels = torch.arange(24).expand(2, 24), TOKENS.roll(-1, 1)
        model(TOKENS, positions, None, labels=labels).sum().backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    for name, middle in gradients[1].items():
        mean = (gradients[0][name] + gradients[2][name]) / 2
        torch.testing.assert_close(middle, mean, rtol=1e-4, atol=1e-4, msg=name)
        if name.startswith("mtp."):
            torch.testing.assert_close(middle, 2 * gradients[0][name], rtol=1e-4, atol=1e-4)
            assert middle.any(), name
    embedding = "embedding.word_embeddings.weight"
    assert (gradients[2][embedding] - gradients[0][embedding]).abs().max() > 1e-3


ARCHITECTURES = {
    "LayerNorm": {"normalization": "LayerNorm"},
    "experts": EXPERTS,
    "one expert a token": {"num_experts": 2, "moe_router_topk": 1},
    "shared expert, balanced": {
        "num_experts": 2,
        "moe_shared_expert_intermediate_size": 32,
        "moe_aux_loss_coeff": 0.01,
    },
    "latent attention": MLA,
    "latent attention, latent queries": {**MLA, "q_lora_rank": 16},
    "latent attention, experts": {**MLA, **EXPERTS},
    "multi-token prediction, experts": {"mtp_num_layers": 1, "num_experts": 2},
    "multi-token prediction, latent attention": {"mtp_num_layers": 1, **MLA},
    "heterogeneous": blocks(
        {"attention": LINEAR, "mlp": {"ffn_hidden_size": 48}},
        {"attention": {"num_query_groups": 4}, "mlp": LINEAR},
    ),
}


@pytest.mark.parametrize("qk_layernorm", [False, True], ids=["", "QK norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_it_trains(runtime, architecture, qk_layernorm):
    """Every parameter gets a finite gradient, with recomputed layers the same."""
    shape = shape_with(architecture, qk_layernorm=qk_layernorm)
    positions, labels = torch.arange(24).expand(2, 24), TOKENS.roll(-1, 1)
    gradients = []
    for recompute in ("none", "selective", "full"):
        with use_args(Arguments(shape=shape, seq_length=24, recompute_granularity=recompute)):
            model = randomise(model_provider()).train()
            loss = model(TOKENS, positions, None, labels=labels)
        loss.mean().backward()
        assert loss.isfinite().all()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
        for other in gradients[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
