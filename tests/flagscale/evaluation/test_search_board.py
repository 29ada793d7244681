"""A rung's ranking against figures that are known, and the page of a search."""

import html.parser
import json
from dataclasses import replace

import numpy as np
import pytest
from browser import Browser
from markdown_it import MarkdownIt

from flagscale.errors import UserError
from flagscale.evaluation.search.board import Candidate, SearchBoard, after_rung
from flagscale.evaluation.search.charts import pareto
from flagscale.evaluation.search.page import headline, render, summary_markdown
from flagscale.evaluation.search.ranking import Losses, places

SAMPLES = 48


def losses(mean: float, spread: float = 0.0, seed: int = 0) -> Losses:
    """Of samples that are hard or easy for every candidate alike."""
    hard = np.random.default_rng(7).gamma(4, 0.5, SAMPLES)
    own = np.random.default_rng(seed).normal(0, spread, SAMPLES) if spread else np.zeros(SAMPLES)
    tokens = 10 + np.arange(SAMPLES) % 5
    return {
        3 * n: (float(tokens[n] * (hard[n] + mean + own[n])), float(tokens[n]))
        for n in range(SAMPLES)
    }


def test_the_order_is_that_of_the_means_over_tokens() -> None:
    given = {1: losses(0.3), 2: losses(0.1), 3: losses(0.2)}
    ranked = places(given, 3, 200, 0.95, 0.5)
    assert [place.number for place in ranked] == [2, 3, 1]
    for place in ranked:
        sums, tokens = zip(*given[place.number].values(), strict=True)
        assert place.loss["value"] == pytest.approx(sum(sums) / sum(tokens), rel=1e-12)
    assert ranked[1].difference["value"] == pytest.approx(0.1, abs=1e-12)


def test_paired_by_sample_a_small_difference_is_clear_that_single_intervals_hide() -> None:
    """Each own interval is wide, for samples differ; the difference is the same in all of them."""
    first, second = places({1: losses(0.1), 2: losses(0.11)}, 1, 500, 0.95, 0.5)
    assert first.loss["high"] > second.loss["value"]
    assert second.difference["low"] > 0
    assert second.why == "beyond the 1 that go on, clearly worse than the best"
    assert second.chance == 0.0


def test_who_is_clearly_worse_by_more_than_the_margin_is_dropped_though_there_is_room() -> None:
    given = {1: losses(0.1), 2: losses(0.2)}
    best = places(given, 2, 200, 0.95, 0.5)[0].loss["value"]
    share = 0.1 / best
    for margin, goes_on in ((share * 1.01, True), (share * 0.99, False), (0.0, False)):
        second = places(given, 2, 200, 0.95, margin)[1]
        assert second.goes_on == goes_on
        assert second.why.startswith("" if goes_on else "clearly worse than the best by more than")


def test_who_is_not_clearly_worse_goes_on_as_far_as_there_is_room() -> None:
    noisy = {n: losses(0.1 + 0.001 * n, spread=0.5, seed=n) for n in (1, 2, 3, 4)}
    for slots in (1, 2, 4):
        ranked = places(noisy, slots, 500, 0.95, 0.5)
        assert sum(place.goes_on for place in ranked) == slots
        assert all(f"beyond the {slots}" in place.why for place in ranked[slots:])
        assert all(0 < place.chance < 1 for place in ranked[1:])


def test_the_chance_is_the_share_of_resamples_as_counted_by_hand() -> None:
    a, b = losses(0.1, 0.5, 1), losses(0.1, 0.5, 2)
    best, other = places({1: a, 2: b}, 2, 400, 0.95, 0.5)
    draws = np.random.default_rng(0).multinomial(SAMPLES, np.full(SAMPLES, 1 / SAMPLES), 400)
    given = {1: a, 2: b}
    mine, theirs = (
        draws @ np.array([total for total, _ in given[place.number].values()])
        for place in (other, best)
    )
    assert other.chance == np.mean(mine < theirs)


def test_what_cannot_be_ranked_is_refused_or_last() -> None:
    broken = losses(float("nan"))
    ranked = places({1: broken, 2: losses(0.1)}, 2, 200, 0.95, 0.5)
    assert [(place.number, place.goes_on) for place in ranked] == [(2, True), (1, False)]
    fewer = dict(list(losses(0.1).items())[1:])
    with pytest.raises(UserError, match="candidates 1 and 2 were not measured on the same samples"):
        places({1: losses(0.1), 2: fewer}, 2, 200, 0.95, 0.5)
    with pytest.raises(UserError, match=r"on 1 sample\(s\), and intervals need at least 2"):
        places({1: {0: (1.0, 2.0)}}, 1, 200, 0.95, 0.5)


def board() -> SearchBoard:
    """Two rungs of five candidates, one of which failed."""
    known = [
        Candidate(
            n,
            f"layers={n}",
            {"student.num_layers": str(n)},
            made={"parameters": 1e6 * n, "memory_bytes": 4e6 * n, "keep_layers": [0, n]},
            curve=tuple((float(step), 5.0 / step + n) for step in range(1, 9)),
            tokens=100.0,
            rank_seconds=36.0,
            tokens_per_second=50.0,
        )
        for n in range(1, 5)
    ]
    failed = Candidate(
        5, "<b>odd</b>", {"student.num_layers": "5"}, "failed", "distil-student: NaN"
    )
    first = places({n: losses(0.1 * n) for n in range(1, 5)}, 2, 200, 0.95, 0.5)
    first = [replace(place, goes_on=place.number < 3) for place in first]
    everyone = after_rung([*known, failed], first, 1, dict.fromkeys(range(1, 5), 4))
    second = places({n: losses(0.1 * n, 0.5, n) for n in (1, 2)}, 1, 200, 0.95, 0.5)
    everyone = after_rung(everyone, second, 2, {1: 8, 2: 8})
    return SearchBoard(2, "distillation_loss", 0.95, SAMPLES, everyone)


def test_the_last_to_go_come_first_and_failures_last() -> None:
    found = board()
    assert [one.status for one in found.candidates] == ["goes on", *["dropped"] * 3, "failed"]
    assert [one.number for one in found.candidates][2:] == [3, 4, 5]
    assert [one.number for one in found.going_on] == [found.candidates[0].number]
    assert [point.rung for point in found.candidates[0].points] == [1, 2]
    again = SearchBoard.from_json(json.loads(json.dumps(found.as_json())))
    assert again == found


def test_no_candidate_of_the_front_is_beaten_in_both() -> None:
    found = board().candidates
    front = pareto(found, "parameters")
    points = {
        one.number: (one.points[-1].loss["value"], one.made["parameters"])
        for one in found
        if one.points
    }
    for number, (loss, size) in points.items():
        better = [n for n, (a, b) in points.items() if n != number and a <= loss and b <= size]
        assert (number in front) == (not better)


def test_the_page_shows_every_candidate_with_its_outcome_and_escapes_names() -> None:
    found = board()
    page = render(found)
    html.parser.HTMLParser().feed(page)
    assert "<b>odd" not in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert "distil-student: NaN" in page
    for one in found.candidates[:-1]:
        assert one.name in page
        for point in one.points:
            assert f"{point.loss['value']:.4f}" in page
    assert headline(found).replace("'", "&#39;") in page
    assert page.count("<figure") == 4  # no figure of the work: nothing says how much it is
    assert page == render(found)


def test_the_page_fits_a_phone_and_paper(browser: Browser) -> None:
    browser.check(render(board()))


def test_the_summary_has_a_row_for_every_candidate() -> None:
    found = board()
    shown = MarkdownIt().enable("table").render(summary_markdown(found))
    assert shown.count("<tr>") == 1 + len(found.candidates)
    assert "5. &lt;b&gt;odd&lt;/b&gt;" in shown
    assert "failed: distil-student: NaN" in shown
    assert shown.count('style="text-align:right">Rung') == 2
