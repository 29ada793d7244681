"""First weights: of which distribution, and that each tensor has its own.

That every layout draws the same ones is shown in steps/test_convert_student_on_ranks.py.
"""

from dataclasses import replace

import pytest
import torch

from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model
from flagscale.models.random_weights import with_random_weights
from flagscale.recipe import ArchitectureRecipe

STD = 0.02  # Megatron-Core's


@pytest.fixture
def drawn(teacher):
    architecture = ArchitectureRecipe(num_experts=4, moe_ffn_hidden_size=32)
    shape = replace(ModelShape.load(teacher), num_layers=2, architecture=architecture)

    def draw(seed: int) -> dict[str, torch.Tensor]:
        with platform.runtime(seed=1):
            model = with_random_weights(lambda: build_model(shape, 64), seed)
        return dict(model.named_parameters())

    return draw


def test_drawn_as_megatron_core_draws(drawn):
    parameters = drawn(5)
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name  # a norm
            continue
        small = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = STD / 2 if small else STD  # for the residual stream: / sqrt(2 x layers)
        assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
        assert abs(parameter.mean().item()) < 5 * expected / parameter.numel() ** 0.5, name


def test_each_tensor_has_its_own(drawn):
    parameters = [p for p in drawn(5).values() if p.dim() == 2]
    seen = {tuple(parameter.flatten()[:8].tolist()) for parameter in parameters}
    assert len(seen) == len(parameters)
    halves = [half for p in parameters for half in p.chunk(2)]
    assert len({tuple(half.flatten()[:8].tolist()) for half in halves}) == len(halves)


def test_seed_decides(drawn):
    first, again, other = drawn(5), drawn(5), drawn(6)
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name])
        assert torch.equal(parameter, other[name]) == (parameter.dim() == 1), name
