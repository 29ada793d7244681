"""Parameters of one run, checked before anything is created.

KFP's client sends whatever it is given, and the server finds a wrong name or type only when the
pipeline is uploaded and the run is being made; a wrong learning rate it never finds.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from flagscale.errors import UserError
from flagscale.recipe import Recipe, parse_section
from flagscale.recipe.sweep import VARIED, check_distinct, set_in_vain
from pipelines.cluster.parameter_values import check_checkpoints, check_value, read_typed, read_yaml
from pipelines.distillation import SECTIONS
from pipelines.placement import KINDS
from pipelines.platform import Platform


def read_parameters(
    given: list[str],
    definitions: Mapping[str, Mapping[str, Any]],
    recipe: Recipe,
    platform: Platform,
) -> dict[str, Any]:
    """The values of a run that differ from the pipeline's defaults.

    Args:
        given: `name=value` each, or `section.field=value` for a part of a recipe's section; values
            are read as YAML.
        definitions: the pipeline's parameters, from `inputDefinitions.parameters` of its root.
        recipe: whose sections are the defaults.
        platform: that the pipeline was made for.

    Returns:
        What to send, by parameter. Sections are whole, and hold what follows from other sections'
        changes too: another teacher's tokenizer, for instance.

    Raises:
        UserError: an unknown name, a value of another type, one that pods would fail of, or a
            recipe that would be refused.
    """
    values: dict[str, Any] = {}
    changed = recipe.model_dump(mode="json", exclude_none=True)
    _forget_inherited(changed, recipe)
    for item in given:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UserError(f"parameter {item!r}: must read name=value")
        name, dot, _ = key.partition(".")
        if dot and name in SECTIONS and name in definitions:
            _put(changed, key, read_yaml(key, text))
            continue
        if key not in definitions:
            raise UserError(_unknown(key, text, definitions, recipe))
        value = read_typed(key, text, definitions[key]["parameterType"])
        if key in SECTIONS:
            changed[key] = value
        else:
            values[key] = check_value(key, value)
    if "checkpoints" in values:
        check_checkpoints(values["checkpoints"], platform, recipe.resources.nodes)
    _check_images(values, definitions)
    return values | _sections(changed, recipe, values, definitions)


def _sections(
    changed: dict[str, Any],
    recipe: Recipe,
    values: Mapping[str, Any],
    definitions: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The sections that are not the recipe's, checked as a recipe is."""
    where = "the recipe with this run's parameters"
    new = parse_section(Recipe, changed, where=where)
    recipes = {where: new} | {f"variant {v.name}": v.recipe for v in new.variants}
    if "variants" in values:
        recipes = {where: new} | _variants(values["variants"], changed)
    count = values.get("training_accelerator_count")
    if count is None:
        count = definitions.get("training_accelerator_count", {}).get("defaultValue", 0)
    for name, one in recipes.items():
        try:
            one.check_accelerators(int(count))
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    return {
        name: getattr(new, name).model_dump(mode="json", exclude_none=True)
        for name in SECTIONS
        if name in definitions and getattr(new, name) != getattr(recipe, name)
    }


def _variants(given: list[Any], base: Mapping[str, Any]) -> dict[str, Recipe]:
    """A sweep's variants as whole recipes, by name; `base` holds what they share."""
    keys = ["name", *VARIED]
    shared = {key: value for key, value in base.items() if key != "sweep"}
    found: dict[str, Recipe] = {}
    for number, variant in enumerate(given):
        if not isinstance(variant, dict) or sorted(variant) != sorted(keys):
            raise UserError(
                f"parameter variants, item {number}: must be a mapping of {', '.join(keys)}, not "
                f"{sorted(variant) if isinstance(variant, dict) else repr(variant)}"
            )
        name = f"parameter variants, {variant['name']!r}"
        if name in found:
            raise UserError(f"{name}: two variants have this name; each needs its own")
        own = {section: variant[section] for section in VARIED}
        found[name] = parse_section(Recipe, shared | own, where=name)
    if not found:
        raise UserError("parameter variants: is empty; give at least one variant")
    names = (variant["name"] for variant in given)
    try:
        check_distinct("parameter variants", zip(names, found.values(), strict=True))
    except ValueError as error:
        raise UserError(str(error)) from None
    return found


def _check_images(values: Mapping[str, Any], definitions: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse accelerators for pods whose image was chosen for pods without."""
    for kind in KINDS:
        count, image = f"{kind}_accelerator_count", f"{kind}_image"
        wanted = int(values.get(count, 0))
        if wanted and image not in values and not int(definitions[count]["defaultValue"]):
            raise UserError(
                f"parameter {count}={wanted}: these pods have none by default, and {image}="
                f"{definitions[image]['defaultValue']} is for pods without; give -p {image}=... "
                "too"
            )


def _forget_inherited(values: dict[str, Any], recipe: Recipe) -> None:
    """Let a changed section give again what others take from it."""
    data, teacher = recipe.data, recipe.teacher
    if (data.tokenizer, data.tokenizer_revision) == (teacher.source, teacher.revision):
        values["data"].pop("tokenizer", None)
        values["data"].pop("tokenizer_revision", None)


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
        varied = set_in_vain(recipe, key, read_yaml(key, text))
        if varied is not None:
            return (
                f"parameter {key}: the sweep varies {varied}; change it with "
                "--set 'sweep.vary={...}', or give all variants of this run with "
                "-p 'variants=[...]'"
            )
        return (
            f"parameter {key}: {section} is fixed when the pipeline is made; change it with "
            f"--set {key}={text}"
        )
    near = difflib.get_close_matches(key, definitions, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(definitions))}"
    return f"parameter {key}: the pipeline has none of this name; {hint}"
