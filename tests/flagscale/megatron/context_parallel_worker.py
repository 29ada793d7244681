"""One rank of context parallelism: `torchrun ... FOLDER`, see `test_attention.py`.

Leaves FOLDER/<rank>.pt: its halves' results, with and without a mask.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from test_attention import (
    VALUE_CHANNELS,
    document_mask,
    halves,
    inputs,
    make_attention,
    packed_params,
    with_gradients,
)

from flagscale.megatron import platform
from flagscale.recipe import ParallelismRecipe


def main() -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with platform.runtime(parallelism=ParallelismRecipe(context_parallel_size=size)):
        groups = ProcessGroupCollection.use_mpu_process_groups(["cp"])
        attention = make_attention({"context_parallel_size": size}, pg_collection=groups)
        whole = inputs(24, value_channels=VALUE_CHANNELS)
        *tensors, gradient = (halves(x, rank, size) for x in whole)
        mask = halves(document_mask(24, 10), rank, size, dim=2)
        found = {
            name: with_gradients(lambda *x, m=given: attention(*x, m), tensors, gradient)
            for name, given in (("causal", None), ("masked", mask))
        }
        packed = packed_params([24 // size])
        with pytest.raises(ValueError, match=f"packed sequences with context_parallel_size={size}"):
            attention(*tensors, None, packed_seq_params=packed)
        with pytest.raises(ValueError, match="must be this rank's and all positions"):
            attention(*tensors, document_mask(24, 10))
    torch.save(found, Path(sys.argv[1], f"{rank}.pt"))


if __name__ == "__main__":
    main()
