import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flagscale.megatron.shape import from_hf_config, hf_config_for
from flagscale.models.hf_export import export_to_hf, reload_in_fresh_process, round_weights
from flagscale.models.hf_import import import_from_hf
from flagscale.models.megatron import logits
from flagscale.models.parity import compare_logits, hf_logits
from flagscale.models.source import load_hf_model, load_tokenizer

FAMILIES = (
    "llama tied",
    "llama untied, llama3 rope",
    "qwen2 tied",
    "qwen2 untied",
    "qwen3 tied, wide heads",
    "qwen3 untied",
)
TOKENS = torch.arange(100)[None]


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_round_trip_gives_back_every_weight(
    make_model: Callable[..., PreTrainedModel], tiny_teacher: Path, tmp_path: Path, family: str
) -> None:
    hf_model = make_model(family)
    shape = from_hf_config(hf_model.config)
    template, folder = _folders(hf_model, tiny_teacher, tmp_path)
    export_to_hf(import_from_hf(hf_model, shape, seq_length=100), shape, template, folder)
    exported = load_hf_model(folder)
    expected = hf_model.state_dict()
    assert exported.state_dict().keys() == expected.keys()
    for name, tensor in exported.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    difference = compare_logits(hf_logits(exported, TOKENS), hf_logits(hf_model, TOKENS))
    assert difference.max_abs_difference == 0
    assert not list(folder.glob(".export-*"))


@pytest.mark.usefixtures("runtime")
def test_bfloat16_equals_the_model_with_rounded_weights(
    make_model: Callable[..., PreTrainedModel], tiny_teacher: Path, tmp_path: Path
) -> None:
    hf_model = make_model("qwen2 tied")
    shape = from_hf_config(hf_model.config)
    template, folder = _folders(hf_model, tiny_teacher, tmp_path)
    model = import_from_hf(hf_model, shape, seq_length=100)
    export_to_hf(model, shape, template, folder, torch.bfloat16)
    dtypes = {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    exported = load_hf_model(folder)  # computes in float32
    unrounded = compare_logits(logits(model, TOKENS), hf_logits(exported, TOKENS))
    assert unrounded.max_abs_difference > 1e-3
    round_weights(model, torch.bfloat16)
    rounded = compare_logits(logits(model, TOKENS), hf_logits(exported, TOKENS))
    assert rounded.max_abs_difference <= 1e-5


def test_a_fresh_process_needs_nothing_of_this_project(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    reloaded = reload_in_fresh_process(tiny_teacher, TOKENS, prompt=[5, 6, 7])
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(tiny_teacher), TOKENS)
    assert compare_logits(reloaded.logits_bsv, expected).max_abs_difference <= 1e-5
    assert reloaded.text


def test_a_folder_that_does_not_load_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="transformers cannot load the exported"):
        reload_in_fresh_process(tmp_path, TOKENS, prompt=[5])


def _folders(hf_model: PreTrainedModel, tokenizer: Path, parent: Path) -> tuple[Path, Path]:
    """What an artifact's `hf/` holds, and an empty folder."""
    template, folder = parent / "hf", parent / "out"
    folder.mkdir()
    hf_config_for(from_hf_config(hf_model.config), hf_model.config).save_pretrained(template)
    load_tokenizer(tokenizer).save_pretrained(template)
    return template, folder
