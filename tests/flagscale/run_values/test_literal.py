"""Texts survive what Kubernetes, Argo and KFP do to command lines on the way to a step."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.run_values.literal import carried, literal

SIGNS = ["$", "$$", "(", "{", "}", "\\", "u0024", "u005c", "/", "kfp-workspace", "x", "é", "\n"]
TEXTS = st.lists(st.sampled_from(SIGNS)).map("".join) | st.text()
VALUES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
)
REPLACED = ("$$", "$(", "{{", "/kfp-workspace")


def expanded(text: str, variables: dict[str, str]) -> str:
    """As the kubelet does it (`third_party/forked/golang/expansion`)."""
    known = re.compile(r"\$\$|\$\(([^)]*)\)")

    def one(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return known.sub(one, text)


@given(VALUES)
def test_every_value_comes_back(value: Any) -> None:
    assert literal(carried(value)) == value


@given(TEXTS)
def test_nothing_is_left_to_replace(text: str) -> None:
    travelling = carried(text)
    assert not any(sign in travelling for sign in REPLACED)
    assert expanded(travelling, {"HOME": "/root", "x": "y"}) == travelling


@pytest.mark.parametrize("text", ["plain", "5 $ each", "a {b} c", r"C:\users", "/kfp", "$HOME"])
def test_what_nobody_would_replace_travels_as_it_is(text: str) -> None:
    assert carried(text) == text


def test_how_it_looks_in_the_form() -> None:
    assert carried("$$x$$ $(HOME) {{x}}") == r"$\u0024x$\u0024 $\u0028HOME) {\u007bx}}"
    assert literal(r"typed by hand: \u007b\u007bx}}") == "typed by hand: {{x}}"
