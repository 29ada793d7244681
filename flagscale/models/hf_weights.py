"""Which rows of which Hugging Face tensors a Megatron-Core tensor is made of: one map, both ways.

Megatron-Core names its weights by the keys of a distributed checkpoint (`sharded_state_dict`):
`decoder.layers.self_attention.linear_qkv.weight` holds every layer's, stacked along a leading axis.
A rank has a slice of such a tensor. Whatever the family, a layer's tensor is rows of Hugging Face
tensors put together, with all their columns: query, key and value heads by key/value group, gate
over up, a vocabulary with padding below. So a rule is a table: key -> rows, and a family is the
rules that it is made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "lm_head.weight"

_LAYERS = "decoder.layers."
_HF_LAYER = "model.layers.{layer}."
_HF_EXPERT = _HF_LAYER + "mlp.experts.{expert}."
_NUMBER = re.compile(r"(\d+)\.")


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
class Located:
    """What a slice of a Megatron-Core tensor lies in.

    Attributes:
        parts: that make up the whole tensor of one layer or expert, in order.
        offset: of the slice in it: row, then column if there are columns.
    """

    parts: tuple[Rows, ...]
    offset: tuple[int, ...]

    def heights(self) -> dict[str, int]:
        """How many rows each Hugging Face tensor has that is part of this one."""
        heights: dict[str, int] = {}
        for part in self.parts:
            if part.name is not None:
                heights[part.name] = max(part.stop, heights.get(part.name, 0))
        return heights

    def overlaps(self, length: int) -> Iterator[tuple[int, Rows]]:
        """The rows that `length` rows from the offset on are made of.

        Yields:
            Where they start in the slice, and the rows.
        """
        first, last, at = self.offset[0], self.offset[0] + length, 0
        for part in self.parts:
            start, stop = max(first, at), min(last, at + len(part))
            if start < stop:
                shift = part.start - at
                yield start - first, Rows(part.name, start + shift, stop + shift)
            at += len(part)


Table: TypeAlias = dict[str, tuple[Rows, ...]]
Rule: TypeAlias = Callable[[ModelShape], Table]


class WeightMap:
    """The weights of one model by both names."""

    def __init__(self, shape: ModelShape) -> None:
        """Put a family's rules together.

        Raises:
            UserError: the family has none, or no Hugging Face model has this architecture.
        """
        if shape.model_type not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise UserError(
                f"model_type={shape.model_type!r} has no rules for its weights; known: {known}"
            )
        shape.check_fits_hugging_face()
        self._num_layers = shape.num_layers
        self._num_experts = shape.architecture.num_experts or 0
        self._table: Table = {}
        for rule in FAMILIES[shape.model_type]:
            self._table |= rule(shape)

    def locate(self, key: str, global_offset: Sequence[int]) -> Located:
        """Find the place of a slice.

        Args:
            key: of Megatron-Core's `ShardedTensor`.
            global_offset: of it: layer and expert first, where they are stacked.

        Raises:
            UserError: Hugging Face's model of this family has no such tensor.
        """
        offset = list(global_offset)
        name, layer, expert = key, 0, 0
        if key.startswith(_LAYERS):
            name = key.removeprefix(_LAYERS)
            number = _NUMBER.match(name)  # layers that differ are not stacked
            layer = int(number[1]) if number else offset.pop(0)
            name = _LAYERS + (name[number.end() :] if number else name)
        if name not in self._table:
            raise UserError(f"the family has no counterpart of Megatron-Core's {key}")
        parts = self._table[name]
        if _is_expert(parts):
            expert = offset.pop(0)
        return Located(_numbered(parts, layer, expert), tuple(offset))

    def names(self) -> set[str]:
        """Every tensor of the Hugging Face model."""
        return {
            part.name
            for key, parts in self._table.items()
            for layer in range(self._num_layers if key.startswith(_LAYERS) else 1)
            for expert in range(self._num_experts if _is_expert(parts) else 1)
            for part in _numbered(parts, layer, expert)
            if part.name is not None
        }


def vocabulary(shape: ModelShape) -> Table:
    """Embedding, final norm, and the output layer where it has weights of its own."""
    padding = Rows(None, 0, shape.padded_vocab_size - shape.vocab_size)
    table = {
        "embedding.word_embeddings.weight": (Rows(EMBEDDING, 0, shape.vocab_size), padding),
        "decoder.final_layernorm.weight": (Rows("model.norm.weight", 0, shape.hidden_size),),
    }
    if shape.untie_embeddings_and_output_weights:
        table["output_layer.weight"] = (Rows(OUTPUT_LAYER, 0, shape.vocab_size), padding)
    return table


def attention(shape: ModelShape) -> Table:
    """Grouped-query attention: each key/value group has its query heads, its key, its value."""
    width = shape.kv_channels
    queries = shape.num_attention_heads // shape.num_query_groups * width
    own = _LAYERS + "self_attention."
    theirs = _HF_LAYER + "self_attn."
    table = {
        own + "linear_qkv.layer_norm_weight": (
            Rows(_HF_LAYER + "input_layernorm.weight", 0, shape.hidden_size),
        ),
        own + "linear_proj.weight": (Rows(theirs + "o_proj.weight", 0, shape.hidden_size),),
    }
    for kind in ("weight", "bias") if shape.add_qkv_bias else ("weight",):
        table[own + f"linear_qkv.{kind}"] = tuple(
            Rows(theirs + f"{projection}.{kind}", group * rows, (group + 1) * rows)
            for group in range(shape.num_query_groups)
            for projection, rows in (("q_proj", queries), ("k_proj", width), ("v_proj", width))
        )
    if shape.qk_layernorm:
        for head in "qk":
            table[own + f"{head}_layernorm.weight"] = (
                Rows(theirs + f"{head}_norm.weight", 0, width),
            )
    return table


def gated_mlp(shape: ModelShape) -> Table:
    """SwiGLU: the gate's rows above the up projection's."""
    return {
        _LAYERS + "mlp.linear_fc1.layer_norm_weight": _mlp_norm(shape),
        **_gated(_LAYERS + "mlp.", _HF_LAYER + "mlp.", shape.hidden_size, shape.ffn_hidden_size),
    }


def experts(shape: ModelShape) -> Table:
    """A router and SwiGLU experts, in place of `gated_mlp`; Hugging Face's are one by one."""
    count, width = shape.architecture.num_experts, shape.architecture.moe_ffn_hidden_size
    return {
        _LAYERS + "pre_mlp_layernorm.weight": _mlp_norm(shape),
        _LAYERS + "mlp.router.weight": (Rows(_HF_LAYER + "mlp.gate.weight", 0, count or 0),),
        **_gated(
            _LAYERS + "mlp.experts.experts.",
            _HF_EXPERT,
            shape.hidden_size,
            width or shape.ffn_hidden_size,
        ),
    }


FAMILIES: dict[str, tuple[Rule, ...]] = {
    "llama": (vocabulary, attention, gated_mlp),
    "qwen2": (vocabulary, attention, gated_mlp),
    "qwen3": (vocabulary, attention, gated_mlp),
}


def _mlp_norm(shape: ModelShape) -> tuple[Rows, ...]:
    return (Rows(_HF_LAYER + "post_attention_layernorm.weight", 0, shape.hidden_size),)


def _gated(own: str, theirs: str, hidden_size: int, ffn_hidden_size: int) -> Table:
    return {
        own + "linear_fc1.weight": (
            Rows(theirs + "gate_proj.weight", 0, ffn_hidden_size),
            Rows(theirs + "up_proj.weight", 0, ffn_hidden_size),
        ),
        own + "linear_fc2.weight": (Rows(theirs + "down_proj.weight", 0, hidden_size),),
    }


def _is_expert(parts: tuple[Rows, ...]) -> bool:
    return any("{expert}" in (part.name or "") for part in parts)


def _numbered(parts: tuple[Rows, ...], layer: int, expert: int) -> tuple[Rows, ...]:
    return tuple(
        Rows(part.name and part.name.format(layer=layer, expert=expert), part.start, part.stop)
        for part in parts
    )
