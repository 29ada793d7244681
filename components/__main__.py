"""Writes each component's README from its signature: `python -m components`."""

import importlib
import pkgutil
import sys
from pathlib import Path

import docstring_parser
from kfp.dsl.base_component import BaseComponent

import components

_KINDS = {
    "STRING": "text",
    "STRUCT": "mapping",
    "LIST": "list",
    "NUMBER_DOUBLE": "number",
    "NUMBER_INTEGER": "whole number",
}


def all_components() -> dict[Path, BaseComponent]:
    """Folder -> component, in alphabetical order."""
    found = {}
    for module in pkgutil.iter_modules(components.__path__):
        if module.ispkg:
            loaded = importlib.import_module(f"components.{module.name}.component")
            assert loaded.__file__
            found[Path(loaded.__file__).parent] = getattr(loaded, module.name)
    return found


def readme(component: BaseComponent) -> str:
    """The README of a component, from its signature and docstring."""
    spec = component.pipeline_spec.components[f"comp-{component.name}"]
    inputs, outputs = spec.input_definitions, spec.output_definitions
    texts = _descriptions(component)
    parameters = [(n, _kind(p), texts[n]) for n, p in inputs.parameters.items()]
    artifacts = [(n, _title(a), texts[n]) for n, a in inputs.artifacts.items()]
    written = [
        *((n, _title(a), texts[n]) for n, a in outputs.artifacts.items()),
        *((n, _kind(p), "as checked") for n, p in outputs.parameters.items()),
    ]
    step = component.name.replace("-", "_")
    return "\n\n".join(
        [
            f"# {component.name}",
            component.description or "",
            f"The work is in [`flagscale/steps/{step}.py`](../../flagscale/steps/{step}.py).",
            "## Inputs\n\n" + _table([*sorted(parameters), *sorted(artifacts)]),
            "## Outputs\n\n" + _table(sorted(written)),
            "<!-- Made by `python -m components` from the signature: change it there. -->\n",
        ]
    )


def _descriptions(component: BaseComponent) -> dict[str, str]:
    """What the docstring says of each argument; KFP itself keeps only that of the inputs."""
    documented = docstring_parser.parse(component.python_func.__doc__ or "")
    return {param.arg_name: param.description or "" for param in documented.params}


def _kind(parameter: object) -> str:
    return _KINDS.get(_type_name(parameter), "text")


def _type_name(parameter: object) -> str:
    field = parameter.DESCRIPTOR.fields_by_name["parameter_type"]  # type: ignore[attr-defined]
    return field.enum_type.values_by_number[parameter.parameter_type].name  # type: ignore[attr-defined]


def _title(artifact: object) -> str:
    title = artifact.artifact_type.schema_title  # type: ignore[attr-defined]
    return title.removeprefix("system.")


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| name | type | |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {' '.join(text.split())} |" for name, kind, text in rows]
    return "\n".join(lines)


def _main() -> int:
    for folder, component in all_components().items():
        (folder / "README.md").write_text(readme(component), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(_main())
