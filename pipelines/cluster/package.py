"""A compiled pipeline on its way to a server: its file, its names, its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flagscale.recipe import Recipe
from pipelines.compiling import LOADER, compile_recipe, pipeline_name, pipeline_version
from pipelines.platform import Platform


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        path: the file.
        name: of the pipeline on the server.
        version: of what the file says.
        description: of the version.
    """

    path: Path
    name: str
    version: str
    description: str

    @property
    def definitions(self) -> dict[str, dict[str, Any]]:
        """The pipeline's parameters: type, default and description by name."""
        inputs = self.specification["root"].get("inputDefinitions", {})
        found: dict[str, dict[str, Any]] = inputs.get("parameters", {})
        return found

    @property
    def specification(self) -> dict[str, Any]:
        """The file's first document, KFP's PipelineSpec."""
        return self._documents()[0]

    def without_cache(self) -> dict[str, Any]:
        """What a run carries whose steps never take an earlier result, nested ones included."""
        spec, platform = self._documents()
        for component in (spec["root"], *spec["components"].values()):
            for task in component.get("dag", {}).get("tasks", {}).values():
                task["cachingOptions"] = {}
        return {"pipeline_spec": spec, "platform_spec": platform}

    def _documents(self) -> list[dict[str, Any]]:
        return list(yaml.load_all(self.path.read_text(encoding="utf-8"), LOADER))


def make_package(
    recipe: Recipe, platform: Platform, folder: Path, name: str | None = None, where: str = ""
) -> Package:
    """Compile a recipe.

    Args:
        recipe: validated.
        platform: validated.
        folder: for the file.
        name: of the pipeline on the server; None: the recipe's.
        where: the platform's name, for people.

    Raises:
        UserError: the platform cannot hold the recipe.
    """
    path = compile_recipe(recipe, platform, folder / "pipeline.yaml")
    name = name or pipeline_name(recipe)
    described = f"recipe {recipe.name} on {where}" if where else f"recipe {recipe.name}"
    return Package(path, name, f"{name}-{pipeline_version(path)}", described)
