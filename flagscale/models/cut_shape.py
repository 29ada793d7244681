"""The shape of a student that is cut out of its teacher: fewer layers, or narrower ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flagscale.errors import UserError
from flagscale.megatron.families import family_of
from flagscale.megatron.shape import ModelShape

# Of experts; the others are fields of a shape.
_OF_EXPERTS = ("num_experts", "moe_ffn_hidden_size")
OF_WHOLE_ROWS, WHOLE_ROWS = ("hidden_size", "moe_ffn_hidden_size"), 8  # numbers, in bf16


def widths(shape: ModelShape) -> dict[str, int]:
    """What ModelOpt's `mcore_minitron` can prune of a model, by the recipe's names."""
    found = {
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_attention_heads,
    }
    experts = shape.architecture.num_experts
    if experts is None:
        return found | {"ffn_hidden_size": shape.ffn_hidden_size}
    width = shape.architecture.moe_ffn_hidden_size or shape.ffn_hidden_size
    return found | {"num_experts": experts, "moe_ffn_hidden_size": width}


def cut_shape(teacher: ModelShape, sizes: Mapping[str, int]) -> ModelShape:
    """The teacher's shape with some sizes cut. Heads keep their width.

    Args:
        teacher: its shape.
        sizes: `num_layers`, and of `widths`; no checks are made.
    """
    values: dict[str, Any] = {n: size for n, size in sizes.items() if n not in _OF_EXPERTS}
    shape = replace(teacher, **values)
    experts = {name: sizes[name] for name in _OF_EXPERTS if name in sizes}
    if not experts:
        return shape
    return replace(shape, architecture=teacher.architecture.model_copy(update=experts))


def cut_widths(wide: ModelShape, narrow: ModelShape) -> dict[str, int]:
    """The widths that differ, by the recipe's names, as the narrower shape has them."""
    before = widths(wide)
    return {name: size for name, size in widths(narrow).items() if size != before[name]}


def check_cut(teacher: ModelShape, sizes: Mapping[str, int]) -> None:
    """Refuse what a teacher cannot be cut to.

    Args:
        teacher: its shape.
        sizes: that the recipe gives, of `widths`.

    Raises:
        UserError: the field, its value, and what it can be.
    """
    known = widths(teacher)
    for name, size in sizes.items():
        if name not in known:
            experts = teacher.architecture.num_experts
            has = "no experts" if experts is None else f"experts in place of MLPs ({experts})"
            raise UserError(
                f"student.{name}={size} has no effect: the teacher has {has}; its widths are "
                f"{', '.join(known)}"
            )
        if size > known[name]:
            raise UserError(
                f"student.{name}={size}: the teacher has only {known[name]}; choose at most that"
            )
    heads = sizes.get("num_attention_heads", teacher.num_attention_heads)
    groups = teacher.num_query_groups
    if heads % groups:
        raise UserError(
            f"student.num_attention_heads={heads} is no multiple of the teacher's {groups} "
            "key/value groups, which ModelOpt cannot prune: each keeps as many heads"
        )
    chosen = teacher.architecture.moe_router_topk
    if sizes.get("num_experts", chosen) < chosen:
        raise UserError(
            f"student.num_experts={sizes['num_experts']}: the teacher chooses {chosen} for each "
            "token; give at least as many"
        )
    for name in OF_WHOLE_ROWS if "num_experts" in known else ():
        if sizes.get(name, 0) % WHOLE_ROWS:
            raise UserError(
                f"student.{name}={sizes[name]} is no multiple of {WHOLE_ROWS}: transformers' "
                "experts take matrices in rows of 16 bytes"
            )
    hidden = sizes.get("hidden_size", teacher.hidden_size)
    if not heads_fit(teacher.model_type, hidden, heads):
        raise UserError(
            f"student.hidden_size={hidden} is no multiple of num_attention_heads={heads}, and "
            f"transformers reads no such {teacher.model_type} model; choose multiples"
        )


def heads_fit(model_type: str, hidden_size: int, heads: int) -> bool:
    """Whether transformers reads a model of the family with these two sizes."""
    return not family_of(model_type).hidden_size_of_whole_heads or hidden_size % heads == 0
