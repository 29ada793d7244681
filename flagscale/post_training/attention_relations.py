"""Attention as something that models of any width and number of heads can be compared by.

MiniLMv2 (arXiv 2012.15828) puts the queries of all heads side by side, splits them into as many
relation heads in both models, and compares how each token's query relates to the others'; likewise
keys and values. `query_key` relates queries to keys: with the model's own number of heads that is
its attention distribution (MiniLM, arXiv 2002.10957; TinyBERT, arXiv 1909.10351). These models are
causal, so a token relates to itself and to what it attends to: what came before it, in its
document.

No attention map is asked of the kernel. Scores are made for some rows at a time, and made again for
the backward pass: memory does not grow with the square of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils.checkpoint import checkpoint

Parts = Mapping[str, torch.Tensor]  # `query`, `key`, `value`: [s, b, channels of all heads]

SCORES = 2**22  # at a time, of one model, in fp32


@dataclass(frozen=True)
class Positions:
    """Which tokens of the sequence a rank has, and which it sees.

    Attributes:
        chunks: first position and length of each run of this rank's rows.
        documents: [s of the whole sequence] number of each token's document; None: all of one.
    """

    chunks: Sequence[tuple[int, int]]
    documents: torch.Tensor | None = None

    def seen(self, first: int, rows: int, device: torch.device) -> torch.Tensor:
        """Bool [rows, first + rows]: which of the tokens up to the last row each row sees."""
        columns = torch.arange(first + rows, device=device)
        mask = columns[first:, None] >= columns
        if self.documents is not None:
            here = self.documents[: first + rows]
            mask = mask & (here[first:, None] == here)
        return mask


def relation_loss(
    student: Parts,
    teacher: Parts,
    relations: Sequence[str],
    heads: int,
    fit: str,
    positions: Positions,
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda halves: halves,
) -> torch.Tensor:
    """How far the student's relations are from the teacher's, token by token.

    Args:
        student: this rank's tokens, with the channels of its heads.
        teacher: likewise.
        relations: `query`, `key`, `value` (each to itself), `query_key`; their mean is taken.
        heads: relation heads that this rank's channels are split into.
        fit: `kl` of the teacher's distribution to the student's, `cosine` of the two (1 - cosine),
            or `mse`: mean squared difference of their scores over the tokens that are seen.
        positions: of this rank's rows.
        whole: gathers the positions of all context-parallel ranks, in order.

    Returns:
        [s, b], float32: the sum over `heads`.
    """
    total: torch.Tensor | float = 0.0
    for relation in relations:
        row, *column = relation.split("_")
        rows = [_in_heads(parts[row], heads) for parts in (student, teacher)]
        sides = (parts[column[0] if column else row] for parts in (student, teacher))
        columns = [_in_heads(whole(side), heads) for side in sides]
        total = total + _one_relation(rows, columns, fit, positions)
    assert isinstance(total, torch.Tensor), "the recipe wants a relation at least"
    return total / len(relations)


def _in_heads(part_sbc: torch.Tensor, heads: int) -> torch.Tensor:
    """[s, b, channels] as [b, heads, s, channels of a head]."""
    return part_sbc.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _one_relation(
    rows: list[torch.Tensor], columns: list[torch.Tensor], fit: str, positions: Positions
) -> torch.Tensor:
    compare = _FITS[fit]

    def some(
        student_row: torch.Tensor,
        student_column: torch.Tensor,
        teacher_row: torch.Tensor,
        teacher_column: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        student = _scores(student_row, student_column)
        with torch.no_grad():
            teacher = _scores(teacher_row, teacher_column)
        return compare(student, teacher, seen).sum(dim=1)  # over heads: [b, rows]

    losses = []
    batch, heads = rows[0].shape[:2]
    for at, first, count in _blocks(positions.chunks, batch * heads):
        here, end = slice(at, at + count), first + count
        operands = [
            tensor
            for row, column in zip(rows, columns, strict=True)
            for tensor in (row[:, :, here], column[:, :, :end])
        ]
        seen = positions.seen(first, count, rows[0].device)
        losses.append(
            checkpoint(some, *operands, seen, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(losses, dim=1).transpose(0, 1)


def _blocks(chunks: Sequence[tuple[int, int]], maps: int) -> Iterator[tuple[int, int, int]]:
    """Where a block of rows begins among the rank's and in the sequence, and how many it has."""
    at = 0
    for first, length in chunks:
        done = 0
        while done < length:
            end = first + length
            count = min(length - done, max(1, SCORES // (maps * end)))
            yield at + done, first + done, count
            done += count
        at += length


def _scores(row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """[b, heads, rows, columns]: scaled products, as attention's."""
    return row.float() @ column.float().transpose(2, 3) * row.size(-1) ** -0.5


def _kl(student: torch.Tensor, teacher: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    log_q, log_p = (F.log_softmax(_only(scores, seen), dim=-1) for scores in (student, teacher))
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _cosine(student: torch.Tensor, teacher: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    q, p = (F.softmax(_only(scores, seen), dim=-1) for scores in (student, teacher))
    return 1 - F.cosine_similarity(q, p, dim=-1)


def _mse(student: torch.Tensor, teacher: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    squares = (student - teacher).square().masked_fill(~seen, 0.0)
    return squares.sum(dim=-1) / seen.sum(dim=-1)


_FITS = {"kl": _kl, "mse": _mse, "cosine": _cosine}


def _only(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Probability 0 elsewhere; finite, for 0 times the difference of two of them is to be 0."""
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min / 2)


def positions_of(
    rows: int, context: torch.distributed.ProcessGroup, packed: PackedSeqParams | None
) -> Positions:
    """Of this rank's rows: all, or two of 2 x CP chunks (see `SDPACoreAttention`)."""
    if context.size() > 1:
        length, rank = rows // 2, context.rank()
        return Positions(
            [(index * length, length) for index in (rank, 2 * context.size() - 1 - rank)]
        )
    if packed is None:
        return Positions([(0, rows)])
    borders = packed.cu_seqlens_q
    places = torch.arange(rows, device=borders.device, dtype=borders.dtype)
    return Positions([(0, rows)], torch.bucketize(places, borders[1:], right=True))
