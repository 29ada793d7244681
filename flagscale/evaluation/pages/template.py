"""The templates of all pages: HTML that needs no network and no script."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined, Template


def template(name: str) -> Template:
    """A page's template, strict about what it is given.

    Args:
        name: `<room>/<file>`, the room one of `flagscale.evaluation`.
    """
    environment = Environment(
        loader=PackageLoader("flagscale.evaluation", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
