"""distil-student from teacher outputs: the live training; resumed; what it refuses to read."""

import json
import shutil

import pytest
import torch

from flagscale.artifacts import MANIFEST, open_artifact
from flagscale.errors import Interrupted, UserError
from flagscale.execution.step_process import step_process
from flagscale.megatron import platform
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import (
    DistillationRecipe,
    LayoutRecipe,
    MetRecipe,
    ModelsRecipe,
    TeacherOutputsRecipe,
    TrainingRecipe,
)
from flagscale.shared import Pointer
from flagscale.steps import distil_student as step
from flagscale.steps.cache_teacher import cache_teacher
from flagscale.steps.outputs.check import check_outputs, outputs_to_read
from flagscale.steps.search.rung import SAMPLE_LOSSES, Rung

TRAINING = TrainingRecipe(
    train_iters=4,
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    lr_warmup_iters=1,
    eval_interval=2,
    eval_iters=1,
    seed=7,
)
LIVE, CACHED = (DistillationRecipe(teacher_outputs=how) for how in ("live", "cached"))
MET = MetRecipe(train=((7, 16),), validation=4, precision="fp32")


@pytest.fixture(scope="module")
def outputs(teacher, dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    cache_teacher(TeacherOutputsRecipe(), MET, teacher, dataset, folder / "work", folder / "kept")
    return folder / "kept"


@pytest.fixture
def distil(teacher, student, dataset, tmp_path):
    def distil(name, outputs, distillation=CACHED, training=TRAINING, rung=None):
        inputs, where = (teacher, student, dataset), (tmp_path / "checkpoints", tmp_path / name)
        step.distil_student(distillation, training, *inputs, *where, outputs, rung)
        return tmp_path / name

    return distil


@pytest.fixture(scope="module")
def live(teacher, student, dataset, tmp_path_factory):
    """The training with the live teacher."""
    folder = tmp_path_factory.mktemp("live")
    where = folder / "checkpoints", folder / "live"
    step.distil_student(LIVE, TRAINING, teacher, student, dataset, *where)
    return folder / "live"


def records(artifact, name="training"):
    lines = (artifact / f"{name}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


def test_it_is_the_live_training_and_goes_on_where_it_was_stopped(
    distil, outputs, live, monkeypatch, caplog
):
    asked = []
    monkeypatch.setattr(step, "stop_requested", lambda: len(asked.append(1) or asked) == 2)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        distil("cached", outputs)
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        cached = distil("cached", outputs)
    assert "resuming after step 2" in caplog.text
    assert "in fp32): asked again, in fp32, it answers the same: hidden states" in caplog.text
    for name in ("training", "validation"):
        for ours, theirs in zip(records(cached, name), records(live, name), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
    tokens = torch.arange(64).view(1, 64)
    with platform.runtime():
        models = (load_model(path, 64) for path in (cached, live))
        ours, theirs = (logits(model, tokens) for model in models)
    assert (ours - theirs).abs().max() < 1e-5
    manifests = [open_artifact(path, "distilled-student") for path in (cached, live)]
    kept = open_artifact(outputs, "teacher-outputs").digest
    assert [m.parents.get("teacher-outputs") for m in manifests] == [kept, None]


@pytest.fixture(scope="module")
def of_two_ranks(teacher, dataset, tmp_path_factory):
    """What two ranks wrote, each with a half of the teacher."""
    folder = tmp_path_factory.mktemp("of-two-ranks")
    models = ModelsRecipe(parallelism=LayoutRecipe(tensor_model_parallel_size=2))
    where = folder / "work", folder / "kept"
    cache_teacher(TeacherOutputsRecipe(), MET, teacher, dataset, *where, models)
    return folder / "kept"


def test_two_ranks_wrote_it_and_an_object_store_has_it(
    distil, of_two_ranks, live, bucket, tmp_path, monkeypatch
):
    """One process then trains from it, as with the live teacher; no file of it is fetched whole."""
    monkeypatch.setenv("FLAGSCALE_SHARED", f"{bucket}/shared")
    with step_process("cache-teacher") as running:
        shutil.copytree(of_two_ranks, running.output(str(tmp_path / "pointer")))
    monkeypatch.delenv("FLAGSCALE_SHARED")
    shutil.rmtree(of_two_ranks)
    cached = distil("cached", tmp_path / "pointer")
    for name in ("training", "validation"):
        for ours, theirs in zip(records(cached, name), records(live, name), strict=True):
            # Two ranks add up the teacher's sums in another order.
            assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_searchs_candidate_is_measured_as_with_the_live_teacher(distil, outputs, student):
    at = Pointer("student", open_artifact(student, "student").digest, str(student), 1)
    stop = Rung(until_step=2, samples=4, student=at)
    found = []
    for name, how in (("cached", CACHED), ("live", LIVE)):
        candidate = distil(f"{name} candidate", outputs, how, rung=stop)
        open_artifact(candidate, "candidate")
        found.append(json.loads((candidate / SAMPLE_LOSSES).read_text()))
    ours, theirs = found
    assert set(ours) == set(theirs) >= {"logits distillation loss", "lm loss"}
    for name, samples in ours.items():
        assert len(samples) == 4
        for sample, loss in samples.items():
            assert loss == pytest.approx(theirs[name][sample], rel=1e-6)


@pytest.fixture
def changed(outputs, tmp_path):
    """The artifact with another fact."""

    def changed(**facts):
        folder = shutil.copytree(outputs, tmp_path / "changed")
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["facts"] |= facts
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return changed


SAMPLED = {"name": "sampled", "temperature": 2.0, "draws": 50, "seed": 0}
TOP_K = {"name": "topk", "temperature": 2.0, "top_k": 9}


@pytest.mark.parametrize(
    ("facts", "loss", "names"),
    [
        ({"teacher": "sha256:x"}, {}, "of another teacher: sha256:x, but this training's is"),
        ({"dataset": "sha256:x"}, {}, "of another dataset: sha256:x"),
        ({"tokenizer": "sha256:x"}, {}, "of another tokenizer: sha256:x"),
        ({"seq_length": 32}, {}, "of another seq_length: 32, but this training's is 64"),
        ({"vocab_size": 7}, {}, "of another vocab_size: 7"),
        ({"version": 0}, {}, "of version 0, this program reads"),
        ({"reset_attention_mask": True}, {}, "reset_attention_mask: True, but .* is False"),
        ({"codec": SAMPLED}, {}, "temperature=1.0: .* of temperature 2.0 alone"),
        ({"codec": TOP_K}, {"temperature": 2.0}, "divergence=forward_kl: .* serve top_k_kl alone"),
    ],
)
def test_answers_to_another_question_are_refused(changed, teacher, dataset, facts, loss, names):
    parents = {
        kind: open_artifact(path, kind, check_files=False)
        for kind, path in {"teacher": teacher, "dataset": dataset}.items()
    }
    with pytest.raises(UserError, match=names):
        check_outputs(changed(**facts), DistillationRecipe(**loss), TRAINING, teacher, parents)


def test_another_teachers_are_refused_before_any_process_starts(distil, changed):
    with pytest.raises(UserError, match="teacher_outputs=live"):
        distil("refused", changed(teacher="sha256:x"))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"train_iters": 5}, "of the 20 samples of train that this training meets are missing"),
        ({"eval_iters": 2}, "of the 8 samples of validation .* are missing"),
        ({"seed": 8}, "samples of train .* are missing"),
    ],
)
def test_missing_samples_are_refused_before_the_first_step(distil, outputs, changes, names):
    with pytest.raises(UserError, match=names):
        distil("refused", outputs, training=TRAINING.model_copy(update=changes))


def test_which_artifact_is_read(outputs):
    assert outputs_to_read(CACHED, outputs) == outputs
    assert outputs_to_read(DistillationRecipe(), outputs) == outputs  # auto
    assert outputs_to_read(DistillationRecipe(), None) is None
    assert outputs_to_read(LIVE, outputs) is None
    assert outputs_to_read(DistillationRecipe(loss="none"), outputs) is None
    with pytest.raises(UserError, match="there are no teacher outputs"):
        outputs_to_read(CACHED, None)
