"""Last hidden states: with the teacher's output layer they replay every logit.

So every divergence, temperature and k can be had of them. In float32 a replay differs from the live
teacher by nothing that is stored; in bfloat16 by the rounding of each value to 8 bits, which is no
rounding at all where the teacher ran in bfloat16. verl does the same for rollouts (its #6194).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flagscale.errors import UserError
from flagscale.teacher_outputs.values import Codec, Hidden

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class HiddenCodec(Codec):
    """A record is [s, h], little-endian, and nothing else."""

    temperature = None

    def __init__(self, seq_length: int, hidden_size: int, dtype: str) -> None:
        """Keep the shape.

        Args:
            seq_length: tokens of a sample.
            hidden_size: of the teacher.
            dtype: `bf16` or `fp32`.

        Raises:
            ValueError: there is no such dtype.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        self._shape, self._dtype = (seq_length, hidden_size), dtype

    @property
    def options(self) -> dict[str, Any]:
        """See `Codec.options`."""
        return {"name": "hidden", "dtype": self._dtype, "hidden_size": self._shape[1]}

    def encode(
        self,
        answers_bsx: torch.Tensor,
        split: str,
        samples: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> list[bytes]:
        """See `Codec.encode`: of whole hidden states, which are no slice of a vocabulary."""
        if answers_bsx.shape != (len(samples), *self._shape):
            raise ValueError(
                f"hidden states are {tuple(answers_bsx.shape)}, {len(samples)} samples have "
                f"{(len(samples), *self._shape)}"
            )
        stored = answers_bsx.detach().to(DTYPES[self._dtype]).cpu().contiguous()
        if not stored.isfinite().all():
            raise UserError(
                f"the teacher's hidden states for {split} samples {list(samples)} are not finite; "
                "which params_dtype did it run in?"
            )
        return [row_sh.view(torch.uint8).numpy().tobytes() for row_sh in stored]

    def decode(self, records: Sequence[bytes]) -> Hidden:
        """See `Codec.decode`."""
        hidden_bsh = torch.empty(len(records), *self._shape, dtype=DTYPES[self._dtype])
        for row_sh, record in zip(hidden_bsh, records, strict=True):
            place = row_sh.view(torch.uint8).numpy().reshape(-1)
            if len(record) != place.size:
                raise ValueError(f"{len(record)} bytes, hidden states have {place.size}")
            place[:] = np.frombuffer(record, np.uint8)
        return Hidden(hidden_bsh)
