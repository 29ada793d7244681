"""Norms alone; their gradients on several ranks are in test_architecture_layouts.py."""

import pytest
import torch
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.megatron.norm import NORMS


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_it_is_torchs_norm_with_a_mark(kind, sequence_parallel):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        normalization=kind,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
    )
    norm = NORMS[kind](config=config, hidden_size=16, eps=1e-3)
    config.sequence_parallel = False
    theirs = WrappedTorchNorm(config=config, hidden_size=16, eps=1e-3)
    assert isinstance(norm, type(theirs))
    with torch.no_grad():
        for ours, other in zip(norm.parameters(), theirs.parameters(), strict=True):
            ours.copy_(other.normal_())
    x = torch.randn(5, 3, 16)
    assert torch.equal(norm(x), theirs(x))
    assert {p.sequence_parallel for p in norm.parameters()} == {sequence_parallel}
