"""YAML as people mean it, where PyYAML is silent: a key given twice is an error, 3e-4 a number.

What is written by `Dumper` has quotes wherever some reader would miss them.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError


class Loader(yaml.SafeLoader):
    """A safe loader that refuses a repeated key, as the YAML specification does."""

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        """A text, in which two halves of a character, as JSON may write it, are that character."""
        text: str = super().construct_scalar(node)
        if not any("\ud800" <= sign <= "\udfff" for sign in text):
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            problem = f"{text!r} holds half of a surrogate pair"
            raise ConstructorError(None, None, problem, node.start_mark) from None

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        """Read a mapping; later, merge keys (`<<`) mix those of others into it."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in first:
                line = first[key.tag, key.value]
                problem = f"{key.value} is given twice, first in line {line}; leave one of them out"
                raise ConstructorError(None, None, problem, key.start_mark)
            first[key.tag, key.value] = key.start_mark.line + 1
        return node


# As in JSON; YAML 1.1 wants a point and a sign, and takes it for a text without.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class Dumper(yaml.SafeDumper):
    """Writes YAML that every reader reads alike.

    PyYAML writes some texts without quotes that others take for something else: 7e2 is a number to
    `load`; so is 0o17 to Go's YAML, with which KFP and kubectl read, and y and n are no texts.
    """


Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",  # a text that might be one of these gets quotes
    re.compile(
        r"""(?: [-+]? (?: \.[0-9_]+ | [0-9][0-9_]* (?:\.[0-9_]*)? ) (?: [eE][-+]?[0-9_]+ )?
          | [-+]? 0 [bBoOxX] \w+ | [0-9]+ (?: -[0-9]+ ){2} .* | [yYnN] )$""",
        re.VERBOSE,
    ),
    list("+-.0123456789yYnN"),
)


def load(text: str) -> Any:  # noqa: ANN401 - whatever it holds
    """Read the one document of a text.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping gives a key twice.
    """
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a safe loader
    except RecursionError:
        raise yaml.YAMLError("is nested too deeply") from None
    except ValueError as error:  # a date that there is not, a number of thousands of digits
        raise yaml.YAMLError(str(error)) from None
