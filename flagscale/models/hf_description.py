"""All of a Hugging Face folder but its weights, written so that every program reads one model.

transformers 5 renamed fields of the files and of classes, and programs that read with transformers
4, or by themselves, go by the old names: silently by a default, where a new name is all there is.
So both are written. And nothing is that is not about the model: what a file may hold is told by the
classes that read it, not by a list of what loading leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from flagscale.artifacts import write_json
from flagscale.errors import UserError
from flagscale.models.probing_texts import probing_texts

# Classes read these, but do not declare them as their own: Qwen2's and Qwen3-MoE's `head_dim`.
_OF_EVERY_MODEL = {"architectures", "dtype", "head_dim", "model_type"}
# Of RoPE, and beside its scaling in transformers 4; 5 has all of it in `rope_parameters`.
_OUTSIDE_OF_ROPE_SCALING = ("rope_theta", "partial_rotary_factor")
_TOKENS_OF_A_MODEL = ("bos_token_id", "eos_token_id", "pad_token_id")
# What a decoder takes. Without it transformers 4 makes `token_type_ids` too, which it refuses.
_INPUTS = ["input_ids", "attention_mask"]
_CHAT_TEMPLATE, _CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"


def write_config(
    config: PreTrainedConfig, folder: Path, quantization: dict[str, Any] | None = None
) -> None:
    """Write `config.json`: the fields of the configuration's class, under old names and new.

    Args:
        config: of a family that `flagscale.megatron.families` has, with the dtype of the weights.
        folder: existing folder to write into.
        quantization: `quantization_config`, of a quantised model.
    """
    own = {item.name for item in fields(type(config))} - {
        item.name for item in fields(PreTrainedConfig)
    }
    renamed = type(config).attribute_map
    known = _OF_EVERY_MODEL | own | {renamed[name] for name in own & renamed.keys()}
    values = {name: value for name, value in config.to_dict().items() if name in known}
    values |= {old: values[new] for old, new in renamed.items() if new in values}
    values |= _rope(config.rope_parameters) | {"torch_dtype": values["dtype"]}
    if quantization is not None:
        values["quantization_config"] = quantization
    _write(folder / CONFIG_NAME, values)


def write_generation_config(
    source: Path, config: PreTrainedConfig, folder: Path, end_ids: Collection[int] = ()
) -> None:
    """Write `generation_config.json`: the source's own, or else the model's special tokens.

    Values that are a default's stay: programs have other defaults (`top_k`).

    Args:
        source: folder that may have the file.
        config: of the model.
        folder: existing folder to write into.
        end_ids: end an answer too: a base model knows no turns, and its student has learnt them.

    Raises:
        UserError: the source's cannot be read.
    """
    path = source / GENERATION_CONFIG_NAME
    if path.exists():
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    else:
        values = {name: getattr(config, name, None) for name in _TOKENS_OF_A_MODEL}
    end = values.get("eos_token_id")
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    if more := sorted(set(end_ids) - set(ends)):
        values["eos_token_id"] = ends + more
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    kept = {name: value for name, value in values.items() if name in known and value is not None}
    _write(folder / GENERATION_CONFIG_NAME, kept)


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates.

    The class is one that transformers 4 and 5 both know, and that takes `tokenizer.json` as it is.

    Args:
        tokenizer: whose ids the model was trained on.
        folder: existing folder to write into.
    """
    pipeline = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    pipeline.no_truncation()  # these are of a use, not of the model
    pipeline.no_padding()
    pipeline.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": _INPUTS,
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            "split_special_tokens": tokenizer.split_special_tokens,
            # transformers 5 does not for BPE, whatever the file says, and 4 would.
            "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces
            and type(pipeline.model).__name__ != "BPE",
            **_length(tokenizer),
            **_special_tokens(tokenizer, pipeline),
            **_added_around(tokenizer, pipeline),
            **_prefix_space(pipeline),
            **_write_chat_templates(tokenizer, folder),
        },
    )


def check_loads(tokenizer: PreTrainedTokenizerFast, folder: Path, name: str) -> None:
    """Refuse a folder of which AutoTokenizer makes other tokens than the model was trained on.

    Args:
        tokenizer: see `check_ids`.
        folder: with `config.json` and the tokenizer's files.
        name: see `check_ids`.

    Raises:
        UserError: the first text that shows it.
    """
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = [theirs(text)["input_ids"] for text in probing_texts()]
    check_ids(tokenizer, probing_texts(), ids, name)


def check_ids(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    theirs: Sequence[Sequence[int]],
    name: str,
) -> None:
    """Refuse a folder of which a program makes other tokens than the model was trained on.

    Args:
        tokenizer: whose ids the model was trained on.
        texts: to encode.
        theirs: the program's ids of each.
        name: what was read, for the message.

    Raises:
        UserError: the first text that shows it.
    """
    for text, found in zip(texts, theirs, strict=True):
        own = tokenizer(text)["input_ids"]
        if own != found:
            raise UserError(
                f"{name}: AutoTokenizer does not make the model's own tokens: {text!r} becomes "
                f"{found}, and should become {own}. transformers {transformers.__version__} builds "
                "the tokenizers of some families itself, whatever tokenizer.json says (qwen2): "
                "give a teacher that has its family's tokenizer"
            )


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters`, and what transformers 4 has instead."""
    scaling = dict(parameters)
    beside = {name: scaling.pop(name) for name in _OUTSIDE_OF_ROPE_SCALING if name in scaling}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {
        "rope_parameters": parameters,
        "rope_scaling": scaling if is_scaled else None,
        **beside,
    }


def _write(path: Path, values: dict[str, Any]) -> None:
    """In the order that transformers writes; by the version it tells files that need mending."""
    values = values | {"transformers_version": transformers.__version__}
    write_json(path, dict(sorted(values.items())))


def _length(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Where it is limited; transformers' number for "not" is 1e30."""
    length = tokenizer.model_max_length
    return {"model_max_length": length} if length < 1e30 else {}


def _special_tokens(tokenizer: PreTrainedTokenizerFast, pipeline: Tokenizer) -> dict[str, Any]:
    """Under the names of transformers 4, all of which 5 takes; 4 does not take 5's list."""
    named = tokenizer.special_tokens_map
    own = {name for name in named if name not in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES}
    values: dict[str, Any] = {name: named[name] for name in named if name not in own}
    if own:
        values["extra_special_tokens"] = {name: named[name] for name in sorted(own)}
    if tokenizer.extra_special_tokens:
        values["additional_special_tokens"] = [str(t) for t in tokenizer.extra_special_tokens]
    values["added_tokens_decoder"] = {
        str(number): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for number, token in sorted(pipeline.get_added_tokens_decoder().items())
    }
    return values


def _added_around(tokenizer: PreTrainedTokenizerFast, pipeline: Tokenizer) -> dict[str, bool]:
    """Whether BOS and EOS are put around a text, which `tokenizer.json` does and others ask for."""
    text = pipeline.encode("a", add_special_tokens=False).ids
    whole = pipeline.encode("a").ids
    start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return {
        "add_bos_token": tokenizer.bos_token_id in whole[:start],
        "add_eos_token": tokenizer.eos_token_id in whole[start + len(text) :],
    }


def _prefix_space(pipeline: Tokenizer) -> dict[str, bool]:
    """Transformers 4 changes a pre-tokenizer that says otherwise than this, or than its default."""
    state = json.loads(pipeline.to_str())["pre_tokenizer"] or {}
    return {name: state[name] for name in ("add_prefix_space",) if name in state}


def _write_chat_templates(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    """In files, where transformers reads them; returned, where the others do."""
    templates = tokenizer.chat_template
    if not templates:
        return {}
    named = {"default": templates} if isinstance(templates, str) else templates
    for name, template in named.items():
        path = folder / _CHAT_TEMPLATE
        if name != "default":
            path = folder / _CHAT_TEMPLATES / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")
    if isinstance(templates, str):
        return {"chat_template": templates}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    return {"chat_template": listed}
