"""What is exported is one model for everybody: transformers 4 and 5, and other programs."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import hf_reader
import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast
from variants import VARIANTS, random_model

from flagscale.megatron.families import FAMILIES
from flagscale.megatron.shape import from_hf_config, hf_config_for
from flagscale.models.hf_description import (
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
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def trained(pre_tokenizer: Any, special: list[str], normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics["lists"], topics["numbers"] * 3], trainer)
    return tokenizer


def split_and_bytes(pattern: str = SPLIT) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])


def gpt2_like() -> PreTrainedTokenizerFast:
    """A plain one, which says that spaces before punctuation are to be cleaned away."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=True,
        is_local=True,
        local_files_only=True,
    )


def with_prefix_space() -> PreTrainedTokenizerFast:
    """RoBERTa's way; transformers 4 takes the prefix away, if it is not told."""
    tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=True), ["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def llama3_like() -> PreTrainedTokenizerFast:
    """BOS by the post-processor; special tokens without names; its file cuts and pads."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = trained(split_and_bytes(), special)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
            ),
        ]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=20, pad_id=1, pad_token="<|end_of_text|>")
    tokenizer.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=131072,
        chat_template={"default": TEMPLATE, "tool_use": "tools: " + TEMPLATE},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask", "token_type_ids"],
    )


def llama2_like() -> PreTrainedTokenizerFast:
    """SentencePiece's BPE: bytes for what is unknown, blanks as a letter, BOS and EOS."""
    letters = [*sorted(set(topics["lists"]) - {" ", "\n"}), "▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "s"), ("▁", "▁")]
    pieces += ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE,
        legacy=False,
        sp_model_kwargs={},
    )


def qwen2_like() -> PreTrainedTokenizerFast:
    """Of its class: transformers 5 makes no other for a model of this family."""
    tokenizer = trained(
        split_and_bytes(SPLIT.replace("{1,3}", "")),
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        normalizers.NFC(),
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
    )


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    maker.__name__: maker
    for maker in (gpt2_like, with_prefix_space, llama3_like, llama2_like, qwen2_like)
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
