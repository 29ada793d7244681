"""What the body of a step's component works with: sections, inputs, outputs, figures.

Its process is `flagscale.execution.step_process`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flagscale.artifacts import MANIFEST, Manifest, read_manifest
from flagscale.errors import UserError
from flagscale.execution.absent import AbsentInputError, absent, pass_on, write_absent
from flagscale.execution.exclusive import exclusively
from flagscale.execution.metrics_file import write_metrics
from flagscale.imports import uncollected
from flagscale.recipe import Section, SectionT, parse_section
from flagscale.run_values.literal import literal
from flagscale.secrets import mask
from flagscale.shared import (
    ANEW,
    Place,
    Pointer,
    fetch,
    manifest_of,
    pointer_to,
    read_pointer,
    shared_place,
    write_pointer,
)
from flagscale.shared.store import is_url

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")


class Metrics(Protocol):
    """What KFP's `Metrics` artifact offers."""

    path: str
    metadata: dict[str, Any]


class Input(Protocol):
    """What KFP's input artifacts offer."""

    path: str
    uri: str


class Step:
    """The running step."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._place: Place | None = None
        self._folders = ExitStack()
        self._outputs: list[tuple[Path, Path]] = []
        self._afterwards: list[Callable[[], object]] = []
        self._importing = ExitStack()
        self._kept: dict[str, bytes] = {}
        self.recipe: dict[str, Any] = {}

    def import_first(self) -> None:
        """Collect no garbage until the body has imported what it runs: its next calls are these."""
        self._importing.enter_context(uncollected())

    def section(self, kind: type[SectionT], values: dict[str, Any]) -> SectionT:
        """A section of the recipe, checked again: KFP hands over its numbers as floats.

        Args:
            kind: of section.
            values: as KFP carried them.

        Raises:
            UserError: a field is unknown or has a wrong value.
        """
        self._importing.close()
        section = parse_section(kind, literal(values), where=self.name)
        self.recipe[kind.__name__.removesuffix("Recipe").lower()] = section.model_dump(mode="json")
        return section

    def literal(self, value: ValueT) -> ValueT:
        """A parameter that is no section, without what it was carried in (`carried`)."""
        found: ValueT = literal(value)
        return found

    def require(
        self, given: Mapping[type[Section], dict[str, Any]] | None = None, /, **inputs: Input
    ) -> None:
        """Look whether inputs are there at all, before a body imports what it would run on them.

        Args:
            given: the sections that the output would depend on, as KFP carried them: what says that
                there is no output is to name them.
            inputs: by the names of the component's inputs.

        Raises:
            AbsentInputError: one says that there is none.
        """
        for name, artifact in inputs.items():
            manifest = absent(Path(artifact.path))
            if manifest is not None:
                for kind, values in (given or {}).items():
                    self.section(kind, values)
                raise AbsentInputError(name, manifest)

    def input(self, name: str, artifact: Input, *, in_parts: bool = False) -> Path:
        """The folder of an input artifact, wherever the pointer at KFP's path says that it is.

        KFP's launcher says nothing where it found nothing to download.

        Args:
            name: of the component's input.
            artifact: what KFP handed over.
            in_parts: what lies in an object store is left there, and the folder is that of the
                pointer to it: for an artifact whose reader follows one, and reads but a part.

        Raises:
            UserError: nothing is there, or something else than what was pointed to.
            AbsentInputError: it says that there is none.
        """
        path = self.input_or_absent(name, artifact, in_parts=in_parts)
        self.require(**{name: artifact})
        if (path / MANIFEST).exists():
            self.recipe |= {k: v for k, v in read_manifest(path).recipe.items() if v}
        return path

    def input_or_absent(self, name: str, artifact: Input, *, in_parts: bool = False) -> Path:
        """`input`, or the folder of an artifact that says that there is none, and why.

        Args:
            name: of the component's input.
            artifact: what KFP handed over.
            in_parts: see `input`.

        Raises:
            UserError: nothing is there, or something else than what was pointed to.
        """
        self._importing.close()
        path = Path(artifact.path)
        if not path.is_dir() or not any(path.iterdir()):
            raise UserError(f"input {name}: nothing is left at {artifact.uri}; {ANEW}")
        try:
            pointer = read_pointer(path)
            if pointer is None or (in_parts and is_url(pointer.location)):
                return path
            folder = tempfile.TemporaryDirectory(prefix=f"{self.name}-", ignore_cleanup_errors=True)
            return fetch(pointer, Path(self._folders.enter_context(folder)) / pointer.kind)
        except UserError as error:
            raise UserError(f"input {name}: {error}") from error

    def manifest(self, name: str, artifact: Input) -> Manifest:
        """The manifest of an input artifact, of which nothing else is fetched.

        Args:
            name: of the component's input.
            artifact: what KFP handed over.

        Raises:
            UserError: see `input`.
            AbsentInputError: see there.
        """
        path = self.input(name, artifact, in_parts=True)
        pointer = read_pointer(path)
        return read_manifest(path) if pointer is None else manifest_of(pointer)

    def pointer(self, name: str, artifact: Input) -> Pointer:
        """Where an input artifact is, for later steps that go on with it.

        Args:
            name: of the component's input.
            artifact: what KFP handed over.

        Raises:
            UserError: see `input`.
            AbsentInputError: see there.
        """
        self.require(**{name: artifact})
        found = read_pointer(Path(artifact.path))
        if found is not None:
            return found
        folder = self.input(name, artifact)
        return pointer_to(folder, read_manifest(folder), str(folder.absolute()))

    def record_failure(self, path: str, error: Exception) -> None:
        """Say where an output was to be that there is none, and why; the step then ends well."""
        target = Path(path)
        if isinstance(error, AbsentInputError):
            pass_on(target, error.manifest, self.recipe)
            logger.info("%s: %s", self.name, error)
            return
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_absent(target, self.name, mask(message), self.recipe, files=self._kept)
        logger.warning("%s: the run goes on without this one", self.name)

    def keep_file(self, name: str, path: Path) -> None:
        """See `flagscale.execution.step_process.keep_file`."""
        self._kept[name] = mask(path.read_text(encoding="utf-8", errors="replace")).encode()

    def output(self, path: str) -> Path:
        """The folder to write an output artifact to.

        With a shared place that is a folder there, or on the way there: when the step's body has
        succeeded, the artifact is published and a pointer to it stands at `path`.

        Raises:
            UserError: the shared place cannot be written.
        """
        self._importing.close()
        self._place = self._place or shared_place()
        if self._place is None:
            return Path(path)
        if not self._outputs:
            self._folders.enter_context(self._place)
        staged = self._place.stage(self.name)
        self._outputs.append((staged, Path(path)))
        return staged

    def copy(self, source: Path, target: str) -> None:
        """Copy a file to where an output artifact of KFP is to be.

        Raises:
            FileNotFoundError: the step wrote no such file.
        """
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def report(self, figures: Mapping[str, float], metrics: Metrics) -> None:
        """Hand the figures to KFP: into the UI and, as a file, into what its cache looks for.

        Args:
            figures: name -> value; values that JSON cannot hold (NaN, infinity) are left out.
            metrics: the component's `Output[Metrics]`.
        """
        metrics.metadata.update(write_metrics(Path(metrics.path), figures))

    def publish(self) -> None:
        """Put the outputs in place, then do what waits for that.

        Raises:
            UserError: the shared place cannot be written, or the step wrote no artifact.
        """
        for staged, path in self._outputs:
            assert self._place is not None
            pointer = self._place.publish(staged)
            write_pointer(pointer, path)
            logger.info("%s: %s is at %s", self.name, pointer.kind, pointer.location)
        for do in self._afterwards:
            do()

    def close(self) -> None:
        """Remove folders that were the step's own."""
        self._importing.close()
        self._folders.close()

    def when_published(self, do: Callable[[], object]) -> None:
        """See `when_published`."""
        self._afterwards.append(do)

    def keep_exclusive(self, place: str) -> None:
        """See `keep_exclusive`."""
        self._folders.enter_context(exclusively(place))
