"""Every parallel layout against one process: losses, gradient norm, and each gradient, in fp32."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from layout_cases import CASES, KINDS, Case
from layout_worker import MODELS

from flagscale.checkpoint import load_weights
from flagscale.megatron import platform
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model
from flagscale.recipe import DataRecipe
from flagscale.steps.prepare_data import prepare_data

RELATIVE = 1e-5  # the bound for fp32
WORKER = Path(__file__).with_name("layout_worker.py")
DOCUMENT = Path(__file__).parents[3] / "docs/parallelism.md"
TABLE_BEGINS = "<!-- the rest of this file is made by `make parallelism` -->"


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory, tiny_teacher):
    """A dataset of which each sample holds the borders of some documents."""
    folder = tmp_path_factory.mktemp("short-documents")
    text = "".join(topics[name] for name in sorted(topics))
    lines = [json.dumps({"text": text[i : i + 80]}) for i in range(0, 80_000, 80)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    data = DataRecipe(
        source=str(folder / "corpus.jsonl"),
        tokenizer=str(tiny_teacher),
        seq_length=64,
        validation_fraction=0.1,
        test_fraction=0.1,
        workers=1,
    )
    prepare_data(data, folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def results(tmp_path_factory, torchrun, teacher, student, short_documents):
    """Folder of what every case left, one torchrun a number of processes."""
    folder = tmp_path_factory.mktemp("layouts")
    inputs = {"teacher": str(teacher), "student": str(student), "dataset": str(short_documents)}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    for processes in sorted({case.processes for case in CASES}):
        torchrun(processes, WORKER, folder)
    return folder


def result(folder: Path, case: str, kind: str) -> dict:
    return json.loads((folder / case / kind / "result.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout(results, teacher, student, case: Case, kind: str):
    found = result(results, case.name, kind)
    if kind in case.refused:
        assert re.search(re.escape(case.refused[kind]), found["error"])
        return
    assert "error" not in found, found["error"]
    expected = result(results, case.reference, kind)
    assert numbers(found["validation"]) == pytest.approx(numbers(expected["validation"]), RELATIVE)
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=RELATIVE)
    shape = ModelShape.load(teacher if kind == "standard" else student)
    shape = replace(shape, **MODELS[case.model])
    ours, theirs = (
        gradients(results / name / kind / "gradients", shape)
        for name in (case.name, case.reference)
    )
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error <= RELATIVE, f"{name}: {error:.2g}"


def test_borders_matter(results):
    """Packed samples are others than plain ones, or the packed layouts would show nothing."""
    plain, packed = (
        result(results, case, "standard")["records"][0]["lm loss"]
        for case in ("one process", "one process, packed")
    )
    assert abs(packed / plain - 1) > 0.01


def numbers(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "tokens per second"}


def gradients(folder: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    with platform.runtime():
        model = build_model(shape, seq_length=64)
        load_weights(model, folder)
    return dict(model.named_parameters())


def test_documented(results):
    """The table of docs/parallelism.md is what came out; `make parallelism` renews it."""
    text = DOCUMENT.read_text()
    start = text.index(TABLE_BEGINS) + len(TABLE_BEGINS)
    if "RENEW_TABLE" in os.environ:
        DOCUMENT.write_text(f"{text[:start]}\n\n{table(results)}")
    else:
        assert text[start:].strip() == table(results).strip()


def table(results: Path) -> str:
    lines = ["| layout | processes | " + " | ".join(KINDS) + " |", "|---|---:|---|---|"]
    for case in CASES:
        cells = []
        for kind in KINDS:
            error = result(results, case.name, kind).get("error")
            cells.append("equal" if error is None else f"refused: {error.split(': ', 1)[1]}")
        lines.append(f"| {case.name} | {case.processes} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
