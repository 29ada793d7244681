"""What is wrong with a section's values: by field, value and remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_LONGEST_SHOWN = 300  # characters of a value


def explain(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """A line about each wrong field: its value, and what would be right."""
    items = error.errors()
    places = [item["loc"] for item in items]
    return [_line(kind, item) for item in items if not _only_counts(item, places)]


def message(kind: Any, item: Any) -> str:  # noqa: ANN401 - a type expression, ErrorDetails
    """What is wrong with one value, with a right one if its type names some.

    Args:
        kind: what was validated: a section, or any type.
        item: one of `ValidationError.errors()`.
    """
    if item["type"] == "value_error":  # ours: says itself what would be right
        return str(item["msg"]).removeprefix("Value error, ")
    examples = " or ".join(str(value) for value in _examples(_type_at(kind, item["loc"])))
    return f"{item['msg']}, e.g. {examples}" if examples else str(item["msg"])


def shown(value: object) -> str:
    """A value as it stands in an error, or its beginning."""
    text = repr(value)
    if len(text) <= _LONGEST_SHOWN:
        return text
    return f"{text[:_LONGEST_SHOWN]}... ({len(text):,} characters)"


def _only_counts(item: Any, places: Sequence[tuple[int | str, ...]]) -> bool:  # noqa: ANN401
    """Whether a list is called too short only because pydantic left out its wrong items."""
    place = item["loc"]
    return item["type"] == "too_short" and any(
        len(other) > len(place) and other[: len(place)] == place for other in places
    )


def _line(kind: type[BaseModel], item: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    location = [part for part in item["loc"] if isinstance(part, str | int)]
    name = (
        ".".join(str(part) for part in location)
        or kind.__name__.removesuffix("Recipe").lower()
        or "recipe"
    )
    if item["type"] == "extra_forbidden":
        known = _fields(_type_at(kind, location[:-1]))
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"  {name}={shown(item['input'])}: unknown field; {hint}"
    if item["type"] == "missing":
        return f"  {name}: required, and not given"
    if isinstance(item["input"], dict):  # a cross-field check: the message names the values
        return f"  {name}: {message(kind, item)}"
    return f"  {name}={shown(item['input'])}: {message(kind, item)}"


def _type_at(kind: Any, location: Sequence[str | int]) -> Any:  # noqa: ANN401 - a type expression
    """The type, or the field, of what is at a place; None if nothing is."""
    for number, part in enumerate(location):
        kind = _bare(kind)
        inner = get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields.get(str(part))
        elif get_origin(kind) is dict:
            if list(location[number + 1 :]) == ["[key]"]:  # pydantic's sign for the key itself
                return inner[0]
            kind = inner[1]
        else:
            kind = inner[0] if inner else None
    return kind


def _bare(kind: Any) -> Any:  # noqa: ANN401 - a type expression
    """The type without what is said of it: `X` of `X | None`, of a field and of `Annotated`."""
    if isinstance(kind, FieldInfo):
        return _bare(kind.annotation)
    if get_origin(kind) in (Annotated, Union, types.UnionType):
        return _bare(next(a for a in get_args(kind) if a is not type(None)))
    return kind


def _examples(kind: Any) -> list[Any]:  # noqa: ANN401 - a type expression
    if isinstance(kind, FieldInfo):
        return kind.examples or _examples(kind.annotation)
    if get_origin(kind) not in (Annotated, Union, types.UnionType):
        return []
    first, *notes = get_args(kind)
    fields = [note for note in notes if isinstance(note, FieldInfo) and note.examples]
    return (fields[0].examples or []) if fields else _examples(first)


def _fields(kind: Any) -> list[str]:  # noqa: ANN401 - a type expression
    """Names of a section's fields."""
    bare = _bare(kind)
    is_section = isinstance(bare, type) and issubclass(bare, BaseModel)
    return list(bare.model_fields) if is_section else []
