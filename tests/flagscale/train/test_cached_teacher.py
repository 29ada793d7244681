"""Training from what the teacher answered once: that with the live one, on every layout."""

import json
from pathlib import Path

import pytest
from cached_worker import LAYOUTS, SPARSE, cases
from divergence_worker import DIVERGENCES

ROUNDING = 1e-6  # of training from fp32 hidden states to that with the live teacher
LAYOUT = 1e-5  # of one layout to another, in fp32
WORKER = Path(__file__).with_name("cached_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory, torchrun, teacher, student, dataset):
    """One process writes what the teacher answers; all layouts read it."""
    folder = tmp_path_factory.mktemp("cached")
    inputs = {"teacher": str(teacher), "student": str(student), "dataset": str(dataset)}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    for processes in LAYOUTS:
        torchrun(processes, WORKER, folder)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("form", ["apart", "fused"])
@pytest.mark.parametrize(
    ("layout", "name"), [("one", name) for name in DIVERGENCES] + [("one, packed", "forward_kl")]
)
def test_hidden_states_are_the_live_teacher(results, layout, name, form):
    live, cached = (results[layout][f"{kind}, {name}, {form}"] for kind in ("live", "fp32"))
    for part in ("training", "validation"):
        assert cached[part] == pytest.approx(live[part], rel=ROUNDING), part


@pytest.mark.parametrize("layout", LAYOUTS[2])
def test_every_layout_reads_what_one_process_wrote(results, layout):
    reference = "one, packed" if layout.endswith("packed") else "one"
    for case in cases(layout):
        found, expected = (results[one][case] for one in (layout, reference))
        assert found["training"]["grad norm"] > 0
        for part in ("training", "validation"):
            assert found[part] == pytest.approx(expected[part], rel=LAYOUT), (case, part)


def test_sparse_targets_estimate_the_live_teacher(results):
    """As near as draws can be to so small a loss; and fused they are what they are apart."""
    for codec, name in SPARSE.items():
        live = results["one"][f"live, {name}, apart"]
        apart, fused = (results["one"][f"{codec}, {name}, {form}"] for form in ("apart", "fused"))
        assert fused["training"] == pytest.approx(apart["training"], rel=LAYOUT)
        for part in ("training", "validation"):
            kd = "logits distillation loss"
            # 4 standard errors, of T^2 times a token's 0.5 nats / sqrt(50), of 256 tokens.
            allowed = {"sampled": {"abs": 0.07}, "topk": {"rel": 2e-3}}[codec]
            assert apart[part][kd] == pytest.approx(live[part][kd], **allowed)
            assert apart[part]["lm loss"] == pytest.approx(live[part]["lm loss"], rel=ROUNDING)
