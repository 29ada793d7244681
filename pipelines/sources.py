"""What of a recipe and a platform a cluster's pods may not have: files of this machine, images."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from components.image import release
from flagscale.recipe import Recipe
from pipelines import where
from pipelines.platform import Platform

_FILE_URL = re.compile("(file|local)://")


def notes(recipe: Recipe, platform: Platform, given: Collection[str] = ()) -> str:
    """What to tell of teachers and texts that are files, and of images that lie in no registry.

    A file may also be in the image or on the volume, an image on the nodes, so this refuses
    nothing.

    Args:
        recipe: with a run's own values.
        platform: where it is to run.
        given: names of the pipeline's parameters that the run has its own values for.

    Returns:
        A line each.

    Raises:
        UserError: an image's name is wrong.
    """
    return "".join(
        f"note: {note}\n" for note in (*_files(recipe, platform), *_images(recipe, platform, given))
    )


def _files(recipe: Recipe, platform: Platform) -> Iterator[str]:
    mount = platform.shared.mount_path if platform.shared and not platform.shared.url else None
    place = f"the volume at {mount}" if mount else "an object store or the image"
    for field, source in _sources(recipe):
        path = Path(_FILE_URL.sub("", source)).expanduser()
        if not _is_path(source) or (mount and path.is_relative_to(mount)):
            continue
        what = "a file or folder of this machine" if path.exists() else "a path"
        yield (
            f"{field}={source} is {what}; a pod looks for it in its own files: put it on {place}"
        )


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "teacher.source", recipe.teacher.source
    students = [recipe.student, *(variant.recipe.student for variant in recipe.variants)]
    for source in sorted({student.source for student in students if student.source is not None}):
        yield "student.source", source
    for corpus in recipe.data.corpora:
        field = "data.source" if recipe.data.blend is None else f"data.blend.{corpus.name}"
        yield field, corpus.source


def _is_path(source: str) -> bool:
    """Whether a step looks among files for it, or would if they were those of this machine."""
    from flagscale.data.sources import detect

    if "://" in source:
        return _FILE_URL.match(source) is not None
    if not source.strip() or source.startswith("package:"):
        return False
    kind = detect(source)
    if kind == "huggingface":  # by its form; a folder may be made later, e.g. build/teacher
        return source.endswith(".gguf") or Path(source.partition("/")[0]).is_dir()
    return kind == "files"


def _images(recipe: Recipe, platform: Platform, given: Collection[str]) -> Iterator[str]:
    """The images that nobody has named: the release's, as `make images` names them here."""
    used = {
        parameter.default
        for parameter in where.parameters(platform, recipe)
        if parameter.name.endswith("_image") and parameter.name not in given
    }
    images = {"cpu": platform.images.cpu, "gpu": platform.images.gpu}
    for number, (kind, image) in enumerate(images.items()):
        name = release(number)
        if image is None and name in used:
            yield (
                f"image {name} has no registry, so the nodes must have it already; "
                f"FLAGSCALE_REGISTRY, or images.{kind} of the platform file, says where it is"
            )
