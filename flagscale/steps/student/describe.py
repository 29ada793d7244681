"""All of a student's artifact but its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from flagscale.megatron.shape import ModelShape, hf_config_for
from flagscale.models.hf_description import write_config
from flagscale.models.origin import LICENSES, ORIGIN_JSON, PRETRAINED, keep_origin
from flagscale.models.pretrained import Pretrained, describe
from flagscale.models.source import load_hf_config


def describe_student(
    source: Pretrained | None, shape: ModelShape, teacher: Path, dataset: Path, folder: Path
) -> None:
    """Write its shape and `hf/`.

    Of a student that was made from the teacher: what the teacher's `hf/` holds, with the student's
    configuration, unless none describes it. Of a model of its own: its configuration, the data's
    tokenizer, and where both models come from.

    Args:
        source: the model of its own.
        shape: of the student.
        teacher: its artifact.
        dataset: the artifact.
        folder: of the student's artifact.
    """
    shape.save(folder)
    own, theirs = folder / "hf", teacher / "hf"
    if source is not None:
        describe(source, dataset, own)
        shutil.copy(theirs / ORIGIN_JSON, own / ORIGIN_JSON)
        if (theirs / LICENSES).is_dir():
            shutil.copytree(theirs / LICENSES, own / LICENSES)
        (own / PRETRAINED).mkdir()
        keep_origin(source.recipe.source, source.recipe.revision, own / PRETRAINED)
        return
    if not shape.fits_hugging_face:
        configurations = shutil.ignore_patterns("config.json", "generation_config.json")
        shutil.copytree(theirs, own, ignore=configurations)
        return
    shutil.copytree(theirs, own)
    write_config(hf_config_for(shape, load_hf_config(theirs)), own)
