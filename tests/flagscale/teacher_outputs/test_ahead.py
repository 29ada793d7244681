"""Reading ahead: the same answers, asked for once, and errors where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flagscale.errors import UserError
from flagscale.teacher_outputs import Hidden, ReadAhead, TeacherOutputs
from tests.flagscale.teacher_outputs.outputs import facts, make


class Counted:
    """Says what was read, and in which order."""

    def __init__(self, outputs: TeacherOutputs) -> None:
        self.outputs, self.asked = outputs, []

    def read(self, split: str, samples: list[int]) -> object:
        self.asked.append((split, samples))
        return self.outputs.read(split, samples)


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    outputs = make(tmp_path / "outputs", facts(), {"train": [0, 1, 2, 3], "validation": [0]})
    return Counted(outputs)


def same(found: object, expected: object) -> bool:
    assert isinstance(found, Hidden)
    assert isinstance(expected, Hidden)
    return torch.equal(found.hidden_bsh, expected.hidden_bsh)


def test_what_was_announced_is_read_once(counted: Counted) -> None:
    ahead, read = ReadAhead(counted), counted.outputs.read
    assert same(ahead.read("train", [1, 0], [2]), read("train", [1, 0]))
    assert same(ahead.read("validation", [0]), read("validation", [0]))  # in between
    assert same(ahead.read("train", [2], [3]), read("train", [2]))
    assert same(ahead.read("train", [3]), read("train", [3]))
    asked = [("train", [1, 0]), ("train", [2]), ("train", [3]), ("validation", [0])]
    assert sorted(counted.asked) == sorted(asked)


def test_another_may_be_asked_for(counted: Counted) -> None:
    ahead = ReadAhead(counted)
    ahead.read("train", [0], [1])
    assert same(ahead.read("train", [3]), counted.outputs.read("train", [3]))


def test_what_is_missing_is_told_when_it_is_asked_for(counted: Counted) -> None:
    ahead = ReadAhead(counted)
    ahead.read("train", [0], [7])
    with pytest.raises(UserError, match="no answer to sample 7 of train"):
        ahead.read("train", [7])
