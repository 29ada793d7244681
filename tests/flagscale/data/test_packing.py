import itertools
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from flagscale.data.packing import ChatSamples, load_packing, pack, save_packing

EOD = 9


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    capacity=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_every_conversation_once_and_whole(lengths: list[int], capacity: int, seed: int) -> None:
    order, firsts = pack(np.array(lengths), capacity, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert firsts[0] == 0
    assert firsts[-1] == len(lengths)
    used = [
        sum(min(lengths[i], capacity) for i in order[begin:end])
        for begin, end in itertools.pairwise(firsts)
    ]
    assert 0 < min(used) <= max(used) <= capacity
    assert sum(2 * size <= capacity for size in used) <= 1  # two half-empty rows would be one


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, 5000)
    _, firsts = pack(lengths, 1025, seed=1)
    assert lengths.sum() / ((len(firsts) - 1) * 1025) > 0.995


def test_the_seed_decides() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 200)
    first, again, other = (pack(lengths, 33, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.order, again.order)
    assert np.array_equal(first.firsts, again.firsts)
    assert not np.array_equal(first.order, other.order)
    assert len(first.firsts) == len(other.firsts)


def write(path: Path, rows: list[list[int]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for row in rows:
        builder.add_document(np.array(row), [len(row)])
    builder.finalize(f"{path}.idx")


def test_samples(tmp_path: Path) -> None:
    """Documents 1, 2 and 3 of four: one too long, and two that share a row with room left."""
    write(tmp_path / "a", [[8], [1, 2, 3, 4, 5, 6, 7], [1, 1, EOD], [2, 9]], np.uint16)
    write(tmp_path / "a.mask", [[1], [0, 0, 1, 1, 1, 1, 1], [1, 1, 0], [0, 1]], np.uint8)
    save_packing(pack(np.array([7, 3, 2]), 7, seed=0), tmp_path / "cache")
    packing = load_packing(tmp_path / "cache")
    assert len(packing.firsts) == 3
    short = ChatSamples(tmp_path / "a", tmp_path / "a.mask", np.array([1, 2, 3]), packing, 6, EOD)
    rows = {tuple(sample.tokens): sample for sample in map(short.__getitem__, range(len(short)))}
    alone = rows[1, 2, 3, 4, 5, 6]
    assert alone.labels.tolist() == [2, 3, 4, 5, 6, 7]
    assert alone.loss_mask.tolist() == [0, 1, 1, 1, 1, 1]
    assert alone.starts.tolist() == [0]
    shared = rows[1, 1, EOD, 2, 9, EOD]
    assert shared.labels.tolist() == [1, EOD, 2, 9, EOD, EOD]
    # a conversation's first token is not to be predicted from another conversation
    assert shared.loss_mask.tolist() == [1, 0, 0, 1, 0, 0]
    assert shared.starts.tolist() == [0, 3, 5]

    cut = ChatSamples(
        tmp_path / "a", tmp_path / "a.mask", np.array([1]), pack(np.array([7]), 5, 0), 4, EOD
    )
    assert cut[0].tokens.tolist() == [1, 2, 3, 4]
    assert cut[0].labels.tolist() == [2, 3, 4, 5]
