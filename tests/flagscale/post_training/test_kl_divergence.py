import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.post_training.kl_divergence import forward_kl


def reference(student, teacher, temperature):
    """Float64, straight from the definition."""
    log_p = F.log_softmax(teacher.double() / temperature, dim=-1)
    log_q = F.log_softmax(student.double() / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def logits(shape, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * scale


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(2, 300),
    scale=st.floats(0.01, 20),
    temperature=st.floats(0.25, 8),
    seed=st.integers(0, 2**30),
)
def test_value_and_gradient_equal_float64(rows, vocabulary, scale, temperature, seed):
    teacher = logits((rows, vocabulary), scale, seed)
    student = logits((rows, vocabulary), scale, seed + 1).requires_grad_()
    exact_student = student.detach().double().requires_grad_()
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(seed))

    loss = forward_kl(student, teacher, temperature)
    exact = reference(exact_student, teacher, temperature)
    (loss * weights).sum().backward()
    (exact * weights.double()).sum().backward()

    size = exact.abs().max().item() + temperature**2
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=2e-6 * size)
    torch.testing.assert_close(
        student.grad.double(), exact_student.grad, rtol=1e-4, atol=1e-6 * max(temperature, 1)
    )


def test_relative_accuracy_on_a_real_vocabulary():
    teacher, student = logits((64, 49152), 3, 0), logits((64, 49152), 3, 1)
    exact = reference(student, teacher, 2.0)
    torch.testing.assert_close(forward_kl(student, teacher, 2.0).double(), exact, rtol=1e-5, atol=0)


def test_equal_logits_give_exactly_zero():
    same = logits((8, 1000), 10, 0)
    student = same.clone().requires_grad_()
    loss = forward_kl(student, same, 1.5)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert student.grad.abs().max() == 0


def test_small_divergence_keeps_its_precision():
    teacher = logits((16, 5000), 3, 0)
    student = teacher + logits((16, 5000), 0.01, 1)
    exact = reference(student, teacher, 1.0)
    assert exact.max() < 1e-4
    torch.testing.assert_close(forward_kl(student, teacher).double(), exact, rtol=2e-3, atol=1e-8)


def test_padding_logits_change_nothing():
    teacher, student = logits((4, 100), 3, 0), logits((4, 100), 3, 1)
    padding = torch.full((4, 28), -1e4)
    padded = forward_kl(torch.cat([student, padding], -1), torch.cat([teacher, padding], -1))
    torch.testing.assert_close(padded, forward_kl(student, teacher), rtol=1e-6, atol=0)


def test_bf16_gradient():
    teacher, student = (
        logits((8, 500), 3, 0).bfloat16(),
        logits((8, 500), 3, 1).bfloat16().requires_grad_(),
    )
    exact_student = student.detach().double().requires_grad_()
    forward_kl(student, teacher).sum().backward()
    reference(exact_student, teacher, 1.0).sum().backward()
    assert student.grad.dtype == torch.bfloat16
    error = (student.grad.double() - exact_student.grad).norm() / exact_student.grad.norm()
    assert error < 2**-8


def test_second_backward_raises_instead_of_lying():
    weight = torch.randn(10, 50, requires_grad=True)
    student = torch.randn(4, 10) @ weight
    loss = forward_kl(student, torch.randn(4, 50)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="temperature=0"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), 0)


MEMORY = """
import resource, torch
from flagscale.post_training.kl_divergence import forward_kl
student = torch.randn(1024, 49152).requires_grad_()
teacher = torch.randn(1024, 49152)
forward_kl(student[:8], teacher[:8]).sum().backward(); student.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scratch = student * 1.0
forward_kl(scratch, teacher).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_no_vocabulary_sized_buffer_is_held():
    """`scratch` and the leaf's own gradient are 192 MiB each; the loss may add a few chunks."""
    result = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True
    )
    assert float(result.stdout) < 192 + 192 + 60
