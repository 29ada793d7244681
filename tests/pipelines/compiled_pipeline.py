"""A compiled pipeline, read back from its YAML."""

from pathlib import Path
from typing import Any

import yaml

from flagscale.recipe import Recipe
from pipelines.compiling import LOADER, compile_recipe
from pipelines.platform import Platform

ROOT = Path(__file__).parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}


class Compiled:
    """A compiled pipeline: its two documents, and what a step's pod would get with the defaults."""

    def __init__(self, path: Path) -> None:
        self.spec, self.platform = yaml.load_all(path.read_text(), LOADER)
        self.executors: dict[str, Any] = self.spec["deploymentSpec"]["executors"]
        executors = self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        self.kubernetes: dict[str, Any] = executors

    def resolve(self, value: Any) -> Any:
        """A literal, or the default of the pipeline parameter that it names."""
        if isinstance(value, dict) and "componentInputParameter" in value:
            return self.default(value["componentInputParameter"])
        if isinstance(value, dict) and "runtimeValue" in value:
            return value["runtimeValue"]["constant"]
        if isinstance(value, str) and value.startswith("{{$.inputs.parameters['"):
            return self.default(value.split("'")[1])
        return value

    def default(self, name: str) -> Any:
        name = name.removeprefix("pipelinechannel--")
        return self.spec["root"]["inputDefinitions"]["parameters"][name]["defaultValue"]


def compiled(recipe: Recipe, platform: Platform, folder: Path) -> Compiled:
    return Compiled(compile_recipe(recipe, platform, folder / "p.yaml"))
