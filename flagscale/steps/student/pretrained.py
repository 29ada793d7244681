"""What convert-student does besides where the student is a Hugging Face model of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.models.pretrained import Pretrained, check_early, open_pretrained
from flagscale.models.same_tokenizer import check_same_tokenizer
from flagscale.models.source import weights_folder
from flagscale.models.tokenizers import load_tokenizer
from flagscale.recipe import ParallelismRecipe, SourceRecipe

_SECTION = "student"


def check_pretrained(
    recipe: SourceRecipe,
    teacher: ModelShape,
    dataset: Path,
    facts: Mapping[str, Any],
    sizes: ParallelismRecipe,
) -> None:
    """Refuse a student that does not fit teacher and text, before its weights are fetched.

    Args:
        recipe: where the student comes from.
        teacher: its shape.
        dataset: the artifact.
        facts: of its manifest.
        sizes: that both models are divided by.

    Raises:
        UserError: its tokenizer is another, it is not supported, or it cannot be divided so.
    """
    own = load_tokenizer(recipe.source, recipe.revision)
    whose = "the teacher's, which the data was made with"
    check_same_tokenizer(load_tokenizer(dataset / "tokenizer"), own, recipe.source, whose)
    shape = check_early(_SECTION, recipe, facts, sizes)
    if shape is not None:
        _check_vocabulary(recipe, shape, teacher)


@contextmanager
def pretrained_folder(recipe: SourceRecipe | None) -> Iterator[Path | None]:
    """The folder with the student's configuration and weights; None without a source."""
    if recipe is None:
        yield None
        return
    with weights_folder(recipe.source, recipe.revision) as folder:
        yield folder


def open_student(
    recipe: SourceRecipe, folder: Path, teacher: ModelShape, facts: Mapping[str, Any]
) -> Pretrained:
    """The student as its folder has it.

    Raises:
        UserError: see `open_pretrained`; or it knows fewer tokens than the teacher.
    """
    student = open_pretrained(_SECTION, recipe, folder, facts)
    _check_vocabulary(recipe, student.shape, teacher)
    return student


def _check_vocabulary(recipe: SourceRecipe, student: ModelShape, teacher: ModelShape) -> None:
    """A tokenizer may know more tokens than a model; both models must know the same."""
    if student.vocab_size != teacher.vocab_size:
        raise UserError(
            f"student.source={recipe.source}: it knows {student.vocab_size} tokens of the "
            f"tokenizer, and the teacher {teacher.vocab_size}; give a model that knows the same"
        )
