"""Every divergence through the real training, on every kind of layout: what one process reports."""

import json
from pathlib import Path

import pytest
from divergence_worker import DIVERGENCES, FUSED, LAYOUTS

RELATIVE = 1e-5  # the bound for fp32
WORKER = Path(__file__).with_name("divergence_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory, torchrun, teacher, student, dataset):
    folder = tmp_path_factory.mktemp("divergences")
    inputs = {"teacher": str(teacher), "student": str(student), "dataset": str(dataset)}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    for processes in LAYOUTS:
        torchrun(processes, WORKER, folder)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("layout", LAYOUTS[2])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_one_process(results, name, layout):
    reference = "one, packed" if layout.endswith("packed") else "one"
    for form in ("apart", "fused") if layout in FUSED else ("apart",):
        found, expected = (results[one][f"{name}, {form}"] for one in (layout, reference))
        assert found["training"]["grad norm"] > 0
        for part in ("training", "validation"):
            assert found[part] == pytest.approx(expected[part], rel=RELATIVE), (form, part)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fused_with_the_output_layer_it_is_the_same(results, name):
    apart, fused = (results["one"][f"{name}, {form}"] for form in ("apart", "fused"))
    assert fused["training"] == pytest.approx(apart["training"], rel=RELATIVE)


def test_the_divergence_is_the_only_difference(results):
    """The LM loss is what it is; each divergence has a value of its own."""
    records = [results["one"][f"{name}, apart"]["training"] for name in DIVERGENCES]
    assert len({record["lm loss"] for record in records}) == 1
    assert len({record["logits distillation loss"] for record in records}) == len(records)
    for record in records:
        parts = record["lm loss"] + 0.7 * record["logits distillation loss"]
        assert record["total loss"] == pytest.approx(parts, rel=1e-6)
