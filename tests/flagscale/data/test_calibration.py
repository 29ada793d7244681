"""Calibration text: which samples, cut where, known by a digest."""

from pathlib import Path

import torch

from flagscale.data.calibration import OTHER_ORDER, calibration
from flagscale.data.loader import train_iterator

SEQ_LENGTH = 64


def test_it_is_not_what_training_sees_first(dataset: Path, tmp_path: Path) -> None:
    found = calibration(dataset, tmp_path / "a", 3 * SEQ_LENGTH, 7, "cpu")
    training = train_iterator(
        dataset, tmp_path / "b", micro_batch_size=3, global_batch_size=3, seed=7
    )
    assert not torch.equal(found.whole, next(training)["tokens"])


def test_it_is_of_the_train_split_in_an_order_of_its_own(dataset: Path, tmp_path: Path) -> None:
    found = calibration(dataset, tmp_path / "a", 3 * SEQ_LENGTH + 5, 7, "cpu")
    assert found.tokens == 3 * SEQ_LENGTH
    assert len(found.batches) == 1
    iterator = train_iterator(
        dataset, tmp_path / "b", micro_batch_size=3, global_batch_size=3, seed=7 ^ OTHER_ORDER
    )
    expected = next(iterator)
    for name, values in found.batches[0].items():
        assert torch.equal(values, expected[name])
    assert torch.equal(found.whole, expected["tokens"])


def test_digest_tells_texts_apart(dataset: Path, tmp_path: Path) -> None:
    def digest(tokens: int, seed: int) -> str:
        return calibration(dataset, tmp_path / "cache", tokens, seed, "cpu").digest

    assert digest(128, 7) == digest(190, 7)  # two samples both
    assert len({digest(128, 7), digest(128, 8), digest(192, 7), digest(64, 7)}) == 4


def test_of_less_than_a_sample_it_is_the_beginning(dataset: Path, tmp_path: Path) -> None:
    short, whole = (calibration(dataset, tmp_path / "c", n, 7, "cpu") for n in (20, 64))
    assert short.tokens == 20
    assert torch.equal(short.whole, whole.whole[:, :20])


def test_micro_batches_are_bounded(dataset: Path, tmp_path: Path) -> None:
    found = calibration(dataset, tmp_path / "d", 20 * SEQ_LENGTH, 7, "cpu")
    assert [len(batch["tokens"]) for batch in found.batches] == [16, 4]
