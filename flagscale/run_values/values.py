"""The value of one parameter of a run, checked as a platform file's is."""

from __future__ import annotations

import copy
import posixpath
import re
from pathlib import PurePosixPath
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from flagscale.errors import UserError
from flagscale.recipe import parse_section
from flagscale.recipe.explaining import message, shown
from flagscale.recipe.results import ExperimentName
from flagscale.recipe.section import Line, Source
from flagscale.recipe.sweep import Metric
from flagscale.run_values.buckets import check_bucket_url
from flagscale.run_values.fields import FIELDS
from flagscale.run_values.kubernetes_names import ClaimName, ImageName, LabelKey, LabelValue, Name
from flagscale.run_values.made import PlatformFacts
from flagscale.run_values.toleration import Toleration
from flagscale.secrets import has_credentials, hide_in_urls

_MAY_BE_EMPTY = {"tracking_experiment", *(field.name for field in FIELDS)}
_TEXTS: dict[str, Any] = {"tracking_experiment": ExperimentName, "training_checkpoints": Source}
_CHOICES = {"sweep_metric": get_args(Metric)}
_OF_PODS: dict[str, Any] = {
    "_volume_claim": ClaimName,
    "_mlflow_secret": Name,
    "_image": ImageName,
    "_node_selector": dict[LabelKey, LabelValue],
}  # by the end of the parameter's name


def check_value(key: str, value: Any) -> None:  # noqa: ANN401 - of any kind
    """Refuse what KFP would pass on to Kubernetes unseen, and pods would fail of.

    Args:
        key: the parameter's name.
        value: not of a section of the recipe.

    Raises:
        UserError: what is wrong with it.
    """
    if isinstance(value, str) and has_credentials(value):
        raise UserError(
            f"parameter {key}={hide_in_urls(value)}: holds credentials, and KFP stores and shows "
            "every run's parameters; give them by a secret of the platform file"
        )
    if value == "" and key not in _MAY_BE_EMPTY:
        raise UserError(f"parameter {key}: is empty; leave it out for the default")
    if isinstance(value, str) and value:
        _check_kind(key, value, _TEXTS.get(key, Line))
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UserError(f"parameter {key}={value}: must be one of {', '.join(_CHOICES[key])}")
    if key.startswith("where_"):
        _check_of_pods(key, value)


def _check_of_pods(key: str, value: Any) -> None:  # noqa: ANN401 - of any kind
    """What a platform file refuses, a run does too."""
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
    # A text in the pipeline: KFP puts it into a Kubernetes quantity.
    if key.endswith("_accelerator_count") and not re.fullmatch("[0-9]{1,5}", str(value)):
        raise UserError(f"parameter {key}={value}: must be a whole number, 0 or more")
    for end, kind in _OF_PODS.items():
        if key.endswith(end):
            _check_kind(key, value, kind)


def _check_kind(key: str, value: Any, kind: Any) -> None:  # noqa: ANN401 - a type expression
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"parameter {key}: {shown(wrong['input'])}: {message(kind, wrong)}"
        ) from None


def check_checkpoints(place: str, platform: PlatformFacts) -> None:
    """Refuse a place that the training's pods could not use, or that would be gone with them.

    Args:
        place: folder or URL.
        platform: where the pods run.

    Raises:
        UserError: what it must be.
    """
    mount, url = platform.mount_path, platform.url
    if "://" in place and not platform.uses_trainjob:
        try:
            check_bucket_url(place)
        except ValueError as error:
            raise UserError(f"parameter training_checkpoints={place}: a URL {error}") from None
        return
    if url is not None:
        right = "must be a URL of an object store; a folder is lost with its pod"
    elif mount is None:
        if place.startswith("/"):
            return
        right = "must be a folder of the pods, from / on, or a URL of an object store"
    elif PurePosixPath(posixpath.normpath(place)).is_relative_to(mount):
        return
    elif platform.uses_trainjob:
        right = f"must be a folder below {mount}, which all nodes of a TrainJob see"
    else:
        right = (
            f"must be a folder below {mount}, or a URL of an object store; any other folder is "
            "lost with its pod"
        )
    raise UserError(f"parameter training_checkpoints={place}: {right}")


def check_images(values: dict[str, Any], platform: PlatformFacts) -> None:
    """Refuse accelerators for pods whose image was chosen for pods without.

    Args:
        values: the run's parameters by name.
        platform: with the pipeline's own images.

    Raises:
        UserError: which pods.
    """
    for kind, own in platform.accelerator_counts.items():
        count, image = f"where_{kind}_accelerator_count", f"where_{kind}_image"
        if int(values[count]) and not own and values[image] == platform.images[kind]:
            raise UserError(
                f"parameter {count}={values[count]}: these pods have none by default, and {image}="
                f"{values[image]} is for pods without; give another {image} too"
            )
