"""Our writer and reader of indexed datasets against Megatron-Core's own."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from flagscale.data.indexed import IndexedWriter, sequence_lengths, token_type

COUNTER = itertools.count()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=20),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32]),
)
def test_files_are_megatrons_byte_for_byte(
    tmp_path: Path, lengths: list[int], dtype: type[np.number[Any]]
) -> None:
    folder = tmp_path / str(next(COUNTER))
    folder.mkdir()
    random = np.random.default_rng(len(lengths))
    documents = [random.integers(0, 255, length) for length in lengths]
    writer = IndexedWriter(folder / "ours.mask", dtype)
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for document in documents:
        writer.add(document)
        builder.add_document(document, [len(document)])
    writer.finish()
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in ("bin", "idx"):
        ours, theirs = folder / f"ours.mask.{suffix}", folder / f"theirs.{suffix}"
        assert ours.read_bytes() == theirs.read_bytes()
    assert sequence_lengths(folder / "theirs").tolist() == lengths
    if sum(lengths):  # an empty file cannot be mapped
        indexed = IndexedDataset(str(folder / "ours.mask"))
        assert all((indexed.get(i) == document).all() for i, document in enumerate(documents))


@pytest.mark.parametrize("size", [1, 65499, 65500, 65501, 200_000])
def test_type_of_tokens_is_megatrons(size: int) -> None:
    assert token_type(size) is DType.optimal_dtype(size)


@pytest.mark.parametrize("content", [b"", b"MMIDIDX\0\0", b"x" * 50])
def test_another_file_is_no_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.idx").write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.idx: is no index"):
        sequence_lengths(tmp_path / "train")
