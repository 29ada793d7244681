"""Held-out losses of single samples, by which students that are being trained are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flagscale.data.loader import validation_batches
from flagscale.data.mixture import VALIDATION_SEED, Mixture, weights_of
from flagscale.data.samples import Index
from flagscale.megatron.arguments import Arguments
from flagscale.megatron.global_vars import use_args
from flagscale.train.batches import ChunkBatches, reads_data
from flagscale.train.loop import evaluation_reports
from flagscale.train.schedule import from_last_stage

SampleLosses = dict[str, dict[int, tuple[float, float]]]


@torch.no_grad()
def sample_losses(
    chunks: Sequence[GPTModel], args: Arguments, dataset: Path, cache: Path, count: int
) -> SampleLosses:
    """Losses of single samples of the validation split, the same samples whatever the run.

    They are those of a validation, through `forward_step`: on every layout, of every divergence.
    All ranks call it.

    Args:
        chunks: of the model, wrapped or not.
        args: that the model was built with.
        dataset: a `dataset` artifact.
        cache: folder of the index (`flagscale.data.loader.prepare_index`).
        count: how many; a split that has fewer is taken whole.

    Returns:
        Each reported loss -> number of the sample -> its sum over the tokens, nats, and their
        number. The same on every rank.
    """
    one = replace(args, micro_batch_size=1, global_batch_size=count)
    with use_args(one):
        reports = evaluation_reports(chunks, _batches(one, dataset, cache), 1)
    found: SampleLosses = {}
    if reports:
        own_nr2 = torch.stack([torch.stack([*report.values()]) for report in reports]).double()
        torch.distributed.all_reduce(own_nr2, group=parallel_state.get_context_parallel_group())
        ranks = parallel_state.get_data_parallel_world_size()
        shares = [torch.empty_like(own_nr2) for _ in range(ranks)]
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather(shares, own_nr2, group=group)
        all_nr2 = torch.stack(shares, dim=1).flatten(0, 1)  # rank after rank takes the next sample
        numbers = _numbers(dataset, cache, count)
        for r, name in enumerate(reports[0]):
            pairs = ((total, tokens) for total, tokens in all_nr2[:, r].tolist())
            found[name] = dict(zip(numbers, pairs, strict=True))
    return from_last_stage(found)


def _batches(args: Arguments, dataset: Path, cache: Path) -> ChunkBatches:
    count = args.parallelism.virtual_pipeline_model_parallel_size
    stages = [None] if count is None else list(range(count))
    return [
        iter(
            validation_batches(
                dataset,
                cache,
                micro_batch_size=1,
                global_batch_size=args.global_batch_size,
                eval_iters=1,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                reset_attention_mask=args.reset_attention_mask,
            )
        )
        if reads_data(args, stage)
        else None
        for stage in stages
    ]


def _numbers(dataset: Path, cache: Path, count: int) -> list[int]:
    """Of the first samples that validations take, in their order."""
    index = Index(dataset, cache, "validation")
    parts = index.open(reset_attention_mask=False)
    samples = Mixture(parts, weights_of(index, parts), VALIDATION_SEED)
    return [samples.number(position) for position in range(count)]
