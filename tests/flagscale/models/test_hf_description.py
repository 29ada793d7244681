"""What is exported is one model for everybody: transformers 4 and 5, and other programs."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import hf_reader
import pytest
import torch
from tokenizer_kinds import TOKENIZERS
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedConfig
from variants import VARIANTS, random_model

from flagscale.errors import UserError
from flagscale.megatron.families import FAMILIES
from flagscale.megatron.shape import from_hf_config, hf_config_for
from flagscale.models.hf_description import (
    check_ids,
    write_config,
    write_generation_config,
    write_tokenizer,
)

TOKENS = torch.randint(300, (2, 96), generator=torch.Generator().manual_seed(0)).tolist()
TEXTS = [
    "The list type, isn't it? 1234567 and 3.14 . ",
    "Steps:\n\n1. a\r\n\t  2.  b   \n",
    "café naïve cafe\u0301 ﬁ Å Ω",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # done",
    "Ελληνικά, Русский, עברית, العربية, हिन्दी, ไทย, 中文\uff0c日本語、한국어",
    "👩‍🚀🏳️‍🌈 \u200b\ufeff",
    "<|im_start|>user\nHi <mark> there<|im_end|>  x",
    "",
]
# Scaled RoPE that no teacher may have yet; how it is written is the same rule.
ROPES = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
}


def differing(model_type: str) -> PreTrainedConfig:
    """A configuration of which no field is its class's default."""
    kind = type(AutoConfig.for_model(model_type))
    own = {item.name: item for item in fields(kind)}
    for item in fields(PreTrainedConfig):
        own.pop(item.name)
    values: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "gelu",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_only_layers": [1],
        "pad_token_id": 7,
        "bos_token_id": 8,
        "eos_token_id": [9, 10],
        "rope_parameters": {"rope_theta": 5e5, **ROPES["linear"]},
    }
    values = {name: value for name, value in values.items() if name in own or name == "head_dim"}
    for name in own.keys() - values.keys():
        default = own[name].default
        assert default is not MISSING, name
        assert isinstance(default, bool | int | float), name
        values[name] = not default if isinstance(default, bool) else default + 1
    values["initializer_range"] = 0.5
    return kind(**values, dtype="bfloat16")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of every kind: models, tokenizers, configurations."""
    root = tmp_path_factory.mktemp("written")
    named = {name: (name, {}) for name in VARIANTS}
    named |= {name: ("llama tied", {"rope_parameters": ROPES[name]}) for name in ROPES}
    for name, (variant, changes) in named.items():
        if changes:
            changes = {"rope_parameters": {**changes["rope_parameters"], "rope_theta": 3e4}}
            changes["max_position_embeddings"] = 64
        model = random_model(variant, **changes)
        folder = root / "models" / name
        model.save_pretrained(root / "saved" / name)
        folder.mkdir(parents=True)
        shutil.move(root / "saved" / name / "model.safetensors", folder)
        config = model.config
        if not changes:
            config = hf_config_for(from_hf_config(config), config)
        config.dtype = torch.float32
        write_config(config, folder)
        write_generation_config(folder, config, folder)
    for name, make in TOKENIZERS.items():
        for model_type in FAMILIES:
            if (model_type == "qwen2") == (name == "qwen2_like"):
                folder = root / "tokenizers" / f"{model_type} {name}"
                folder.mkdir(parents=True)
                write_config(AutoConfig.for_model(model_type), folder)
                write_tokenizer(make(), folder)
    for model_type in FAMILIES:
        folder = root / "configs" / model_type
        folder.mkdir(parents=True)
        write_config(differing(model_type), folder)
    return root


@pytest.fixture(scope="module")
def read(written: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """What transformers 4 and 5 make of them, by folder."""
    kinds = ("models", "configs", "tokenizers")
    request = {kind: [str(f) for f in sorted((written / kind).iterdir())] for kind in kinds}
    request |= {"tokens": TOKENS, "texts": TEXTS}
    four = hf_reader.read_with_transformers_4(request, tmp_path_factory.mktemp("transformers-4"))
    return four, hf_reader.read(request)


@pytest.mark.parametrize("name", [*VARIANTS, *ROPES])
def test_logits(read: tuple[Any, Any], written: Path, name: str) -> None:
    four, five = (found["models"][str(written / "models" / name)] for found in read)
    torch.testing.assert_close(four["logits"], five["logits"], atol=1e-5, rtol=0)
    assert four["written"] == five["written"]
    assert four["dtype"] == five["dtype"] == "torch.float32"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_a_configuration(
    read: tuple[Any, Any], written: Path, model_type: str
) -> None:
    """What the classes of transformers 4 and 5 read: all of it was changed from its default."""
    four, five = (found["configs"][str(written / "configs" / model_type)] for found in read)
    rope = five.pop("rope_parameters")
    assert rope.pop("rope_theta") == four.pop("rope_theta") == 5e5
    assert four.pop("rope_scaling", rope) == rope == ROPES["linear"]
    of_its_library = {"transformers_version", "_name_or_path", "name_or_path"}
    common = four.keys() & five.keys() - of_its_library
    assert {name: four[name] for name in common} == {name: five[name] for name in common}
    own = differing(model_type).to_dict().keys() & common
    assert {"hidden_size", "num_key_value_heads", "rms_norm_eps", "hidden_act"} <= own
    assert four.keys() - common - of_its_library <= {"torch_dtype"}, "transformers 4 only"


@pytest.mark.parametrize(
    ("model_type", "name"),
    [(m, n) for m in FAMILIES for n in TOKENIZERS if (m == "qwen2") == (n == "qwen2_like")],
)
def test_token_ids(read: tuple[Any, Any], written: Path, model_type: str, name: str) -> None:
    """Of `tokenizer.json` itself, whoever reads it."""
    folder = written / "tokenizers" / f"{model_type} {name}"
    four, five = (found["tokenizers"][str(folder)] for found in read)
    right = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert five["ids"] == four["ids"] == [right.encode(text).ids for text in TEXTS]
    assert four == five
    made = TOKENIZERS[name]()
    made.backend_tokenizer.no_truncation()
    made.backend_tokenizer.no_padding()
    assert five["ids"] == [made.backend_tokenizer.encode(text).ids for text in TEXTS]
    assert five["inputs"] == ["attention_mask", "input_ids"]


SAMPLING = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 0.9,
    "eos_token_id": [1, 2],
}


def test_a_generation_configuration_is_the_source_s_own(tmp_path: Path) -> None:
    """With what is a default somewhere (vLLM's `top_k` is not 50), without what is no setting."""
    leftovers = {"_from_model_config": True, "chat_format": "chatml", "is_local": True}
    text = json.dumps(SAMPLING | leftovers | {"transformers_version": "4.40.0"})
    (tmp_path / "generation_config.json").write_text(text)
    (tmp_path / "out").mkdir()
    write_generation_config(tmp_path, AutoConfig.for_model("llama"), tmp_path / "out")
    values = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert values.pop("transformers_version").startswith("5.")
    assert values == SAMPLING
    (tmp_path / "generation_config.json").write_text("[1")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read"):
        write_generation_config(tmp_path, AutoConfig.for_model("llama"), tmp_path / "out")


def test_a_model_without_generation_configuration(tmp_path: Path) -> None:
    """Its special tokens; none that it has not."""
    config = AutoConfig.for_model("qwen3", eos_token_id=[5, 6])
    write_generation_config(tmp_path / "nowhere", config, tmp_path)
    values = json.loads((tmp_path / "generation_config.json").read_text())
    assert values.keys() == {"eos_token_id", "transformers_version"}
    assert values["eos_token_id"] == [5, 6]


def test_ids_that_a_program_would_get_otherwise() -> None:
    """AutoTokenizer of transformers 5 makes Qwen2's tokenizer of any in a folder of that family."""
    tokenizer = TOKENIZERS["llama3_like"]()
    right = [tokenizer(text)["input_ids"] for text in TEXTS]
    check_ids(tokenizer, TEXTS, right, "tokenizer of x")
    wrong = [*right[:1], right[1][1:], *right[2:]]
    told = r"tokenizer of x: AutoTokenizer .* own tokens: 'Steps.* becomes \[.*should become \[0, "
    with pytest.raises(UserError, match=told):
        check_ids(tokenizer, TEXTS, wrong, "tokenizer of x")
