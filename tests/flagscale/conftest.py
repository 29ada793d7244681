"""Artifacts of a tiny run, made once a session by the real steps."""

import json
import pydoc_data.topics
from pathlib import Path

import pytest

from flagscale.recipe import DataRecipe, StudentRecipe, TeacherRecipe

SEQ_LENGTH = 64


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def dataset(artifacts, tiny_teacher) -> Path:
    from flagscale.steps.prepare_data import prepare_data

    corpus = artifacts / "corpus.jsonl"
    lines = [json.dumps({"text": text}) for text in pydoc_data.topics.topics.values()]
    corpus.write_text("\n".join(lines))
    recipe = DataRecipe(
        source=str(corpus),
        tokenizer=str(tiny_teacher),
        seq_length=SEQ_LENGTH,
        validation_fraction=0.1,
        test_fraction=0.1,
        workers=1,
    )
    prepare_data(recipe, artifacts / "dataset")
    return artifacts / "dataset"


@pytest.fixture(scope="session")
def teacher(artifacts, dataset, tiny_teacher) -> Path:
    from flagscale.steps.prepare_teacher import prepare_teacher

    prepare_teacher(TeacherRecipe(source=str(tiny_teacher)), dataset, artifacts / "teacher")
    return artifacts / "teacher"


@pytest.fixture(scope="session")
def student(artifacts, dataset, teacher) -> Path:
    """The teacher's layers 0 and 3."""
    from flagscale.steps.convert_student import convert_student

    recipe = StudentRecipe(init="prune", num_layers=2)
    convert_student(recipe, teacher, dataset, artifacts / "student")
    return artifacts / "student"
