"""Quantised layers compute what their format says; what they know is the same in every model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flagscale.checkpoint import save_weights
from flagscale.checkpoint.weights import sharded_model
from flagscale.errors import UserError
from flagscale.megatron.shape import QUANTIZERS, ModelShape
from flagscale.models.megatron import build_model, forward, load_model, logits

SHAPE = ModelShape(
    model_type="llama",
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=500,
    padded_vocab_size=512,
    max_position_embeddings=64,
    norm_epsilon=1e-6,
    rotary_base=1e4,
)
TOKENS = torch.arange(64).view(2, 32) * 7 % 500


def quantized(name, stored=torch.float32):
    from flagscale.post_training.quantization import calibrate

    torch.manual_seed(0)
    model = build_model(SHAPE, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))
    calibrate(model, name, lambda one: forward(one, TOKENS), stored)
    return model


def e4m3(x):
    """float64 rounded to FP8 (OCP 8-bit floating point, E4M3), ties to even, no infinity."""
    values = [m / 8 * 2.0**-6 for m in range(8)]
    values += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    values = np.array(values[:-1])  # the last is NaN
    size = np.minimum(np.abs(x), 448.0)
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    down, up = size - values[below], values[above] - size
    even = np.where(above % 2 == 0, above, below)
    chosen = np.where(down < up, below, np.where(up < down, above, even))
    return np.sign(x) * values[chosen]


def fake(x, amax):
    return e4m3(x * (448.0 / amax)) * (amax / 448.0)


def test_fp8_layers_compute_what_float64_does(runtime):
    from flagscale.post_training.quantization import quantized_linears

    model, seen = quantized("fp8"), {}
    linears = quantized_linears(model)
    assert len(linears) == 2 * 4  # not the output layer
    for name, linear in linears.items():
        linear.register_forward_hook(
            # Copied: a residual is added in place.
            lambda _module, inputs, output, name=name: seen.update(
                {name: (inputs[0].clone(), output[0].clone())}
            )
        )
    forward(model, TOKENS)
    for name, linear in linears.items():
        inputs, output = (tensor.double().numpy() for tensor in seen[name])
        weight = linear.weight.detach().double().numpy()
        rounded = fake(weight, linear.weight_quantizer.amax.item())
        expected = fake(inputs, linear.input_quantizer.amax.item()) @ rounded.T
        assert np.abs(output - expected).max() < 1e-5 * np.abs(expected).max()
        assert np.abs(rounded - weight).max() > 0
        assert linear.weight_quantizer.amax >= np.abs(weight).max()


@pytest.mark.parametrize("name", ["fp8", "int8", "int8_sq", "int4_awq", "int4_awq_64"])
def test_what_is_known_is_saved_and_loaded(runtime, tmp_path, name):
    from flagscale.post_training.quantizers import save_quantizers

    plain = sharded_model(build_model(SHAPE, 32))
    model = quantized(name, torch.bfloat16)
    own = sharded_model(model)
    # A quantised model's checkpoint is a plain one.
    assert {key: one.key for key, one in own.items()} == {k: one.key for k, one in plain.items()}
    expected = logits(model, TOKENS)
    replace(SHAPE, quantization=name).save(tmp_path)
    save_weights(model, tmp_path / "weights", torch.bfloat16)
    save_quantizers(model, name, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, 32), TOKENS), expected)
    # In bfloat16 too its quantisers know the same numbers.
    narrow = load_model(tmp_path, 32, params_dtype=torch.bfloat16)
    difference = (logits(narrow, TOKENS) - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()


def test_a_file_of_another_model_is_refused(runtime, tmp_path):
    from flagscale.post_training.quantizers import save_quantizers

    model = quantized("int8")
    save_weights(model, tmp_path / "weights")
    save_quantizers(model, "int8", tmp_path)
    for changes, says in (
        ({"quantization": "int8_sq"}, "lacks .*pre_quant_scale"),
        ({"quantization": "int8", "num_layers": 3}, r"lacks decoder\.layers\.2"),
        ({"quantization": "int8", "ffn_hidden_size": 128}, r"linear_fc1.*has the shape \(512, 1\)"),
    ):
        replace(SHAPE, **changes).save(tmp_path)
        with pytest.raises(UserError, match=says):
            load_model(tmp_path, 32)
    (tmp_path / QUANTIZERS).unlink()
    with pytest.raises(UserError, match=f"{QUANTIZERS}: cannot be read"):
        load_model(tmp_path, 32)


def test_after_a_failure_nothing_more_is_quantised(runtime, monkeypatch):
    from flagscale.post_training import quantization

    monkeypatch.setattr(quantization, "_failed", [])

    def fail(model):
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        quantization.calibrate(build_model(SHAPE, 32), "int8", fail)
    with pytest.raises(RuntimeError, match=r"earlier quantisation .*ValueError: out of luck"):
        quantized("fp8")
