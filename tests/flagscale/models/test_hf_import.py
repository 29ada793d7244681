from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from flagscale.megatron.shape import from_hf_config
from flagscale.models.hf_import import import_from_hf
from flagscale.models.parity import check_weights, count_parameters, logit_difference
from flagscale.models.source import load_hf_model

FAMILIES = (
    "llama tied",
    "llama untied, llama3 rope",
    "qwen2 tied",
    "qwen2 untied",
    "qwen3 tied, wide heads",
    "qwen3 untied",
)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(
    make_model: Callable[..., PreTrainedModel], family: str
) -> None:
    hf_model = make_model(family)
    shape = from_hf_config(hf_model.config)
    assert (shape.vocab_size, shape.padded_vocab_size) == (300, 384)
    model = import_from_hf(hf_model, shape, seq_length=128)
    tokens = torch.randint(300, (2, 128), generator=torch.Generator().manual_seed(0))
    parity = logit_difference(model, hf_model, tokens)
    assert parity.max_abs_difference <= 1e-5
    assert parity.top1_agreement == 1
    assert parity.num_tokens == 256
    assert count_parameters(model, shape) == count_parameters(hf_model)
    check_weights(model, "model")


@pytest.mark.usefixtures("runtime")
def test_padding_neither_changes_logits_nor_is_needed(
    make_model: Callable[..., PreTrainedModel],
) -> None:
    hf_model = make_model("llama tied")
    tokens = torch.arange(64)[None]
    for divisor in (1, 256):
        shape = from_hf_config(hf_model.config, make_vocab_size_divisible_by=divisor)
        model = import_from_hf(hf_model, shape, seq_length=64)
        assert model.embedding.word_embeddings.weight.size(0) == {1: 300, 256: 512}[divisor]
        assert logit_difference(model, hf_model, tokens).max_abs_difference <= 1e-5


@pytest.mark.usefixtures("runtime")
def test_weights_stored_in_bfloat16_are_imported_as_they_are(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("qwen3 untied").to(torch.bfloat16).save_pretrained(tmp_path)
    hf_model = load_hf_model(tmp_path)
    model = import_from_hf(hf_model, from_hf_config(hf_model.config), seq_length=64)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tokens = torch.arange(64)[None]
    assert logit_difference(model, hf_model, tokens).max_abs_difference <= 1e-5
