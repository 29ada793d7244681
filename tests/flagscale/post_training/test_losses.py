import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from flagscale.post_training.losses import HiddenStateCosineLoss, MSELoss


@pytest.mark.parametrize("distance", [0.3, 0.02])
@pytest.mark.parametrize("kind", [HiddenStateCosineLoss, MSELoss])
def test_intermediate_losses_of_bf16_states_equal_float64(kind, distance):
    # A student close to its teacher: in bf16 the cosine's loss would be 15 times wrong.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 2, 64, generator=generator).bfloat16()
    noise = torch.randn(16, 2, 64, generator=generator)
    student = (teacher + distance * noise).bfloat16().requires_grad_()
    exact = student.detach().double().requires_grad_()
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    loss = kind(config, projection_layer=torch.nn.Identity())
    found, tp_reduce, is_sequence_parallel = loss((student, None), (teacher, None))
    expected = _in_float64(kind, exact, teacher.double()).transpose(0, 1)
    found.sum().backward()
    expected.sum().backward()
    assert (tp_reduce, is_sequence_parallel) == (False, False)
    # fp32's 1 - cosine is rounded at 1e-7; gradients are rounded once more, to the states' bf16.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2**-8


def _in_float64(kind, student, teacher):
    if kind is MSELoss:
        return (student - teacher).square().mean(-1)
    return 1 - F.cosine_similarity(student, teacher, dim=-1)
