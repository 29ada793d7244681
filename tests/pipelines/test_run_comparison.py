"""Runs that MLflow has, side by side: which they are, and what `compare` says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from flagscale import tracking
from flagscale.artifacts import MANIFEST, Manifest, new_artifact, write_json
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT_DATA
from flagscale.evaluation.fidelity import FIGURES, Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.tasks.scores import PER_EXAMPLE, TASKS, TaskScores, save_scores
from pipelines.__main__ import main

EXPERIMENT = "side by side"


def evaluation(folder: Path, kl: float, temperature: float, documents: int = 12) -> Path:
    """What evaluate writes, of a training at a temperature."""
    tokens_d = np.arange(30, 30 + documents)
    hard_d = np.random.default_rng(3).gamma(20, 1 / 20, documents)
    means = {"teacher": 0.0, "student": 4.0, "distilled": kl}
    sums = {
        model: {f: tokens_d * (hard_d * value if f == "kl" else 0.5) for f in FIGURES}
        for model, value in means.items()
    }
    fidelity = Fidelity(tuple(f"{documents} {d}" for d in range(documents)), tokens_d, sums)
    metrics = summarise(fidelity, 300, 0.95, 0) | {
        "seq_length": 16,
        "parameters": {"teacher": 9000, "student": 3000, "distilled": 3000},
    }
    recipe = {
        "student": {"num_layers": 2, "fingerprint": f"of {temperature}"},
        "distillation": {"temperature": temperature},
        "training": {"global_batch_size": 8},
    }
    parents = {"distilled": Manifest("distilled-student", recipe, {}, {}, {}, None, {})}
    with new_artifact(folder, "evaluation", {}, parents) as staging:
        write_json(staging.path / METRICS, metrics)
        lines = [json.dumps(row) + "\n" for row in fidelity.rows()]
        (staging.path / PER_DOCUMENT).write_text("".join(lines))
        costs = {"seconds": 20.0, "processes": 2, "price": None}
        write_json(staging.path / REPORT_DATA, {"costs": costs if temperature < 4 else None})
        staging.facts = {"measured": {"recipe": recipe}}
    return folder


class Store:
    """An experiment, filled as pipelines do."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
        place = (runs / "mlartifacts").as_uri()
        self.experiment = self.client.create_experiment(EXPERIMENT, artifact_location=place)
        self.ids: dict[str, str] = {}

    def run(self, key: str, name: str, parent: str = "", **tags: str) -> str:
        above = {tracking.PARENT_TAG: self.ids[parent]} if parent else {}
        made = self.client.create_run(self.experiment, run_name=name, tags={**above, **tags})
        self.ids[key] = made.info.run_id
        self.client.set_terminated(made.info.run_id, "FINISHED")
        return made.info.run_id

    def pipeline(self, key: str, name: str, source: str = "a") -> None:
        run_id = self.run(key, name)
        for field, value in {"data.seq_length": "16", "data.source": source}.items():
            self.client.log_param(run_id, field, value)

    def evaluated(self, key: str, parent: str, folder: Path | None) -> None:
        run_id = self.run(key, "evaluate", parent, **{tracking.PROCESS_TAG: "host:1"})
        for name in (MANIFEST, METRICS, PER_DOCUMENT, REPORT_DATA) if folder else ():
            self.client.log_artifact(run_id, str(folder / name))  # type: ignore[operator]

    def asked(self, key: str, parent: str, speed: float, right: int) -> None:
        run_id = self.run(key, "evaluate-tasks", parent)
        self.client.log_metric(run_id, "distilled/decode_tokens_per_second", speed)
        values = {"teacher": np.ones(10), "distilled": (np.arange(10) < right) * 1.0}
        reported = {model: (float(v.mean()), None) for model, v in values.items()}
        folder = self.runs / key
        folder.mkdir(parents=True)
        examples = tuple(map(str, range(10)))
        save_scores(folder, [TaskScores("arc_easy", "acc", True, examples, values, reported)])
        for name in (TASKS, PER_EXAMPLE):
            self.client.log_artifact(run_id, str(folder / name))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    made = Store(folder)
    made.pipeline("one", "tiny", source="corpus A")
    made.evaluated("one/evaluate", "one", evaluation(folder / "1", 0.5, 1.0))
    made.asked("one/tasks", "one", 40.0, right=9)
    made.pipeline("again", "tiny", source="corpus A")  # all from the cache
    made.run("again/e", "evaluate", "again", **{tracking.CACHED_TAG: made.ids["one/evaluate"]})
    made.pipeline("sweep", "swept", source="corpus B")
    for number, kl in enumerate((0.4, 0.6), start=1):
        measured = evaluation(folder / f"sweep {number}", kl, 2.0 * number)
        made.evaluated(f"sweep/{number}", "sweep", measured)
    made.asked("sweep/tasks", "sweep", 99.0, right=8)
    made.pipeline("two", "tiny", source="corpus A")
    made.evaluated("two/evaluate", "two", evaluation(folder / "3", 0.7, 3.0))
    made.asked("two/tasks", "two", 50.0, right=2)
    made.pipeline("other", "elsewhere")
    made.evaluated("other/evaluate", "other", evaluation(folder / "2", 0.1, 1.0, documents=13))
    made.pipeline("lost", "lost")
    made.evaluated("lost/evaluate", "lost", None)
    made.run("one/task", "evaluate", "one")  # KFP's plugin makes one of its own
    made.pipeline("failed", "failed")
    made.run("failed/evaluate", "evaluate", "failed", **{tracking.PROCESS_TAG: "host:1"})
    made.client.update_run(made.ids["failed/evaluate"], status="FAILED")
    return made


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def compare(store: Store, capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    code = main(["compare", "--runs", str(store.runs), *map(str, arguments)])
    out = capsys.readouterr()
    return code, out.out + out.err


def test_an_experiment_is_one_leaderboard_a_set_of_documents(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new" / "page.html"
    code, text = compare(store, capsys, "--experiment", EXPERIMENT, "--output", page)
    assert code == 0
    first, second = (f"swept {store.ids[f'sweep/{number}'][:8]}" for number in (1, 2))
    one = f"tiny {store.ids['one'][:8]}"
    order = [line.split("|")[2].strip() for line in text.splitlines() if line.count("|") > 7]
    two = f"tiny {store.ids['two'][:8]}"
    assert order[2:6] == [first, one, second, two]  # by KL; the cached run is the same student
    assert f"elsewhere {store.ids['other'][:8]}: KL to the teacher" in text
    assert f"Left out: lost {store.ids['lost'][:8]}, whose evaluation is not in MLflow." in text
    assert "failed" not in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert [cell.strip() for cell in rows["data.source"].split("|")[2:-1]] == [
        "corpus B",
        "corpus A",
        "corpus B",
        "corpus A",
    ]
    assert [cell.strip() for cell in rows["distillation.temperature"].split("|")[2:-1]] == [
        "2.0",
        "1.0",
        "4.0",
        "3.0",
    ]
    assert not any("fingerprint" in row for row in rows)
    # Of one variant it is not known what its training cost, nor which of the two was asked tasks.
    assert "| Size, parameters | Pareto front" in text
    assert "not asked" in rows[first]
    assert f"page     {page}" in text
    assert EXPERIMENT in page.read_text()


def test_two_runs_by_id(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = compare(
        store, capsys, "--run-ids", store.ids["again"], store.ids["sweep/2"], "--metric", "kl"
    )
    assert code == 0
    assert f"tiny {store.ids['again'][:8]}: KL to the teacher" in text
    assert "the best of 2 students" in text
    code, text = compare(store, capsys, "--run-ids", store.ids["one"], store.ids["two"])
    rows = [line for line in text.splitlines() if line.startswith("| tiny")]
    one, two = (f"tiny {store.ids[key][:8]}" for key in ("one", "two"))
    assert "Speed of generation, tokens/s | Training, rank-seconds" in text
    assert {row.split("|")[1].strip(): row.split("|")[4].strip() for row in rows[:2]} == {
        one: "40",
        two: "50",
    }
    assert (store.runs / "comparison.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--experiment", "none"), "experiment 'none': there is none at sqlite"),
        (("--experiment", "Default"), "no run of it was evaluated yet"),
        (("--run-ids", "{one}"), "at least two runs are compared"),
        (("--run-ids", "{one}", "{again}"), "have the same evaluation, one of them from the cache"),
        (("--run-ids", "{one}", "{other}"), "measured 12 documents"),
        (("--run-ids", "{one}", "{sweep}"), "has measured 2 students: name one of its runs of"),
        (("--run-ids", "{one}", "{failed}"), "(failed) has measured 0 students"),
        (("--run-ids", "{one}", "{lost}"), "has 1 student(s) to compare, at least 2"),
        (("--run-ids", "{one}", "f" * 32), "there is none at sqlite"),
        (("recipes/tiny.yaml", "--experiment", EXPERIMENT), "leave out the one given"),
        (("recipes/tiny.yaml", "--metric", "kl"), "--metric goes with --experiment"),
    ],
)
def test_what_cannot_be_compared_is_told(
    store: Store,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    said: str,
) -> None:
    code, text = compare(store, capsys, *(one.format(**store.ids) for one in arguments))
    assert code == 2
    assert said in text


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--experiment", "e", "--runs", str(tmp_path)]) == 2
    assert f"{tmp_path}/mlflow.db: no runs are tracked there" in capsys.readouterr().err
