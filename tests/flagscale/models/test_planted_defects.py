"""Planted defects of a distillation, each of which the audit finds and names; and sound models."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from flagscale.data.loader import validation_batches
from flagscale.megatron import platform
from flagscale.megatron.arguments import model_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.distillation_audit import audit
from flagscale.models.distillation_proof import PROOF_LOSS
from flagscale.models.megatron import load_model
from flagscale.post_training.findings import as_text, failures

SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def arguments(teacher: Path, student: Path) -> Iterator[None]:
    args = with_teacher(model_arguments(ModelShape.load(student), SEQ_LENGTH), teacher, PROOF_LOSS)
    with platform.runtime(), use_args(args):
        yield


@pytest.fixture
def taught(teacher: Path, arguments: None) -> GPTModel:
    return load_model(teacher, SEQ_LENGTH)


@pytest.fixture
def learner(student: Path, arguments: None) -> GPTModel:
    return load_model(student, SEQ_LENGTH)


@pytest.fixture(scope="module")
def batch(dataset: Path, tmp_path_factory) -> dict[str, torch.Tensor]:
    batches = validation_batches(
        dataset,
        tmp_path_factory.mktemp("cache"),
        micro_batch_size=1,
        global_batch_size=1,
        eval_iters=1,
    )
    return next(iter(batches))


def test_sound(learner, taught, batch):
    found = audit(learner, taught, batch, 6.0)
    print(as_text(found.findings))
    assert not failures(found.findings)
