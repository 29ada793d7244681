"""The value of one parameter of a run, read from a command line as its type."""

from __future__ import annotations

from typing import Any

import yaml

from flagscale.errors import UserError
from flagscale.recipe import strict_yaml

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "STRING": (str, "a text"),
    "NUMBER_INTEGER": (int, "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": (bool, "true or false"),
    "LIST": (list, "a list, e.g. [a, b]"),
    "STRUCT": (dict, "a mapping, e.g. {key: value}"),
}


def read_yaml(key: str, text: str) -> Any:  # noqa: ANN401 - whatever it holds
    """A value as YAML.

    Raises:
        UserError: it is none, or a mapping in it gives a key twice.
    """
    try:
        return strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"parameter {key}={text}: the value is not valid YAML: {error}") from None


def read_typed(key: str, text: str, kind: str) -> Any:  # noqa: ANN401 - as `kind` says
    """A value of one of KFP's types.

    Raises:
        UserError: it is no YAML, or of another type.
    """
    value = read_yaml(key, text)
    if kind == "STRING" and not isinstance(value, dict | list):
        quoted = text.strip()[:1] in ("'", '"')
        return str(yaml.safe_load(text)) if quoted else text.strip()
    kinds, right = _KINDS[kind]
    wrong_number = isinstance(value, bool) and kind != "BOOLEAN"
    if wrong_number or not isinstance(value, kinds):
        raise UserError(f"parameter {key}={text}: must be {right}, not {_what(value)}")
    return value


def _what(value: Any) -> str:  # noqa: ANN401 - anything
    if value is None:
        return "nothing"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "a mapping")
