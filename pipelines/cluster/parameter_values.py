"""The value of one parameter of a run: read as its type, and checked as a platform file's is."""

from __future__ import annotations

import copy
import posixpath
import re
from pathlib import PurePosixPath
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from flagscale.errors import UserError
from flagscale.recipe import parse_section, strict_yaml
from flagscale.recipe.explaining import message
from flagscale.recipe.sweep import Metric
from flagscale.secrets import has_credentials, hide_in_urls
from pipelines.kubernetes_values import ClaimName, ImageName, LabelKey, LabelValue, Name
from pipelines.platform import Platform
from pipelines.pods import Toleration

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


def read_yaml(key: str, text: str) -> Any:  # noqa: ANN401 - whatever it holds
    """A value as YAML.

    Raises:
        UserError: it is none, or a mapping in it gives a key twice.
    """
    try:
        return strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"parameter {key}={text}: the value is not valid YAML: {error}") from None


def read_typed(key: str, text: str, kind: str) -> Any:  # noqa: ANN401 - as `kind` says
    """A value of one of KFP's types.

    Raises:
        UserError: it is no YAML, or of another type.
    """
    value = read_yaml(key, text)
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


def check_value(key: str, value: Any) -> Any:  # noqa: ANN401 - of any kind
    """Refuse what KFP would pass on to Kubernetes unseen, and pods would fail of.

    Raises:
        UserError: what is wrong with it.
    """
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
    kind = _OF_PODS.get(key) or _OF_PODS.get(key.partition("_")[2])
    if kind is None:
        return
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"parameter {key}: {wrong['input']!r}: {message(kind, wrong)}") from None


def check_checkpoints(place: str, platform: Platform, nodes: int) -> None:
    """Refuse a place that the training's pods could not use, or that would be gone with them.

    Args:
        place: folder or URL.
        platform: where the pods run.
        nodes: that train together.

    Raises:
        UserError: what it must be.
    """
    shared = platform.shared
    if "://" in place and not platform.uses_trainjob(nodes):
        if re.match("(s3|gs|az)://[^/]", place):
            return
        right = "a URL must start with s3://, gs:// or az://, and name a bucket"
    elif shared is None:
        if place.startswith("/"):
            return
        right = "must be a folder of the pods, from / on, or a URL of an object store"
    elif shared.url is not None:
        right = "must be a URL of an object store; a folder is lost with its pod"
    elif PurePosixPath(posixpath.normpath(place)).is_relative_to(shared.mount_path):
        return
    elif platform.uses_trainjob(nodes):
        right = f"must be a folder below {shared.mount_path}, which all nodes of a TrainJob see"
    else:
        right = (
            f"must be a folder below {shared.mount_path}, or a URL of an object store; any other "
            "folder is lost with its pod"
        )
    raise UserError(f"parameter checkpoints={place}: {right}")
