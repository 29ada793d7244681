import io
import json
from pathlib import Path

from pipelines.local.output import StepOutput
from pipelines.local.steps import RunResult, StepResult
from pipelines.local.summary import summary
from pipelines.outcome import duration


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def test_the_summary_shows_figures_times_and_places(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    figures = {"lm_loss": 3.2, "perplexity": 24.5, "kl": 0.0, "top1_agreement": 1.0}
    models = {
        "teacher": {f: interval(v, 0) for f, v in figures.items()},
        "student": {f: interval(v + 9, 0.5) for f, v in figures.items()},
        "distilled": {f: interval(v + 2, 0.25) for f, v in figures.items()},
    }
    metrics = {"models": models, "documents": 12, "tokens": 3456, "confidence": 0.95}
    (results / "metrics.json").write_text(json.dumps({**metrics, "kl_reduction": 0.8125}))
    result = RunResult(tmp_path, "sqlite:////x/mlflow.db", "/#/experiments/1", 200.4)
    result.steps["prepare-data"] = StepResult(3.0, reused=True, outputs={})
    report = tmp_path / "report"
    result.steps["evaluate"] = StepResult(
        61.0, reused=False, outputs={"evaluation": results, "report": report}
    )
    (tmp_path / "page").write_text("<h1>Lineage</h1>")
    made = {"exported_student": tmp_path, "lineage": tmp_path / "page"}
    result.steps["export-student"] = StepResult(1.0, reused=True, outputs=made)
    text = summary(result)
    assert f"lineage  {tmp_path}/lineage.html" in text
    assert (tmp_path / "lineage.html").read_text() == "<h1>Lineage</h1>"
    assert "12 documents, 3,456 tokens; 95% intervals" in text
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert "12.200 [11.700, 12.700]" in lines["student before"]
    assert lines["teacher"].split()[1:] == ["3.200", "24.5", "0.000", "1.000"]
    assert "The student's KL fell by 81.2% in training." in text
    assert "Wall time 3 min 20 s" in text
    assert "prepare-data     reused from cache" in text
    assert "evaluate         1 min 01 s" in text
    assert f"report   {tmp_path}/evaluation/report.html" in text
    assert "mlflow ui --backend-store-uri sqlite:////x/mlflow.db" in text
    assert "then http://127.0.0.1:5000/#/experiments/1" in text
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["steps"]["prepare-data"]["reused"] is True
    assert facts["metrics"]["kl_reduction"] == 0.8125


def test_durations() -> None:
    assert [duration(s) for s in (0.2, 59.4, 60, 3725)] == [
        "0 s",
        "59 s",
        "1 min 00 s",
        "62 min 05 s",
    ]


def test_step_output_drops_what_kfp_adds() -> None:
    shown = io.StringIO()
    output = StepOutput(shown)
    output.write("    [KFP Executor 2026 INFO]: Got executor_input:\n    {\n        'a': 1\n")
    output.write("    }\n    12:00:00 step 1")
    assert shown.getvalue() == ""
    output.write("\n    \n" + "-" * 80 + "\n")
    output.write("    [KFP Executor 2026 INFO]: Looking\n        indented\n")
    assert shown.getvalue() == "    12:00:00 step 1\n        indented\n"


def test_the_summary_of_a_sweep_ends_with_its_leaderboard(tmp_path: Path) -> None:
    table = tmp_path / "table"
    table.mkdir()
    names = ("lm_loss", "perplexity", "kl", "top1_agreement", "accuracy")

    def row(rank: int, name: str, value: float, verdict: str) -> dict[str, object]:
        figures = {f: interval(value, 0.25) for f in names}
        return {"rank": rank, "name": name, "figures": figures, "verdict": verdict}

    board = {
        "metric": "accuracy",
        "rows": [row(1, "temperature=2.0", 3, "best"), row(2, "temperature=1.0", 2, "not clear")],
        "references": {"Teacher": {f: interval(9, 0) for f in names}},
        "documents": 12,
        "tokens": 3456,
        "confidence": 0.9,
    }
    (table / "leaderboard.json").write_text(json.dumps(board))
    result = RunResult(tmp_path, "http://mlflow", seconds=1.0)
    for number, variant in enumerate(("temperature=1.0", "temperature=2.0"), start=1):
        result.steps[f"evaluate-{number}"] = StepResult(61.0, False, {}, variant)
    result.steps["leaderboard"] = StepResult(2.0, reused=False, outputs={"leaderboard": table})
    result.steps["export-winner"] = StepResult(2.0, reused=False, outputs={})
    text = summary(result)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    heading = "token accuracy LM loss perplexity KL to teacher top-1 agreement beside the best"
    first = lines.index(heading)
    assert lines[first + 1].startswith("1 temperature=2.0 3.000 [2.750, 3.250] 3.000")
    assert lines[first + 2].endswith("not clear")
    assert lines[first + 3].startswith("Teacher 9.000 9.000 9.0")
    assert lines[first + 4] == "The best by token accuracy is exported: temperature=2.0."
    assert "90% intervals" in text
    assert "evaluate-2 1 min 01 s temperature=2.0" in lines
    assert f"report {tmp_path}/leaderboard/report.html" in lines
    assert f"student {tmp_path}/exported_student" in lines
    assert "MLflow http://mlflow" in lines
    facts = json.loads((tmp_path / "summary.json").read_text())
    assert facts["leaderboard"] == board
    assert facts["steps"]["evaluate-2"]["variant"] == "temperature=2.0"
