"""The report stands alone, is safe, and says what the figures say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from browser import Browser

from flagscale.artifacts import Manifest
from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.page import headline, render

HOSTILE = "</p><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)>"
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects tags and text, and complains about tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.tags if name == tag)


def manifest(kind: str, recipe: dict[str, object], facts: dict[str, object]) -> Manifest:
    return Manifest(kind, recipe, {}, {}, facts, "sha256:tokenizer", {"torch": "2.13.0"})


def make_data(fidelity: Fidelity) -> ReportData:
    log = [
        {
            "step": step,
            "logits distillation loss": 10 / step,
            "lm loss": 12 / step,
            "learning rate": 3e-4 / step,
            "grad norm": 5 / step,
        }
        for step in (1, 2, 3, 4)
    ]
    return ReportData(
        metrics=summarise(fidelity, 500, 0.95, 0),
        fidelity=fidelity,
        training=log,
        validation=[{"step": 4, "lm loss": 3.5, "logits distillation loss": 2.7}],
        generations=[
            {"prompt": HOSTILE, "teacher": " a list", "student": "", "distilled": HOSTILE}
        ],
        layers={"teacher": 30, "student": 10, "distilled": 10},
        parameters={"teacher": 134_515_008, "student": 63_717_504, "distilled": 63_717_504},
        manifests={
            "dataset": manifest("dataset", {"data": {"source": HOSTILE}}, {"splits": {"n": 3}}),
            "teacher": manifest("teacher", {"teacher": {"source": "a/model"}}, {"ok": True}),
            "student": manifest("student", {"student": {"num_layers": 10}}, {}),
            "distilled": manifest("distilled-student", {"training": {"lr": 3e-4}}, {"steps": 4}),
        },
        evaluation={"max_documents": 64, "prompts": [HOSTILE]},
    )


@pytest.fixture
def data(fidelity_of: Callable[..., Fidelity]) -> ReportData:
    return make_data(fidelity_of())


def test_needs_nothing_from_outside(data: ReportData) -> None:
    html = render(data)
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "img", "object", "embed", "base"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert attributes.get(name, "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert "@import" not in style.group(1)
    assert "url(" not in style.group(1)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))


def test_fits_a_phone_and_paper(data: ReportData, browser: Browser) -> None:
    browser.check(render(data))


def test_hostile_text_is_only_text(data: ReportData) -> None:
    html = render(data)
    assert "<script" not in html
    assert HOSTILE in "".join(Page(html).text)


def test_tables_and_pictures_are_accessible(data: ReportData) -> None:
    page = Page(render(data))
    assert {a.get("scope") for a in page.all("th")} == {"row", "col"}
    charts = list(page.all("svg"))
    assert len(charts) == 4
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert max(ids.values()) == 1
    for chart in charts:
        assert chart["role"] == "img"
        assert all(reference in ids for reference in chart["aria-labelledby"].split())
    for _, attributes in page.tags:
        reference = attributes.get("href", "")
        assert not reference or reference[1:] in ids
    assert next(page.all("html"))["lang"] == "en"


def test_shows_the_figures(data: ReportData) -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(render(data)).text))
    assert "KL to the teacher falls by 80%" in text
    for expected in ("a/model", "30 layers", "63.7M", "max documents", "sha256:", "2.13.0"):
        assert expected in text


def test_same_data_same_bytes(data: ReportData) -> None:
    assert render(data) == render(data)


def test_charts_take_their_colours_from_the_page(data: ReportData) -> None:
    svg = re.findall(r"<svg.*?</svg>", render(data), re.DOTALL)
    assert all("var(--" in chart for chart in svg)
    assert not [c for chart in svg for c in re.findall(r"#0102\w\w", chart)]


def test_without_logs_or_prompts(data: ReportData) -> None:
    page = Page(render(replace(data, training=[], validation=[], generations=[])))
    assert len(list(page.all("svg"))) == 1
    assert "What the models write" not in "".join(page.text)


def test_losses_that_are_nothing_are_left_out(data: ReportData) -> None:
    training = [{"step": s, "lm loss": 5 / s, "logits distillation loss": 0.0} for s in (1, 2)]
    validation = [{"step": 2, "lm loss": 3.0, "intermediate distillation loss": 0.0}]
    validation[0]["attention distillation loss"] = 0.5
    html = render(replace(data, training=training, validation=validation))
    assert "Training: LM loss 5 at step 1, 2.5 at step 2. Validation: LM loss 3 at step 2" in html
    assert "attention loss 0.5 at step 2" in html
    assert "intermediate loss" not in html


def test_blank_lines_do_not_fill_the_page(data: ReportData) -> None:
    long = "one\n\n\n \n\ntwo" + "\n" * 50
    html = render(replace(data, generations=[{**data.generations[0], "teacher": long}]))
    assert "one\n\ntwo</p>" in html


def test_many_documents(fidelity_of: Callable[..., Fidelity]) -> None:
    assert len(render(make_data(fidelity_of(documents=5000)))) < 200_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kl_after": 2.0}, "falls by 80%"),
        ({"kl_after": 0.001}, "falls by 99.99%"),
        ({"kl_after": 12.0}, "rises by 20%"),
        ({"kl_after": 2.0, "kl_before": 0.0}, "more than before"),
        ({"kl_after": 10.0}, "the same as before"),
    ],
)
def test_headline(
    fidelity_of: Callable[..., Fidelity], changes: dict[str, float], expected: str
) -> None:
    assert expected in headline(summarise(fidelity_of(**changes), 500, 0.95, 0))
