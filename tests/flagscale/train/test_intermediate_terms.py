"""Intermediate terms on every layout against one process, in fp32; and what they train."""

import json
from pathlib import Path

import pytest
import torch
from terms_worker import BF16, LAYOUTS, REFERENCES, Layout

RELATIVE = 1e-5  # the bound for fp32
WORKER = Path(__file__).with_name("terms_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory, torchrun, teacher, dataset):
    folder = tmp_path_factory.mktemp("terms")
    inputs = {"teacher": str(teacher), "dataset": str(dataset)}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    for processes in sorted({layout.processes for layout in [*REFERENCES.values(), *LAYOUTS]}):
        torchrun(processes, WORKER, folder)
    return folder


def result(folder: Path, layout: Layout) -> dict:
    return torch.load(folder / f"{layout.name}.pt")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_equals_one_process(results, layout):
    reference = next(one for end, one in REFERENCES.items() if layout.name.endswith(end))
    found, expected = result(results, layout), result(results, reference)
    assert found["validation"] == pytest.approx(expected["validation"], rel=RELATIVE)
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=RELATIVE)
    theirs = dict(expected["gradients"])
    assert {name for name, _ in found["gradients"]} == set(theirs)
    for name, gradient in found["gradients"]:  # of every rank that has it
        error = (gradient - theirs[name]).norm() / theirs[name].norm()
        assert error <= RELATIVE, f"{name}: {error:.2g}"


@pytest.mark.parametrize("layout", [*REFERENCES.values(), *LAYOUTS], ids=lambda layout: layout.name)
def test_the_audit_looks_at_each_kind_of_term(results, layout):
    """On every layout; a wrong one would have ended the training."""
    told = result(results, layout)["audits"]
    assert len(told) == 2
    kinds = (
        ["intermediate"] if layout.name.endswith("whole layers") else ["intermediate", "attention"]
    )
    assert all(f"{kind} loss within" in audit for audit in told for kind in kinds)


def numbers(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "tokens per second"}


def test_losses_travel_without_rounding(results):
    """Between stages of bf16, which would round them at 2^-9; without TP all else is the same."""
    one, two = (result(results, layout)["validation"] for layout in BF16)
    assert two == pytest.approx(one, rel=1e-6)


def test_each_term_is_reported(results):
    record = result(results, REFERENCES[""])["records"][0]
    hidden = [value for name, value in record.items() if name.startswith(("mse of", "cosine of"))]
    attention = [value for name, value in record.items() if name.startswith("kl of attention")]
    assert (len(hidden), len(attention)) == (6, 4)
    means = (sum(hidden) / 6, sum(attention) / 4)
    assert record["intermediate distillation loss"] == pytest.approx(means[0], rel=1e-6)
    assert record["attention distillation loss"] == pytest.approx(means[1], rel=1e-6)
    total = record["logits distillation loss"] + 0.5 * means[0] + 2.0 * means[1]
    assert record["total loss"] == pytest.approx(record["lm loss"] + 0.7 * total, rel=1e-6)


def test_projections_are_trained_saved_and_no_part_of_the_student(results):
    found = result(results, REFERENCES[""])
    assert len(found["projections"]) == 6 * 2  # weights and biases
    assert all(gradient.any() for _, gradient in found["gradients"])
    assert not any("projection" in name for name in found["student"])
    assert found["hooks"] == 0
