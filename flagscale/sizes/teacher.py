"""How large a teacher is, before it has been fetched: from its config.json, or a GGUF file's head.

So is a student that is a model of its own.

Neither transformers nor torch is needed, and no network for the models of `known_models.yaml`, for
folders, and for what the Hub's cache holds.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from flagscale.errors import UserError
from flagscale.megatron.families import family_of
from flagscale.megatron.shape import VOCABULARY_DIVISOR, ModelShape, pad_vocab_size
from flagscale.recipe import ArchitectureRecipe, SourceRecipe

KNOWN = Path(__file__).with_name("known_models.yaml")
_SECONDS = 5.0  # for the Hub's answer
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Teacher:
    """What is known of a model.

    Attributes:
        shape: its sizes; what no size follows from may be wrong.
        dtype_bytes: of a weight, as its source has it.
        origin: where the figures are from, for people.
    """

    shape: ModelShape
    dtype_bytes: int
    origin: str


class UnknownSizeError(Exception):
    """How large a model is cannot be told here; the text says why."""


def teacher_of(recipe: SourceRecipe, who: str = "teacher") -> Teacher:
    """The teacher's sizes, or those of a student that is a model of its own.

    Args:
        recipe: where it comes from.
        who: it is, `teacher` or `student`.

    Raises:
        UnknownSizeError: its configuration cannot be read here.
    """
    source = recipe.source
    if source in known_models() and recipe.revision is None:
        return _of(known_models()[source]["config"], "figures of it that come along", who)
    if source.startswith("package:"):
        raise UnknownSizeError(f"{source} is none of the packages that are known")
    path = Path(source).expanduser()
    if source.endswith(".gguf"):
        return _gguf(path, who)
    if (path / "config.json").is_file():
        return _of(_read(path / "config.json"), f"{path}/config.json", who)
    if path.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise UnknownSizeError(f"{source} has no config.json here")
    return _of(*_from_hub(source, recipe.revision), who)


@cache
def known_models() -> dict[str, Any]:
    """`known_models.yaml`: Hub id -> parameters and configuration."""
    found: dict[str, Any] = yaml.safe_load(KNOWN.read_text(encoding="utf-8"))
    return found


def shape_of(config: Mapping[str, Any], who: str = "teacher") -> ModelShape:
    """The sizes in a Hugging Face configuration.

    Raises:
        UserError: its family is not supported.
        UnknownSizeError: it lacks one of them.
    """
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        family = family_of(config["model_type"], who)
        return ModelShape(
            model_type=config["model_type"],
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden,
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or hidden // heads,
            vocab_size=config["vocab_size"],
            padded_vocab_size=pad_vocab_size(config["vocab_size"], VOCABULARY_DIVISOR),
            max_position_embeddings=config.get("max_position_embeddings", 0),
            norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=config.get("rope_theta", 1e4),
            qk_layernorm=family.qk_layernorm,
            add_qkv_bias=family.add_qkv_bias,
            untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
            architecture=_experts(config) if family.has_experts else ArchitectureRecipe(),
        )
    except KeyError as error:
        raise UnknownSizeError(f"its configuration has no {error}") from error


def _experts(config: Mapping[str, Any]) -> ArchitectureRecipe:
    return ArchitectureRecipe(
        # transformers itself writes the latter, the Hub has the former.
        num_experts=config.get("num_experts") or config["num_local_experts"],
        moe_router_topk=config["num_experts_per_tok"],
        moe_ffn_hidden_size=config["moe_intermediate_size"],
    )


def _of(config: Mapping[str, Any], origin: str, who: str) -> Teacher:
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    return Teacher(shape_of(config, who), _DTYPE_BYTES.get(str(dtype), 4), origin)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnknownSizeError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise UnknownSizeError(f"{path} holds no configuration")
    return found


def _from_hub(source: str, revision: str | None) -> tuple[dict[str, Any], str]:
    """The configuration from the Hub's cache, or else from the Hub, at one short attempt."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers

    try:
        cached = try_to_load_from_cache(source, "config.json", revision=revision)
        url = hf_hub_url(source, "config.json", revision=revision)
    except HFValidationError as error:
        raise UnknownSizeError(f"{source} is no Hub id: {error}") from error
    if isinstance(cached, str):
        return _read(Path(cached)), "its config.json in the Hub's cache"
    if constants.HF_HUB_OFFLINE:
        raise UnknownSizeError("its config.json is not in the Hub's cache, and HF_HUB_OFFLINE=1")
    request = urllib.request.Request(url, headers=build_hf_headers())  # noqa: S310 - https
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310 - https
            found = json.load(answer)
    except (OSError, ValueError) as error:
        raise UnknownSizeError(
            f"its config.json cannot be fetched from the Hub: {error}"
        ) from error
    return found, "its config.json on the Hub"


def _gguf(path: Path, who: str) -> Teacher:
    """From the keys at a GGUF file's head; the weights are dequantised to fp32."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise UnknownSizeError(f"{path} cannot be read: {error}") from error
    names = {tensor.name: tensor for tensor in reader.tensors}
    family = str(reader.fields["general.architecture"].contents())

    def key(name: str, default: Any = None) -> Any:  # noqa: ANN401 - a number
        field = reader.fields.get(f"{family}.{name}")
        return default if field is None else field.contents()

    config = {
        "model_type": family,
        "num_hidden_layers": key("block_count"),
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": key("attention.key_length"),
        "vocab_size": int(names["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "float32",
    }
    try:
        return _of(config, f"the head of {path.name}", who)
    except (TypeError, UserError) as error:
        raise UnknownSizeError(f"{path} lacks a size: {error}") from error
