"""Parameters of one run, checked before anything is created.

KFP's client sends whatever it is given, and the server finds a wrong name or type only when the
pipeline is uploaded and the run is being made. The values themselves are checked by what the
pipeline's first step asks too: `flagscale.run_values.check_run`.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.recipe.sweep import VARIED, set_in_vain
from flagscale.run_values import FIELDS, LISTS, SECTIONS, check_run
from flagscale.run_values.literal import literal
from pipelines import form
from pipelines.cluster.parameter_values import read_typed, read_yaml
from pipelines.platform import Platform


@dataclass(frozen=True)
class RunParameters:
    """A run's parameters.

    Attributes:
        sent: those that differ from the pipeline's defaults, as given; sections are whole.
        recipes: that the run will work by, as its first step gives them: one, or a sweep's
            variants.
    """

    sent: dict[str, Any]
    recipes: list[Recipe]


def read_parameters(
    given: list[str],
    definitions: Mapping[str, Mapping[str, Any]],
    recipe: Recipe,
    platform: Platform,
) -> RunParameters:
    """Read and check the values of a run.

    Args:
        given: `name=value` each, or `section.field=value` for a part of a recipe's section; values
            are read as YAML.
        definitions: the pipeline's parameters, from `inputDefinitions.parameters` of its root.
        recipe: whose sections are the defaults.
        platform: that the pipeline was made for.

    Raises:
        UserError: an unknown name, a value of another type, one that pods would fail of, a
            recipe that would be refused, or a field that is given twice.
    """
    defaults = {name: literal(one["defaultValue"]) for name, one in definitions.items()}
    values = copy.deepcopy(defaults)
    parts: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"parameter {item!r}: must read name=value")
        name, dot, _ = key.partition(".")
        if dot and name in SECTIONS and name in definitions:
            parts[key] = read_yaml(key, text)
            _put(values, key, parts[key])
        elif key in definitions:
            values[key] = read_typed(key, text, definitions[key]["parameterType"])
        else:
            raise UserError(_unknown(key, text, definitions, recipe))
    _refuse_twice(values, parts)
    made = form.made(recipe, platform, list(definitions))
    checked = check_run(made, values)
    form.check_size(made, values)
    _refuse_replaced(checked, parts)
    sent = {name: value for name, value in values.items() if value != defaults[name]}
    return RunParameters(sent, _recipes(recipe, checked))


def _recipes(recipe: Recipe, checked: Mapping[str, Any]) -> list[Recipe]:
    whole = recipe.model_dump(exclude={"sweep", "search"})
    whole |= {name: checked[name] for name in SECTIONS if name in checked}
    several = [checked[name] for name in LISTS if name in checked]
    return [
        Recipe.model_validate(whole | {n: one[n] for n in VARIED if n in one})
        for one in (several[0] if several else [{}])
    ]


def _refuse_twice(values: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Refuse a field that is given by its own parameter and as part of its section."""
    for field in FIELDS:
        for name in (field.field, *field.cleared):
            part = f"{field.section}.{name}"
            if part in parts and values.get(field.name):
                raise UserError(
                    f"parameter {field.name}={values[field.name]}: {part}={parts[part]} is given "
                    "as well; leave one of them out"
                )


def _refuse_replaced(checked: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
    """Refuse a tokenizer that reads like the default, in whose place another teacher's is taken."""
    tokenizer = parts.get("data.tokenizer")
    if tokenizer is not None and checked["data"].get("tokenizer") != tokenizer:
        raise UserError(
            f"parameter data.tokenizer={tokenizer}: is the default, which follows the teacher to "
            f"{checked['data'].get('tokenizer')}; --set data.tokenizer={tokenizer} keeps it"
        )


def _put(values: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - of YAML
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"parameter {key}: {parent} is a value, not a section")
    node[last] = value


def _unknown(
    key: str, text: str, definitions: Mapping[str, Mapping[str, Any]], recipe: Recipe
) -> str:
    section = key.partition(".")[0]
    if section in Recipe.model_fields and section not in definitions:
        varied = set_in_vain(recipe.sweep, key, read_yaml(key, text))
        if varied is not None:
            return (
                f"parameter {key}: the sweep varies {varied}; change it with "
                "--set 'sweep.vary={...}', or give all variants of this run with "
                "-p 'sweep_variants=[...]'"
            )
        if recipe.search is not None and section == "student":
            return (
                f"parameter {key}: the search gives the students; change them with "
                "--set 'search.candidates=[...]', or give all candidates of this run with "
                "-p 'search_candidates=[...]'"
            )
        return (
            f"parameter {key}: {section} is fixed when the pipeline is made; change it with "
            f"--set {key}={text}"
        )
    near = difflib.get_close_matches(key, definitions, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(definitions))}"
    return f"parameter {key}: the pipeline has none of this name; {hint}"
