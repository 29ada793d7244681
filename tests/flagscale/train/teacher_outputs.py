"""What the live teacher answers to the samples that some steps meet; of one process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flagscale.artifacts import new_artifact, open_artifact
from flagscale.checkpoint import load_weights
from flagscale.data.loader import train_iterator, validation_batches
from flagscale.megatron.arguments import model_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.gpt_builder import build_gpt_model
from flagscale.megatron.shape import ModelShape
from flagscale.teacher_outputs import KIND, OutputsFacts, OutputsWriter, codec_of
from flagscale.train.batches import Batch, get_batch

CODECS: dict[str, dict[str, Any]] = {
    "fp32": {"name": "hidden", "dtype": "fp32", "hidden_size": 64},
    "bf16": {"name": "hidden", "dtype": "bf16", "hidden_size": 64},
    "sampled": {"name": "sampled", "temperature": 2.0, "draws": 50, "seed": 3},
    "topk": {"name": "topk", "temperature": 2.0, "top_k": 9},
}


@torch.no_grad()
def write_outputs(
    folder: Path,
    teacher: Path,
    dataset: Path,
    codec: str,
    cache: Path,
    *,
    packed: bool = False,
    samples: int = 16,
    seed: int = 5,
) -> Path:
    """Of the first samples of a training with that seed, and of as many of its validation's.

    Args:
        folder: to make.
        teacher: a `teacher` artifact.
        dataset: a `dataset` artifact.
        codec: of `CODECS`.
        cache: of the dataset's index.
        packed: documents do not see one another.
        samples: how many of each split.
        seed: of the order.
    """
    parents = {
        kind: open_artifact(path, kind)
        for kind, path in {"teacher": teacher, "dataset": dataset}.items()
    }
    shape, seq_length = ModelShape.load(teacher), parents["dataset"].facts["seq_length"]
    facts = OutputsFacts(
        CODECS[codec],
        parents["teacher"].digest,
        parents["dataset"].digest,
        parents["teacher"].tokenizer_hash,
        seq_length,
        packed,
        "fp32",
        shape.vocab_size,
    )
    args = replace(model_arguments(shape, seq_length), reset_attention_mask=packed)
    share: dict[str, Any] = {
        "micro_batch_size": 1,
        "global_batch_size": samples,
        "reset_attention_mask": packed,
    }
    batches: dict[str, Iterable[dict[str, Any]]] = {
        "train": train_iterator(dataset, cache, seed=seed, **share),
        "validation": validation_batches(dataset, cache, eval_iters=1, **share),
    }
    with new_artifact(folder, KIND, {}, parents) as staging, use_args(args):
        model = build_gpt_model(args).eval()
        load_weights(model, teacher / "weights")
        writer = OutputsWriter(staging.path, facts)
        for split, stream in batches.items():
            for _, values in zip(range(samples), stream, strict=False):
                batch = Batch(*get_batch(iter([values])))
                answers = _answers(model, batch, hidden="hidden" in CODECS[codec]["name"])
                numbers = values["samples"].tolist()
                if writer.missing(split, numbers):
                    writer.write(split, numbers, codec_of(facts).encode(answers, split, numbers))
        staging.facts = writer.finish({"train": 10_000, "validation": 10_000})
        staging.tokenizer_hash = parents["teacher"].tokenizer_hash
    return folder


def _answers(model: torch.nn.Module, batch: Batch, *, hidden: bool) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    hook = model.output_layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    named = (
        {} if batch.packed_seq_params is None else {"packed_seq_params": batch.packed_seq_params}
    )
    logits_bsv = model(batch.tokens, batch.position_ids, batch.attention_mask, **named)
    hook.remove()
    return kept[0].transpose(0, 1) if hidden else logits_bsv
