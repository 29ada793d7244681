"""Run-time parameters of a pipeline: what the KFP UI shows before a run is started.

KFP reads a pipeline's parameters from a function's signature. Which parameters there are follows
here from the recipe and the platform, so the signature is made from a list of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from flagscale.run_values.literal import carried


@dataclass(frozen=True)
class Parameter:
    """A parameter of a pipeline; its type is that of its default.

    Attributes:
        name: as in the KFP UI.
        default: text, mapping or list.
        description: one line.
        choices: texts, of which the form lets one be chosen; none where there are many.
    """

    name: str
    default: str | dict[str, Any] | list[Any]
    description: str
    choices: tuple[str, ...] = ()


def make_pipeline(
    name: str,
    display_name: str,
    description: str,
    parameters: Sequence[Parameter],
    wire: Callable[[Mapping[str, Any]], None],
    config: dsl.PipelineConfig | None = None,
) -> BaseComponent:
    """A pipeline with these parameters.

    Args:
        name: in lower case and dashes.
        display_name: in the UI.
        description: in the UI.
        parameters: in the UI's order; their defaults as steps are to get them.
        wire: makes the tasks, given each parameter's channel by name.
        config: of `pipelines.placement.pipeline_config`.
    """

    def pipeline(*values: Any) -> None:  # noqa: ANN401 - KFP's channels
        wire(dict(zip((p.name for p in parameters), values, strict=True)))

    pipeline.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                p.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=carried(p.default),
                annotation=type(p.default),
            )
            for p in parameters
        ]
    )
    lines = [f"    {p.name}: {p.description}" for p in parameters]
    pipeline.__doc__ = "\n".join([description, "", "Args:", *lines, ""])
    pipeline.__name__ = name.replace("-", "_")
    decorate = dsl.pipeline(
        name=name, display_name=display_name, description=description, pipeline_config=config
    )
    made = decorate(pipeline)
    inputs = made.pipeline_spec.root.input_definitions.parameters
    for parameter in parameters:  # KFP's format knows them, its SDK does not yet
        for choice in parameter.choices:
            inputs[parameter.name].literals.add(string_value=choice)
    return made
