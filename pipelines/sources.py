"""Sources of a recipe that a pod may not have."""

from collections.abc import Iterator
from pathlib import Path

from flagscale.recipe import Recipe
from pipelines.platform import Platform


def notes(recipe: Recipe, platform: Platform) -> str:
    """What to tell of teachers and texts that are files of this machine; a line each.

    A path may also be in the image, or on the volume, so this refuses nothing.
    """
    mount = platform.shared.mount_path if platform.shared and not platform.shared.url else None
    lines = []
    for field, source in _sources(recipe):
        path = Path(source)
        if "://" in source or not path.exists() or (mount and path.is_relative_to(mount)):
            continue
        place = f"the volume at {mount}" if mount else "an object store or the image"
        lines.append(
            f"note: {field}={source} is a file or folder of this machine; a pod looks for it in "
            f"its own files: put it on {place}\n"
        )
    return "".join(lines)


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "teacher.source", recipe.teacher.source
    for corpus in recipe.data.corpora:
        yield (
            "data.source" if recipe.data.blend is None else f"data.blend.{corpus.name}",
            (corpus.source),
        )
