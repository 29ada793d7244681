"""Checks before a run begins: what would fail later fails now, in seconds.

The sources are looked at in a process of their own (`python -m pipelines.local.preflight`, which
reads a resolved recipe), so that the runner does not keep torch in memory for hours.
"""

import hashlib
import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flagscale.errors import UserError
from flagscale.recipe import Recipe, SourceRecipe, parse_section
from flagscale.recipe.data import CorpusRecipe
from flagscale.recipe.training import OVERLAPS_AND_FUSIONS
from pipelines.local.recipe_files import LOCAL_URL

if TYPE_CHECKING:
    from flagscale.megatron.shape import ModelShape

logger = logging.getLogger(__name__)

_PACKAGE = "package:"
# Fields of `training` whose values, but for the defaults, not every machine can honour.
_OF_THE_MACHINE = {
    *OVERLAPS_AND_FUSIONS,
    "transformer_impl",
    "fp8",
    "recompute_modules",
    "parallelism",
    "log_straggler",
    "record_memory_history",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BAD_SOURCE = 3  # exit code: standard output holds the user's error


class SourceCheck:
    """A check of the recipe's teacher and text that runs beside other preparations."""

    def __init__(self, recipe: Recipe) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.local.preflight"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(recipe.model_dump_json())
        self._process.stdin.close()
        self._process.stdin = None

    def wait(self) -> None:
        """Wait for the verdict.

        Raises:
            UserError: the teacher or the text is not there, or the student is deeper than it.
        """
        out, err = self._process.communicate()
        if self._process.returncode == _BAD_SOURCE:
            raise UserError(out.strip())
        if self._process.returncode:
            raise UserError(f"the check of teacher and text broke down:\n{err.strip()}")

    def cancel(self) -> None:
        """End it, whatever it would have said."""
        self._process.kill()
        self._process.communicate()


def with_fingerprints(recipe: Recipe) -> Recipe:
    """The recipe with `fingerprint` filled in of `teacher`, `student` and `data`.

    The cache sees a recipe's text; these make it see that what is behind an equal path, address or
    id has changed.

    Raises:
        UserError: remote text is not there.
    """
    teacher, data = recipe.teacher, recipe.data
    if teacher.fingerprint is None:
        found = _of_model(teacher.source, teacher.revision)
        teacher = teacher.model_copy(update={"fingerprint": found})
    if data.fingerprint is None:
        parts = [_of_corpus(corpus) for corpus in data.corpora]
        if data.tokenizer:
            parts.append(_of_model(data.tokenizer, data.tokenizer_revision))
        known = [part for part in parts if part]
        data = data.model_copy(update={"fingerprint": "+".join(known) or None})
    student = recipe.student
    if student.fingerprint is None:
        student = student.model_copy(update={"fingerprint": _of_students(recipe)})
    return recipe.model_copy(update={"teacher": teacher, "student": student, "data": data})


def _of_students(recipe: Recipe) -> str | None:
    """Of the models that students are, all those of a sweep together; None where they are none."""
    students = [recipe.student, *(variant.recipe.student for variant in recipe.variants)]
    sources = {(one.source, one.revision) for one in students if one.source is not None}
    parts = [_of_model(*one) for one in sorted(sources, key=str)]
    return "+".join(part for part in parts if part) or None


def _of_corpus(corpus: CorpusRecipe) -> str | None:
    if found := fingerprint(corpus.source):
        return found
    from flagscale.data.states import is_remote, remote_state

    return _told(corpus.source, remote_state(corpus)) if is_remote(corpus) else None


def _of_model(source: str, revision: str | None) -> str | None:
    found = fingerprint(source)
    if found is None and _HUB_ID.fullmatch(source):
        from flagscale.hub import commit_of

        return _told(source, commit_of(source, revision, "model"))
    return found


def _told(source: str, state: str | None) -> str | None:
    if state is None:
        logger.warning(
            "%s: nobody says whether it has changed; results of earlier runs with it are used "
            "again (--no-cache makes them anew)",
            source,
        )
    return state


def fingerprint(source: str) -> str | None:
    """A digest of names, sizes and modification times below `source`; None if it is not local."""
    if source == "python-docs":
        return f"python {sys.version.split()[0]}"
    if source.startswith(_PACKAGE):
        module = source.removeprefix(_PACKAGE).replace("-", "_")
        spec = importlib.util.find_spec(module)
        roots = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    else:
        path = Path(LOCAL_URL.sub("", source)).expanduser()
        roots = [path] if path.exists() else sorted(_glob(path))
    if not roots:
        return None
    value = hashlib.sha256()
    for root in roots:
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            if "__pycache__" in file.parts:
                continue
            facts = file.stat()
            value.update(f"{file}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return f"files {value.hexdigest()[:16]}"


def _glob(path: Path) -> list[Path]:
    if not any(sign in str(path) for sign in "*?[") or "://" in str(path):
        return []
    anchor = Path(path.anchor or ".")
    return list(anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path)))


def check_sources(recipe: Recipe) -> None:
    """Look at the models' configurations and tokenizers and the first document of each corpus.

    Raises:
        UserError: one of them is missing or unreadable, a model is of a family that is not
            supported, the student does not fit the teacher, or one of them cannot be divided over
            the ranks.
    """
    from flagscale.data.sources import documents, kind_of_source
    from flagscale.data.states import is_remote
    from flagscale.megatron.shape import from_hf_config
    from flagscale.models.source import load_hf_config

    config = load_hf_config(recipe.teacher.source, recipe.teacher.revision)
    teacher = from_hf_config(config, ignored=recipe.teacher.ignored_config_fields)
    variants = recipe.variants
    if not variants:
        _check_student(recipe, teacher)
    for variant in variants:
        try:
            _check_student(variant.recipe, teacher)
        except UserError as error:
            raise UserError(f"{recipe.varied} {variant.name!r}: {error}") from error
    for corpus in recipe.data.corpora:
        # of a dataset on the hub the first document may be a large download
        if not (is_remote(corpus) and kind_of_source(corpus) == "huggingface"):
            next(documents(corpus))


def _check_student(recipe: Recipe, teacher: "ModelShape") -> None:
    from flagscale.megatron.layout import check_layouts
    from flagscale.models.student_shape import student_shape

    if recipe.student.pretrained is None:
        student = student_shape(teacher, recipe.student)
    else:
        student = _pretrained(recipe, recipe.student.pretrained)
    check_layouts(recipe, teacher, student)
    asked = recipe.training.model_dump(exclude_defaults=True).keys() & _OF_THE_MACHINE
    if recipe.student.init in ("scratch", "pretrained") or asked:
        _ask_megatron(recipe, student)


def _pretrained(recipe: Recipe, source: SourceRecipe) -> "ModelShape":
    """The shape of a student that is a model of its own, of the tokenizer that the data has."""
    from flagscale.megatron.shape import from_hf_config
    from flagscale.models.same_tokenizer import check_same_tokenizer
    from flagscale.models.source import load_hf_config
    from flagscale.models.tokenizers import load_tokenizer

    config = load_hf_config(source.source, source.revision)
    shape = from_hf_config(config, ignored=source.ignored_config_fields, who="student")
    right = recipe.data.tokenizer or recipe.teacher.source
    revision = recipe.data.tokenizer_revision
    own, theirs = load_tokenizer(right, revision), load_tokenizer(source.source, source.revision)
    check_same_tokenizer(own, theirs, source.source, f"that of {right}")
    return shape


def _ask_megatron(recipe: Recipe, student: "ModelShape") -> None:
    """Make what the training step would make of the student, save for its weights.

    Megatron-Core, and this machine, know more than a recipe: which kernels there are, what layers
    of one's own are, which sizes go together.
    """
    from flagscale.megatron import platform
    from flagscale.megatron.arguments import training_arguments
    from flagscale.megatron.layer_specs import custom_spec
    from flagscale.megatron.performance import resolved
    from flagscale.megatron.transformer_config import transformer_config

    training = recipe.training
    try:
        if not platform.HAS_GPU:
            recipe.check_on_cpu()
        training.check_world_size(platform.processes(training.parallelism))
        training = resolved(training, student, distilled=recipe.distillation.loss != "none")
        args = training_arguments(student, recipe.data.seq_length, training)
        config = transformer_config(args)
        if student.architecture.spec is not None:
            custom_spec(student.architecture.spec, config)
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"the student or its training cannot be built: {error}") from error


def _main() -> int:
    values: Any = json.load(sys.stdin)
    try:
        check_sources(parse_section(Recipe, values, where="recipe"))
    except UserError as error:
        sys.stdout.write(f"{error}\n")
        return _BAD_SOURCE
    return 0


if __name__ == "__main__":
    sys.exit(_main())
