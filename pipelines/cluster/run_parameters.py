"""Parameters of one run, checked before anything is created.

KFP's client sends whatever it is given, and the server finds a wrong name or type only when the
pipeline is uploaded and the run is being made; a wrong learning rate it never finds.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from flagscale.errors import UserError
from flagscale.recipe import Recipe, parse_section
from flagscale.recipe.sweep import VARIED, Metric
from flagscale.secrets import has_credentials, hide_in_urls
from pipelines.distillation import SECTIONS
from pipelines.kubernetes_values import ClaimName, ImageName, LabelKey, LabelValue, Name
from pipelines.platform import Toleration

_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "STRING": (str, "a text"),
    "NUMBER_INTEGER": (int, "a whole number"),
    "NUMBER_DOUBLE": ((int, float), "a number"),
    "BOOLEAN": (bool, "true or false"),
    "LIST": (list, "a list, e.g. [a, b]"),
    "STRUCT": (dict, "a mapping, e.g. {key: value}"),
}
_OF_PODS: dict[str, Any] = {
    "volume_claim": ClaimName,
    "mlflow_secret": Name,
    "image": ImageName,
    "node_selector": dict[LabelKey, LabelValue],
}


def read_parameters(
    given: list[str], definitions: Mapping[str, Mapping[str, Any]], recipe: Recipe
) -> dict[str, Any]:
    """The values of a run that differ from the pipeline's defaults.

    Args:
        given: `name=value` each, or `section.field=value` for a part of a recipe's section; values
            are read as YAML.
        definitions: the pipeline's parameters, from `inputDefinitions.parameters` of its root.
        recipe: whose sections are the defaults.

    Returns:
        What to send, by parameter. Sections are whole, and hold what follows from other sections'
        changes too: another teacher's tokenizer, for instance.

    Raises:
        UserError: an unknown name, a value of another type, or a recipe that would be refused.
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
            _put(changed, key, _yaml(key, text))
            continue
        if key not in definitions:
            raise UserError(_unknown(key, text, definitions))
        value = _typed(key, text, definitions[key]["parameterType"])
        if key in SECTIONS:
            changed[key] = value
        else:
            values[key] = _checked(key, value)
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
    return found


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


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as in JSON; YAML 1.1 wants a point and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+"),
    list("-+.0123456789"),
)


def _yaml(key: str, text: str) -> Any:  # noqa: ANN401 - whatever it holds
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError:
        raise UserError(f"parameter {key}={text}: the value is not valid YAML") from None


def _typed(key: str, text: str, kind: str) -> Any:  # noqa: ANN401 - as `kind` says
    value = _yaml(key, text)
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


def _checked(key: str, value: Any) -> Any:  # noqa: ANN401 - of any kind
    """What KFP would pass on to Kubernetes unseen, and pods would fail of."""
    if key == "metric" and value not in get_args(Metric):
        raise UserError(f"parameter metric={value}: must be one of {', '.join(get_args(Metric))}")
    if key.endswith("_tolerations"):
        for number, item in enumerate(value):
            parse_section(Toleration, copy.copy(item), where=f"parameter {key}, item {number}")
    if key.endswith("_node_selector"):
        for label, wanted in value.items():
            if not isinstance(wanted, str):
                raise UserError(
                    f"parameter {key}: label {label} must have a text, not {wanted!r}: "
                    f"{{{label}: '{wanted}'}}"
                )
    if value == "" and key != "experiment":
        raise UserError(f"parameter {key}: is empty; leave it out for the default")
    _check_of_pods(key, value)
    # A text in the pipeline: KFP puts it into a Kubernetes quantity.
    if key.endswith("_accelerator_count") and not re.fullmatch("[0-9]+", str(value)):
        raise UserError(f"parameter {key}={value}: must be a whole number, 0 or more")
    return value


def _check_of_pods(key: str, value: Any) -> None:  # noqa: ANN401 - of any kind
    """What a platform file refuses, a run does too."""
    if isinstance(value, str) and has_credentials(value):
        raise UserError(
            f"parameter {key}={hide_in_urls(value)}: holds credentials, and KFP stores and shows "
            "every run's parameters; give them by a secret of the platform file"
        )
    if key == "checkpoints" and not (value.startswith("/") or "://" in value):
        raise UserError(
            f"parameter checkpoints={value}: must be a folder of the pods, from / on, or a URL"
        )
    kind = _OF_PODS.get(key) or _OF_PODS.get(key.partition("_")[2])
    if kind is None:
        return
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"parameter {key}: {wrong['input']!r}: {wrong['msg']}") from None


def _unknown(key: str, text: str, definitions: Mapping[str, Mapping[str, Any]]) -> str:
    section = key.partition(".")[0]
    if section in Recipe.model_fields and section not in definitions:
        return (
            f"parameter {key}: {section} is fixed when the pipeline is made; change it with "
            f"--set {key}={text}"
        )
    near = difflib.get_close_matches(key, definitions, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(definitions))}"
    return f"parameter {key}: the pipeline has none of this name; {hint}"
