import gc
import itertools
import json
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from transformers import PreTrainedTokenizerFast

from flagscale.artifacts import hash_files, new_artifact
from flagscale.data import samples
from flagscale.data.counts import SplitCounts, add_up
from flagscale.data.document_tokens import DocumentTokens
from flagscale.data.encoder import Encoder
from flagscale.data.layout import SPLITS
from flagscale.data.loader import (
    Batches,
    BatchShape,
    prepare_index,
    split_documents,
    train_iterator,
    validation_batches,
)
from flagscale.data.rows import BadRows
from flagscale.data.sources import Document
from flagscale.data.writer import Corpus, write_splits
from flagscale.errors import UserError
from flagscale.megatron import platform

SEQ_LENGTH = 16


def write_dataset(
    path: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], bos_id: int | None = None
) -> Path:
    with new_artifact(path, "dataset", {}) as staging:
        encoder = Encoder(tokenizer, DocumentTokens(0, bos_id), 0.2, 0.2)
        documents = (Document(text, "test") for text in texts)
        counts = write_splits([Corpus(None, "text", documents, encoder, BadRows())], staging.path)
        staging.facts = {
            "splits": add_up(counts),
            "eod_id": 0,
            "bos_id": bos_id,
            "vocab_size": encoder.vocab_size,
            "seq_length": SEQ_LENGTH,
        }
    return path


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    texts = [f"Text number {i} counts {i * i}. " * (1 + i % 3) for i in range(60)]
    return write_dataset(tmp_path_factory.mktemp("loader") / "dataset", tokenizer, texts)


def train(dataset: Path, cache: Path, **changes: int) -> Iterator[dict[str, torch.Tensor]]:
    arguments = {"micro_batch_size": 2, "global_batch_size": 4, "seed": 7} | changes
    return train_iterator(dataset, cache, **arguments)


def take(batches: Iterable[dict[str, torch.Tensor]], count: int) -> list[torch.Tensor]:
    return [batch["tokens"] for batch in itertools.islice(batches, count)]


def samples_an_epoch(dataset: Path) -> int:
    tokens = sum(len(ids) for ids in split_documents(dataset, "train"))
    return (tokens - 1) // SEQ_LENGTH


def test_a_batch(dataset: Path, tmp_path: Path) -> None:
    batch = next(train(dataset, tmp_path))
    of_rows = {"tokens", "labels", "loss_mask", "position_ids"}
    assert batch.keys() == of_rows | {"samples", "split", "following"}
    assert batch["samples"].shape == batch["following"].shape == (2,)
    assert SPLITS[batch["split"]] == "train"
    assert all(batch[name].shape == (2, SEQ_LENGTH) for name in of_rows)
    assert {key: value.dtype for key, value in batch.items()} == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "loss_mask": torch.float32,
        "samples": torch.int64,
        "split": torch.int64,
        "following": torch.int64,
    }
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert batch["loss_mask"].all()
    assert torch.equal(batch["position_ids"][1], torch.arange(SEQ_LENGTH))


def test_a_batch_says_what_follows(dataset: Path, tmp_path: Path) -> None:
    batches = list(
        validation_batches(dataset, tmp_path, micro_batch_size=1, global_batch_size=2, eval_iters=2)
    )
    for one, after in itertools.pairwise(batches):
        assert torch.equal(one["following"], after["samples"])
    assert batches[-1]["following"].numel() == 0


def test_an_epoch_has_every_token_once(dataset: Path, tmp_path: Path) -> None:
    count = samples_an_epoch(dataset)
    assert count > 10
    rows = torch.cat(take(train(dataset, tmp_path, micro_batch_size=1, global_batch_size=1), count))
    stored = np.concatenate(split_documents(dataset, "train"))
    lost = len(stored) - rows.numel()
    assert 1 <= lost <= SEQ_LENGTH  # the end of the last document: no sample of its own
    surplus = np.bincount(stored, minlength=500) - np.bincount(rows.flatten(), minlength=500)
    assert surplus.min() == 0
    assert surplus.sum() == lost


def test_resuming_gives_the_same_batches(dataset: Path, tmp_path: Path) -> None:
    steps = 2 * samples_an_epoch(dataset) // 4 + 3  # into the third epoch
    whole = take(train(dataset, tmp_path), 2 * steps)
    for step in (1, 5, steps // 2, steps - 1):
        resumed = take(train(dataset, tmp_path, start_step=step), 2 * (steps - step))
        assert all(map(torch.equal, resumed, whole[2 * step :]))


def test_every_epoch_has_the_same_samples_in_another_order(dataset: Path, tmp_path: Path) -> None:
    count = samples_an_epoch(dataset)
    stream = train(dataset, tmp_path, micro_batch_size=1, global_batch_size=1)
    epochs = [[tuple(row[0].tolist()) for row in take(stream, count)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_changes_the_order(dataset: Path, tmp_path: Path) -> None:
    first, second, again = (take(train(dataset, tmp_path, seed=s), 4) for s in (1, 2, 1))
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, second))


def test_the_micro_batch_size_does_not(dataset: Path, tmp_path: Path) -> None:
    single = take(train(dataset, tmp_path, micro_batch_size=1), 8)
    assert torch.equal(torch.cat(single), torch.cat(take(train(dataset, tmp_path), 4)))


def test_ranks_share_a_global_batch(dataset: Path, tmp_path: Path) -> None:
    whole = take(train(dataset, tmp_path, global_batch_size=8), 4)
    ranks = [
        take(
            train(
                dataset,
                tmp_path,
                global_batch_size=8,
                data_parallel_rank=rank,
                data_parallel_size=2,
            ),
            2,
        )
        for rank in range(2)
    ]
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert all(map(torch.equal, whole, together))


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=6 is not a multiple of .*=2 x 2"):
        BatchShape(2, 6, data_parallel_size=2)


def test_validation_is_always_the_same(dataset: Path, tmp_path: Path) -> None:
    def validation(cache: str, eval_iters: int = 2) -> Batches:
        return validation_batches(
            dataset,
            tmp_path / cache,
            micro_batch_size=1,
            global_batch_size=2,
            eval_iters=eval_iters,
        )

    batches = validation("a")
    first = take(batches, 99)
    assert len(first) == 4
    assert all(map(torch.equal, first, take(batches, 99)))
    assert all(map(torch.equal, first, take(validation("b"), 99)))
    assert len(take(validation("a", eval_iters=500), 9999)) == 1000


def test_the_artifact_is_left_alone(dataset: Path, tmp_path: Path) -> None:
    before = hash_files(dataset)
    next(train(dataset, tmp_path))
    assert hash_files(dataset) == before


def test_half_an_index_is_built_again(dataset: Path, tmp_path: Path) -> None:
    whole = take(train(dataset, tmp_path), 4)
    (complete,) = tmp_path.rglob("complete")
    assert all(map(torch.equal, whole, take(train(dataset, tmp_path), 4)))
    complete.unlink()
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(path.read_bytes()[:20])
    assert all(map(torch.equal, whole, take(train(dataset, tmp_path), 4)))


def test_the_index_of_another_dataset_at_the_same_path(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path, cache = tmp_path / "dataset", tmp_path / "cache"
    write_dataset(path, tokenizer, [f"old {i} " * 9 for i in range(40)])
    old = take(train(path, cache), 4)
    write_dataset(path, tokenizer, [f"new {i} " * 9 for i in range(20)])
    fresh = take(train(path, tmp_path / "other"), 4)
    assert all(map(torch.equal, fresh, take(train(path, cache), 4)))
    assert not all(map(torch.equal, fresh, old))


def test_with_torch_distributed(dataset: Path, tmp_path: Path) -> None:
    alone = take(train(dataset, tmp_path / "alone"), 4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert all(map(torch.equal, alone, take(train(dataset, tmp_path / "group"), 4)))
    finally:
        dist.destroy_process_group()


def _rank(rank: int, dataset: Path, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    cache = folder / "cache"
    if rank == 0:
        with pytest.raises(RuntimeError, match="rank 0 calls prepare_index"):
            train(dataset, cache, seed=11)
        prepare_index(dataset, cache)
    dist.barrier()
    if rank == 1:  # no other process has a part in it
        batches = train(dataset, cache, data_parallel_rank=1, data_parallel_size=2, seed=11)
        torch.save(take(batches, 6), folder / "1.pt")
    dist.barrier()
    batches = train(dataset, cache, data_parallel_rank=rank, data_parallel_size=2, seed=11)
    if rank == 0:
        torch.save(take(batches, 6), folder / "0.pt")
    dist.destroy_process_group()


def test_two_processes(dataset: Path, tmp_path: Path) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    mp.spawn(_rank, args=(dataset, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = take(train(dataset, tmp_path / "alone", seed=11), 12)
    together = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert all(map(torch.equal, whole, together))


def test_documents(dataset: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    documents = split_documents(dataset, "train")
    texts = [str(tokenizer.decode(ids[:-1].tolist())) for ids in documents]
    numbers = [int(text.split()[2]) for text in texts]
    assert numbers == sorted(numbers)
    assert all(ids[-1] == 0 and ids.dtype == np.int64 for ids in documents)
    some = split_documents(dataset, "train", 5)
    places = [next(i for i, d in enumerate(documents) if np.array_equal(d, s)) for s in some]
    assert places == [i * len(documents) // 5 for i in range(5)]
    assert len(split_documents(dataset, "train", 10_000)) == len(documents)


def test_no_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no dataset here"):
        train(tmp_path, tmp_path)
    with new_artifact(tmp_path / "teacher", "teacher", {}):
        pass
    with pytest.raises(UserError, match="is a 'teacher', but a 'dataset' is needed"):
        split_documents(tmp_path / "teacher", "test")
    with pytest.raises(ValueError, match="split 'valid': must be one of train, validation, test"):
        split_documents(tmp_path, "valid")


def test_a_split_that_fills_no_sample(dataset: Path, tmp_path: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    manifest["facts"]["splits"] = {name: vars(SplitCounts(1, 16, 40)) for name in SPLITS}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="the train split has 16 tokens, a sample needs 17"):
        train(tmp_path, tmp_path / "cache")


def test_text_is_packed_as_megatrons_builder_does(dataset: Path, tmp_path: Path) -> None:
    """Byte for byte, through its own way to build; a sample's number is its place there."""
    config = GPTDatasetConfig(
        random_seed=samples.SEED,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([str(dataset / "train")], None), None, None],
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=SimpleNamespace(vocab_size=500, eod=0, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config)
    theirs = builder.build()[0]
    ours = train(dataset, tmp_path / "ours", micro_batch_size=1, global_batch_size=1)
    assert len(theirs) == samples_an_epoch(dataset)
    numbers = set()
    for batch in itertools.islice(ours, len(theirs)):
        number = int(batch["samples"])
        numbers.add(number)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(batch[name][0], theirs[number][name])
    assert numbers == set(range(len(theirs)))
    again = train(dataset, tmp_path / "other", micro_batch_size=1, global_batch_size=1, seed=8)
    batch = next(again)  # another order of the same samples
    assert torch.equal(batch["tokens"][0], theirs[int(batch["samples"])]["tokens"])


def test_documents_begin_with_bos(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Borders are before it, and EOD is not to learn that it comes next."""
    texts = [f"Text number {i} counts {i * i}. " * (1 + i % 3) for i in range(60)]
    dataset = write_dataset(tmp_path / "dataset", tokenizer, texts, bos_id=1)
    for document in split_documents(dataset, "train"):
        assert document[0] == 1
        assert document[-1] == 0
        assert not np.isin(document[1:-1], [0, 1]).any()
    for reset in (False, True):
        batches = train(dataset, tmp_path / f"{reset}", reset_attention_mask=reset)
        for batch in itertools.islice(batches, 8):
            tokens, labels = batch["tokens"], batch["labels"]
            ends = tokens == 0
            assert (labels[ends] == 1).all()
            assert torch.equal(batch["loss_mask"] == 0, ends)
            if reset:
                begins = batch["position_ids"] == 0
                begins[:, 0] = tokens[:, 0] == 1
                assert torch.equal(begins, tokens == 1)


@pytest.mark.skipif(not platform.HAS_GPU, reason="needs a GPU")
def test_batches_are_pinned_on_a_gpu_machine(dataset: Path, tmp_path: Path) -> None:
    batch = next(train(dataset, tmp_path))
    assert all(value.is_pinned() for value in batch.values())


def test_the_thread_ends_with_its_iterator(dataset: Path, tmp_path: Path) -> None:
    def working() -> int:
        return sum(thread.name == "batches" for thread in threading.enumerate())

    gc.collect()
    before = working()
    batches = train(dataset, tmp_path)
    assert working() == before  # none before a batch is asked for
    next(batches)
    assert working() == before + 1
    del batches
    gc.collect()
    assert working() == before
