"""Aliases of the model registry: which version is the candidate, and which one is shipped.

`candidate` is set on every export; `champion` moves by the recipe's gate alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flagscale.errors import UserError
from flagscale.tracking.step import on_server

if TYPE_CHECKING:
    from mlflow import MlflowClient

CANDIDATE = "candidate"
CHAMPION = "champion"


def promote(model_uri: str, alias: str = CHAMPION) -> str | None:
    """Move an alias to a version of a registered model.

    Args:
        model_uri: `models:/NAME/VERSION`, as the export gave it.
        alias: e.g. `champion`.

    Returns:
        `models:/NAME@ALIAS`; None where there is no server, or it did not serve.

    Raises:
        UserError: `model_uri` names no version.
    """
    name, version = parse_version(model_uri)

    def move(client: MlflowClient) -> str:
        client.set_registered_model_alias(name, alias, version)
        return f"models:/{name}@{alias}"

    return on_server(move, f"alias {alias} still names another version than {model_uri}")


def parse_version(model_uri: str) -> tuple[str, str]:
    """Name and version.

    Raises:
        UserError: it is not of the form `models:/NAME/VERSION`.
    """
    scheme, _, rest = model_uri.partition(":/")
    name, _, version = rest.partition("/")
    if scheme != "models" or not name or not version.isdecimal():
        raise UserError(f"model {model_uri!r}: must be models:/NAME/VERSION")
    return name, version
