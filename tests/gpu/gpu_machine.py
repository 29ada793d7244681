"""What this machine has for the tests of this folder, and what they skip for."""

import os

import pytest
import torch

from flagscale.megatron import platform
from flagscale.megatron.accelerators import has_transformer_engine

# For whoever writes these tests on a machine without a GPU: what can run on a CPU does.
ON_CPU = os.environ.get("GPU_TESTS_ON_CPU") == "1"


def skip_without_gpus(count: int) -> None:
    """Skip the test if there are fewer."""
    if not ON_CPU and torch.cuda.device_count() < count:
        pytest.skip(f"{count} GPUs are needed, and there are {torch.cuda.device_count()}")


def skip_on_cpu() -> None:
    """Skip what only CUDA can do."""
    if not platform.HAS_GPU:
        pytest.skip("CUDA itself is tested")


def skip_without_transformer_engine() -> None:
    """Skip the test if it is not installed; one that does not import is an error."""
    if not has_transformer_engine():
        pytest.skip("transformer-engine is not installed (NVIDIA's image has it)")


def skip_without_multicast() -> None:
    """Skip what goes through transformer-engine's user buffers."""
    import transformer_engine_torch

    if not transformer_engine_torch.device_supports_multicast():
        pytest.skip("CUDA multicast is needed (NVSwitch)")
