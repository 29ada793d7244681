"""Checks of what an audit's models were read from: tokenizer, dataset, stored weights."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from flagscale.artifacts import Manifest
from flagscale.checkpoint.stored import StoredTensors
from flagscale.checkpoint.weights import local_weights
from flagscale.data.loader import (
    prepare_validation_index,
    split_documents,
    validation_batches,
)
from flagscale.megatron.shape import ModelShape
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash
from flagscale.post_training.findings import Finding, fault, not_run, within

_COUNTED = 2_000_000  # tokens of the train split whose frequencies are taken
_COUNTED_DOCUMENTS = 2_000
_SMALL = 2**16  # elements of a tensor that is read a second time
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def audited_batch(dataset: Path, vocab_size: int) -> tuple[dict[str, torch.Tensor], float]:
    """One validation sample, and its `unigram_loss`. All ranks call it; the first reads for all.

    Args:
        dataset: a `dataset` artifact.
        vocab_size: see `unigram_loss`.
    """
    told: list[tuple[dict[str, torch.Tensor], float] | None] = [None]
    if torch.distributed.get_rank() == 0:
        with tempfile.TemporaryDirectory(prefix="flagscale-audit-") as cache:
            prepare_validation_index(dataset, Path(cache))
            batches = validation_batches(
                dataset, Path(cache), micro_batch_size=1, global_batch_size=1, eval_iters=1
            )
            batch = next(iter(batches))
        told = [(batch, unigram_loss(dataset, batch, vocab_size))]
    torch.distributed.broadcast_object_list(told, src=0)
    assert told[0] is not None, "the first rank is one of them"
    return told[0]


def unigram_loss(dataset: Path, batch: dict[str, torch.Tensor], vocab_size: int) -> float:
    """The loss of the batch's unmasked labels by the frequency of tokens in the train split alone.

    Args:
        dataset: a `dataset` artifact.
        batch: of its data loader.
        vocab_size: tokens; each is counted once more than it occurs.

    Returns:
        Nats a token.
    """
    counts_v = np.ones(vocab_size)
    for document in split_documents(dataset, "train", _COUNTED_DOCUMENTS):
        counts_v += np.bincount(document, minlength=vocab_size)[:vocab_size]
        if counts_v.sum() > _COUNTED:
            break
    labels = batch["labels"].flatten().numpy()
    mask = batch["loss_mask"].flatten().double().numpy()
    loss_n = -np.log(counts_v / counts_v.sum())[labels]
    return float((loss_n * mask).sum() / max(mask.sum(), 1))


def check_tokenizers(
    teacher: Path, dataset: Path, manifests: Mapping[str, Manifest], batch: dict[str, torch.Tensor]
) -> list[Finding]:
    """One tokenizer made the data and belongs to the teacher, and its ids fit the vocabulary.

    Args:
        teacher: the artifact.
        dataset: the artifact.
        manifests: theirs, by name.
        batch: of the data loader.
    """
    name, note = "tokenizer", "the teacher's is the one that made the data"
    own = load_tokenizer(teacher / "hf")
    cause = None
    for whose, found in (
        ("the teacher's", own),
        ("the dataset's", load_tokenizer(dataset / "tokenizer")),
    ):
        if tokenizer_hash(found) != manifests["teacher"].tokenizer_hash:
            cause = f"{whose} tokenizer is not the one that the teacher was prepared with"
    # A tokenizer that makes of its own words other tokens did not make these.
    tokens = batch["tokens"][0].tolist()
    again = own(own.decode(tokens), add_special_tokens=False)["input_ids"]
    common = (Counter(tokens) & Counter(again)).total() / max(len(tokens), 1)
    vocab_size = ModelShape.load(teacher).vocab_size
    highest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
    beyond = None
    if highest >= vocab_size:
        beyond = f"the data have the token {highest}, but the teacher knows {vocab_size}"
    return [
        fault(name, cause, note),
        within(
            "text made anew",
            1 - common,
            0.1,
            "share of tokens that decoding and encoding a sample changes",
            f"of a sample, decoded and encoded by the teacher's tokenizer, {1 - common:.1%} of the "
            "tokens are others: the data were made with another tokenizer",
        ),
        fault("vocabulary", beyond, f"all ids are below the teacher's {vocab_size}"),
    ]


def check_stored(whose: str, model: GPTModel, weights: Path, dtype: torch.dtype) -> Finding:
    """What a model has in memory is what its artifact holds, in the dtype that it says.

    Small tensors are read once more, norms and biases among them: a mistake of the reader shows in
    all of one kind.

    Args:
        whose: `teacher` or `student`.
        model: this rank's part, read from the artifact.
        weights: folder of the checkpoint.
        dtype: the artifact's.
    """
    stored = StoredTensors(weights)
    cause, count = None, 0
    for tensor in local_weights(model):
        found = stored.tensors[tensor.key]
        if found.dtype != dtype:
            cause = f"the {whose}'s {tensor.key} is stored in {found.dtype}, not in {dtype}"
        if tensor.data.numel() > _SMALL or cause:
            continue
        count += 1
        axes = tensor.prepend_axis_num
        part = stored.read(tensor.key, tensor.global_offset, (1,) * axes + tensor.local_shape)
        if not torch.equal(
            part.view(tensor.data.shape).to(tensor.data.dtype), tensor.data.detach().cpu()
        ):
            cause = f"the {whose}'s {tensor.key} in memory is not what its artifact holds: it was "
            cause += "not loaded"
    return fault(f"{whose} as stored", cause, f"{count} small tensors, read once more, are equal")


def check_kept(student: GPTModel, teacher: GPTModel, kept: Sequence[int] | None) -> Finding:
    """A student of the teacher's layers has the teacher's own weights.

    Args:
        student: this rank's part.
        teacher: this rank's part.
        kept: which of the teacher's layers the student's are; None: its weights are its own.
    """
    name = "student from teacher"
    if kept is None:
        return not_run(name, "the student's weights are no copies of the teacher's")
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return not_run(name, "a layer and its copy are on different pipeline stages")
    theirs = dict(teacher.named_parameters())
    pairs = {
        name: _LAYER.sub(lambda layer: f"decoder.layers.{kept[int(layer[1])]}.", name)
        for name, _ in student.named_parameters()
    }
    shapes = {name: parameter.shape for name, parameter in student.named_parameters()}
    if any(source in theirs and theirs[source].shape != shapes[n] for n, source in pairs.items()):
        return not_run(name, "the student is narrower: its weights are parts of the teacher's")
    cause = None
    for parameter_name, parameter in student.named_parameters():
        source = pairs[parameter_name]
        if source not in theirs or not torch.equal(parameter, theirs[source]):
            cause = f"the student's {parameter_name} is not the teacher's {source}: it was not "
            cause += "copied, or changed since"
            break
    return fault(name, cause, f"layers {list(kept)} have the teacher's own weights")
