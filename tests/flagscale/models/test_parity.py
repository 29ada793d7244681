"""Proofs that a model is transformers': right ones pass in either dtype, mistakes do not."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from transformers import AutoConfig, PreTrainedModel

from flagscale.errors import UserError
from flagscale.megatron.shape import from_hf_config
from flagscale.models.layer_outputs import Outputs, in_transformers, layer_outputs
from flagscale.models.megatron import build_model
from flagscale.models.parity import (
    check_layers,
    check_logits,
    check_weights,
    compare_logits,
    layer_differences,
)

TOKENS = torch.randint(300, (1, 80), generator=torch.Generator().manual_seed(1))
LIMIT, WHERE = 1e-3, "teacher.max_logit_difference"
DTYPES = (torch.float32, torch.bfloat16)


def _swap_gate_and_up(model: GPTModel) -> None:
    weight = model.decoder.layers[1].mlp.linear_fc1.weight
    weight.data = torch.cat(weight.data.chunk(2)[::-1])


def _swap_layers(model: GPTModel) -> None:
    first, second = (dict(model.decoder.layers[i].named_parameters()) for i in (1, 2))
    for name, parameter in first.items():
        parameter.data, second[name].data = second[name].data, parameter.data


def _swap_rows(model: GPTModel, first: int) -> None:
    weight = model.decoder.layers[1].self_attention.linear_qkv.weight.data
    width = model.config.kv_channels
    rows = weight.unflatten(0, (-1, width))
    rows[[first, first + 1]] = rows[[first + 1, first]]


def _swap_query_heads(model: GPTModel) -> None:
    _swap_rows(model, 0)


def _swap_key_and_value(model: GPTModel) -> None:
    _swap_rows(model, 2)  # two query heads come before


def _change_rotary_base(model: GPTModel) -> None:
    model.rotary_pos_emb.inv_freq **= 1.25  # 10,000 becomes 100,000


def _lose_final_norm(model: GPTModel) -> None:
    model.decoder.final_layernorm.weight.data.fill_(1)


def _shift_embedding(model: GPTModel) -> None:
    weight = model.embedding.word_embeddings.weight
    weight.data = weight.data.roll(1, dims=0)


MISTAKES: dict[Callable[[GPTModel], None], str] = {
    _swap_gate_and_up: "layer 1",
    _swap_layers: "layer [12]",
    _swap_query_heads: "layer 1",
    _swap_key_and_value: "layer 1",
    _change_rotary_base: "layer [012]",
    _lose_final_norm: "the output layer",
    _shift_embedding: "the embedding",
}


@pytest.fixture
def folder(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    make_model("qwen3 untied").to(torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def _computing_in(
    dtype: torch.dtype, folder: Path, imported: Callable[[Path], GPTModel]
) -> GPTModel:
    model = build_model(
        from_hf_config(AutoConfig.from_pretrained(folder)), TOKENS.size(1), params_dtype=dtype
    )
    model.load_state_dict(imported(folder).state_dict(), strict=False)
    return model


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_copy_passes_with_margin(
    folder: Path, imported: Callable[[Path], GPTModel], dtype: torch.dtype
) -> None:
    ours = layer_outputs(_computing_in(dtype, folder, imported), TOKENS)
    theirs = in_transformers(folder, TOKENS, ours.hidden_bsh, dtype)
    differences = layer_differences(ours, theirs, dtype)
    if dtype == torch.bfloat16:
        rounding = layer_differences(ours, theirs, dtype, theirs.rounded)
        assert max(rounding) <= 0.015
    assert len(differences) == 5  # the embedding, three layers, the output layer
    assert max(differences) <= {torch.float32: 1e-5, torch.bfloat16: 0.015}[dtype]
    check_layers(differences, dtype, LIMIT, WHERE)
    parity = compare_logits(ours.logits_bsv, theirs.logits_bsv, dtype)
    assert parity.kl_divergence <= {torch.float32: 1e-9, torch.bfloat16: 1e-3}[dtype]
    assert parity.top1_agreement >= {torch.float32: 1, torch.bfloat16: 0.95}[dtype]
    assert parity.num_tokens == 80
    check_logits(parity, LIMIT, WHERE)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_copy_is_refused(
    folder: Path,
    imported: Callable[[Path], GPTModel],
    mistake: Callable[[GPTModel], None],
    dtype: torch.dtype,
) -> None:
    model = _computing_in(dtype, folder, imported)
    mistake(model)
    ours = layer_outputs(model, TOKENS)
    theirs = in_transformers(folder, TOKENS, ours.hidden_bsh)
    differences = layer_differences(ours, theirs, dtype)
    with pytest.raises(UserError, match=rf"{MISTAKES[mistake]} differs from transformers' by"):
        check_layers(differences, dtype, LIMIT, WHERE)
    assert max(differences) >= 0.15  # three times the limit of 16 bits


MASSIVE = [3, 17]


def _few_large_channels(model: PreTrainedModel) -> None:
    """A thousand times as large as the others, and weighed down where a layer reads them."""
    model.model.embed_tokens.weight[:, MASSIVE] *= 1000
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[MASSIVE] *= 1e-3
    model.model.norm.weight[MASSIVE] *= 1e-3


def _large_channels_that_cancel(model: PreTrainedModel) -> None:
    """What is left of them is smaller than their rounding: no layer is exact in 16 bits."""
    first, second = MASSIVE
    model.model.embed_tokens.weight[:, MASSIVE] = torch.tensor([30.0, -11.0])
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[second] = norm.weight[first]
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for part in readers:
            part.weight[:, second] = part.weight[:, first] * 30 / 11


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [_few_large_channels, _large_channels_that_cancel])
def test_massive_activations(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
    make: Callable[[PreTrainedModel], None],
    dtype: torch.dtype,
) -> None:
    hf_model = make_model("qwen3 untied")
    with torch.no_grad():
        make(hf_model)
    hf_model.to(torch.bfloat16).save_pretrained(tmp_path)
    model = _computing_in(dtype, tmp_path, imported)
    ours = layer_outputs(model, TOKENS)
    assert ours.hidden_bsh[1].abs().max() > 300 * ours.hidden_bsh[1].abs().median()
    theirs = in_transformers(tmp_path, TOKENS, ours.hidden_bsh, dtype)
    rounding = layer_differences(ours, theirs, dtype, theirs.rounded) if theirs.rounded else []
    differences = layer_differences(ours, theirs, dtype)
    check_layers(differences, dtype, LIMIT, WHERE, rounding)
    if make is _large_channels_that_cancel and dtype == torch.bfloat16:
        with pytest.raises(UserError, match=r"0\.05: layer"):  # a fixed limit is none
            check_layers(differences, dtype, LIMIT, WHERE)
    check_logits(compare_logits(ours.logits_bsv, theirs.logits_bsv, dtype), LIMIT, WHERE)
    if make is _few_large_channels:  # in whose rounding a mistake used to disappear
        _swap_query_heads(model)
        ours = layer_outputs(model, TOKENS)
        theirs = in_transformers(tmp_path, TOKENS, ours.hidden_bsh, dtype)
        rounding = layer_differences(ours, theirs, dtype, theirs.rounded) if theirs.rounded else []
        with pytest.raises(UserError, match="layer 1 differs from transformers' by 0"):
            check_layers(layer_differences(ours, theirs, dtype), dtype, LIMIT, WHERE, rounding)


@pytest.mark.usefixtures("runtime")
def test_rounding_of_experts(
    make_model: Callable[..., PreTrainedModel],
    imported: Callable[[Path], GPTModel],
    tmp_path: Path,
) -> None:
    make_model("qwen3_moe untied, rescaled shares").to(torch.bfloat16).save_pretrained(tmp_path)
    ours = layer_outputs(_computing_in(torch.bfloat16, tmp_path, imported), TOKENS)
    theirs = in_transformers(tmp_path, TOKENS, ours.hidden_bsh, torch.bfloat16)
    assert max(layer_differences(ours, theirs, torch.bfloat16, theirs.rounded)) < 0.02
    assert max(layer_differences(ours, theirs, torch.bfloat16)) < 0.02


@pytest.mark.parametrize("family", ["llama untied, llama3 rope", "qwen2 tied"])
def test_a_layer_at_a_time_is_the_same_as_the_whole(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path, family: str
) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    whole = model(TOKENS, use_cache=False, output_hidden_states=True)
    hidden = list(whole.hidden_states)[:-1]  # the last one is normed
    last: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, output: last.append(output))
    model(TOKENS, use_cache=False)
    hidden.append(last[0])
    streamed = in_transformers(tmp_path, TOKENS, hidden)
    assert torch.equal(streamed.logits_bsv, whole.logits)
    for ours, theirs in zip([*hidden, whole.logits], streamed.hidden_bsh, strict=True):
        assert torch.equal(ours, theirs)


def test_comparison_of_logits() -> None:
    ours = torch.tensor([[[0.0, 1.5], [2.0, 3.0]]])
    theirs = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])
    parity = compare_logits(ours, theirs)
    assert parity.max_logit_difference == 3.0
    assert parity.mean_logit_difference == 3.5 / 4
    assert parity.top1_agreement == 0.5
    assert parity.num_tokens == 2
    assert parity.logit_spread == pytest.approx((math.sqrt(0.5) + math.sqrt(2)) / 2)
    expected = torch.nn.functional.kl_div(
        ours.double().log_softmax(-1)[0],
        theirs.double().log_softmax(-1)[0],
        log_target=True,
        reduction="batchmean",
    )
    assert parity.kl_divergence == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="shapes"):
        compare_logits(ours, theirs[:, :1])


@pytest.mark.parametrize("difference", [5e-3, float("nan"), float("inf")])
def test_logits_above_the_limit_are_named(difference: float) -> None:
    theirs = torch.randn(1, 9, 50, generator=torch.Generator().manual_seed(0)) * 3
    check_logits(compare_logits(theirs + 2.5e-3, theirs), LIMIT, WHERE)  # the spread is about 3
    ours = theirs.clone()
    ours[0, 4, 7] += difference
    with pytest.raises(UserError, match=r"teacher.max_logit_difference=0.001: .* differ by"):
        check_logits(compare_logits(ours, theirs), LIMIT, WHERE)


@pytest.mark.parametrize("noise", [0.3, float("nan")])
def test_in_16_bits_distributions_are_compared(noise: float) -> None:
    draw = torch.Generator().manual_seed(0)
    theirs = torch.randn(1, 90, 500, generator=draw) * 3
    wrong = torch.randn(theirs.shape, generator=draw)
    rounded = theirs.bfloat16().float()
    check_logits(compare_logits(rounded, theirs, torch.bfloat16), LIMIT, WHERE)
    with pytest.raises(UserError, match=r"KL divergence in torch.bfloat16=0.02: the logits"):
        check_logits(compare_logits(theirs + noise * wrong, theirs, torch.bfloat16), LIMIT, WHERE)


def test_a_layer_that_is_not_a_number() -> None:
    states = torch.ones(1, 4, 8)
    ours = Outputs((states, states * float("nan")), torch.randn(1, 4, 9))
    theirs = Outputs((states, states * 2, ours.logits_bsv), ours.logits_bsv)
    differences = layer_differences(ours, theirs, torch.float32)
    assert differences[0] == 0
    with pytest.raises(UserError, match="layer 0 differs from transformers' by nan"):
        check_layers(differences, torch.float32, LIMIT, WHERE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.down_proj.weight", 0.0, "all zero"),
        ("model.layers.0.self_attn.q_proj.weight", float("nan"), "not finite"),
        ("model.layers.0.self_attn.q_proj.bias", float("inf"), "not finite"),
    ],
)
def test_weights_that_no_trained_model_has_are_refused(
    make_model: Callable[..., PreTrainedModel], name: str, value: float, message: str
) -> None:
    model = make_model("qwen2 untied")
    check_weights(model, "student")
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.bias").zero_()  # a bias may be
        check_weights(model, "student")
        model.get_parameter(name).fill_(value)
    with pytest.raises(UserError, match=f"student: {name} .*{message}"):
        check_weights(model, "student")
