r"""Texts as Kubeflow Pipelines carries them to the step that they are meant for.

A parameter's value travels in a container's command line. On the way Kubernetes replaces `$(NAME)`
by a variable of the pod and `$$` by `$`, Argo and KFP replace what stands between `{{` and `}}`,
and KFP's local runner refuses its own folder's name. None of them can be told not to. So the second
character of each of these is written as JSON writes any character, by its number: `$$` becomes
`$\u0024`. Whoever types such a value into KFP's form writes it so too; `submit` does it by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# What one of them would replace, up to the character that hides it; and what reads as hidden.
_REPLACED = re.compile(r"(?<=\$)[$(]|(?<=\{)\{|(?<=/)k(?=fp-workspace)|\\(?=u[0-9a-f]{4})")
_HIDDEN = re.compile(r"\\u(0024|0028|007b|006b|005c)")


def carried(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value as it may travel: the texts in it hold nothing that would be replaced."""
    return _in_texts(value, lambda text: _REPLACED.sub(_hide, text))


def literal(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    """The value as it was before `carried`; one that holds nothing hidden is the same."""
    return _in_texts(value, lambda text: _HIDDEN.sub(lambda found: chr(int(found[1], 16)), text))


def _hide(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:  # noqa: ANN401 - any JSON value
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _in_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_texts(item, change) for item in value]
    return value
