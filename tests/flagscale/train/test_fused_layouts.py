"""Distillation with the output layers fused with the loss equals that with logits, on ranks too.

`test_layouts.py` compares all layouts, fused, with one process that is fused.
"""

import json
from pathlib import Path

import pytest
from layout_cases import WITH_LOGITS
from test_layouts import (  # noqa: F401 - a fixture among them
    RELATIVE,
    WORKER,
    gradients,
    numbers,
    result,
    short_documents,
)

from flagscale.megatron.shape import ModelShape


@pytest.fixture(scope="module")
def results(tmp_path_factory, torchrun, teacher, student, short_documents) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("fused-layouts")
    inputs = {
        "teacher": str(teacher),
        "student": str(student),
        "dataset": str(short_documents),
        "cases": ["one process", "one process, packed", *(case.name for case in WITH_LOGITS)],
        "kinds": ["distillation"],
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))
    for processes in (1, 2):
        torchrun(processes, WORKER, folder)
    return folder


@pytest.mark.parametrize("case", WITH_LOGITS, ids=lambda case: case.name)
def test_logits_held_or_not(results, student, case):
    kind, reference = "distillation", case.reference
    found, expected = (result(results, name, kind) for name in (case.name, reference))
    assert numbers(found["validation"]) == pytest.approx(numbers(expected["validation"]), RELATIVE)
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=RELATIVE)
    ours, theirs = (
        gradients(results / name / kind / "gradients", ModelShape.load(student))
        for name in (case.name, reference)
    )
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error <= RELATIVE, f"{name}: {error:.2g}"
