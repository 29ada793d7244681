"""Renews `pipelines/compiled/`: `python -m pipelines.golden`.

What the compiler makes of some recipes and platforms lies in the repository, so that a change of
it is seen in review; a test compares.
"""

import os
import sys
from pathlib import Path

from flagscale.recipe import load_recipe
from pipelines.compiling import compile_manifests, compile_recipe
from pipelines.planning import fitted
from pipelines.platform import load_platform

_ROOT = Path(__file__).parents[1]
FOLDER = _ROOT / "pipelines" / "compiled"
COMPILED = {
    "smollm2-135m-to-22-layers": ("cpu-only", "gke-h100", "on-prem-a100"),
    "qwen3-8b-to-24-layers": ("gke-h100",),
    "tiny-sweep": ("gke-h100",),
    "tiny-search": ("on-prem-a100",),
}
MANIFESTS = {"smollm2-135m-to-22-layers": ("gke-h100",)}


def write(folder: Path) -> list[Path]:
    """Write all of them, with the release's own image names.

    Args:
        folder: filled with `RECIPE-PLATFORM.yaml` and `RECIPE-PLATFORM-kubernetes.yaml`.
    """
    for name in ("FLAGSCALE_REGISTRY", "FLAGSCALE_CPU_IMAGE", "FLAGSCALE_GPU_IMAGE"):
        os.environ.pop(name, None)
    written = []
    for recipe_name, platforms in COMPILED.items():
        recipe = load_recipe(_ROOT / "recipes" / f"{recipe_name}.yaml")
        for name in platforms:
            output = folder / f"{recipe_name}-{name}.yaml"
            platform = load_platform(name)
            written.append(compile_recipe(fitted(recipe, platform)[0], platform, output))
    for recipe_name, platforms in MANIFESTS.items():
        recipe = load_recipe(_ROOT / "recipes" / f"{recipe_name}.yaml")
        for name in platforms:
            output = folder / f"{recipe_name}-{name}-kubernetes.yaml"
            platform = load_platform(name)
            written.append(compile_manifests(fitted(recipe, platform)[0], platform, output))
    return written


def _main() -> int:
    written = {path.name for path in write(FOLDER)}
    for path in FOLDER.glob("*.yaml"):
        if path.name not in written:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(_main())
