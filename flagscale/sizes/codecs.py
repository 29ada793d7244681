"""Bytes of what is kept of a teacher, by codec."""

from __future__ import annotations

from flagscale.megatron.shape import ModelShape
from flagscale.recipe import TeacherOutputsRecipe

_DIFFERENT = 0.25  # of the draws of a token: 12 of 50 in arXiv 2503.16870
_ENTRY = 28  # bytes a sample in the index of records


def bytes_per_token(
    outputs: TeacherOutputsRecipe, teacher: ModelShape, dtype_bytes: int, seq_length: int
) -> float:
    """Of what is kept; of `sampled` about, for it depends on how sure the teacher is.

    Args:
        outputs: the recipe's section.
        teacher: its shape.
        dtype_bytes: of a number that the teacher computes with.
        seq_length: of a sample.
    """
    token_bits = (teacher.vocab_size - 1).bit_length()
    if outputs.codec == "hidden":
        size = {"auto": dtype_bytes, "bf16": 2, "fp32": 4}[outputs.dtype]
        record = float(size * teacher.hidden_size)
    elif outputs.codec == "sampled":
        count_bits = outputs.draws.bit_length()
        different = max(1.0, _DIFFERENT * outputs.draws)
        record = 4 + (count_bits + different * (token_bits + count_bits)) / 8
    else:
        record = 8 + min(outputs.top_k, teacher.vocab_size) * (2 + token_bits / 8)
    return record + _ENTRY / seq_length
