"""Changes of a section's fields to what is at their types' borders, or beyond, or nasty."""

import copy
import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel

from tests.flagscale.recipe.test_bounds import parts

Change = tuple[tuple[str, ...], Any]
TEXTS = [
    *("", " ", "x", "a/b", "a:b", "../x", "/", ".", "..", "~", "y", "7e2", "null", "1e3", "-x"),
    *(
        "$(HOME)",
        "$$",
        "{{x}}",
        "{{$.inputs}}",
        "é🙂",
        "a\nb",
        "a\0b",
        "\ud800",
        "\u2028",
        "x" * 300,
    ),
    *("x" * 5000, "s3://b", "decoder.layers.1", "module:name", "\\u0024", "%s", "'\"`", "*[?]"),
]
GOOD_TEXTS = [
    "x",
    "é🙂",
    "$(HOME) {{x}}",
    "7e2",
    "y",
    "decoder.layers.1",
    "decoder.layers.0.mlp",
    "mse",
]
NUMBERS = [
    *(0, 1, 2, 3, 7, 8, 64, 256, 257, -1, True, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64),
    *(0.0, 0.5, 1.0, 1e-9, 1e-30, 1e-300, 5e-324, 0.9999999999999999, 1e6, 1e30, 1e300, -0.0),
    *(math.inf, -math.inf, math.nan, 10**400, 1e3, 20261128123456),
]


def leaves(
    kind: type[BaseModel], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The path and the field of everything in a section that is none itself."""
    for name, field in kind.model_fields.items():
        inside = [
            p
            for p, _ in parts(field.annotation)
            if isinstance(p, type) and issubclass(p, BaseModel)
        ]
        if inside and name not in ("blend",):
            yield from leaves(inside[0], (*path, name))
        else:
            yield (*path, name), field


def choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for one in get_args(annotation) for value in choices(one)]


def at_borders(field: Any) -> list[Any]:
    found: list[Any] = []
    for _, notes in parts(field.annotation, tuple(field.metadata)):
        for note in notes:
            for name in ("ge", "gt", "le", "lt"):
                limit = getattr(note, name, None)
                if limit is not None:
                    step = limit * 1e-9 if isinstance(limit, float) else 1
                    found += [limit, limit - step, limit + step]
    return found


def plausible(field: Any) -> list[Any]:
    """Values that a field's type takes, mostly."""
    kinds = [plain for plain, _ in parts(field.annotation)]
    typical = {bool: [True, False], int: [1, 2, 4, 8, 64], float: [0.1, 0.5, 1.0], str: GOOD_TEXTS}
    return [
        *choices(field.annotation),
        *at_borders(field),
        *(value for kind in kinds for value in typical.get(kind, ())),
        field.get_default(),
    ]


def values_of(field: Any) -> st.SearchStrategy[Any]:
    good = st.sampled_from(plausible(field))
    nasty = st.sampled_from(NUMBERS) | st.sampled_from(TEXTS) | st.text()
    single = good | good | good | nasty
    if any(word in str(field.annotation) for word in ("tuple", "list", "dict")):
        pairs = st.lists(st.sampled_from(GOOD_TEXTS), min_size=2, max_size=3)
        mapping = st.dictionaries(st.sampled_from(TEXTS), single, max_size=2)
        return st.lists(single | pairs, max_size=3) | mapping | good
    return single


def changes_of(kind: type[BaseModel]) -> st.SearchStrategy[list[Change]]:
    """One or two fields of a section, or of those in it, each with a new value."""
    fields = dict(leaves(kind))
    one = st.sampled_from(sorted(fields)).flatmap(
        lambda path: st.tuples(st.just(path), values_of(fields[path]))
    )
    return st.lists(one, min_size=1, max_size=2)


def changed(base: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    """A copy of a section's raw values with these changes."""
    values = copy.deepcopy(base)
    for path, value in changes:
        node = values
        for name in path[:-1]:
            if not isinstance(node.get(name), dict):
                node[name] = {}
            node = node[name]
        node[path[-1]] = value
    return values
