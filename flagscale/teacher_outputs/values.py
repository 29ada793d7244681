"""What is kept of a teacher, and what a codec is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only looks at an artifact needs no torch
    import torch
    import torch.distributed as dist


@dataclass(frozen=True)
class Hidden:
    """The teacher's last hidden states.

    Attributes:
        hidden_bsh: [b, s, h], after the final norm: the input of the output layer; as stored, in
            bfloat16 or float32.
    """

    hidden_bsh: torch.Tensor


@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of the teacher's distribution at the stored temperature.

    Attributes:
        tokens_bsk: int64 [b, s, k], each once in a row; 0 where the share is 0.
        shares_bsk: float32 [b, s, k]; 0 fills.
        tail_bs: float32 [b, s], the share of all other tokens; None where the shares are an
            unbiased estimate of the whole distribution, and sum to 1.
        entropy_bs: float32 [b, s], nats: of the teacher's whole distribution.
    """

    tokens_bsk: torch.Tensor
    shares_bsk: torch.Tensor
    tail_bs: torch.Tensor | None
    entropy_bs: torch.Tensor


class Codec(ABC):
    """Makes of a teacher's answer to a sample a record of bytes, and of that what a loss needs.

    Attributes:
        temperature: that divides the logits before anything is kept; None where the logits
            themselves can be had again.
    """

    temperature: float | None

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """`name`, and what else `codec_of` needs to make the same codec."""

    @abstractmethod
    def encode(
        self,
        answers_bsx: torch.Tensor,
        split: str,
        samples: Sequence[int],
        group: dist.ProcessGroup | None = None,
    ) -> list[bytes]:
        """A record a sample, the same on every rank of the group and on every layout.

        Args:
            answers_bsx: [b, s, h], hidden states, or [b, s, V], logits, V this rank's slice of the
                vocabulary; on any device.
            split: that the samples are of.
            samples: [b], their numbers.
            group: the ranks that share the vocabulary, in order; None: this rank has all of it.
                All of them call it with the same samples.

        Raises:
            ValueError: the shape is not what the codec was made for.
        """

    @abstractmethod
    def decode(self, records: Sequence[bytes]) -> Hidden | SparseTargets:
        """What was encoded, the samples in the order of the records.

        Raises:
            ValueError: a record is not one of this codec's.
        """


def check_logits(
    logits_bsv: torch.Tensor,
    samples: int,
    seq_length: int,
    vocab_size: int,
    group: dist.ProcessGroup | None,
) -> None:
    """Refuse logits that are not of so many samples and of the whole vocabulary.

    Raises:
        ValueError: what they are.
    """
    ranks = 1 if group is None else group.size()
    *found, width = logits_bsv.shape
    if found != [samples, seq_length] or width * ranks < vocab_size:
        raise ValueError(
            f"logits are {tuple(logits_bsv.shape)} on {ranks} ranks; needed are "
            f"({samples}, {seq_length}, {vocab_size} / ranks)"
        )
