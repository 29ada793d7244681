"""The tiny recipe as a user runs it: commands, kills, caches, MLflow, and what comes out."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import psutil
import pytest

from components.__main__ import all_components
from flagscale.execution.notes import read_process
from flagscale.recipe import DistillationRecipe, load_recipe
from flagscale.tracking import CACHED_TAG, RESUMED_TAG

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "recipes" / "tiny.yaml"
OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "FLAGSCALE_"))}
IMPORTED = ("prepare-data", "prepare-teacher", "convert-student")
PATIENCE = 1500  # seconds: far more than is needed, on a machine with much else to do
STEPS = (*IMPORTED, "distil-student", "evaluate", "export-student")
# KFP's MLflow plugin logs these as parameters itself, and fails where one of that name is there.
KFP_INPUTS = {name for one in all_components().values() for name in one.component_spec.inputs or ()}


@dataclass
class Commands:
    """`python -m pipelines` in one folder of runs."""

    runs: Path
    teacher: Path

    def start(self, command: str, *overrides: str) -> subprocess.Popen[str]:
        sets = [f"--set={text}" for text in (f"teacher.source={self.teacher}", *overrides)]
        return subprocess.Popen(
            [sys.executable, "-m", "pipelines", command, RECIPE, "--runs", self.runs, *sets],
            cwd=ROOT,
            env=OUTSIDE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def __call__(self, command: str, *overrides: str) -> str:
        process = self.start(command, *overrides)
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        return output

    def output(self, name: str) -> Path:
        return (self.runs / "latest" / name).resolve()


def records(artifact: Path) -> list[dict[str, float]]:
    """The training log but for the speed."""
    lines = (artifact / "training.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "tokens per second"} for line in lines
    ]


@dataclass
class Finished:
    """A run that ended: what it printed and what it left."""

    output: str
    student: Path
    distilled: Path
    evaluation: Path


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path) -> Commands:
    return Commands(tmp_path_factory.mktemp("end-to-end") / "runs", tiny_teacher)


def finish(commands: Commands, *overrides: str) -> Finished:
    text = commands("run", *overrides)
    names = ("exported_student", "distilled_student", "evaluation")
    return Finished(text, *(commands.output(name) for name in names))


@pytest.fixture(scope="module")
def first(commands: Commands) -> Finished:
    return finish(commands)


@pytest.fixture(scope="module")
def killed(commands: Commands, first: Finished) -> str:
    """The baseline, whose runner and step are killed in the middle of training."""
    before = set((commands.runs / "checkpoints").glob("*/*/latest.json"))
    process = commands.start("run", "distillation.loss=none")
    deadline = time.monotonic() + PATIENCE
    while set((commands.runs / "checkpoints").glob("*/*/latest.json")) <= before:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    step = read_process(commands.runs / "latest" / "steps" / "distil-student")
    assert step
    for victim in (process.pid, int(step.split(":")[0])):
        psutil.Process(victim).send_signal(signal.SIGKILL)
    return process.communicate(timeout=PATIENCE)[0]


@pytest.fixture(scope="module")
def baseline(commands: Commands, killed: str) -> Finished:
    return finish(commands, "distillation.loss=none")


def test_the_summary_says_where_everything_is(commands: Commands, first: Finished) -> None:
    for number, name in enumerate(("check-recipe", *STEPS), start=1):
        assert f"[{number}/7] {name} done in" in first.output
    tail = first.output[first.output.index("Held-out test split") :]
    for word in ("report.html", "exported_student", "mlflow ui --backend-store-uri"):
        assert word in tail
    assert (commands.runs / "latest").is_dir()


def test_a_doctor_looks_at_what_the_run_made(commands: Commands, first: Finished) -> None:
    before = (commands.runs / "latest").resolve()
    output = commands("doctor")
    for name in IMPORTED:
        assert f"{name} reused" in output
    assert "TP1 equals TP2" in output
    assert "audit.html" in output
    assert "Warning" not in output
    # It has no student to show.
    assert (commands.runs / "latest").resolve() == before


def test_the_student_comes_closer_to_its_teacher(first: Finished) -> None:
    metrics = json.loads((first.evaluation / "metrics.json").read_text())
    before, after = (metrics["models"][name]["kl"] for name in ("student", "distilled"))
    assert after["high"] < before["low"]
    assert metrics["kl_reduction"] == pytest.approx(1 - after["value"] / before["value"])


def test_the_report_needs_no_network(first: Finished) -> None:
    html = (first.evaluation / "report.html").read_text()
    assert "<svg" in html
    assert 'src="http' not in html
    assert "<script" not in html


def test_the_student_works_outside_the_project(first: Finished, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "inputs = tokenizer('The list type', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0]))\n"
        "assert not [name for name in sys.modules if name.startswith(('flagscale', 'megatron'))]\n"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, first.student],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "The list type" in result.stdout
    assert len(result.stdout) > len("The list type") + 8


def test_another_loss_reuses_what_it_can_and_says_so(baseline: Finished) -> None:
    for name in IMPORTED:
        assert f"{name} reused from cache" in baseline.output
    assert "distil-student done in" in baseline.output


def test_killed_in_training_it_goes_on_with_the_same_losses(
    killed: str, baseline: Finished, commands: Commands, tmp_path: Path
) -> None:
    """Against the same training without a break, by the step itself."""
    from flagscale.steps.distil_student import distil_student

    assert "distil-student done in" not in killed
    assert "resuming after step" in baseline.output
    recipe = load_recipe(RECIPE)
    distil_student(
        DistillationRecipe(loss="none"),
        recipe.training,
        teacher=commands.output("teacher"),
        student=commands.output("student"),
        dataset=commands.output("dataset"),
        checkpoints=tmp_path / "checkpoints",
        output=tmp_path / "distilled",
    )
    assert records(baseline.distilled) == records(tmp_path / "distilled")


def test_the_baseline_is_set_beside_it(
    commands: Commands, first: Finished, baseline: Finished
) -> None:
    table = commands("compare")
    assert "| Distilled |" in table
    assert "| Baseline |" in table
    assert "paired" in table
    assert "lm loss" in records(baseline.distilled)[0]


def test_mlflow_has_parents_children_and_curves(
    commands: Commands, first: Finished, killed: str, baseline: Finished
) -> None:
    uri = f"sqlite:///{commands.runs}/mlflow.db"
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("flagscale-distillation")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    by_loss = {(run.data.params["distillation.loss"], run.info.status): run for run in parents}
    assert ("none", "KILLED") in by_loss  # the one that was killed
    for loss, curve_of in (("logits", "logits distillation loss"), ("none", "lm loss")):
        parent = by_loss[loss, "FINISHED"]
        children = {
            run.info.run_name: run
            for run in runs
            if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
        }
        assert set(children) == set(STEPS)
        for name, run in children.items():
            assert run.info.status == "FINISHED"
            files = {file.path for file in client.list_artifacts(run.info.run_id)}
            assert "manifest.json" in files or CACHED_TAG in run.data.tags, name
            assert run.data.params.keys().isdisjoint(KFP_INPUTS)
        assert children["evaluate"].data.metrics["distilled/kl"] > 0
        curve = client.get_metric_history(
            children["distil-student"].info.run_id, f"train/{curve_of}"
        )
        assert [point.step for point in curve] == list(range(1, 31))
        assert "report.html" in {
            file.path for file in client.list_artifacts(children["evaluate"].info.run_id)
        }
    assert client.get_registered_model("tiny").latest_versions
    trained = {run.info.run_id: run for run in runs if run.info.run_name == "distil-student"}
    (resumed,) = (run for run in trained.values() if RESUMED_TAG in run.data.tags)
    assert resumed.data.params["distillation.loss"] == "none"
    assert trained[resumed.data.tags[RESUMED_TAG]].info.status == "KILLED"
