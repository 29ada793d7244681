"""What a pod has to run on: accelerators with their memory and speed, host memory, a price."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """One model of accelerator.

    Attributes:
        memory: bytes that its driver reports.
        flops: operations a second of dense bf16 matrix products, at most; None: not known.
        bandwidth: bytes a second of its memory, at most; None: not known.
    """

    memory: float
    flops: float | None = None
    bandwidth: float | None = None


# Memory: what nvidia-smi reports. Speed and bandwidth: NVIDIA's data sheets, dense bf16, without
# sparsity: https://www.nvidia.com/en-us/data-center/ h100, h200, a100, l40s, l4, a10 (pages "...
# Tensor Core GPU datasheet").
ACCELERATORS = {
    "H200-141GB": Accelerator(143_771 * 2**20, 989e12, 4.8e12),
    "H100-80GB": Accelerator(81_559 * 2**20, 989e12, 3.35e12),
    "H100-PCIe-80GB": Accelerator(81_559 * 2**20, 756e12, 2.0e12),
    "A100-80GB": Accelerator(81_920 * 2**20, 312e12, 2.039e12),
    "A100-40GB": Accelerator(40_960 * 2**20, 312e12, 1.555e12),
    "L40S-48GB": Accelerator(46_068 * 2**20, 362e12, 864e9),
    "A10-24GB": Accelerator(23_028 * 2**20, 125e12, 600e9),
    "L4-24GB": Accelerator(23_034 * 2**20, 121e12, 300e9),
}

# Of an accelerator's memory, what tensors can fill: the rest is CUDA's context, NCCL's buffers,
# kernels' workspaces and what the allocator cannot hand out. An estimate, not a measurement.
USABLE = 0.9
# What a process holds before it has a model: libraries, above all. On a CPU the most that manifests
# of small runs say, 0.6 to 0.9 GB; with CUDA's libraries an estimate.
PROCESS = {"cpu": 0.9e9, "cuda": 4e9}


@dataclass(frozen=True)
class Machine:
    """A pod of one kind of step, or this machine.

    Attributes:
        memory: of the host, bytes; None: not known.
        accelerators: of the pod; 0: it computes on its CPUs.
        accelerator: their model; None: not known.
        pods: that work together.
        price_per_hour: of one pod.
    """

    memory: float | None
    accelerators: int = 0
    accelerator: Accelerator | None = None
    pods: int = 1
    price_per_hour: float | None = None

    @property
    def device(self) -> str:
        """`cuda` or `cpu`: where models live."""
        return "cuda" if self.accelerators else "cpu"

    @property
    def room(self) -> float | None:
        """Bytes of an accelerator that tensors can fill; None where that is not known."""
        return None if self.accelerator is None else USABLE * self.accelerator.memory
