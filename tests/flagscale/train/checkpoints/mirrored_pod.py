"""A training pod whose checkpoints are mirrored; such pods killed: `mirrored_pod.py FOLDER URL...`

For each URL a fork saves one checkpoint after another there, and is killed with -9. The process is
one of its own, without threads: a fork of one that has some may die in the garbage collector.
"""

import os
import signal
import sys
import time
from pathlib import Path

import s3fs  # noqa: F401 - once, not in each fork

from flagscale.train.checkpoints.folders import STATE, CheckpointFolders
from flagscale.train.checkpoints.mirror import Mirror


class Pod:
    """A training process's side: a folder of its own, and a mirror."""

    def __init__(self, url: str, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.folders = CheckpointFolders(folder, keep, "lm loss")
        self.mirror = Mirror(url, folder)
        while not self.mirror.downloaded():
            pass

    def save(self, step: int, loss: float = 1.0, wait: bool = True) -> None:
        validation = [{"step": step, "lm loss": loss}]
        history = {"step": step, "layout": {}, "training": [], "validation": validation}
        partial = self.folders.begin(history)
        (partial / STATE).mkdir()
        (partial / STATE / "0.distcp").write_text(f"weights of {step}" * 1000)
        (partial / STATE / "metadata.json").write_text("{}")
        self.mirror.upload(self.folders.publish(partial))
        if wait:
            self.wait()

    def wait(self) -> None:
        while not self.mirror.uploaded():
            pass

    def content(self) -> dict[str, str]:
        return {
            path.relative_to(self.folder).as_posix(): path.read_text()
            for path in self.folder.glob("step-*/**/*")
            if path.is_file()
        }


def save_until_killed(url: str, folder: Path, told: Path) -> None:
    """Tells the last step whose checkpoint has arrived."""
    pod = Pod(url, folder, keep=1)
    for step in range(1, 1000):
        pod.save(step)
        told.write_text(str(step))


def main() -> None:
    folder = Path(sys.argv[1])
    for number, url in enumerate(sys.argv[2:]):
        told, child = folder / f"told-{number}", os.fork()
        if child == 0:
            try:
                save_until_killed(url, folder / f"killed-{number}", told)
            finally:
                os._exit(1)
        while not told.exists():
            if os.waitpid(child, os.WNOHANG)[0]:
                raise SystemExit(f"the pod of {url} has ended by itself")
            time.sleep(0.01)
        time.sleep(0.05 + 0.13 * number)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
