"""Rows of a teacher's logits as probabilities that come out the same on every layout.

Sums over the vocabulary are taken in blocks of 128 tokens, which is what Megatron pads a rank's
slice to a multiple of, and the blocks' sums of all ranks are put side by side before they are
added: so each number is made by the same operations, however many ranks share the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flagscale.errors import UserError

BLOCK = 128
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}  # of one fp32 buffer: 16 MiB, 128 MiB
_NOTHING = -200.0  # exp of it is 0 in float32


@dataclass(frozen=True)
class Rows:
    """Some positions of one sample.

    Attributes:
        at: which positions.
        logits_nv: float32 [n, V], this rank's slice, divided by the temperature; -inf where there
            is no token.
        weights_nbc: float32 [n, B, 128], this rank's probabilities but for the normaliser.
        sums_nb: float64 [n, R * B], of every rank's blocks.
        log_z_n: float64 [n], what to take from `logits_nv` to have log probabilities.
        entropy_n: float64 [n], nats.
    """

    at: slice
    logits_nv: torch.Tensor
    weights_nbc: torch.Tensor
    sums_nb: torch.Tensor
    log_z_n: torch.Tensor
    entropy_n: torch.Tensor


def rows_of(
    logits_sv: torch.Tensor,
    temperature: float,
    vocab_size: int,
    group: dist.ProcessGroup | None,
    elements: int = 0,
) -> Iterator[Rows]:
    """The positions of a sample, as many at once as a buffer takes.

    Args:
        logits_sv: [s, V], V this rank's slice of the vocabulary.
        temperature: divides them.
        vocab_size: of all slices, without padding.
        group: the ranks that share the vocabulary; all of them take part in each step.
        elements: that a position takes of the caller's own buffers.

    Raises:
        UserError: a logit is NaN or infinite.
    """
    positions, width = logits_sv.shape
    tokens = min(max(vocab_size - rank_of(group) * width, 0), width)
    size = max(_CHUNK_ELEMENTS[logits_sv.device.type] // max(width, elements), 1)
    for start in range(0, positions, size):
        at = slice(start, min(start + size, positions))
        yield _rows(at, logits_sv[at].float() / temperature, tokens, group)


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This rank's place among those that share the vocabulary."""
    return 0 if group is None else dist.get_rank(group)


def side_by_side(part_nx: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's part, [n, R * x], in the order of ranks."""
    if group is None or group.size() == 1:
        return part_nx
    parts = [torch.empty_like(part_nx) for _ in range(group.size())]
    dist.all_gather(parts, part_nx.contiguous(), group=group)
    return torch.cat(parts, 1)


def _rows(at: slice, logits_nv: torch.Tensor, tokens: int, group: dist.ProcessGroup | None) -> Rows:
    logits_nv[:, tokens:] = -torch.inf
    largest_n = side_by_side(logits_nv.amax(-1, keepdim=True), group).amax(-1)
    shifted_nv = (logits_nv - largest_n[:, None]).clamp_(min=_NOTHING)
    shifted_nbc = blocks(shifted_nv, _NOTHING)
    weights_nbc = shifted_nbc.exp()
    own = torch.stack([weights_nbc.sum(-1), (weights_nbc * shifted_nbc).sum(-1)], -1)
    sums_nb2 = side_by_side(own.double().flatten(1), group).unflatten(1, (-1, 2))
    sums_nb, total_n2 = sums_nb2[..., 0], sums_nb2.sum(1)
    log_total_n = total_n2[:, 0].log()
    if not log_total_n.isfinite().all():
        raise UserError("the teacher's logits are not finite; which params_dtype did it run in?")
    return Rows(
        at,
        logits_nv,
        weights_nbc,
        sums_nb,
        largest_n.double() + log_total_n,
        log_total_n - total_n2[:, 1] / total_n2[:, 0],
    )


def blocks(values_nv: torch.Tensor, filler: float) -> torch.Tensor:
    """[n, B, 128], the last block filled up."""
    missing = -values_nv.size(1) % BLOCK
    padded = (
        torch.nn.functional.pad(values_nv, (0, missing), value=filler) if missing else values_nv
    )
    return padded.unflatten(1, (-1, BLOCK))
