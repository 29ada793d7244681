"""Students of many runs: which can be compared, who is preferable, and how it is shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flagscale.evaluation.boards.pareto import dominated_by
from flagscale.evaluation.boards.run_board import QUALITY, Student, boards
from flagscale.evaluation.boards.run_board_page import markdown, render
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.tasks.scores import TaskScores

LOWER = {"a": True, "b": False, "c": True}
POINTS = st.lists(
    st.fixed_dictionaries({axis: st.integers(0, 3).map(float) for axis in LOWER}), max_size=12
)


@given(POINTS)
@settings(max_examples=60)
def test_the_front_is_what_nothing_is_preferable_to(points: list[dict[str, float]]) -> None:
    def preferable(one: dict[str, float], other: dict[str, float]) -> bool:
        gains = [(other[a] - one[a]) * (1 if LOWER[a] else -1) for a in LOWER]
        return min(gains) >= 0 and max(gains) > 0

    found = dominated_by(points, LOWER)
    for point, by in zip(points, found, strict=True):
        if by is None:
            assert not any(preferable(other, point) for other in points)
        else:
            assert preferable(points[by], point)
            assert found[by] is None


@pytest.fixture
def student(fidelity_of: Callable[..., Fidelity]) -> Callable[..., Student]:
    def make(name: str, kl: float, temperature: float = 1.0, **changes: Any) -> Student:
        axes = changes.pop("axes", {"parameters": 1e6, "training_rank_seconds": 60.0})
        tasks = changes.pop("tasks", ())
        drawn = changes.pop("settings", (500, 0.95, 0))
        fidelity = fidelity_of(kl_after=kl, **changes)
        parameters = {"teacher": 9e6, "student": 1e6, "distilled": axes["parameters"]}
        metrics = summarise(fidelity, *drawn) | {"seq_length": 32, "parameters": parameters}
        return Student(
            name=name,
            run_id=f"id of {name}",
            sections={"distillation.temperature": str(temperature), "training.lr": "0.001"},
            origin="one",
            metrics=metrics,
            fidelity=fidelity,
            axes=axes,
            digests={},
            tasks=tasks,
        )

    return make


Make = Callable[..., Student]


def test_other_documents_make_another_board(student: Make) -> None:
    given = [
        student("alone", 1.0, documents=11),
        student("b", 2.2, 2.0),
        student("other teacher", 1.5, teacher_loss=3.3),
        student("a", 2.0, 4.0, settings=(300, 0.9, 7)),
    ]
    first, *others = boards(given, "kl")
    assert [row.name for row in first.leaderboard.rows] == ["a", "b"]
    assert {board.students[0].name for board in others} == {"alone", "other teacher"}
    # The surer settings of the two, the same for all.
    assert (first.leaderboard.bootstrap_samples, first.leaderboard.confidence) == (500, 0.95)
    assert first.varied == ("distillation.temperature",)
    assert first.leaderboard.rows[0].changes == {"distillation.temperature": "4.0"}


def test_preferable_in_everything_or_perhaps_by_chance(student: Make) -> None:
    small = {"parameters": 1e6, "training_rank_seconds": 60.0}
    given = [
        student("best", 2.0, axes={"parameters": 2e6, "training_rank_seconds": 60.0}),
        student("small", 2.5, axes=small),
        student("worse", 2.8, axes=small),
        student("as good", 2.5 + 1e-9, axes={**small, "training_rank_seconds": 61.0}),
    ]
    (board,) = boards(given, "kl")
    assert board.axes == (QUALITY, "parameters", "training_rank_seconds")
    places = [board.places[number] for number in (1, 2, 3, 4)]
    assert [place.dominated_by for place in places] == [None, None, 2, 2]
    assert [place.is_clear for place in places[2:]] == [True, True]
    assert places[2].values == {QUALITY: pytest.approx(2.5), **small} | {
        QUALITY: board.leaderboard.rows[3].figures["kl"]["value"]
    }
    (by_accuracy,) = boards(given, "accuracy")  # all the same: size and cost decide
    places = [by_accuracy.places[number] for number in (1, 2, 3, 4)]
    assert [place.dominated_by for place in places] == [2, None, None, 2]
    assert not places[0].is_clear


def test_an_axis_that_is_not_known_of_all_is_left_out(student: Make) -> None:
    known = {"parameters": 1e6, "exported_bytes": 4e6, "flops_a_token": 2e6}
    first = student("a", 2.0, axes={**known, "decode_tokens_per_second": 10.0})
    others = [student("b", 2.1, axes=known), student("c", 2.2)]
    (board,) = boards([first, others[0]], "kl")
    assert board.axes == (QUALITY, "exported_bytes", "flops_a_token")  # what all of them have
    (board,) = boards([first, *others], "kl")
    assert board.axes == (QUALITY, "parameters")


def scored(task: str, right: Any, examples: int = 40) -> TaskScores:
    values = {"teacher": np.ones(examples), "distilled": np.asarray(right, dtype=float)}
    reported = {model: (float(v.mean()), 0.01) for model, v in values.items()}
    return TaskScores(task, "acc", True, tuple(map(str, range(examples))), values, reported)


def test_tasks_are_compared_on_the_same_examples_alone(student: Make) -> None:
    places = np.arange(40)
    given = [
        student("a", 2.0, tasks=[scored("arc", places % 10 > 0), scored("piqa", places > 9)]),
        student("b", 2.3, tasks=[scored("arc", places % 2 > 0)]),
        student("c", 2.4, tasks=[scored("arc", places > 35), scored("piqa", places[:30] > 0, 30)]),
        student("d", 2.5),
    ]
    (board,) = boards(given, "kl")
    (arc,) = board.tasks  # piqa's examples are not the same
    assert (arc.name, arc.examples, arc.teacher) == ("arc", 40, (1.0, 0.01))
    assert list(arc.cells) == [1, 2, 3]
    assert (arc.cells[1].value, arc.cells[1].difference) == (0.9, None)
    found = arc.cells[2]
    pair = (given[1].tasks[0].values["distilled"], given[0].tasks[0].values["distilled"])
    expected = stats.bootstrap(
        pair,
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=1,
    ).confidence_interval
    assert found.difference is not None
    assert found.difference["value"] == pytest.approx(-0.4)
    for end, value in (("low", expected.low), ("high", expected.high)):
        assert abs(found.difference[end] - value) < 0.1 * (expected.high - expected.low)
    assert [cell.verdict for cell in arc.cells.values()] == ["", "worse", "worse"]
    text = markdown([board])
    assert re.search(r"\| b +\| 0.5 ± 0.01  -0.4 \(-0.\d+ to -0.\d+\) worse", text)
    assert re.search(r"\| d +\| not asked", text)
    assert re.search(r"\| Teacher +\| 1 ± 0.01", text)
    assert "arc, 40 examples" in render([board], "e")


class Page(HTMLParser):
    """What a page loads, its ids, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        for key, value in attrs:
            if key in ("src", "href", "xlink:href") and not (value or "").startswith("#"):
                self.loads.append(value or "")
            if key == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_board_and_loads_nothing(student: Make, browser: Browser) -> None:
    given = [
        student("a <b>", 2.0, 2.0, axes={"parameters": 4e6, "training_rank_seconds": 60.0}),
        student("c", 2.3),
        student("d", 2.4),
        student("elsewhere", 1.0, documents=11),
        student("elsewhere too", 1.0, 2.0, documents=11),
    ]
    sided = boards(given, "kl")
    html = render(sided, "an experiment", ["Left out: x."])
    page = Page(html)
    assert page.loads == []
    assert len({*page.ids}) == len(page.ids), "two boards' charts are not mixed up"
    assert "url(" not in html.replace("url(#", "")
    told = re.sub(r"\s+", " ", page.text)
    best = sided[0].leaderboard.winner.figures["kl"]["value"]
    assert f"a <b>: KL to the teacher {best:.3f}, the best of 3 students" in told
    assert "5 students on 2 boards" in told
    assert "Left out: x." in told
    assert "c is preferable" in told
    assert "some student's was not measured: speed." in told
    assert "id of elsewhere" in told
    assert html == render(boards(given, "kl"), "an experiment", ["Left out: x."])
    browser.check(html)


def test_the_text_has_the_same(student: Make) -> None:
    given = [student("a", 2.0, 2.0), student("b", 2.3)]
    lines = markdown(boards(given, "kl"), ["Left out: x."]).splitlines()
    cells = {line.split("|")[2].strip(): line for line in lines if line.count("|") > 7}
    assert "best" in cells["a"]
    assert re.search(r"\+0\.2\d+ \[\+0\.\d+, \+0\.\d+\], worse", cells["b"])
    assert any(re.match(r"\| distillation.temperature\s*\| 2.0\s*\| 1.0", line) for line in lines)
    assert any(line.startswith("| b ") and "a is preferable" in line for line in lines)
    assert lines[-1] == "Left out: x."
