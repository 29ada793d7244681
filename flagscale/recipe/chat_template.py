"""Chat templates as text: read from a file, parsed, never rendered here."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LARGEST = 100_000  # characters: a recipe is handed to every step


class _Generation(Extension):
    """`{% generation %}`, by which transformers' templates mark answers; here just a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def read_template(value: str) -> str:
    """A template's text, from the text itself or from the file that is named.

    Raises:
        ValueError: there is no such file, or it is no template.
    """
    text = value
    if "{{" not in value and "{%" not in value:
        try:
            text = Path(value).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ValueError(
                f"{value[:80]!r}: no template's text (no {{{{ or {{%), and no file that can be "
                f"read: {error}"
            ) from error
    if len(text) > _LARGEST:
        raise ValueError(f"{len(text):,} characters; a chat template has at most {_LARGEST:,}")
    if "messages" not in variables(text):
        raise ValueError(
            "the chat template writes no messages: it must use the variable `messages`"
        )
    return text


@lru_cache
def variables(template: str) -> frozenset[str]:
    """What a template may be given.

    Raises:
        ValueError: it is no template.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(template)))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"the chat template is none: line {error.lineno}: {error.message}"
        ) from error
