"""The model card of an exported student: what it is, what it was taught, how well it does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE, SHOWN
from flagscale.megatron.shape import ModelShape
from flagscale.models.origin import Origin
from flagscale.recipe.quantization import FORMATS

_ROWS = {TEACHER: "Teacher", BEFORE: "Before training", AFTER: "This model"}


def model_card(
    name: str,
    origin: Origin,
    shape: ModelShape,
    training: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Any],
    export_format: str = "huggingface",
    has_chat_template: bool = False,
    pretrained: Origin | None = None,
) -> str:
    """The text of README.md: YAML front matter that the Hugging Face hub reads, then Markdown.

    Args:
        name: title.
        origin: of the teacher.
        shape: of the student.
        training: sections `distillation` and `training` of the recipe.
        metrics: of the evaluation artifact.
        export_format: `huggingface` or `megatron`.
        has_chat_template: whether its tokenizer has one.
        pretrained: origin of the model that the student was before; None: it was made of the
            teacher.
    """
    teacher = _name(origin)
    weights = pretrained or origin
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(weights, export_format), sort_keys=False)}---",
        f"# {name}",
        f"A {_kind(shape)} model of {shape.num_layers} layers and "
        f"{metrics['parameters'][AFTER] / 1e6:.1f}M parameters, "
        f"{_made(training, teacher, pretrained)}{_quantized(shape)}",
        f"## How well it does\n\n{_table(metrics)}\n\n{_note(metrics)}",
        f"## How it was trained\n\n{_learnt(metrics['kinds'], has_chat_template)}\n\n"
        f"{_training(training)}",
        f"## How to use it\n\n{_usage(shape, export_format)}",
        f"## Licence\n\n{_license(weights, _name(weights))}",
    ]
    if pretrained and training["distillation"]["loss"] != "none":
        sections.append(_taught(origin, teacher))
    return "\n\n".join(sections) + "\n"


_USAGE = {
    "huggingface": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=40)[0]))
```""",
    "megatron": """A Megatron-Core distributed checkpoint; no class of transformers loads it. With
FlagScale distillation:

```python
from pathlib import Path

import torch
from transformers import AutoTokenizer

from flagscale.megatron import platform
from flagscale.models.megatron import load_model, logits

folder = Path("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
tokens = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
with platform.runtime():
    model = load_model(folder, seq_length=tokens.size(1))
    print(tokenizer.decode(logits(model, tokens)[0, -1].argmax()))
```""",
}


_SERVED = """Its weights are FP8 numbers with scales, in ModelOpt's unified format
(`hf_quant_config.json`), which vLLM, SGLang and TensorRT-LLM are made to read:

```python
from vllm import LLM

model = LLM("path/to/this/folder", quantization="modelopt")
print(model.generate("Once upon a time")[0].outputs[0].text)
```

transformers 5 does not know the format: it warns, leaves the scales out, and loads another
model."""


def _usage(shape: ModelShape, export_format: str) -> str:
    if shape.quantization is not None and export_format == "huggingface":
        return _SERVED
    return _USAGE[export_format]


def _quantized(shape: ModelShape) -> str:
    if shape.quantization is None:
        return ""
    one = FORMATS[shape.quantization]
    what = "weights and inputs" if one.quantizes_inputs else "weights"
    return (
        f" The {what} of its layers' matrix products are quantised to {one.weight_bits} bits "
        f"(ModelOpt's `{one.modelopt}`); embedding and output layer are not."
    )


def _kind(shape: ModelShape) -> str:
    architecture = shape.architecture
    if shape.fits_hugging_face and architecture.num_experts is not None:
        chosen = architecture.moe_router_topk
        return f"{shape.model_type} ({architecture.num_experts} experts, {chosen} a token)"
    if shape.fits_hugging_face:
        return shape.model_type
    values = architecture.model_dump(mode="json", exclude_defaults=True)
    named = ", ".join(
        name if isinstance(value, dict) else f"{name}={value}" for name, value in values.items()
    )
    return f"Megatron-Core GPT ({named})"


def _front_matter(origin: Origin, export_format: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "library_name": "transformers" if export_format == "huggingface" else "megatron-core",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "megatron-core", "modelopt"],
    }
    for name in ("license", "license_name", "license_link"):
        if getattr(origin, name):
            values[name] = getattr(origin, name)
    if origin.base_model:
        values["base_model"] = origin.base_model
    return values


def _name(origin: Origin) -> str:
    return origin.base_model or origin.source


def _made(
    training: Mapping[str, Mapping[str, Any]], teacher: str, pretrained: Origin | None
) -> str:
    start = _name(pretrained) if pretrained else teacher
    if training["distillation"]["loss"] == "none":
        return f"made from `{start}` and trained, without a teacher, with Megatron-Core."
    begun = f"that was `{start}`, " if pretrained else ""
    return f"{begun}distilled from `{teacher}` with Megatron-Core and NVIDIA ModelOpt."


def _taught(origin: Origin, teacher: str) -> str:
    """The licence of a teacher that the weights are not derived from may still say something."""
    name = origin.license_name or origin.license
    known = f"whose licence is `{name}`" if name else "whose licence is not known"
    link = f" ({_linked(origin.license_link)})" if origin.license_link else ""
    note = _llama_note(origin)
    text = (
        f"It has learnt from what `{teacher}` predicts, {known}{link}; that licence's files, where "
        "there are any, are in `teacher/`."
    )
    return f"{text}\n\n{note}" if note else text


def _table(metrics: Mapping[str, Any]) -> str:
    lines = [
        "| | " + " | ".join(figure.label for figure in SHOWN.values()) + " |",
        "|---|" + "---:|" * len(SHOWN),
    ]
    for model, label in _ROWS.items():
        found = metrics["models"][model]
        cells = [
            f"{figure.text(found[key]['value'])} "
            f"[{figure.text(found[key]['low'])}, {figure.text(found[key]['high'])}]"
            for key, figure in SHOWN.items()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _note(metrics: Mapping[str, Any]) -> str:
    meanings = " ".join(f"{figure.label}: {figure.meaning}" for figure in SHOWN.values())
    return (
        f"Measured on {metrics['documents']} held-out documents ({metrics['tokens']:,} tokens, "
        f"windows of {metrics['seq_length']}), with {100 * metrics['confidence']:g}% bootstrap "
        f"intervals over documents. {meanings}"
    )


def _training(sections: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| setting | value |", "|---|---|"]
    for section, values in sections.items():
        for key, value in values.items():
            if value is not None and value != []:
                lines.append(f"| `{section}.{key}` | {value} |")
    return "\n".join(lines)


def _learnt(kinds: Sequence[str], has_chat_template: bool) -> str:
    """What it may be asked: a template that nothing was trained with promises too much."""
    if kinds == ["chat"]:
        return "On conversations, written as its chat template writes them."
    if kinds != ["text"]:
        return "On plain text and on conversations, written as its chat template writes them."
    if not has_chat_template:
        return "On plain text, not on conversations: it continues a text. It has no chat template."
    return (
        "On plain text, not on conversations: it continues a text. The chat template that it has "
        "is the teacher's, and nothing was trained with it. How well the student follows it was "
        "not measured."
    )


def _license(origin: Origin, teacher: str) -> str:
    name = origin.license_name or origin.license
    known = f"`{name}`, that" if name else "Not known: it is that"
    link = f" Its text: {_linked(origin.license_link)}." if origin.license_link else ""
    note = _llama_note(origin)
    text = f"{known} of `{teacher}`, from which this model is derived.{link}"
    return f"{text}\n\n{note}" if note else text


def _linked(link: str) -> str:
    return f"<{link}>" if "://" in link else f"[{link}]({link})"


def _llama_note(origin: Origin) -> str | None:
    """What Meta's community licences want of a model that is made with theirs.

    Llama 3 to 4, sections 1.b.i and 1.b.iii; Llama 2, section 1.b.ii, which wants no name.
    """
    found = re.fullmatch(r"llama(\d(?:\.\d)?)", origin.license_name or origin.license or "")
    if found is None:
        return None
    version = found.group(1)
    notice = (
        f'a file `NOTICE` must say: "Llama {version} is licensed under the '
        f"{'LLAMA 2' if version == '2' else f'Llama {version}'} Community License, Copyright (c) "
        'Meta Platforms, Inc. All Rights Reserved."'
    )
    if version == "2":
        return f"Where this model is distributed, {notice}"
    return (
        'Built with Llama. Where this model is distributed, its name must begin with "Llama", a '
        f"copy of the licence must go along, and {notice}"
    )
