import json
import os
import signal
import subprocess
import time

import mlflow
import pytest
import torch

from flagscale.artifacts import open_artifact
from flagscale.megatron import platform
from flagscale.models.megatron import load_model, logits
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.distil_student import distil_student

# Enough steps that it is stopped long before the last one.
TRAINING = TrainingRecipe(
    train_iters=40,
    micro_batch_size=2,
    global_batch_size=4,
    lr=1e-3,
    lr_warmup_iters=1,
    eval_interval=20,
    eval_iters=1,
    save_interval=2,
)

PROCESS = """
import sys
from pathlib import Path
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.steps.distil_student import distil_student
from flagscale.execution.step_process import step_process

if __name__ == "__main__":
    training = TrainingRecipe.model_validate_json(sys.argv[1])
    with step_process("distil-student"):
        distil_student(DistillationRecipe(), training, *map(Path, sys.argv[2:]))
"""


def records(artifact, name="training"):
    """What was logged, but for the speed."""
    lines = (artifact / f"{name}.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


@pytest.fixture(scope="module")
def inputs(teacher, student, dataset):
    return teacher, student, dataset


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    figures = distil_student(
        DistillationRecipe(), TRAINING, *inputs, folder / "checkpoints", folder / "distilled"
    )
    return folder, figures


def test_student_comes_closer_to_the_teacher(uninterrupted):
    folder, figures = uninterrupted
    validation = records(folder / "distilled", "validation")
    assert [record["step"] for record in validation] == [0, 20, 40]
    losses = [record["logits distillation loss"] for record in validation]
    assert losses[2] < losses[1] < losses[0]
    assert figures["validation logits distillation loss"] == losses[2]
    assert figures["steps"] == 40


def test_artifact_is_a_plain_trained_model(uninterrupted, student):
    folder, _ = uninterrupted
    open_artifact(folder / "distilled", "distilled-student")
    tokens = torch.arange(64).view(1, 64)
    with platform.runtime():
        before, after = (load_model(path, 64) for path in (student, folder / "distilled"))
        assert (logits(before, tokens) - logits(after, tokens)).abs().max() > 0.01


def test_checkpoints_go_when_the_artifact_is_there(uninterrupted):
    folder, _ = uninterrupted
    assert list((folder / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_gives_the_same_losses(
    inputs, uninterrupted, empty_store, tmp_path, python, kill
):
    """SIGTERM as a local run and a TrainJob's pods hear it; a step in a pod of KFP never does."""
    uri = f"sqlite:///{empty_store}"
    env = {**os.environ, "MLFLOW_TRACKING_URI": uri, "KFP_RUN_ID": "a-b", "MLFLOW_RUN_ID": ""}
    paths = [*inputs, tmp_path / "checkpoints", tmp_path / "distilled"]
    (tmp_path / "process.py").write_text(PROCESS)
    command = python(tmp_path / "process.py", TRAINING.model_dump_json(), *paths)
    own = {"env": env, "cwd": tmp_path, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **own)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/latest.json")), process)
    process.send_signal(kill)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == (-9 if kill == signal.SIGKILL else 143), output
    assert ("stopped after step" in output) == (kill == signal.SIGTERM)
    assert not (tmp_path / "distilled").exists()

    second = subprocess.run(command, capture_output=True, check=True, **own)
    assert "resuming after step" in second.stdout
    whole, _ = uninterrupted
    assert records(tmp_path / "distilled") == records(whole / "distilled")
    assert records(tmp_path / "distilled", "validation") == records(
        whole / "distilled", "validation"
    )
    assert_one_run_with_the_whole_curve(uri, records(whole / "distilled"))


def assert_one_run_with_the_whole_curve(uri, expected):
    """A retry in the same KFP run goes on in the run of the first attempt."""
    client = mlflow.MlflowClient(uri)
    runs = client.search_runs(
        [client.get_experiment_by_name("flagscale-distillation").experiment_id]
    )
    (run,) = (run for run in runs if run.info.run_name == "distil-student")
    assert run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/logits distillation loss")
    assert [(point.step, point.value) for point in points] == [
        (record["step"], record["logits distillation loss"]) for record in expected
    ]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_another_recipe_does_not_resume(inputs, tmp_path):
    """Only checkpoints of the very same training count."""
    from flagscale.steps.training.fingerprint import fingerprint

    parents = {"teacher": open_artifact(inputs[0], "teacher")}

    def name(**changes):
        training = {**TRAINING.model_dump(), **changes}
        return fingerprint({"distillation": {"loss": "logits"}, "training": training}, parents)

    assert name() == name(save_interval=5) == name(save_interval_minutes=None)
    assert len({name(), name(seed=1), name(lr=0.1), name(train_iters=9)}) == 4
    best = {"keep_weights": "best"}  # of those that were saved
    assert name(**best) == name(**best, keep_checkpoints=9) != name(**best, save_interval=5)
    assert name(**best) == name(**best, save_interval_minutes=1)  # those that time made never are


def test_baseline_trains_without_the_teacher(inputs, tmp_path):
    distil_student(
        DistillationRecipe(loss="none"),
        TRAINING,
        *inputs,
        tmp_path / "checkpoints",
        tmp_path / "baseline",
    )
    training = records(tmp_path / "baseline")
    assert all("lm loss" in r and "logits distillation loss" not in r for r in training)


def test_best_weights_are_kept(inputs, tmp_path):
    """At rates that do more harm at each step, the artifact is the training up to the first."""
    changes = {
        "train_iters": 5,
        "lr": 3.0,
        "lr_warmup_iters": 4,
        "lr_decay_style": "constant",
        "eval_interval": 1,
        "save_interval": 1,
        "keep_checkpoints": 1,
        "async_save": True,
    }
    recipe = TRAINING.model_copy(update={**changes, "keep_weights": "best"})
    paths = (*inputs, tmp_path / "checkpoints")
    figures = distil_student(DistillationRecipe(), recipe, *paths, tmp_path / "best")
    validated = records(tmp_path / "best", "validation")[1:]
    best = min(validated, key=lambda record: record["logits distillation loss"])
    assert figures["steps"] == best["step"] == 1
    assert figures["validation lm loss"] == best["lm loss"]

    first_rate = records(tmp_path / "best")[0]["learning rate"]
    only = {"train_iters": 1, "lr": first_rate, "lr_warmup_iters": 0, "keep_weights": "last"}
    shorter = recipe.model_copy(update=only)
    distil_student(DistillationRecipe(), shorter, *paths, tmp_path / "shorter")
    tokens = torch.arange(64).view(1, 64)
    with platform.runtime():
        ours, theirs = (load_model(tmp_path / name, 64) for name in ("best", "shorter"))
        assert torch.equal(logits(ours, tokens), logits(theirs, tokens))


def test_intermediate_terms_with_a_narrower_student(teacher, dataset, tmp_path):
    """The projection between the widths is trained, and stays out of the student."""
    from flagscale.recipe import StudentRecipe
    from flagscale.steps.convert_student import convert_student

    narrow = StudentRecipe(init="scratch", num_layers=1, hidden_size=32, num_attention_heads=2)
    convert_student(narrow, teacher, dataset, tmp_path / "student")
    pair = ("decoder.final_layernorm", "decoder.final_layernorm", "mse")
    distil_student(
        DistillationRecipe(intermediate_layer_pairs=(pair,), skip_lm_loss=False),
        TRAINING,
        teacher,
        tmp_path / "student",
        dataset,
        tmp_path / "checkpoints",
        tmp_path / "distilled",
    )
    first, *_, last = records(tmp_path / "distilled")
    assert last["intermediate distillation loss"] < first["intermediate distillation loss"]
    assert last["total loss"] == pytest.approx(
        last["lm loss"] + last["logits distillation loss"] + last["intermediate distillation loss"],
        rel=1e-5,
    )
    with platform.runtime():
        load_model(tmp_path / "distilled", 64)
