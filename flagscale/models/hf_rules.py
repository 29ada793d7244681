"""Whose rows a Megatron-Core tensor is made of: a rule for each part of a model.

A rule is a table: key of a tensor -> rows of Hugging Face tensors, which put together are the
tensor of one layer or expert, and how many columns these have. A model is the rules that it is made
of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from flagscale.megatron.shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"
LAYERS = "decoder.layers."

_HF_LAYER = "model.layers.{layer}."
_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop` of a Hugging Face tensor; without a name, zeros.

    In a rule's table the name has the places `{layer}` and `{expert}`.
    """

    name: str | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Stack:
    """The tensor of one layer or expert: rows of Hugging Face tensors with all their columns.

    Attributes:
        parts: from top to bottom.
        columns: of each of them; None where they are vectors.
    """

    parts: tuple[Rows, ...]
    columns: int | None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def is_expert(self) -> bool:
        """Whether every expert has one."""
        return any("{expert}" in (part.name or "") for part in self.parts)

    def numbered(self, layer: int, expert: int) -> Stack:
        """The stack of a layer, and of one of its experts."""
        parts = (
            Rows(part.name and part.name.format(layer=layer, expert=expert), part.start, part.stop)
            for part in self.parts
        )
        return Stack(tuple(parts), self.columns)


Table: TypeAlias = dict[str, Stack]
Rule: TypeAlias = Callable[[ModelShape], Table]


def vocabulary(shape: ModelShape) -> Table:
    """Embedding, final norm, and the output layer where it has weights of its own."""

    def of_tokens(name: str) -> Stack:
        padding = Rows(None, 0, shape.padded_vocab_size - shape.vocab_size)
        return Stack((Rows(name, 0, shape.vocab_size), padding), shape.hidden_size)

    table = {
        "embedding.word_embeddings.weight": of_tokens(EMBEDDING),
        "decoder.final_layernorm.weight": _vector("model.norm.weight", shape.hidden_size),
    }
    if shape.untie_embeddings_and_output_weights:
        table["output_layer.weight"] = of_tokens(OUTPUT_LAYER)
    return table


def attention(shape: ModelShape) -> Table:
    """Grouped-query attention: each key/value group has its query heads, its key, its value."""
    width = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * width
    own = LAYERS + "self_attention."
    theirs = _HF_LAYER + "self_attn."
    output = Rows(theirs + "o_proj.weight", 0, shape.hidden_size)
    table: Table = {
        own + "linear_qkv.layer_norm_weight": _vector(
            _HF_LAYER + "input_layernorm.weight", shape.hidden_size
        ),
        own + "linear_proj.weight": Stack((output,), shape.num_attention_heads * width),
    }
    columns = {"weight": shape.hidden_size} | ({"bias": None} if shape.add_qkv_bias else {})
    for kind, count in columns.items():
        heads = tuple(
            Rows(theirs + f"{projection}.{kind}", group * rows, (group + 1) * rows)
            for group in range(shape.num_query_groups)
            for projection, rows in (("q_proj", queries), ("k_proj", width), ("v_proj", width))
        )
        table[own + f"linear_qkv.{kind}"] = Stack(heads, count)
    if shape.qk_layernorm:
        for head in "qk":
            table[own + f"{head}_layernorm.weight"] = _vector(theirs + f"{head}_norm.weight", width)
    return table


def gated_mlp(shape: ModelShape) -> Table:
    """SwiGLU: the gate's rows above the up projection's."""
    return {
        LAYERS + "mlp.linear_fc1.layer_norm_weight": _mlp_norm(shape),
        **_gated(LAYERS + "mlp.", _HF_LAYER + "mlp.", shape.hidden_size, shape.ffn_hidden_size),
    }


def experts(shape: ModelShape) -> Table:
    """A router and SwiGLU experts, in place of `gated_mlp`; Hugging Face's are one by one."""
    count, width = shape.architecture.num_experts, shape.architecture.moe_ffn_hidden_size
    return {
        LAYERS + "pre_mlp_layernorm.weight": _mlp_norm(shape),
        LAYERS + "mlp.router.weight": Stack(
            (Rows(_HF_LAYER + "mlp.gate.weight", 0, count or 0),), shape.hidden_size
        ),
        **_gated(
            LAYERS + "mlp.experts.experts.",
            _HF_EXPERT,
            shape.hidden_size,
            width or shape.ffn_hidden_size,
        ),
    }


def rules(shape: ModelShape) -> tuple[Rule, ...]:
    """What a model is made of; families differ by what they have, not by its names."""
    has_experts = shape.architecture.num_experts is not None
    return (vocabulary, attention, experts if has_experts else gated_mlp)


def _vector(name: str, size: int) -> Stack:
    return Stack((Rows(name, 0, size),), None)


def _mlp_norm(shape: ModelShape) -> Stack:
    return _vector(_HF_LAYER + "post_attention_layernorm.weight", shape.hidden_size)


def _gated(own: str, theirs: str, hidden_size: int, ffn_hidden_size: int) -> Table:
    gate_and_up = (
        Rows(theirs + "gate_proj.weight", 0, ffn_hidden_size),
        Rows(theirs + "up_proj.weight", 0, ffn_hidden_size),
    )
    down = Rows(theirs + "down_proj.weight", 0, hidden_size)
    return {
        own + "linear_fc1.weight": Stack(gate_and_up, hidden_size),
        own + "linear_fc2.weight": Stack((down,), ffn_hidden_size),
    }
