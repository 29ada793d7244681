"""The order of a sweep's variants, and how far apart they are."""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser
from markdown_it import MarkdownIt
from scipy.stats import norm, t

from flagscale.errors import UserError
from flagscale.evaluation.boards.leaderboard import Candidate, Failed, rank
from flagscale.evaluation.boards.leaderboard_page import headline, render, summary_markdown
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import SHOWN, summarise

FidelityOf = Callable[..., Fidelity]


@pytest.fixture
def candidate(fidelity_of: FidelityOf) -> Callable[..., Candidate]:
    def make(number: int, kl: float, parameters: int = 1000, **changes: Any) -> Candidate:
        fidelity = fidelity_of(kl_after=kl, **changes)
        metrics = summarise(fidelity, 500, 0.95, 0) | {
            "seq_length": 32,
            "parameters": {"teacher": 9000, "student": parameters, "distilled": parameters},
        }
        return Candidate(
            number=number,
            name=f"temperature={number}.0",
            changes={
                "student.ffn_hidden_size": str(parameters),
                "distillation.temperature": f"{number}.0",
            },
            origin=str(parameters),
            metrics=metrics,
            fidelity=fidelity,
            tokens_per_second=100.0 * number,
            source=Path(f"evaluation-{number}"),
        )

    return make


Make = Callable[..., Candidate]


def test_figures_are_those_of_each_evaluation(candidate: Make) -> None:
    """The same documents and draws: together as alone."""
    candidates = [candidate(1, 2.5), candidate(2, 2.0), candidate(3, 3.0)]
    board = rank(candidates, "kl")
    assert [row.number for row in board.rows] == [2, 1, 3]
    assert [row.rank for row in board.rows] == [1, 2, 3]
    alone = {c.number: c.metrics["models"]["distilled"] for c in candidates}
    for row in board.rows:
        assert list(row.figures) == list(SHOWN)
        for figure, interval in row.figures.items():
            assert interval == pytest.approx(alone[row.number][figure], rel=1e-12)
    assert set(board.references) == {"Teacher", "Before training"}
    assert board.references["Before training"]["kl"] == pytest.approx(
        candidates[0].metrics["models"]["student"]["kl"], rel=1e-12
    )


def test_differences_are_paired_and_against_numpy(candidate: Make) -> None:
    a, b = candidate(1, 2.0), candidate(2, 2.2)
    row = rank([a, b], "kl").rows[1]
    generator = np.random.default_rng(0)
    documents = len(a.fidelity.documents)
    draws = generator.multinomial(documents, np.full(documents, 1 / documents), size=500)
    gap_d = b.fidelity.sums["distilled"]["kl"] - a.fidelity.sums["distilled"]["kl"]
    gaps = (draws @ gap_d) / (draws @ a.fidelity.tokens_d)
    assert row.difference["kl"]["value"] == pytest.approx(gap_d.sum() / a.fidelity.tokens_d.sum())
    tail = norm.cdf(t.ppf(0.025, documents - 1) * np.sqrt(documents / (documents - 1)))
    low, high = np.quantile(gaps, (tail, 1 - tail))
    assert (row.difference["kl"]["low"], row.difference["kl"]["high"]) == pytest.approx((low, high))
    assert row.verdict == "worse"
    own = row.figures["kl"]
    assert high - low < (own["high"] - own["low"]) / 5


def test_the_order_of_the_evaluations_changes_nothing(candidate: Make) -> None:
    candidates = [candidate(1, 2.5), candidate(2, 2.0, 800), candidate(3, 2.0, 900)]
    boards = {
        (json.dumps(board.as_json()), board.csv(), render(board))
        for board in (rank(list(c), "kl") for c in itertools.permutations(candidates))
    }
    assert len(boards) == 1


def test_a_tie_goes_to_the_smaller_student_then_to_the_first(candidate: Make) -> None:
    board = rank([candidate(1, 2.0, 900), candidate(2, 2.0, 800), candidate(3, 2.5)], "kl")
    assert [(row.number, row.rank) for row in board.rows] == [(2, 1), (1, 1), (3, 3)]
    assert [row.verdict for row in board.rows] == ["best", "equal", "worse"]
    assert "first, but not clearly ahead of temperature=1.0" in headline(board)
    assert set(board.references) == {
        "Teacher",
        "Before training, ffn_hidden_size=900",
        "Before training, ffn_hidden_size=800",
        "Before training, ffn_hidden_size=1000",
    }
    board = rank([candidate(2, 2.0), candidate(1, 2.0)], "kl")
    assert [row.number for row in board.rows] == [1, 2]


def test_shares_are_ordered_the_other_way_round(candidate: Make) -> None:
    low, high = candidate(1, 2.0), candidate(2, 3.0)
    better = {f: s.copy() for f, s in high.fidelity.sums["distilled"].items()}
    better["top1_agreement"] = better["top1_agreement"] + 3
    sums = {**high.fidelity.sums, "distilled": better}
    high = replace(high, fidelity=replace(high.fidelity, sums=sums))
    assert rank([low, high], "top1_agreement").winner.number == 2
    assert rank([low, high], "top1_agreement").rows[1].verdict == "worse"
    assert rank([low, high], "lm_loss").winner.number == 1


def test_one_clear_winner_is_called_the_best(candidate: Make) -> None:
    board = rank([candidate(1, 2.0), candidate(2, 2.6)], "kl")
    assert headline(board).endswith(", the best of 2 variants")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 11}, "of which 11 are the same"),
        ({"teacher_loss": 3.3}, "have different teachers"),
    ],
)
def test_refuses_what_cannot_be_compared(
    candidate: Make, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rank([candidate(1, 2.0), candidate(2, 2.0, **changes)], "kl")


def test_refuses_other_settings_of_the_bootstrap(candidate: Make) -> None:
    other = candidate(2, 2.0)
    other = replace(other, metrics={**other.metrics, "confidence": 0.9})
    with pytest.raises(UserError, match=r"confidence=0\.95, evaluation-2 with 0\.9"):
        rank([candidate(1, 2.0), other], "kl")


def test_the_table_holds_what_a_spreadsheet_needs(candidate: Make) -> None:
    board = rank([candidate(1, 2.5), candidate(2, 2.0)], "kl")
    rows = list(csv.DictReader(io.StringIO(board.csv())))
    assert [row["distillation.temperature"] for row in rows] == ["2.0", "1.0"]
    assert float(rows[1]["kl"]) == board.rows[1].figures["kl"]["value"]
    assert float(rows[1]["kl_minus_best_low"]) == board.rows[1].difference["kl"]["low"]
    assert rows[1]["verdict"] == "worse"
    assert rows[0]["tokens_per_second"] == "200.0"


class Balanced(HTMLParser):
    """Fails on tags that do not match; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_needs_no_network_and_escapes_names(
    candidate: Make, browser: Browser
) -> None:
    bad = replace(candidate(2, 2.0), name="<script>alert(1)</script>")
    page = render(rank([candidate(1, 2.5), bad], "kl"))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    text = " ".join(" ".join(parser.text).split())
    assert "Ordered by KL to the teacher" in text
    assert "+0.4" in text  # the difference, signed
    assert "<script" not in page
    assert 'src="http' not in page
    assert "<svg" in page
    browser.check(page)


def test_the_summary_is_a_table_of_all_and_escapes_names(candidate: Make) -> None:
    """Read by a Markdown parser: cells with bars, stars and tags stay cells."""
    bad = replace(candidate(2, 2.0), name="a|b <script> *c* [d](e)")
    failed = [Failed(3, "t=3", {}, "distil-student: |NaN|")]
    board = rank([candidate(1, 2.5), bad], "kl", failed)
    page = summary_markdown(board)
    shown = MarkdownIt().enable("table").render(page)
    assert shown.count("<tr>") == 1 + len(board.rows) + len(board.references)
    assert "1. a|b &lt;script&gt; *c* [d](e) (1k parameters)" in shown
    assert "<script" not in page
    assert f"<strong>{html.escape(headline(board), quote=False)}</strong>" in shown
    best = board.winner.figures["kl"]
    assert f'<td style="text-align:right">{SHOWN["kl"].text(best["value"])} (' in shown
    assert "<li>t=3 failed: distil-student: |NaN|</li>" in shown
