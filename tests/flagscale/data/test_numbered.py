"""Samples by number: the very ones that training reads, and which of them it comes by."""

import itertools
from pathlib import Path

import pytest
import torch

from flagscale.data.loader import train_iterator, validation_batches
from flagscale.data.numbered import NumberedSamples

SHAPE = {"micro_batch_size": 2, "global_batch_size": 4}


@pytest.mark.parametrize("reset_attention_mask", [False, True])
def test_the_samples_that_training_reads(
    dataset: Path, tmp_path: Path, reset_attention_mask: bool
) -> None:
    training = train_iterator(
        dataset, tmp_path, seed=7, reset_attention_mask=reset_attention_mask, **SHAPE
    )
    read = list(itertools.islice(training, 6))
    there = NumberedSamples(dataset, tmp_path, "train", reset_attention_mask)
    again = list(there.batches([batch["samples"].tolist() for batch in read]))
    for batch, same in zip(read, again, strict=True):
        assert batch.keys() == same.keys()
        for name in batch.keys() - {"following"}:  # in training's order another one does
            torch.testing.assert_close(batch[name], same[name], rtol=0, atol=0)
    # 6 micro-batches are 3 steps.
    met = {number for batch in read for number in batch["samples"].tolist()}
    assert there.first(12, seed=7) == sorted(met)


def test_more_than_there_are(dataset: Path, tmp_path: Path) -> None:
    there = NumberedSamples(dataset, tmp_path, "train")
    assert there.first(3 * len(there), seed=1) == there.all()


def test_of_a_validation(dataset: Path, tmp_path: Path) -> None:
    batches = validation_batches(dataset, tmp_path, eval_iters=2, **SHAPE)
    met = {number for batch in batches for number in batch["samples"].tolist()}
    assert NumberedSamples(dataset, tmp_path, "validation").first(8) == sorted(met)
