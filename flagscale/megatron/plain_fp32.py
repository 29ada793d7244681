"""fp32 is fp32: no TensorFloat-32, which keeps 10 of 23 bits of the factors of matrix products.

Three switches turn it on. torch's own for cuBLAS is off by default, but NVIDIA's images turn it on
with `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`: torch reads that once, as the switch's first value, so
that setting the switch overrides it. torch's own for cuDNN is on. transformer-engine asks cuBLAS
for TF32 whatever torch says; only NVIDIA's libraries' own `NVIDIA_TF32_OVERRIDE=0` keeps it off.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LIBRARIES_VARIABLE = "NVIDIA_TF32_OVERRIDE"


@contextmanager
def plain_fp32() -> Iterator[None]:
    """Let matrix products of fp32 tensors be fp32 inside; afterwards all is as it was.

    NVIDIA's libraries read their variable when they start: enter before the first work on a GPU.
    """
    cublas = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    libraries = os.environ.get(LIBRARIES_VARIABLE)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    os.environ[LIBRARIES_VARIABLE] = "0"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(cublas)
        torch.backends.cudnn.allow_tf32 = cudnn
        if libraries is None:
            os.environ.pop(LIBRARIES_VARIABLE, None)
        else:
            os.environ[LIBRARIES_VARIABLE] = libraries
