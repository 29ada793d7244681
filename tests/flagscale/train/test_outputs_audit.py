"""The live teacher, asked once more before training: what it finds in an artifact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from teacher_outputs import CODECS, write_outputs

from flagscale.megatron.arguments import training_arguments, with_teacher
from flagscale.megatron.global_vars import use_args
from flagscale.recipe import DistillationRecipe, ParallelismRecipe, TrainingRecipe
from flagscale.teacher_outputs import TeacherOutputs
from flagscale.train import outputs_audit
from flagscale.train.audit import AuditError
from flagscale.train.outputs_audit import audit_outputs
from flagscale.train.rank_batches import RankBatches

TRAINING = TrainingRecipe(
    train_iters=2, micro_batch_size=2, global_batch_size=4, lr=1e-3, seed=5, precision="fp32"
)


@pytest.fixture(scope="module")
def outputs(runtime, teacher, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return {
        codec: write_outputs(folder / codec, teacher, dataset, codec, folder / "data", samples=4)
        for codec in CODECS
    }


@pytest.fixture
def audit(args, teacher, dataset, tmp_path):
    def audit(folder):
        found = training_arguments(args.shape, args.seq_length, TRAINING)
        found = with_teacher(found, teacher, DistillationRecipe(), folder)
        with use_args(found):
            audit_outputs(found, RankBatches(dataset, tmp_path, found, TRAINING).train(0))

    return audit


@pytest.mark.parametrize("codec", CODECS)
def test_what_the_teacher_answered_passes(audit, outputs, codec, caplog):
    with caplog.at_level("INFO"):
        audit(outputs[codec])
    assert "it answers the same" in caplog.text


@pytest.mark.parametrize("codec", CODECS)
def test_answers_to_other_samples_do_not(audit, outputs, codec, monkeypatch):
    """Whole records, with right checksums, of the wrong samples: as a wrong index would give."""
    read = TeacherOutputs.read
    monkeypatch.setattr(
        TeacherOutputs, "read", lambda self, split, samples: read(self, split, samples[::-1])
    )
    with pytest.raises(AuditError, match=r"are not what .* answers now.*make them anew"):
        audit(outputs[codec])


@pytest.mark.parametrize("codec", ["fp32", "topk"])
def test_nor_does_a_shift_by_one_token(audit, outputs, codec, monkeypatch):
    answer = outputs_audit.CachedTeacher.answer

    def shifted(self, *where):
        found = answer(self, *where)
        if isinstance(found, torch.Tensor):
            return found.roll(1, 0)
        return found[torch.arange(len(found)).roll(2)]

    monkeypatch.setattr(outputs_audit.CachedTeacher, "answer", shifted)
    with pytest.raises(AuditError):
        audit(outputs[codec])


def test_where_the_teacher_cannot_be_divided_it_is_told(args, teacher, outputs, caplog):
    """It need not be: what is trained is the student."""
    sizes = ParallelismRecipe(pipeline_model_parallel_size=3)
    found = with_teacher(args, teacher, DistillationRecipe(), outputs["fp32"])
    audit_outputs(replace(found, parallelism=sizes), [None])
    assert "was not asked again" in caplog.text
