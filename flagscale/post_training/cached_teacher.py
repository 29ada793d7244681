"""A teacher that is not there: what it answered once, from an artifact, in its place.

To ModelOpt it is a teacher like any other, of no width: between pipeline stages nothing of it
travels, and on the last one it looks its answers up by the numbers of the micro-batch's samples.
From hidden states its output layer, alone of all its weights, makes the logits anew, so hooks,
fusion and every divergence work as they do with the live one. Where some tokens' probabilities were
kept, it hands these on in place of logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from flagscale.checkpoint import load_output_layer
from flagscale.megatron import platform
from flagscale.megatron.gpt_builder import mask_padded_vocabulary
from flagscale.megatron.shape import ModelShape
from flagscale.post_training.sparse_targets import GivenTargets, SparseRows
from flagscale.teacher_outputs import Hidden, ReadAhead, SparseTargets, TeacherOutputs

if TYPE_CHECKING:
    from flagscale.post_training.upstream import mtd


class CachedTeacher(torch.nn.Module):
    """This pipeline stage's part of a teacher whose answers are read.

    Attributes:
        config: the student's, but without width.
        outputs: what the teacher answered.
        output_layer: on the last stage: of hidden states the teacher's own, whose weight is to be
            loaded; else `GivenTargets`.
        decoder: takes what the stage before passes on.
    """

    def __init__(
        self,
        shape: ModelShape,
        outputs: TeacherOutputs,
        config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        """Build it, with a random output layer.

        Args:
            shape: the teacher's.
            outputs: what it answered to the samples that will be met.
            config: the student's.
            pre_process: the stage is the first.
            post_process: the stage is the last.
        """
        super().__init__()
        self.outputs, self.pre_process, self.post_process = outputs, pre_process, post_process
        self.vocab_size, self.unpadded_vocab_size = shape.padded_vocab_size, shape.vocab_size
        self.config, self._hidden_size = _with_width(config, 0), shape.hidden_size
        self.decoder = _Received()
        self._reader = ReadAhead(outputs)
        self.ask()
        if not post_process:
            return
        if not self.has_logits:
            self.output_layer: GivenTargets | ColumnParallelLinear = GivenTargets()
            return
        self.output_layer = ColumnParallelLinear(
            shape.hidden_size,
            shape.padded_vocab_size,
            config=_with_width(config, shape.hidden_size),
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
        mask_padded_vocabulary(self.output_layer, shape.vocab_size)

    @property
    def has_logits(self) -> bool:
        """Whether its logits can be had again; else there are the probabilities of some tokens."""
        return self.outputs.codec.temperature is None

    def load_output_layer(self, teacher: Path, *, tied: bool) -> None:
        """Read the output layer's weight, if there is one. All ranks call it.

        Args:
            teacher: a checkpoint of the teacher's weights.
            tied: its output layer is its embedding.

        Raises:
            UserError: there is no such checkpoint.
        """
        if self.has_logits:
            layer = self.output_layer if self.post_process else None
            assert not isinstance(layer, GivenTargets), "there are logits"
            load_output_layer(layer, teacher, tied=tied)

    def ask(
        self, split: str = "", samples: Sequence[int] = (), following: Sequence[int] = ()
    ) -> None:
        """Say what the next forward pass is about.

        Args:
            split: that the samples are of; nobody says by default.
            samples: [rows], their numbers.
            following: what the one after it will be about, if that is known: to read ahead.
        """
        self._split, self._samples, self._following = split, list(samples), list(following)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Any:  # noqa: ANN401
        """As a `GPTModel`'s, of which only the shape of the input matters.

        Returns:
            On the last stage what the output layer gives: logits [s / CP, b, V / TP], or what takes
            their place. On others, what the next stage's models get of it: [s, b, 0].

        Raises:
            UserError: there is no answer to a sample, or it is damaged.
            ValueError: nobody said which samples these are, or they are of another length.
        """
        if not self.post_process:
            return self._nothing(input_ids)
        assert input_ids is not None, "the last stage is given a batch"
        answer = self.answer(packed_seq_params is not None, input_ids.shape)
        return self.output_layer(answer)[0]

    def answer(self, is_packed: bool, shape_bs: Sequence[int]) -> torch.Tensor | SparseRows:
        """This rank's part of what the teacher answered to the samples that it was asked about.

        Args:
            is_packed: the samples stand one after the other in one row.
            shape_bs: of this rank's tokens.

        Returns:
            Hidden states [s / CP, b, h], or [s / CP / TP, b, h] with sequence parallelism, or
            targets of s / CP x b rows.
        """
        if not self._samples or min(self._samples) < 0:
            raise ValueError(
                f"split={self._split!r}, samples={self._samples}: the micro-batch does not say "
                "which samples it holds, so no answer of the teacher's belongs to it"
            )
        group = parallel_state.get_context_parallel_group()

        def here(rows_bs: torch.Tensor) -> torch.Tensor:
            """[s / CP, b, ...] of this rank."""
            mine = get_batch_on_this_cp_rank({"rows": rows_bs}, group)["rows"]
            if is_packed:
                mine = mine.flatten(0, 1).unsqueeze(0)
            if mine.shape[:2] != shape_bs:
                raise ValueError(
                    f"teacher outputs of {tuple(mine.shape[:2])} tokens, but the micro-batch has "
                    f"{tuple(shape_bs)}: they are of another seq_length"
                )
            return mine.transpose(0, 1)

        if not self.has_logits:  # a hundredth of the bytes: each rank reads them
            targets = self._read()
            assert isinstance(targets, SparseTargets), "of this codec"
            return _rows(targets, here)

        def hidden_states() -> torch.Tensor:
            found = self._read()
            assert isinstance(found, Hidden), "of this codec"
            hidden_sbh = _on_device(here(found.hidden_bsh).contiguous())
            return hidden_sbh.to(self.config.params_dtype)

        return self._passed_on(hidden_states, shape_bs)

    def _read(self) -> Hidden | SparseTargets:
        return self._reader.read(self._split, self._samples, self._following)

    def _passed_on(self, read: Callable[[], torch.Tensor], shape_bs: Sequence[int]) -> torch.Tensor:
        """What one tensor-parallel rank reads, [s, b, h]; where ranks share positions, this one's.

        Storage is slower than what connects them.
        """
        group = parallel_state.get_tensor_model_parallel_group()
        ranks, is_first = group.size(), group.rank() == 0
        if ranks == 1:
            return read()
        first = parallel_state.get_tensor_model_parallel_src_rank()
        (count, length), share = shape_bs, self.config.sequence_parallel
        size = length // ranks if share else length, count, self._hidden_size
        if is_first and not share:
            own = read()
        else:
            device, dtype = platform.device(), self.config.params_dtype
            own = torch.empty(size, dtype=dtype, device=device)
        if share:
            parts = list(read().chunk(ranks)) if is_first else None
            torch.distributed.scatter(own, parts, src=first, group=group)
        else:
            torch.distributed.broadcast(own, src=first, group=group)
        return own

    def _nothing(self, input_ids: torch.Tensor | None) -> torch.Tensor:
        """[s, b, 0], beside the student's hidden states."""
        if not self.pre_process:
            assert self.decoder.tensor is not None, "the schedule sets what was received"
            return self.decoder.tensor
        assert input_ids is not None, "the first stage is given a batch"
        count, length = input_ids.shape
        if self.config.sequence_parallel:
            length //= parallel_state.get_tensor_model_parallel_world_size()
        return torch.empty(
            length, count, 0, dtype=self.config.params_dtype, device=input_ids.device
        )


class _Received(torch.nn.Module):
    """In place of layers: what the stage before has passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor: torch.Tensor | None = None

    def set_input_tensor(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor


def _rows(found: SparseTargets, here: Callable[[torch.Tensor], torch.Tensor]) -> SparseRows:
    """Of this rank's positions, in the order of hidden states."""

    def rows(values_bs: torch.Tensor) -> torch.Tensor:
        return _on_device(here(values_bs).flatten(0, 1))

    return SparseRows(
        rows(found.tokens_bsk),
        rows(found.shares_bsk),
        None if found.tail_bs is None else rows(found.tail_bs),
        rows(found.entropy_bs),
    )


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Where the model is; a GPU is not waited for."""
    if platform.HAS_GPU:
        tensor = tensor.pin_memory()
    return tensor.to(platform.device(), non_blocking=True)


def _with_width(config: TransformerConfig, hidden_size: int) -> TransformerConfig:
    """The same, but for the width; its checks, which know no width of 0, are not run again."""
    changed = copy.copy(config)
    changed.hidden_size = hidden_size
    return changed


def hand_on_samples(model: mtd.DistillationModel) -> None:
    """Let a model's forward pass take what `CachedTeacher.ask` does too, for that alone.

    Args:
        model: a distillation model, converted in all other respects.
    """
    forward = model.forward

    def with_samples(
        self: GPTModel,
        *args: Any,  # noqa: ANN401
        split: str = "",
        samples: Sequence[int] = (),
        following: Sequence[int] = (),
        **named: Any,  # noqa: ANN401
    ) -> torch.Tensor:
        self.teacher_model.ask(split, samples, following)
        result: torch.Tensor = forward(*args, **named)
        return result

    model.forward = MethodType(with_samples, model)
