"""The verdict claims no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from test_report import make_data

from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.report.data import Other, ReportData
from flagscale.evaluation.report.page import render
from flagscale.evaluation.report.summary import summary_markdown
from flagscale.evaluation.report.verdict import kept, percent, seeds_spread, verdict
from flagscale.evaluation.tasks.scores import TaskScores


@pytest.fixture
def data(fidelity_of: Callable[..., Fidelity]) -> ReportData:
    return make_data(fidelity_of(documents=40))


def scores(task: str, seed: int, right: dict[str, float], **changes: object) -> TaskScores:
    """Answers of models that are right as often as they say, on the same 200 examples."""
    hard_e = np.random.default_rng(seed).random(200)
    values = {model: (hard_e < share).astype(float) for model, share in right.items()}
    reported = {model: (float(v.mean()), 0.03) for model, v in values.items()}
    examples = tuple(f"{task}-{i}" for i in range(200))
    one = TaskScores(task, "acc", True, examples, values, reported)
    return replace(one, **changes)


RIGHT = {"teacher": 0.8, "student": 0.3, "distilled": 0.7}


def test_without_tasks_it_is_token_accuracy(data: ReportData) -> None:
    found = kept(data)
    accuracy = {m: s["accuracy"].sum() for m, s in data.fidelity.sums.items()}
    share = accuracy["distilled"] / accuracy["teacher"]
    assert found.share
    assert found.share.value == pytest.approx(share)
    assert found.share.low < share < found.share.high
    text = verdict(data)
    assert text.startswith(f"Keeps {percent(share)} [")
    assert "of the teacher's token accuracy on 40 held-out documents at 47% of its size" in text
    assert text.endswith("clearly closer to the teacher than it was before distillation")


def test_what_no_teacher_taught_is_not_called_distilled(data: ReportData) -> None:
    trained = replace(data.manifests["distilled"], recipe={"distillation": {"loss": "none"}})
    alone = replace(data, manifests={**data.manifests, "distilled": trained})
    assert verdict(alone).endswith("clearly closer to the teacher than it was before training")
    page = render(alone)
    assert "Training report" in page
    assert "a student of 10 that was trained on the text alone" in page
    assert "after distillation" not in page
    assert "Distillation report" in render(data)


def test_of_tasks_it_is_the_mean_that_is_kept(data: ReportData) -> None:
    tasks = [scores("a", 1, RIGHT), scores("b", 2, RIGHT)]
    found = kept(data, tasks)
    means = {m: np.mean([t.values[m].mean() for t in tasks]) for m in RIGHT}
    assert found.share
    assert found.share.value == pytest.approx(means["distilled"] / means["teacher"])
    assert found.share.low < found.share.value < found.share.high < 1
    assert "of the teacher on 2 tasks at 47% of its size" in verdict(data, tasks)


def test_only_first_metrics_count_of_which_more_is_better(data: ReportData) -> None:
    good = scores("a", 1, RIGHT)
    norm = replace(good, metric="acc_norm", values={m: v * 0 + 1 for m, v in good.values.items()})
    perplexity = scores("p", 3, RIGHT, higher_is_better=False)
    corpus = scores("bleu", 4, RIGHT, values={})
    found = kept(data, [good, norm, perplexity, corpus])
    assert found == replace(kept(data, [good]), left_out=("p", "bleu"))
    assert "on a at" in verdict(data, [good, perplexity])
    nothing = kept(data, [perplexity])
    assert nothing == replace(kept(data), left_out=("p",))


def test_a_teacher_that_is_never_right_leaves_nothing_to_keep(data: ReportData) -> None:
    tasks = [scores("a", 1, {"teacher": 0.0, "distilled": 0.5})]
    assert kept(data, tasks).share is None
    assert verdict(data, tasks).startswith("The teacher has nothing to keep of")


@pytest.mark.parametrize(
    ("factor", "said"),
    [
        (1.5, "clearly closer to the teacher than the runner-up, x"),
        (0.5, "clearly further from it than x"),
        (1.0, "by KL to the teacher the same as the runner-up, x"),
    ],
)
def test_the_runner_up(data: ReportData, factor: float, said: str) -> None:
    own = data.fidelity.sums["distilled"]
    others = [
        Other("far", "baseline", {**own, "kl": own["kl"] * 3}),
        Other("x", "run", {**own, "kl": own["kl"] * factor}),
        Other("lucky seed", "seed", {**own, "kl": own["kl"] * 0}),
    ]
    assert verdict(replace(data, others=others)).endswith(said)


def test_a_runner_up_within_the_noise(data: ReportData) -> None:
    own = data.fidelity.sums["distilled"]
    noise = np.random.default_rng(0).normal(1, 0.2, len(own["kl"]))
    other = Other("twin", "run", {**own, "kl": own["kl"] * noise})
    text = verdict(replace(data, others=[other]))
    assert "not distinguishable from" in text


def test_seeds_are_told_with_their_spread(data: ReportData) -> None:
    assert seeds_spread(data) == ""
    own = data.fidelity.sums["distilled"]
    others = [Other(str(f), "seed", {**own, "kl": own["kl"] * f}) for f in (1.1, 0.9)]
    kl = own["kl"].sum() / data.fidelity.tokens_d.sum()
    text = seeds_spread(replace(data, others=others))
    assert f"3 seeds: KL {kl:.4g} on average, standard deviation {0.1 * kl:.2g}" in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100.0%"), (0.99996, "100.00%"), (0.9973, "99.73%"), (0.94123, "94.1%"), (0.79, "79.0%")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_summary(data: ReportData) -> None:
    tasks = [scores("arc_easy", 1, RIGHT), scores("<b>|", 2, RIGHT)]
    text = summary_markdown(data, tasks)
    lines = text.splitlines()
    assert lines[0].startswith("**Keeps ")
    assert "| arc\\_easy | " in text
    assert "<b>" not in text
    rows = [line for line in lines if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {5}
    kl = data.metrics["models"]["distilled"]["kl"]["value"]
    assert f"{kl:.3f} [" in text
    assert summary_markdown(data).count("| Task |") == 0
