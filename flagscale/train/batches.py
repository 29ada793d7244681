"""What one micro-batch is, and how `forward_step` gets it.

The data loader runs where it is needed and nowhere else: on the first and the last pipeline stage,
on the first of the tensor-parallel ranks, which sends the others what it read. Context-parallel
ranks all read the whole sequence and keep their part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

from flagscale.data.layout import SPLITS
from flagscale.megatron import platform
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import get_args

# For each chunk of this rank its micro-batches; None where the rank is sent them, or needs none.
ChunkBatches = Sequence[Iterator[dict[str, torch.Tensor]] | None]

_INTEGERS = ("tokens", "labels", "position_ids")
_NAMES = ("samples", "split", "following")  # what a micro-batch is made of, not for the model


class Batch(NamedTuple):
    """One micro-batch, in the order of Megatron's `get_batch`. All None on a stage that needs none.

    With packed samples b is 1: the rows stand one after the other.

    Attributes:
        tokens: int64 [b, s / CP].
        labels: int64 [b, s / CP]; what follows each token.
        loss_mask: float32 [b, s / CP]; 0 where a position has no loss.
        attention_mask: None for causal attention, else bool [b or 1, 1, s / CP, s], True =
            forbidden.
        position_ids: int64 [b, s / CP].
        packed_seq_params: where documents begin and end, if they do not see one another.
        samples: int64 [rows], not moved to the device: which of the split's samples the rows are;
            -1 where whoever made the micro-batch did not say.
        split: int64, as little moved: its place in `SPLITS`; -1 likewise.
        following: int64, the samples of the next micro-batch, where there is one and it is known.
    """

    tokens: torch.Tensor | None
    labels: torch.Tensor | None
    loss_mask: torch.Tensor | None
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    packed_seq_params: PackedSeqParams | None = None
    samples: torch.Tensor | None = None
    split: torch.Tensor | None = None
    following: torch.Tensor | None = None

    @property
    def names(self) -> dict[str, Any]:
        """What a forward pass that looks its samples up is given. Waits for a GPU that has them.

        `split`, its name, `samples` and `following`, numbers.

        Raises:
            ValueError: whoever made the micro-batch did not say.
        """
        if self.samples is None or self.split is None or self.split < 0:
            raise ValueError("the micro-batch does not say which samples of which split it holds")
        following = [] if self.following is None else self.following.tolist()
        return {
            "split": SPLITS[int(self.split)],
            "samples": self.samples.tolist(),
            "following": [number for number in following if number >= 0],
        }


def get_batch(
    data_iterator: Iterator[dict[str, torch.Tensor]] | None, vp_stage: int | None = None
) -> Batch:
    """The next micro-batch, on the device that the model is on.

    Args:
        data_iterator: yields the dictionaries of `flagscale.data.loader`; None where
            `reads_data` is false.
        vp_stage: which chunk of an interleaved pipeline asks.
    """
    args = get_args()
    if not _needs_batch(args, vp_stage):
        return Batch(None, None, None, None, None)
    values = None if data_iterator is None else next(data_iterator)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        values = _from_first_tensor_rank(values, args)
    assert values is not None, "no data iterator on a rank that reads data"
    device = platform.device()
    named = {name: values.get(name) for name in _NAMES}
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
        if name not in _NAMES
    }
    if args.reset_attention_mask:
        return _packed(moved)._replace(**named)
    kept = {name: moved[name] for name in (*_INTEGERS, "loss_mask")}
    if moved.get("attention_mask") is not None:
        kept["attention_mask"] = moved["attention_mask"]
    kept = get_batch_on_this_cp_rank(kept)
    return Batch(
        kept["tokens"],
        kept["labels"],
        kept["loss_mask"],
        kept.get("attention_mask"),
        kept["position_ids"],
        **named,
    )


def reads_data(args: Arguments, vp_stage: int | None = None) -> bool:
    """Whether this rank must be given a data iterator for the chunk."""
    is_sender = parallel_state.get_tensor_model_parallel_rank() == 0
    return is_sender and _needs_batch(args, vp_stage)


def micro_batch_shape(args: Arguments) -> tuple[int, int]:
    """(sequence length, sequences) of what the pipeline's stages pass on, before CP divides it."""
    if args.reset_attention_mask:
        return args.seq_length * args.micro_batch_size, 1
    return args.seq_length, args.micro_batch_size


def _needs_batch(args: Arguments, vp_stage: int | None) -> bool:
    """Only the ends of the pipeline do; but where documents end matters to every layer."""
    return (
        args.reset_attention_mask
        or parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    )


def _from_first_tensor_rank(values: dict[str, Any] | None, args: Arguments) -> dict[str, Any]:
    if values is not None and values.get("attention_mask") is not None:
        raise ValueError("attention_mask: is not sent to other tensor-parallel ranks; pack instead")
    device, size = platform.device(), args.micro_batch_size * args.seq_length
    # One message of a size that all know: with a GPU nobody waits for what is in it.
    rows = args.micro_batch_size
    message = torch.full((4 * size + 2 * rows + 1,), -1, device=device)
    if values is not None:
        integers = [values[name].reshape(-1) for name in _INTEGERS]
        mask = values["loss_mask"].reshape(-1).double().view(torch.int64)
        sent = torch.cat([*integers, mask, *(values[name].reshape(-1) for name in _named(values))])
        message[: sent.numel()].copy_(_pinned(sent), non_blocking=True)
    _broadcast(message)
    shape = (rows, args.seq_length)
    *integers, mask = (part.view(shape) for part in message[: 4 * size].split(size))
    received: dict[str, Any] = dict(zip(_INTEGERS, integers, strict=True))
    received["loss_mask"] = mask.view(torch.float64).float()
    samples, split, following = message[4 * size :].split([rows, 1, rows])
    received |= {"samples": samples, "split": split[0], "following": following}
    if args.reset_attention_mask:
        received |= _borders_from_first_tensor_rank(values, size)
    return received


def _named(values: dict[str, Any]) -> Iterable[str]:
    """All that says which samples there are, or nothing: in a message each has its place."""
    return _NAMES if all(name in values for name in _NAMES) else ()


def _borders_from_first_tensor_rank(values: dict[str, Any] | None, size: int) -> dict[str, Any]:
    """How many borders there are is in the message too; who gets it has to read that much of it."""
    message = torch.zeros(size + 3, dtype=torch.int32, device=platform.device())
    if values is not None:
        borders = values["cu_seqlens"].int()
        head = torch.tensor([borders.numel(), values["max_seqlen"]], dtype=torch.int32)
        message[: 2 + borders.numel()].copy_(_pinned(torch.cat([head, borders])), non_blocking=True)
    _broadcast(message)
    if values is not None:
        count, longest = values["cu_seqlens"].numel(), values["max_seqlen"]
    else:
        count, longest = message[:2].tolist()
    return {"cu_seqlens": message[2 : 2 + count], "max_seqlen": longest}


def _broadcast(message: torch.Tensor) -> None:
    torch.distributed.broadcast(
        message,
        parallel_state.get_tensor_model_parallel_src_rank(),
        group=parallel_state.get_tensor_model_parallel_group(),
    )


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.pin_memory() if platform.HAS_GPU else tensor


def _packed(values: dict[str, Any]) -> Batch:
    """The rows as one, with the borders of their documents."""
    borders, longest = values["cu_seqlens"].int(), values["max_seqlen"]
    flat = {name: values[name].reshape(1, -1) for name in (*_INTEGERS, "loss_mask")}
    return Batch(
        flat["tokens"],
        flat["labels"],
        flat["loss_mask"],
        None,
        flat["position_ids"],
        PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=borders,
            cu_seqlens_kv=borders,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    )
