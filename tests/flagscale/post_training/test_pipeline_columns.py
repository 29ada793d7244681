import pytest
import torch

from flagscale.post_training.pipeline_columns import from_columns, to_columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_and_its_gradient_travel_without_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    loss = (torch.randn(16, 2, generator=generator).exp() * 1e-3).requires_grad_()
    gradient = torch.randn(16, 2, generator=generator)
    sent = to_columns(loss, dtype)
    assert sent.dtype == dtype
    received = sent.detach().requires_grad_()  # another process' tensor
    found = from_columns(received)
    assert torch.equal(found, loss)
    found.backward(gradient)
    assert received.grad.dtype == dtype
    sent.backward(received.grad)
    assert torch.equal(loss.grad, gradient)
