"""Whether artifacts are what their manifests say: every rank hashes a share, while it does more.

Hashing all of two models and a dataset takes minutes to hours; no GPU should wait for one process
that does it. So the ranks divide the files, hash in a thread while they build and read the models,
and agree on the outcome before anything is made of what was read.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flagscale.artifacts import Manifest, check_file, check_names
from flagscale.checkpoint.agreement import same_outcome
from flagscale.errors import UserError


@contextmanager
def files_checked(
    folders: Mapping[str, Path], manifests: Mapping[str, Manifest]
) -> Iterator[Callable[[], None]]:
    """Check files in the background while the body runs, which calls what it is given once.

    All ranks call it; the body's call is collective, within the runtime.

    Args:
        folders: of artifacts, by name.
        manifests: theirs.

    Yields:
        What waits until every rank has checked its share.

    Raises:
        UserError: a file is missing or changed. Also where the body fails before it asks: that is
            then why.
    """
    for name, folder in folders.items():
        check_names(folder, manifests[name])
    check = _Check(
        [(folders[name], manifests[name], file) for name, file in _share(folders, manifests)]
    )
    try:
        yield check.agree
    except Exception as error:
        damage = check.damage()
        if damage is None or isinstance(error, UserError):
            raise
        raise damage from error
    finally:
        check.stop()


def _share(folders: Mapping[str, Path], manifests: Mapping[str, Manifest]) -> list[tuple[str, str]]:
    """This rank's files, so that all ranks have about as much: small ones first."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    sizes = {
        (name, file): (folder / file).stat().st_size
        for name, folder in folders.items()
        for file in manifests[name].files
    }
    loads, mine = [0] * ranks, []
    for one in sorted(sizes, key=lambda one: (-sizes[one], one)):
        least = loads.index(min(loads))
        loads[least] += sizes[one]
        if least == rank:
            mine.append(one)
    return mine[::-1]


class _Check:
    """Of some files, in a thread of its own."""

    def __init__(self, files: list[tuple[Path, Manifest, str]]) -> None:
        self._files, self._stopped = files, False
        self._found: Exception | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for folder, manifest, file in self._files:
                if self._stopped:
                    return
                check_file(folder, manifest, file)
        except Exception as error:
            self._found = error

    def damage(self) -> UserError | None:
        """Of this rank's files, once all are checked."""
        self._thread.join()
        return self._found if isinstance(self._found, UserError) else None

    def agree(self) -> None:
        """Wait for every rank's; all raise, or none."""
        with same_outcome(self._files[0][0] if self._files else Path(), "cannot be checked"):
            self._thread.join()
            if self._found is not None:
                raise self._found

    def stop(self) -> None:
        """Begin no other file."""
        self._stopped = True
