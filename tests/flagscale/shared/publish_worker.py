"""A step killed with -9 at each point of its publication: `publish_worker.py SHARED FOLDER`.

Imports once, then forks a child for each point: the child writes an artifact and publishes it, and
kills itself before its n-th change of a file, or its n-th upload. Leaves FOLDER/result.json.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import s3fs  # noqa: F401 - once, not in each child
from kfp import dsl

from flagscale.artifacts import new_artifact, open_artifact
from flagscale.execution.step_process import step_process
from flagscale.shared import fetch, read_pointer

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open", "os.link", "shutil.rmtree")


def make(output: Path) -> None:
    with new_artifact(output, "student", {"student": {"num_layers": 2}}) as staging:
        (staging.path / "weights").mkdir()
        (staging.path / "weights" / "0.distcp").write_bytes(b"w" * 100_000)
        (staging.path / "model.json").write_text("{}")


class Killer:
    """Kills this process before the n-th thing that it is told of."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1


def watch_files(killer: Killer) -> None:
    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS:
            return
        reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if not reads:
            killer()

    sys.addaudithook(hook)


def watch_uploads(killer: Killer) -> None:
    from s3fs import S3FileSystem

    for name in ("_put_file", "_pipe_file"):
        setattr(S3FileSystem, name, watched(getattr(S3FileSystem, name), killer))


def watched(function: Callable, killer: Killer) -> Callable:
    async def told(*arguments, **options):
        killer()
        return await function(*arguments, **options)

    return told


def step(path: Path, kill_at: int | None) -> None:
    """The life of one pod."""
    with step_process("convert-student") as running:
        output = running.output(dsl.Model(uri=str(path)).path)
        make(output)
        if kill_at is not None:
            by_url = "://" in os.environ["FLAGSCALE_SHARED"]
            (watch_uploads if by_url else watch_files)(Killer(kill_at))


def child(path: Path, kill_at: int | None) -> int:
    """Exit code of a pod, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            step(path, kill_at)
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opened(path: Path) -> str:
    """Digest of what the pointer points to, files compared; empty where there is no pointer."""
    pointer = read_pointer(path)
    if pointer is None:
        return ""
    folder = fetch(pointer, path.with_suffix(".fetched"))
    return open_artifact(folder, "student").digest


def reader(path: Path) -> str:
    """`opened`, in a process of its own: this one forks, and must not begin fsspec's threads."""
    told = path.with_suffix(".digest")
    pid = os.fork()
    if pid == 0:
        try:
            told.write_text(opened(path))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    return told.read_text()


def main() -> None:
    os.environ["FLAGSCALE_SHARED"], folder = sys.argv[1], Path(sys.argv[2])
    results = []
    for number in range(100):
        path = folder / str(number) / "model"
        path.parent.mkdir()
        code = child(path, number)
        results.append([code, reader(path)])
        if code == 0:
            break
        shared = Path(sys.argv[1])
        if shared.is_dir():  # what stands there already would be kept, and less would happen
            for target in shared.glob("artifacts/student-*"):
                shutil.rmtree(target)
    again = [child(folder / "0" / "model", None), reader(folder / "0" / "model")]
    (folder / "result.json").write_text(json.dumps([*results, again]))


if __name__ == "__main__":
    main()
