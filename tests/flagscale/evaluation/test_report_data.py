"""What a report is made of survives the disk; other runs are read beside it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_report import HOSTILE, Page, make_data
from test_token_analysis import DRAWS, VOCAB, decode, make_documents, make_table
from test_verdict import RIGHT, scores

from flagscale.artifacts import new_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT, REPORT_DATA
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.report.__main__ import main
from flagscale.evaluation.report.costs import Costs
from flagscale.evaluation.report.data import Other, ReportData
from flagscale.evaluation.report.other_runs import named_folders, with_others
from flagscale.evaluation.report.page import render
from flagscale.evaluation.report.token_analysis import find

COSTS = Costs(
    tokens=15_360,
    seconds=90.5,
    processes=2,
    device="cpu",
    flops=3.1e13,
    peak_memory={"host": 3 * 10**9},
    weight_bytes={"teacher": 4 * 10**8, "student": 3 * 10**8, "distilled": 3 * 10**8},
    flops_a_token={"teacher": 2.7e8, "student": 2e8, "distilled": 2e8},
    energy_joules=900.0,
    energy_from="an estimate",
    price=0.5,
)

SPEED = Speed("transformers", "cpu", "float32", 64, 16, 410.0, 35.2, 1_200_000_000)


@pytest.fixture
def data(fidelity_of: Callable[..., Fidelity]) -> ReportData:
    made = make_data(fidelity_of())
    findings = find(make_table(), DRAWS, np.arange(VOCAB), make_documents(), decode)
    twin = Other("twin", "run", made.fidelity.sums["distilled"])
    return replace(made, findings=findings, costs=COSTS, others=[twin])


def write(folder: Path, data: ReportData, recipe: dict[str, object]) -> Path:
    """An evaluation, as the step writes it."""
    with new_artifact(folder, "evaluation", {}) as staging:
        metrics = summarise(data.fidelity, 500, 0.95, 0) | {"seq_length": 32}
        write_json(staging.path / METRICS, metrics)
        rows = [json.dumps(row) + "\n" for row in data.fidelity.rows()]
        (staging.path / PER_DOCUMENT).write_text("".join(rows))
        replace(data, metrics=metrics).save(staging.path)
        staging.facts = {"measured": {"recipe": recipe}}
    return folder


def test_what_was_saved_renders_the_same_page(data: ReportData, tmp_path: Path) -> None:
    data.save(tmp_path)
    again = ReportData.load(tmp_path)
    assert render(again) == render(data)
    assert again.costs == data.costs
    assert again.findings == data.findings
    np.testing.assert_array_equal(
        again.fidelity.sums["distilled"]["kl"], data.fidelity.sums["distilled"]["kl"]
    )


@pytest.mark.parametrize("text", [None, "{", "{}", "[]"])
def test_what_is_damaged_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT_DATA).write_text(text)
    with pytest.raises(UserError, match=r"report\.json: not what a report is made of"):
        ReportData.load(tmp_path)


def recipe(loss: str = "logits", seed: int = 1, lr: float = 1e-4) -> dict[str, object]:
    return {"distillation": {"loss": loss}, "training": {"seed": seed, "lr": lr}}


def test_other_runs_are_what_their_recipes_say(
    fidelity_of: Callable[..., Fidelity], tmp_path: Path
) -> None:
    own = make_data(fidelity_of())
    folder = write(tmp_path / "own", own, recipe())
    made = {"none": recipe("none"), "seed": recipe(seed=2), "lr": recipe(lr=1e-3), "same": recipe()}
    others = {
        name: write(tmp_path / name, make_data(fidelity_of(kl_after=3.0)), other)
        for name, other in made.items()
    }
    found = with_others(ReportData.load(folder), folder, others)
    assert [(one.name, one.kind) for one in found.others] == [
        ("none", "baseline"),
        ("seed", "seed"),
        ("lr", "run"),
        ("same", "run"),
    ]
    page = render(found)
    assert "Beside other runs" in page
    assert "2 seeds: KL" in page
    assert "clearly closer to the teacher than the runner-up, none" in page


def test_the_page_from_the_command_line(
    fidelity_of: Callable[..., Fidelity], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write(tmp_path / "own", make_data(fidelity_of()), recipe())
    other = write(tmp_path / "other", make_data(fidelity_of(kl_after=3.0)), recipe("none"))
    shorter = write(tmp_path / "shorter", make_data(fidelity_of(documents=8)), recipe())
    page = tmp_path / "page.html"
    arguments = [str(own), "--output", str(page), "--beside"]
    assert main([*arguments, f"plain=text={other}"]) == 1  # no such folder
    assert main([*arguments, f"text alone={other}"]) == 0
    assert "the runner-up, text alone" in capsys.readouterr().out
    assert "text alone" in page.read_text()
    assert main([*arguments, f"other={shorter}"]) == 1
    assert "documents" in capsys.readouterr().err


def test_names_on_the_command_line() -> None:
    assert named_folders(["a=/x", "b=y=z"]) == {"a": Path("/x"), "b": Path("y=z")}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(UserError, match="--beside"):
            named_folders(wrong)


def test_the_whole_page_stands_alone(data: ReportData) -> None:
    """With tokens in context, tasks, other runs and costs, and hostile text in them."""
    assert data.findings
    worst = replace(data.findings.worst_tokens[0], before=HOSTILE, token=HOSTILE)
    findings = replace(data.findings, worst_tokens=(worst,))
    tasks = [scores("arc_easy", 1, RIGHT), scores(HOSTILE, 2, RIGHT, higher_is_better=False)]
    html = render(replace(data, findings=findings, generation={"teacher": [SPEED]}), tasks)
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object"}
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert max(ids.values()) == 1
    assert len(list(page.all("svg"))) == 8
    text = "".join(page.text)
    assert text.count(HOSTILE) >= 3
    for expected in (
        "Keeps 8",
        "twin",
        "15,360 tokens in 1 min 30 s",
        "31 TFLOP",
        "The teacher writes",
        "35.2 tokens/s",
        "reads 64 tokens at 410 tokens/s",
        "0.00025 kWh",
        "an estimate",
        "75.0% of the teacher's, as stored",
        "The share in the verdict leaves out",
        "by KL to the teacher the same as the runner-up, twin",
    ):
        assert expected in re.sub(r"\s+", " ", text), expected
