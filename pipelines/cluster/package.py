"""A compiled pipeline on its way to a server: its file, its names, its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from components.image import VERSION
from flagscale.recipe import Recipe
from flagscale.secrets import hide_in_urls
from pipelines.compiling import LOADER, compile_recipe, pipeline_name, pipeline_version
from pipelines.platform import Platform

_LONGEST_TAG = 63  # characters, of KFP's


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        path: the file.
        name: of the pipeline on the server.
        version: of what the file says.
        description: of the version.
        tags: of the version, by which the UI finds it.
    """

    path: Path
    name: str
    version: str
    description: str
    tags: Mapping[str, str]

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
    tags = version_tags(recipe, where)
    return Package(path, name, f"{name}-{pipeline_version(path)}", described, tags)


def version_tags(recipe: Recipe, where: str = "") -> dict[str, str]:
    """What a pipeline's version is of, by keys that are the same for all.

    Args:
        recipe: validated.
        where: the platform's name.
    """
    kinds = {"sweep": recipe.sweep, "search": recipe.search}
    tags = {
        "kind": next((kind for kind, section in kinds.items() if section is not None), "single"),
        "loss": recipe.distillation.loss,
        "platform": where,
        "recipe": recipe.name,
        "release": VERSION,
        # The end of a path or address says more than its beginning.
        "teacher": hide_in_urls(recipe.teacher.source)[-_LONGEST_TAG:],
    }
    return {key: value[:_LONGEST_TAG] for key, value in tags.items() if value}
