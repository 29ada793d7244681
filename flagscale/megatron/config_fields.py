"""The fields of a Hugging Face configuration: read, fixed, or without effect. Others are refused.

The rule needs no list of what goes wrong: a field that is not at its family's default, and that
nobody here knows, may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError
from flagscale.megatron.families import Family

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# `from_hf_config` takes them over into the model's shape.
_READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "rope_parameters", "tie_word_embeddings"),
}
_READ_OF_EXPERTS = {
    *("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    "norm_topk_prob",
}
# Have one supported value each, which functions here and `Family.expected` say.
_CHECKED = {
    *("architectures", "auto_map", "is_causal", "quantization_config"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
# Where the model is made, stored, trained further or asked for text; the logits stay the same.
_WITHOUT_EFFECT = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "tokenizer_class"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
    *("decoder_start_token_id", "initializer_range", "use_cache", "return_dict"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
    *("id2label", "label2id", "problem_type", "task_specific_params", "gradient_checkpointing"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation"),
    # How a matrix product was cut in training; the sum is the same.
    "pretraining_tp",
    # What tools leave: a note of Unsloth, how transformers.js loads it, SmolLM2's of its origin.
    *("unsloth_version", "unsloth_fixed", "transformers.js_config", "is_llama_config"),
}
# Megatron-Core has Llama 3's RoPE scaling with these constants; only the factor can be chosen.
LLAMA3_ROPE: Mapping[str, float] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_ROPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def check_fields(
    config: PreTrainedConfig, family: Family, ignored: Collection[str] = (), who: str = "teacher"
) -> None:
    """Refuse what would be silently wrong.

    Args:
        config: of a model of the family.
        family: see `flagscale.megatron.families`.
        ignored: fields that the user knows to be without effect (`ignored_config_fields`).
        who: see `flagscale.megatron.shape.from_hf_config`.

    Raises:
        UserError: a field has a value that the Megatron-Core model does not honour, or is unknown.
    """
    where = f"{config.model_type} {who}"
    for name, allowed in family.expected.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise UserError(f"{where}: {name}={value!r} is not supported, {allowed[0]!r} is")
    _check_attention(config, where)
    _check_code(config, family, where)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        raise UserError(
            f"{where}: weights quantised with {_get(quantised, 'quant_method')!r} are not "
            "supported; give the unquantised model or a GGUF file"
        )
    unknown = _unknown(config, family) - set(ignored)
    if unknown:
        values = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(unknown)[:5])
        raise UserError(
            f"{where}: {len(unknown)} fields of its configuration are unknown here, and may change "
            f"what it computes: {values}. If the logits do not depend on them, name them in "
            f"{who}.ignored_config_fields={sorted(unknown)}"
        )


def check_spellings(raw: Mapping[str, Any], where: str) -> None:
    """Refuse a `config.json` that says a thing in two ways, and differently.

    Versions of transformers renamed fields, and files may have both; which one counts depends on
    the version.

    Args:
        raw: content of the file.
        where: it comes from, for the message.

    Raises:
        UserError: naming the field and both values.
    """
    scaling = raw.get("rope_scaling") or {}
    readings: tuple[Mapping[str, Any], ...] = (
        raw.get("rope_parameters") or {},
        scaling,
        {"rope_type": scaling.get("type")},
        {name: raw.get(name) for name in ("rope_theta", "partial_rotary_factor", "num_experts")},
        {"num_experts": raw.get("num_local_experts"), "dtype": raw.get("dtype")},
        {"dtype": raw.get("torch_dtype")},
    )
    found: dict[str, Any] = {}
    for reading in readings:
        for name, value in reading.items():
            if value is not None and found.setdefault(name, value) != value:
                raise UserError(
                    f"{where}: says {name}={found[name]!r} and {name}={value!r}, by an old and a "
                    "new name of the field; correct one"
                )


def read_rope(config: PreTrainedConfig, who: str = "teacher") -> tuple[float, float | None]:
    """Base of the rotary embedding, and the factor of Llama 3's scaling where there is one.

    Args:
        config: of a model.
        who: see `flagscale.megatron.shape.from_hf_config`.

    Raises:
        UserError: it is partial, or scaled otherwise.
    """
    where = f"{config.model_type} {who}"
    rope = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(
            f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported, "
            "1.0 is"
        )
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} is not supported; supported: default, llama3")
    wanted = LLAMA3_ROPE if kind == "llama3" else {}
    for name, value in wanted.items():
        if rope.get(name) != value:
            raise UserError(
                f"{where}: llama3 RoPE scaling with {name}={rope.get(name)} is not supported; "
                f"Megatron-Core's is {value}"
            )
    known = _ROPE | wanted.keys() | ({"factor"} if wanted else set())
    unknown = sorted(name for name in rope.keys() - known if rope[name] is not None)
    if unknown:
        values = ", ".join(f"{name}={rope[name]!r}" for name in unknown)
        raise UserError(f"{where}: {values} of a rotary embedding of type {kind} is not supported")
    base = float(rope.get("rope_theta") or 10000.0)
    return base, float(rope["factor"]) if wanted else None


def _check_attention(config: PreTrainedConfig, where: str) -> None:
    if not getattr(config, "is_causal", True):
        raise UserError(f"{where}: is_causal=False is not supported, True is")
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    windowed = [t for t in getattr(config, "layer_types", None) or () if t != "full_attention"]
    if windowed or window is not None:
        raise UserError(
            f"{where}: sliding-window attention (sliding_window="
            f"{getattr(config, 'sliding_window', None)}) is not supported, full attention is"
        )


def _check_code(config: PreTrainedConfig, family: Family, where: str) -> None:
    """Refuse a model of another class, or of code that comes with it."""
    own = getattr(config, "auto_map", None) or {}
    if own.keys() - {"AutoTokenizer"}:
        raise UserError(
            f"{where}: auto_map={own}: code that comes with a model is not run; supported is "
            f"transformers' own {family.causal_lm}"
        )
    named = config.architectures or [family.causal_lm]
    if named != [family.causal_lm]:
        raise UserError(f"{where}: architectures={named} is not supported, {[family.causal_lm]} is")


def _unknown(config: PreTrainedConfig, family: Family) -> set[str]:
    """Fields that neither are known, nor at the family's default, nor say that a thing is off."""
    known = _READ | _CHECKED | _WITHOUT_EFFECT | family.expected.keys()
    if family.has_experts:
        known |= _READ_OF_EXPERTS
    default = type(config)().to_dict()
    return {
        name
        for name, value in config.to_dict().items()
        if name not in known and value and value != default.get(name)
    }


def _get(value: Any, name: str) -> Any:  # noqa: ANN401 - a mapping or an object
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
