"""A Hugging Face folder in transformers' own hands, whole or a layer at a time.

It imports nothing of this project, so that it proves what it proves. In a process of its own:

    python -I reload_hf.py FOLDER REQUEST.json ANSWER.safetensors

That writes the logits of the request's tokens and prints, as JSON, the token ids of the request's
texts and a greedy continuation of its prompt. A model that is too large to be held whole is run a
layer at a time, and continues nothing.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

_NEW_TOKENS = 16
_INDEX = "model.safetensors.index.json"
# Buffers that follow from the configuration, as old transformers stored them.
_DERIVED = tuple(f".rotary_emb.{kind}" for kind in ("inv_freq", "cos_cached", "sin_cached"))
_DERIVED += (".masked_bias",)
_QUANTIZATION = "hf_quant_config.json"  # ModelOpt's, of which transformers knows nothing
_SCALES = ("weight_scale", "input_scale")
_LARGEST = 448.0  # in FP8


def streamed(folder: str | Path) -> Any:  # noqa: ANN401 - transformers'
    """Transformers' model of a folder, in float32, of which one layer's weights are in memory.

    It is transformers' code that computes. Each of the embedding, the layers, the last norm and the
    output layer reads its weights when it is called, and drops them afterwards.

    Args:
        folder: of a decoder that transformers loads from safetensors.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    with init_empty_weights():  # parameters, not what is computed from the configuration
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    files = _files(Path(folder))
    parts = {"model.embed_tokens": model.model.embed_tokens, "model.norm": model.model.norm}
    parts |= {f"model.layers.{i}": layer for i, layer in enumerate(model.model.layers)}
    parts["lm_head"] = model.lm_head
    used: set[str] = set()
    for name, module in parts.items():
        names = {own: _sources(f"{name}.{own}", files) for own in module.state_dict()}
        if config.tie_word_embeddings and name == "lm_head":
            names = {"weight": ["model.embed_tokens.weight"]}
        used.update(*names.values())
        module.register_forward_pre_hook(partial(_load, files, names))
        module.register_forward_hook(lambda module, _inputs, _output: module.to("meta") and None)
    derived = {name for name in files if name.endswith((*_DERIVED, *_SCALES))}
    _quantize_inputs(model, files)
    wrong = used ^ (files.keys() - derived)
    if config.tie_word_embeddings:
        wrong -= {"lm_head.weight"}
    if wrong:
        raise ValueError(f"weights are missing, left over or of another shape: {sorted(wrong)[:3]}")
    return model


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor is."""
    if (folder / _INDEX).exists():
        places = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in places.items()}
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def _sources(name: str, files: dict[str, Path]) -> list[str]:
    """The stored tensors that a parameter is made of: transformers fuses experts."""
    owner, _, kind = name.rpartition(".experts.")
    stored = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(kind, ())
    if not owner or not stored or name in files:
        return [name]
    count = sum(
        file.startswith(f"{owner}.experts.") and file.endswith(f".{stored[0]}.weight")
        for file in files
    )
    return [f"{owner}.experts.{i}.{part}.weight" for i in range(count) for part in stored]


def _load(
    files: dict[str, Path], names: dict[str, list[str]], module: torch.nn.Module, _inputs: object
) -> None:
    state = {}
    own_shapes = {own: parameter.shape for own, parameter in module.state_dict().items()}
    for own, sources in names.items():
        parts = []
        for source in sources:
            parts.append(_read(files, source))
        is_fused = ".experts." in sources[0]
        state[own] = torch.cat(parts).view(own_shapes[own]) if is_fused else parts[0]
    module.load_state_dict(state, assign=True)


def _read(files: dict[str, Path], name: str) -> torch.Tensor:
    """A tensor in float32; one in FP8 dequantised."""
    with safe_open(files[name], "pt", backend="pread") as file:
        tensor = file.get_tensor(name)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.float() * _read(files, f"{name}_scale")
    return tensor.float()


def _quantize_inputs(model: Any, files: dict[str, Path]) -> None:  # noqa: ANN401 - transformers'
    """Let layers that have an input scale round their inputs to FP8, as a server does."""

    def rounded(
        scale: torch.Tensor, _module: torch.nn.Module, inputs: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor]:
        scaled = (inputs[0] / scale).clamp(-_LARGEST, _LARGEST)
        return (scaled.to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        if f"{name}.input_scale" in files:
            scale = _read(files, f"{name}.input_scale")
            module.register_forward_pre_hook(partial(rounded, scale))


def _whole_dequantized(folder: Path) -> Any:  # noqa: ANN401 - transformers'
    """Transformers' model of a folder in ModelOpt's FP8: dequantised, with rounded inputs.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    files = _files(folder)
    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {name: _read(files, name) for name in files if not name.endswith(_SCALES)}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    _quantize_inputs(model, files)
    return model.eval()


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder is in ModelOpt's FP8."""
    return (Path(folder) / _QUANTIZATION).exists()


def whole(folder: str | Path) -> Any:  # noqa: ANN401 - transformers'
    """Transformers' model of a folder, in float32.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    if is_quantized(folder):
        return _whole_dequantized(Path(folder))
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, report = loaded
    wrong = [name for kind in report.values() for name in kind]
    if wrong:
        raise ValueError(f"weights are missing, left over or of another shape: {wrong[:3]}")
    return model.eval()


@torch.no_grad()
def main(folder: str, request: str, answer: str) -> None:
    """Answer a request.

    Args:
        folder: what `save_pretrained` would have written.
        request: JSON file with `tokens` (lists of ids), `prompt` (ids), `texts` and `whole`
            (whether the model is held whole).
        answer: file for the logits, float32 [b, s, vocabulary].
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    values = json.loads(Path(request).read_text(encoding="utf-8"))
    model = whole(folder) if values["whole"] else streamed(folder)
    logits_bsv = model(torch.tensor(values["tokens"]), use_cache=False).logits
    save_file({"logits": logits_bsv.contiguous()}, answer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = None
    if values["whole"]:
        prompt = torch.tensor([values["prompt"]])
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_NEW_TOKENS,
            min_new_tokens=_NEW_TOKENS,
            do_sample=False,
        )
        text = tokenizer.decode(written[0, prompt.size(1) :])
    ids = [tokenizer(one)["input_ids"] for one in values["texts"]]
    json.dump({"text": text, "ids": ids}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
