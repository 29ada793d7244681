"""Aliases of MLflow's model registry: `champion` and its like name one version of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from flagscale.errors import UserError
from flagscale.patience import patiently
from flagscale.secrets import hide_in_urls
from flagscale.tracking.names import as_id, first_line, tag
from flagscale.tracking.server import make_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

_FIRST_REFUSAL = 500  # HTTP: what the server itself gets wrong may pass, what is asked of it not


class Version(NamedTuple):
    """A version of a registered model."""

    name: str
    number: str

    @property
    def uri(self) -> str:
        """`models:/<name>/<version>`."""
        return f"models:/{self.name}/{self.number}"


def registered_by(run_id: str | None) -> str | None:
    """The version that a run registered, its newest if it did so again: `models:/<name>/<version>`.

    Args:
        run_id: of the run; None where it was not tracked.

    Returns:
        None where there is no such version, or no tracking server.

    Raises:
        UserError: the server does not answer, or refuses.
    """
    if run_id is None or not tracking_uri():
        return None

    def find(client: MlflowClient) -> str | None:
        found = client.search_model_versions(f"run_id = '{as_id(run_id)}'")
        newest = max(found, key=lambda version: int(version.version), default=None)
        return None if newest is None else Version(newest.name, str(newest.version)).uri

    return _ask(find, f"look for what run {run_id} registered")


def promote(
    model_uri: str, alias: str = "champion", tags: Mapping[str, str] | None = None
) -> str | None:
    """Move an alias to a version.

    Args:
        model_uri: `models:/<name>/<version>`.
        alias: of the registered model.
        tags: of the version, to be set as well.

    Returns:
        The version that had the alias before, as a URI; None where none had.

    Raises:
        UserError: there is no such version, or the server does not answer, or refuses.
    """
    version = _version(model_uri)

    def move(client: MlflowClient) -> str | None:
        there = client.get_registered_model(version.name).aliases
        client.set_registered_model_alias(version.name, alias, version.number)
        for key, value in (tags or {}).items():
            client.set_model_version_tag(version.name, version.number, key, tag(value))
        return Version(version.name, str(there[alias])).uri if alias in there else None

    return _ask(move, f"move the alias {alias} to {model_uri}")


def note(model_uri: str, tags: Mapping[str, str]) -> None:
    """Set tags of a version.

    Args:
        model_uri: `models:/<name>/<version>`.
        tags: by name.

    Raises:
        UserError: see `promote`.
    """
    version = _version(model_uri)

    def set_tags(client: MlflowClient) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(version.name, version.number, key, tag(value))

    _ask(set_tags, f"tag {model_uri}")


def _version(model_uri: str) -> Version:
    name, slash, number = model_uri.removeprefix("models:/").rpartition("/")
    if not model_uri.startswith("models:/") or not slash or not number.isdigit():
        raise UserError(f"model {model_uri!r}: must read models:/<name>/<version>")
    return Version(name, number)


def _ask(do: Callable[[MlflowClient], T], doing: str) -> T:
    """Talk to the registry; unlike figures, an alias is what the caller is there for."""
    uri = tracking_uri()
    if not uri:
        raise UserError(f"MLflow: cannot {doing}: MLFLOW_TRACKING_URI names no server")
    server = f"MLflow at {hide_in_urls(uri)}"
    try:
        return patiently(lambda: do(make_client(uri)), f"{doing} ({server})", _may_pass)
    except Exception as error:  # MLflow and its databases raise many kinds
        raise UserError(f"{server}: cannot {doing}: {first_line(error)}") from error


def _may_pass(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException

    return not isinstance(error, MlflowException) or (
        error.get_http_status_code() >= _FIRST_REFUSAL
    )
