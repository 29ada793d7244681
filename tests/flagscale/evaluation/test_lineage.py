"""Which artifacts an artifact was made of, and the page that shows it."""

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browser import Browser

from flagscale.artifacts import Manifest, new_artifact, open_artifact
from flagscale.code_version import code_version
from flagscale.evaluation.pages.lineage import lineage, render


def make(folder: Path, kind: str, facts: dict | None = None, **parents: Manifest) -> Manifest:
    with new_artifact(folder / kind, kind, {"section": {"of": kind}}, parents) as staging:
        (staging.path / "file").write_text(kind)
        staging.facts = facts or {}
    return open_artifact(folder / kind, kind)


@pytest.fixture
def export(tmp_path: Path) -> Manifest:
    """A run's last artifact, each read back from disk before the next is made of it."""
    splits = {"train": {"tokens": 12345}}
    corpora = [{"source": "<b>docs</b>"}]
    dataset = make(tmp_path, "dataset", {"splits": splits, "corpora": corpora, "long": "x" * 5000})
    origin = {"origin": {"base_model": "team/teacher", "source": "elsewhere"}}
    teacher = make(tmp_path, "teacher", origin, dataset=dataset)
    outputs = make(tmp_path, "teacher-outputs", teacher=teacher, dataset=dataset)
    student = make(tmp_path, "student", teacher=teacher, dataset=dataset)
    inputs = {"teacher": teacher, "student": student, "dataset": dataset}
    distilled = make(tmp_path, "distilled-student", **inputs, **{"teacher-outputs": outputs})
    evaluation = make(tmp_path, "evaluation", **inputs, distilled=distilled)
    return make(tmp_path, "export", distilled=distilled, evaluation=evaluation)


def test_the_last_manifest_knows_all_that_came_before(export: Manifest) -> None:
    nodes = {node.values["kind"]: node for node in lineage(export)}
    assert [*nodes] == [
        "dataset",
        "teacher",
        "student",
        "teacher-outputs",
        "distilled-student",
        "evaluation",
        "export",
    ]
    assert nodes["export"].parents["evaluation"] == nodes["evaluation"].digest
    assert nodes["teacher"].parents == {"dataset": nodes["dataset"].digest}
    for kind, node in nodes.items():
        assert node.values["recipe"] == {"section": {"of": kind}}
        assert node.values["code"] == code_version()
        assert "torch" in node.values["libraries"]
    assert "long" not in nodes["dataset"].values["facts"], "or manifests would grow and grow"
    assert len(export.ancestors) == 6


def test_what_an_artifact_is_does_not_depend_on_how_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on the code that wrote it: the same content is the same, whose cache entries hold."""
    parent = make(tmp_path, "dataset")
    first = make(tmp_path, "teacher", dataset=parent)
    monkeypatch.setattr("flagscale.artifacts.code_version", lambda: "another")
    second = make(tmp_path, "teacher", dataset=parent)
    assert second.code == "another" != first.code
    assert second.digest == first.digest


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids, self.links, self.text = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.add(given.get("id"))
        self.links += [given["href"]] if given.get("href") else []
        assert "src" not in given

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_has_every_step_and_needs_no_network(export: Manifest, browser: Browser) -> None:
    text = render(export)
    page = Page(text)
    for node in lineage(export):
        assert node.short in page.ids
        assert node.digest in page.text
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    shown = " ".join(" ".join(page.text).split())
    assert "12,345 tokens" in shown
    assert "team/teacher" in shown
    assert f"All by {code_version()}" in shown
    assert "<b>docs" not in text
    assert "<script" not in text
    assert render(export) == text
    browser.check(text)


def test_the_drawing_leads_from_the_first_to_the_last_and_crosses_no_box(export: Manifest) -> None:
    found = re.search(r"<svg.*</svg>", render(export), re.DOTALL)
    assert found
    drawing = ElementTree.fromstring(found[0])
    _, _, width, height = (float(value) for value in drawing.attrib["viewBox"].split())
    boxes = [
        tuple(float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        for box in drawing.iter("rect")
    ]
    assert len(boxes) == 7
    for x, y, w, h in boxes:
        assert 0 <= x <= x + w <= width
        assert 0 <= y <= y + h <= height
    for (x, y, w, h), (x2, y2, _, _) in itertools.pairwise(
        sorted(boxes, key=lambda b: (b[1], b[0]))
    ):
        assert y2 >= y + h or x2 > x + w, "one box hides another"
    lines = [path.attrib["d"] for path in drawing.iter("path")]
    # data-teacher, teacher-student, teacher-outputs, both to the distilled one, and two more
    assert len(lines) == 7
    tops = {(x + w / 2, y) for x, y, w, h in boxes}
    bottoms = {(x + w / 2, y + h) for x, y, w, h in boxes}
    for line in lines:
        numbers = [float(value) for value in re.findall(r"-?[\d.]+", line)]
        assert tuple(numbers[:2]) in bottoms
        assert tuple(numbers[-2:]) in tops


def test_ancestors_that_no_manifest_knows_are_said_to_be_unknown(tmp_path: Path) -> None:
    """Of an artifact that was made before manifests held them."""
    old = Manifest("teacher", {}, {"dataset": f"sha256:{'0' * 64}"}, {}, {}, None, {})
    new = make(tmp_path, "student", teacher=old)
    assert [node.title for node in lineage(new)] == ["Data", "Teacher", "Student before training"]
    assert "before manifests said what they are made of" in " ".join(Page(render(new)).text)
