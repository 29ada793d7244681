"""The k likeliest tokens and the mass of the tail: the usual cache, and a biased one.

The tail is kept as one number, as by the "ghost token" of Anshumann et al., "Sparse logit sampling"
(2025), arXiv 2503.16870; how the teacher spreads it over the other tokens is lost, and with it that
part of the KL and of its gradient (`bias.measure` says how much).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flagscale.teacher_outputs.bits import pack, packed_bytes, unpack, width_of
from flagscale.teacher_outputs.probabilities import (
    BLOCK,
    Rows,
    blocks,
    rank_of,
    rows_of,
    side_by_side,
)
from flagscale.teacher_outputs.values import Codec, SparseTargets, check_logits

_PLACE_BITS = 31
_LAST = 2**_PLACE_BITS - 1
_LEAST = float(np.finfo(np.float16).min)


class TopKCodec(Codec):
    """A record: log probabilities float16 [s, k], tails and entropies float32 [s], tokens [s, k].

    Tokens take as many bits as they need, see `bits`, and come with the likeliest first; among
    equals the first token, so that a record is the same on every layout. On decoding the k shares
    are scaled to sum to 1 less the tail: float16 changes a share of exp(-x) by x parts in 2,000.
    """

    def __init__(self, seq_length: int, vocab_size: int, temperature: float, top_k: int) -> None:
        """Keep the options.

        Args:
            seq_length: tokens of a sample.
            vocab_size: without padding.
            temperature: divides the logits.
            top_k: tokens that are kept; beyond the vocabulary, all of it.

        Raises:
            ValueError: one is out of bounds.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: must be at least 1")
        self.temperature: float = temperature
        self._seq_length, self._vocab_size, self._top_k = seq_length, vocab_size, top_k
        self._k = min(top_k, vocab_size)

    @property
    def options(self) -> dict[str, Any]:
        """See `Codec.options`."""
        return {"name": "topk", "temperature": self.temperature, "top_k": self._top_k}

    def encode(
        self,
        answers_bsx: torch.Tensor,
        split: str,
        samples: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> list[bytes]:
        """See `Codec.encode`."""
        check_logits(answers_bsx, len(samples), self._seq_length, self._vocab_size, group)
        return [self._encode(logits_sv, group) for logits_sv in answers_bsx.detach()]

    def decode(self, records: Sequence[bytes]) -> SparseTargets:
        """See `Codec.decode`; tokens in the order of their shares."""
        parts = [self._decode(record) for record in records]
        tokens_bsk, shares_bsk, tail_bs, entropy_bs = (
            torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True)
        )
        scale_bs = (1 - tail_bs.double()) / shares_bsk.sum(-1, dtype=torch.float64)
        shares_bsk = (shares_bsk * scale_bs[..., None]).float()
        return SparseTargets(tokens_bsk, shares_bsk, tail_bs, entropy_bs)

    def _encode(self, logits_sv: torch.Tensor, group: dist.ProcessGroup | None) -> bytes:
        found = []
        for rows in rows_of(logits_sv, self.temperature, self._vocab_size, group):
            tokens_nk, log_p_nk = _likeliest(rows, self._k, group)
            tail_n = (1 - log_p_nk.exp().sum(-1)).clamp_(min=0)
            if self._k == self._vocab_size:
                tail_n.zero_()
            found.append([x.cpu() for x in (tokens_nk, log_p_nk, tail_n, rows.entropy_n)])
        tokens_sk, log_p_sk, *of_rows = (
            torch.cat(part).numpy() for part in zip(*found, strict=True)
        )
        return b"".join(
            [
                log_p_sk.clip(_LEAST).astype("<f2").tobytes(),
                *(x_s.astype("<f4").tobytes() for x_s in of_rows),
                pack(tokens_sk, width_of(self._vocab_size)),
            ]
        )

    def _decode(self, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        s, k, width = self._seq_length, self._k, width_of(self._vocab_size)
        size = 2 * s * k
        if len(record) != size + 8 * s + packed_bytes(s * k, width):
            raise ValueError(f"{len(record)} bytes: are no record of {self.options}")
        log_p_sk = np.frombuffer(record[:size], "<f2").reshape(s, k)
        tail_s, entropy_s = np.frombuffer(record[size : size + 8 * s], "<f4").reshape(2, s)
        tokens_sk = unpack(memoryview(record)[size + 8 * s :], s * k, width).reshape(s, k)
        return tokens_sk, np.exp(log_p_sk, dtype=np.float32), tail_s, entropy_s


def _likeliest(
    rows: Rows, k: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k likeliest tokens, int64 [n, k], in order, and their log probabilities, float64.

    Logits and tokens are put into one integer each: no two are equal, and bf16 has many that are.
    All of them stand in k of the blocks whose largest logits are largest, which one pass finds: k
    tokens there come before every other.
    """
    blocks_nbc = blocks(rows.logits_nv, -torch.inf)
    n, count, _ = blocks_nbc.shape
    at_b = torch.arange(count, device=blocks_nbc.device)
    largest_nb = _keys(blocks_nbc.amax(-1), at_b)
    at_nj = _LAST - (largest_nb.topk(min(k, count), sorted=False).values & _LAST)
    tokens_njc = at_nj[..., None] * BLOCK + torch.arange(BLOCK, device=at_nj.device)
    logits_njc = blocks_nbc.gather(1, at_nj[..., None].expand(-1, -1, BLOCK))
    first = rows.logits_nv.size(1) * rank_of(group)
    keys_nx = _keys(logits_njc, tokens_njc + first).view(n, -1)
    own_nk = keys_nx.topk(min(k, keys_nx.size(1))).values
    keys_nk = side_by_side(own_nk, group).topk(k).values
    logits_nk = _ordered((keys_nk >> _PLACE_BITS).int()).view(torch.float32)
    return _LAST - (keys_nk & _LAST), logits_nk.double() - rows.log_z_n[:, None]


def _keys(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the logits, among equals the first place first."""
    return (_ordered((logits + 0.0).view(torch.int32)).long() << _PLACE_BITS) | (_LAST - places)


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """The bits of floats as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & (2**31 - 1))
