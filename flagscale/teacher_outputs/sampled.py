"""Random sampling KD: Anshumann et al., "Sparse logit sampling" (2025), arXiv 2503.16870.

N tokens are drawn with replacement from the teacher's `softmax(logits / T)`; a token's share is the
number of its draws by N. Shares have the probabilities as their expectation, and so have the cross
entropy with them and its gradient, which are linear in the shares. The teacher's entropy, which no
few tokens tell, is kept beside them: with it the KL that is reported is a KL in expectation.

The paper's 50 draws have about 12 different tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flagscale.teacher_outputs.bits import pack, packed_bytes, unpack, width_of
from flagscale.teacher_outputs.probabilities import BLOCK, Rows, rank_of, rows_of
from flagscale.teacher_outputs.values import Codec, SparseTargets, check_logits


class SampledCodec(Codec):
    """A record: different tokens of each position less 1, entropies, then tokens and draws less 1.

    The entropies are float32 [s]; all else takes as many bits as it needs, see `bits`.
    """

    def __init__(
        self, seq_length: int, vocab_size: int, temperature: float, draws: int, seed: int
    ) -> None:
        """Keep the options.

        Args:
            seq_length: tokens of a sample.
            vocab_size: without padding.
            temperature: divides the logits.
            draws: for each position.
            seed: of the draws.

        Raises:
            ValueError: one is out of bounds.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be above 0")
        if draws < 1:
            raise ValueError(f"draws={draws}: must be at least 1")
        self.temperature: float = temperature
        self._seq_length, self._vocab_size = seq_length, vocab_size
        self._draws, self._seed = draws, seed

    @property
    def options(self) -> dict[str, Any]:
        """See `Codec.options`."""
        return {
            "name": "sampled",
            "temperature": self.temperature,
            "draws": self._draws,
            "seed": self._seed,
        }

    def encode(
        self,
        answers_bsx: torch.Tensor,
        split: str,
        samples: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> list[bytes]:
        """See `Codec.encode`; the draws follow from seed, split, sample and position alone."""
        check_logits(answers_bsx, len(samples), self._seq_length, self._vocab_size, group)
        return [
            self._encode(logits_sv, self._uniforms(split, sample), group)
            for logits_sv, sample in zip(answers_bsx.detach(), samples, strict=True)
        ]

    def decode(self, records: Sequence[bytes]) -> SparseTargets:
        """See `Codec.decode`; k is the most different tokens of a position among the samples."""
        parts = [self._decode(record) for record in records]
        k = max(int(distinct_s.max()) for distinct_s, *_ in parts)
        shape = (len(parts), self._seq_length, k)
        tokens_bsk, shares_bsk = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        entropy_bs = np.empty(shape[:2], np.float32)
        for b, (distinct_s, entropy_s, tokens_m, draws_m) in enumerate(parts):
            there_sk = np.arange(k) < distinct_s[:, None]
            tokens_bsk[b][there_sk] = tokens_m
            shares_bsk[b][there_sk] = draws_m / self._draws
            entropy_bs[b] = entropy_s
        return SparseTargets(
            torch.from_numpy(tokens_bsk),
            torch.from_numpy(shares_bsk),
            None,
            torch.from_numpy(entropy_bs),
        )

    def _uniforms(self, split: str, sample: int) -> np.ndarray:
        """float64 [s, draws], in [0, 1)."""
        key = hashlib.sha256(f"{self._seed}/{split}/{sample}".encode()).digest()[:16]
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        return generator.random((self._seq_length, self._draws))

    def _encode(
        self, logits_sv: torch.Tensor, uniforms_sd: np.ndarray, group: dist.ProcessGroup | None
    ) -> bytes:
        tokens, entropies = [], []
        own = self._draws * BLOCK * 2  # a block a draw, in float64
        for rows in rows_of(logits_sv, self.temperature, self._vocab_size, group, own):
            uniforms_nd = torch.from_numpy(uniforms_sd[rows.at]).to(logits_sv.device)
            tokens.append(_draw(rows, uniforms_nd, group).cpu())
            entropies.append(rows.entropy_n.float().cpu())
        drawn_sd = np.sort(torch.cat(tokens).numpy(), 1)
        is_new_sd = np.diff(drawn_sd, axis=1, prepend=-1) > 0
        at_m = np.flatnonzero(is_new_sd)  # of every row's draws, one row after the other
        draws_m = np.diff(at_m, append=drawn_sd.size)
        of_draws = width_of(self._draws)
        return b"".join(
            [
                pack(is_new_sd.sum(1) - 1, of_draws),
                torch.cat(entropies).numpy().astype("<f4").tobytes(),
                pack(drawn_sd.reshape(-1)[at_m], width_of(self._vocab_size)),
                pack(draws_m - 1, of_draws),
            ]
        )

    def _decode(self, record: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Different tokens [s], entropies [s], and of all of them, m, the token and its draws."""
        of_draws, of_tokens = width_of(self._draws), width_of(self._vocab_size)
        rest, s = memoryview(record), self._seq_length
        size = packed_bytes(s, of_draws)
        distinct_s, rest = unpack(rest[:size], s, of_draws) + 1, rest[size:]
        entropy_s, rest = np.frombuffer(rest[: 4 * s], "<f4"), rest[4 * s :]
        m = int(distinct_s.sum())
        size = packed_bytes(m, of_tokens)
        return (
            distinct_s,
            entropy_s,
            unpack(rest[:size], m, of_tokens),
            unpack(rest[size:], m, of_draws) + 1,
        )


def _draw(rows: Rows, uniforms_nd: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The tokens, int64 [n, draws], where the cumulative distribution reaches the uniforms."""
    up_to_nb = rows.sums_nb.cumsum(1)
    mass_nd = uniforms_nd * up_to_nb[:, -1:]
    block_nd = _place(up_to_nb, mass_nd)
    mass_nd -= (up_to_nb - rows.sums_nb).gather(1, block_nd)
    width, own = rows.logits_nv.size(1), rows.weights_nbc.size(1)
    block_nd -= own * rank_of(group)
    is_own_nd = (block_nd >= 0) & (block_nd < own)
    block_nd.clamp_(0, own - 1)
    weights_ndc = rows.weights_nbc.gather(1, block_nd[..., None].expand(-1, -1, BLOCK)).double()
    column_nd = _place(weights_ndc.cumsum(2).flatten(0, 1), mass_nd.view(-1, 1))
    tokens_nd = block_nd * BLOCK + column_nd.view_as(block_nd) + width * rank_of(group)
    tokens_nd = torch.where(is_own_nd, tokens_nd, 0)
    if group is not None:
        dist.all_reduce(tokens_nd, group=group)
    return tokens_nd


def _place(up_to_nc: torch.Tensor, mass_nd: torch.Tensor) -> torch.Tensor:
    """Of each mass, int64 [n, d], the first column with more up to and with it.

    By rounding a mass may be no less than the whole; then the last column that adds anything.
    """
    last_n1 = torch.searchsorted(up_to_nc, up_to_nc[:, -1:].contiguous())
    return torch.searchsorted(up_to_nc, mass_nd.contiguous(), right=True).minimum(last_n1)
