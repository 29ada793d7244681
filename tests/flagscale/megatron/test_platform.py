import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flagscale.errors import UserError
from flagscale.megatron import platform

pytestmark = pytest.mark.skipif(
    platform.HAS_GPU, reason="the adapter is for machines without a GPU"
)


def test_cuda_tensors_land_on_the_cpu():
    with platform.runtime():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.ones(1).cuda().device.type == "cpu"
        assert torch.ones(1).to("cuda").device.type == "cpu"
        assert torch.ones(1).to(device="cuda").device.type == "cpu"
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert not torch.empty(1, pin_memory=True).is_pinned()


def test_everything_is_put_back():
    names = ("current_device", "Stream", "Event", "synchronize", "get_rng_state")
    before = [getattr(torch.cuda, name) for name in names]
    with platform.runtime():
        assert [getattr(torch.cuda, name) for name in names] != before
        assert torch.distributed.is_initialized()
    assert [getattr(torch.cuda, name) for name in names] == before
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert not torch.distributed.is_initialized()


def test_is_put_back_after_an_error_too():
    class BoomError(Exception):
        pass

    with pytest.raises(BoomError), platform.runtime():
        raise BoomError
    assert not torch.distributed.is_initialized()
    with platform.runtime():
        pass


def test_no_groups_threads_are_left():
    def threads():
        tasks = Path("/proc/self/task").iterdir()
        return {task for task in tasks if (task / "comm").read_text().startswith("pt_gloo")}

    before = threads()
    with platform.runtime():
        assert threads() - before
    assert not threads() - before


def test_groups_share_a_device():
    """One thread for what arrives, not one a group: each wakes up 100 times a second."""

    def threads():
        tasks = Path("/proc/self/task").iterdir()
        return sum((task / "comm").read_text() == "gloo_tcp_loop\n" for task in tasks)

    before = threads()
    with platform.runtime():
        assert threads() <= before + 1


def test_seed_decides_the_random_numbers():
    def draw(seed):
        with platform.runtime(seed):
            return torch.rand(3)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_precision_and_implementation_of_a_cpu():
    assert platform.training_dtype("auto") == torch.float32
    assert platform.training_dtype("bf16") == torch.bfloat16
    assert platform.transformer_impl("auto") == "local"
    assert platform.device() == torch.device("cpu")


def test_compiler_still_imports_under_the_adapter():
    """torch._dynamo maps functions to names at import: two patches must not be one object."""
    code = (
        "from flagscale.megatron import platform\n"
        "with platform.runtime():\n"
        "    import torch._dynamo, torch._inductor\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_fp32_is_fp32_inside_and_as_it_was_outside(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    torch.set_float32_matmul_precision("high")
    try:
        with platform.runtime():
            assert not torch.backends.cuda.matmul.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "1"
    finally:
        torch.set_float32_matmul_precision("highest")
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
    with platform.runtime():
        assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "NVIDIA_TF32_OVERRIDE" not in os.environ


def test_what_nvidias_image_sets_is_overridden():
    """torch takes it for its switch's first value, so that this needs a process of its own."""
    code = (
        "import torch\n"
        "from flagscale.megatron import platform\n"
        "print(torch.backends.cuda.matmul.allow_tf32)\n"
        "with platform.runtime():\n"
        "    print(torch.backends.cuda.matmul.allow_tf32)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["True", "False"]


def test_accelerators_that_cannot_be_used_are_not_replaced_by_the_cpu(monkeypatch):
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", "8")
    with pytest.raises(UserError) as error, platform.runtime():
        pytest.fail("it trains on the CPU")
    with pytest.raises((AssertionError, RuntimeError), match=r"\w") as torchs:
        torch.cuda.init()
    assert "FLAGSCALE_ACCELERATOR_COUNT=8: this pod was given so many accelerators" in str(error)
    assert str(torchs.value).rstrip(".") in str(error.value)
    monkeypatch.setenv("FLAGSCALE_ACCELERATOR_COUNT", "0")
    with platform.runtime():
        pass


@pytest.mark.parametrize("inputs", [(5, 64), (3, 4, 64)])
def test_products_of_models_that_are_only_run_are_onednns(inputs):
    """With the rounding of fp32, and nowhere else: training multiplies as torch does."""
    inputs, weight = torch.randn(inputs), torch.randn(96, 64)
    exact = inputs.double() @ weight.double().t()
    expected = inputs @ weight.t()
    with platform.runtime():
        assert torch.equal(torch.matmul(inputs, weight.t()), expected)
        with torch.inference_mode(), torch.profiler.profile() as profile:
            found = torch.matmul(inputs, weight.t())
            for other in (weight.t().contiguous(), weight.t()[:, :7], weight.t()[:, 0]):
                torch.testing.assert_close(torch.matmul(inputs, other), inputs @ other)
            half = torch.matmul(inputs.bfloat16(), weight.t().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    names = [event.key for event in profile.key_averages()]
    assert "mkldnn::_linear_pointwise" in names
