"""What was measured of a model's generation; `generation_speed` measures it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Speed:
    """Of one model.

    Attributes:
        engine: that ran it: `transformers`, `megatron` or `vllm`, and how where that matters.
        device: `cpu` or `cuda`.
        dtype: that it computed in.
        prompt_tokens: tokens that were read at once.
        new_tokens: tokens that were written then, one after the other.
        prefill_tokens_per_second: read.
        decode_tokens_per_second: written.
        peak_memory: bytes: what torch had allocated of an accelerator, else the most resident
            memory of the process; None where the engine takes what there is.
    """

    engine: str
    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory: int | None
