"""How far kept outputs are from the teacher that they are of, on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from flagscale.models.answers import Answers, Pass
from flagscale.models.causal_lm import OutputLayer
from flagscale.teacher_outputs import Codec, Hidden, SparseTargets
from flagscale.teacher_outputs.bias import BiasMeter

SAMPLES = 4
_POSITIONS = 256  # of each; every position needs the whole vocabulary in float64
# There is no student yet, and there may be several: the teacher itself, less sure, stands in.
_FLATTER = 2.0
STUDENT = "the teacher at twice the temperature"


@torch.no_grad()
def measured_bias(
    teacher: Answers,
    codec: Codec,
    split: str,
    todo: Sequence[Pass],
    batches: Iterator[dict[str, torch.Tensor]] | None,
    vocab_size: int,
) -> dict[str, float]:
    """Encode some samples, decode them, and compare. All ranks call it, and get the figures.

    Args:
        teacher: that answers.
        codec: that its answers are kept in.
        split: of the samples.
        todo: of them; the same for every copy of the teacher.
        batches: see `Answers.of`.
        vocab_size: without padding.

    Returns:
        What `BiasMeter` says, of forward KL at the codec's temperature, or else at 1.
    """
    meter = BiasMeter(codec.temperature or 1.0)
    layer, added = teacher.output_layer, False
    for one, hidden_bsh in teacher.of(todo, batches):
        if hidden_bsh is None or layer is None:
            continue
        new_bsh = hidden_bsh[: one.new]
        decoded = codec.decode(teacher.encoded(codec, split, one, hidden_bsh))
        for row in range(one.new):
            teacher_1nv = _whole(layer, new_bsh[row, :_POSITIONS], vocab_size)
            if isinstance(decoded, Hidden):
                read = decoded.hidden_bsh[row, :_POSITIONS].to(new_bsh)
                meter.add(_whole(layer, read, vocab_size), teacher_1nv, teacher_1nv / _FLATTER)
            else:
                meter.add(_row(decoded, row), teacher_1nv, teacher_1nv / _FLATTER)
        added = True
    told: list[dict[str, float] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, meter.result() if added else None)
    return next(figures for figures in told if figures is not None)


def _whole(layer: OutputLayer, hidden_nh: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits float32 [1, n, vocabulary]."""
    whole_nv = gather_from_tensor_model_parallel_region(layer(hidden_nh))
    return whole_nv[None, :, :vocab_size].float()


def _row(targets: SparseTargets, row: int) -> SparseTargets:
    """The first positions of one sample, [1, n, ...]."""
    at = (slice(row, row + 1), slice(_POSITIONS))
    return replace(
        targets,
        tokens_bsk=targets.tokens_bsk[at],
        shares_bsk=targets.shares_bsk[at],
        tail_bs=None if targets.tail_bs is None else targets.tail_bs[at],
        entropy_bs=targets.entropy_bs[at],
    )
