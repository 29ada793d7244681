"""Names of files -> splits, beside what the `datasets` library itself makes of such a folder."""

from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from flagscale.data.splits import by_split

LAYOUTS = {
    "names": ["README.md", "train.jsonl", "test.jsonl"],
    "shards": [
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002-abc.parquet",
        "data/hard-00000-of-00001.parquet",
        "extra.parquet",
    ],
    "folders": ["train/a.jsonl", "train/sub/b.jsonl", "testing/c.jsonl", "d.jsonl"],
    "numbered": ["train_0.jsonl", "train_1.jsonl", "x-eval.jsonl", "dev.jsonl"],
    "words": ["my_training.jsonl", "a test.jsonl", "validation-set.jsonl.gz", "other.jsonl"],
    "twice": ["train/train-train.jsonl", "train/a.jsonl"],
    "none": ["part-00000.jsonl", "trainer.jsonl", "contest.jsonl", "sub/x.jsonl"],
    "held out": ["trains.jsonl", "latest/a.jsonl", "test/a.jsonl"],
    "signs": ["[a] train.jsonl", "b*.jsonl"],
    "arrow": ["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_the_library(tmp_path: Path, layout: str) -> None:
    names = LAYOUTS[layout]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    patterns = get_data_patterns(str(tmp_path))
    expected = {
        str(split): {str(Path(file).relative_to(tmp_path)) for file in files}
        for split, files in DataFilesDict.from_patterns(patterns, str(tmp_path)).items()
    }
    found = by_split([name for name in names if name != "README.md"])
    assert {split: set(files) for split, files in found.items()} == expected
    assert all(len(files) == len(set(files)) for files in found.values())
