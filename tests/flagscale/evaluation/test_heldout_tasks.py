"""Held-out tasks are made of the test split alone, always the same, and can be answered."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from flagscale.data.loader import split_documents
from flagscale.errors import UserError
from flagscale.evaluation.tasks.heldout_passages import Passage, heldout_passages, words
from flagscale.evaluation.tasks.heldout_tasks import write_heldout_tasks
from flagscale.models.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def passages(dataset: Path) -> list[Passage]:
    return heldout_passages(dataset, load_tokenizer(dataset / "tokenizer"), 500)


@pytest.fixture(scope="module")
def folder(passages: list[Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heldout")
    write_heldout_tasks(passages, folder)
    return folder


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One  two\n three ", ["One", "  two", "\n three"]),
        ("x = f(a)", ["x", " =", " f(a)"]),
        ("\u4eca\u65e5 is \u65e5\u672c", ["\u4eca", "\u65e5", " is", " \u65e5", "\u672c"]),
        ("", []),
    ],
)
def test_words_keep_the_blanks_before_them(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_passages_are_pieces_of_test_documents(dataset: Path, passages: list[Passage]) -> None:
    tokenizer = load_tokenizer(dataset / "tokenizer")
    texts = [
        tokenizer.decode(document, skip_special_tokens=True)
        for document in split_documents(dataset, "test")
    ]
    assert len(passages) >= 8
    for passage in passages:
        assert passage.shown + passage.following in texts[passage.document]
    # The first ones are of different documents.
    assert len({p.document for p in passages[:3]}) == 3
    assert len(set(passages)) == len(passages)


def test_a_cloze_asks_for_the_last_word(folder: Path, passages: list[Passage]) -> None:
    asked = rows(folder, "heldout_cloze")
    assert len(asked) == len(passages)
    for row, passage in zip(asked, passages, strict=True):
        assert row["context"] + row["continuation"] == passage.shown + passage.following
        assert len(words(row["continuation"])) == 1


def test_one_choice_is_right_and_the_others_are_of_other_documents(
    folder: Path, passages: list[Passage]
) -> None:
    asked = rows(folder, "heldout_multiple_choice")
    own = {passage.shown: passage for passage in passages}
    elsewhere = {p.following: p.document for p in passages}
    for row in asked:
        passage = own[row["context"]]
        assert row["choices"][row["label"]] == passage.following
        assert len(set(row["choices"])) == 4
        wrong = [c for i, c in enumerate(row["choices"]) if i != row["label"]]
        assert all(elsewhere[text] != passage.document for text in wrong)
    labels = np.bincount([row["label"] for row in asked], minlength=4)
    assert (labels > 0).all()  # no place is always right, or never


def test_they_are_the_same_again(passages: list[Passage], folder: Path, tmp_path: Path) -> None:
    write_heldout_tasks(passages, tmp_path)
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert yaml.safe_load((folder / "heldout_cloze.yaml").read_text())["task"] == "heldout_cloze"


@pytest.mark.parametrize("documents", [[0] * 20, [0, 1, 2]])
def test_too_few_passages_are_refused(documents: list[int], tmp_path: Path) -> None:
    few = [Passage(d, f"a {i}", f" b {i}") for i, d in enumerate(documents)]
    with pytest.raises(UserError, match=r"heldout tasks need 8 passages of two documents"):
        write_heldout_tasks(few, tmp_path)
