"""What a teacher makes of samples of a dataset, as it would beside a student in training.

Ranks that share the model run it together, as many micro-batches one after the other as keep a
pipeline's stages busy; copies of the model take turns with the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_last_stage
from megatron.core.pipeline_parallel import get_forward_backward_func

from flagscale.megatron.arguments import Arguments, model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.layout import sizes_for
from flagscale.megatron.shape import ModelShape
from flagscale.models.causal_lm import OutputLayer
from flagscale.models.megatron import load_model, without_multi_token_prediction
from flagscale.recipe import ParallelismRecipe
from flagscale.teacher_outputs import Codec
from flagscale.train.batches import ChunkBatches, get_batch, micro_batch_shape, reads_data

_PASSES_A_STAGE = 4  # that a pipeline is filled with at a time


@dataclass(frozen=True)
class Pass:
    """A forward pass of one copy of the model.

    Attributes:
        samples: their numbers.
        new: how many of them count; the rest fill it, for all copies to run as often.
    """

    samples: tuple[int, ...]
    new: int


def passes(numbers: Sequence[int], size: int, rank: int, ranks: int) -> list[Pass]:
    """The passes of one of several copies of a model, as many for each.

    Args:
        numbers: of all samples.
        size: samples a pass.
        rank: which copy.
        ranks: how many.
    """
    found = []
    for first in range(0, len(numbers), size * ranks):
        start = first + rank * size
        mine = tuple(numbers[start : start + size])
        fill = (numbers[-1],) * (size - len(mine))
        found.append(Pass(mine + fill, len(mine)))
    return found


class Answers:
    """A teacher that is run on samples.

    Attributes:
        output_layer: on ranks of the last pipeline stage; None elsewhere.
        rank: of this copy of the model.
        ranks: copies.
        writes: whether this rank is the one that writes what its copy makes.
    """

    def __init__(self, model: GPTModel, args: Arguments) -> None:
        """See `open_teacher`."""
        self._model, self._args = model, args
        self.output_layer = OutputLayer(model) if is_pipeline_last_stage() else None
        self.rank: int = parallel_state.get_data_parallel_rank()
        self.ranks: int = parallel_state.get_data_parallel_world_size()
        # Of those that share a vocabulary, the first; all make the same records.
        self.writes = (
            is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
        )

    @property
    def micro_batch_size(self) -> int:
        """Samples of a pass."""
        return self._args.micro_batch_size

    @property
    def reads_data(self) -> bool:
        """Whether this rank must be given batches."""
        return reads_data(self._args)

    def of(
        self, todo: Sequence[Pass], batches: Iterator[dict[str, torch.Tensor]] | None
    ) -> Iterator[tuple[Pass, torch.Tensor | None]]:
        """Hidden states after the final norm, pass by pass. All ranks call it.

        Args:
            todo: from `passes`, with `micro_batch_size` samples each.
            batches: of these passes, where `reads_data`.

        Yields:
            Each pass, with [b, s, h] in the model's dtype on ranks of the last pipeline stage.
        """
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        at_once = 1 if stages == 1 else _PASSES_A_STAGE * stages
        for start in range(0, len(todo), at_once):
            some = todo[start : start + at_once]
            yield from zip(some, self._run([batches], len(some)), strict=True)

    def encoded(self, codec: Codec, split: str, one: Pass, hidden_bsh: torch.Tensor) -> list[bytes]:
        """Records of what is new in a pass. All ranks that share the vocabulary call it.

        Args:
            codec: that makes them.
            split: that the samples are of.
            one: the pass.
            hidden_bsh: what `of` gave.
        """
        layer, samples = self.output_layer, one.samples[: one.new]
        assert layer is not None, "on the last pipeline stage"
        if codec.temperature is None:
            return codec.encode(hidden_bsh[: one.new], split, samples) if samples else []
        records = []
        with torch.inference_mode():
            for sample, hidden_sh in zip(samples, hidden_bsh, strict=False):  # a sample's at a time
                logits_1sv = layer(hidden_sh).unsqueeze(0)
                records += codec.encode(logits_1sv, split, [sample], layer.group)
        return records

    @torch.no_grad()
    def _run(self, batches: ChunkBatches, count: int) -> Sequence[torch.Tensor | None]:
        args, model = self._args, self._model

        def step(
            iterator: Any,  # noqa: ANN401 - the schedule's
            chunk: GPTModel,
        ) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
            batch = get_batch(iterator)
            named: dict[str, Any] = {}
            if batch.packed_seq_params is not None:
                named["packed_seq_params"] = batch.packed_seq_params
            output = chunk(batch.tokens, batch.position_ids, batch.attention_mask, **named)
            return output, lambda output, non_loss_data=False: output

        length, rows = micro_batch_shape(args)
        # A stage that does not compute the output layer returns what goes into it.
        before, model.post_process = model.post_process, False
        try:
            with use_args(args), without_multi_token_prediction(model):
                outputs = get_forward_backward_func()(
                    forward_step_func=step,
                    data_iterator=list(batches),
                    model=[model],
                    num_microbatches=count,
                    seq_length=length,
                    micro_batch_size=rows,
                    decoder_seq_length=length,
                    forward_only=True,
                    collect_non_loss_data=True,
                )
        finally:
            model.post_process = before
        if self.output_layer is None:
            return [None] * count
        # [s, b, h], or with packed samples [b * s, 1, h].
        if args.reset_attention_mask:
            shape = (args.micro_batch_size, args.seq_length, -1)
            return [hidden.view(shape) for hidden in outputs]
        return [hidden.transpose(0, 1) for hidden in outputs]


def open_teacher(
    teacher: Path,
    seq_length: int,
    sizes: ParallelismRecipe,
    params_dtype: torch.dtype,
    micro_batch_size: int,
    reset_attention_mask: bool,
) -> Answers:
    """Load a teacher. All ranks call it, within the runtime.

    Args:
        teacher: its artifact, already checked.
        seq_length: tokens of a sample.
        sizes: of the process groups.
        params_dtype: that it computes in.
        micro_batch_size: samples of a pass.
        reset_attention_mask: documents of a sample do not see one another.

    Raises:
        UserError: its weights cannot be read, or it cannot be divided so.
    """
    shape = ModelShape.load(teacher)
    model = load_model(teacher, seq_length, sizes, params_dtype)
    args = model_arguments(
        shape, seq_length, micro_batch_size, sizes_for(shape, sizes), params_dtype
    )
    return Answers(model, replace(args, reset_attention_mask=reset_attention_mask))
