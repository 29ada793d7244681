import pytest
import torch
import torch.nn.functional as F

from flagscale.post_training.hidden_states import FITS


@pytest.mark.parametrize("distance", [0.3, 0.02])
@pytest.mark.parametrize("fit", FITS)
def test_fits_of_bf16_states_equal_float64(fit, distance):
    # A student close to its teacher: in bf16 the cosine's loss would be 15 times wrong.
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(16, 2, 64, generator=generator).bfloat16()
    noise = torch.randn(16, 2, 64, generator=generator)
    student = (teacher + distance * noise).bfloat16().requires_grad_()
    exact = student.detach().double().requires_grad_()
    found = FITS[fit](student, teacher)
    expected = _in_float64(fit, exact, teacher.double())
    found.sum().backward()
    expected.sum().backward()
    # fp32's 1 - cosine is rounded at 1e-7; gradients are rounded once more, to the states' bf16.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-7)
    error = (student.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2**-8


def _in_float64(fit, student, teacher):
    if fit == "mse":
        return (student - teacher).square().mean(-1)
    return 1 - F.cosine_similarity(student, teacher, dim=-1)
