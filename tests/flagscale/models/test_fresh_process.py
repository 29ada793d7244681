from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from flagscale.models import fresh_process
from flagscale.models.fresh_process import reload_in_fresh_process
from flagscale.models.reload_hf import streamed, whole

TOKENS = torch.arange(100)[None]
TEXTS = ["Lists:\n\n1. one", "été 中文 \U0001f600", ""]


@pytest.mark.parametrize("is_whole", [True, False])
def test_it_needs_nothing_of_this_project(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    reloaded = reload_in_fresh_process(tiny_teacher, TOKENS, [5, 6, 7], TEXTS, is_whole)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny_teacher)(TOKENS).logits
    torch.testing.assert_close(reloaded.logits_bsv, expected, atol=1e-5, rtol=0)
    assert bool(reloaded.text) == is_whole
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    assert reloaded.ids == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_a_folder_that_does_not_load_is_a_failure(tmp_path: Path, tiny_teacher: Path) -> None:
    with pytest.raises(RuntimeError, match="transformers cannot load the exported"):
        reload_in_fresh_process(tmp_path, TOKENS, [5], is_whole=True)


@pytest.mark.parametrize(("memory", "fits"), [(10**6, False), (2 * 10**6, True)])
def test_a_model_is_held_whole_if_there_is_memory(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, memory: int, fits: bool
) -> None:
    monkeypatch.setattr(fresh_process, "_available_memory", lambda: memory)
    assert fresh_process._fits(tiny_teacher) == fits  # 212,032 parameters


def test_a_container_s_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    monkeypatch.setattr(fresh_process, "_CGROUP", tmp_path)
    assert fresh_process._available_memory() == 2000000
    (tmp_path / "memory.max").write_text("max\n")
    assert fresh_process._available_memory() > 2000000


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("load", [streamed, whole])
def test_what_is_missing_or_left_over(
    make_model: Callable[..., PreTrainedModel],
    tmp_path: Path,
    load: Callable[[Path], object],
    name: str,
) -> None:
    make_model("llama tied").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {key: tensor.clone() for key, tensor in load_file(path).items()}
    save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"weights are missing.*{name}"):
        load(tmp_path)
    save_file(
        weights | {"model.layers.7.mlp.up_proj.weight": torch.ones(96, 64)}, path, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"left over.*model.layers.7.mlp.up_proj.weight"):
        load(tmp_path)


def test_a_tensor_of_another_shape(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    make_model("llama tied").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path) | {"model.layers.1.mlp.up_proj.weight": torch.ones(96, 60)}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match=r"size mismatch for mlp\.up_proj"):
        streamed(tmp_path)(TOKENS)


def test_one_layer_is_in_memory(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    make_model("qwen2 untied").save_pretrained(tmp_path)
    model = streamed(tmp_path)
    held: list[set[str]] = []

    def look(*_arguments: object) -> None:
        names = model.named_parameters()
        held.append({name for name, tensor in names if tensor.device.type != "meta"})

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    model(TOKENS)
    assert len(held) == 3
    for number, names in enumerate(held):
        assert names
        assert all(name.startswith(f"model.layers.{number}.") for name in names)
    look()
    assert held[-1] == set()
