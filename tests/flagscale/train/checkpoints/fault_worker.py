"""One of two ranks that save and load while one of them cannot: `torchrun ... FOLDER`.

Each rank leaves in FOLDER/<rank>.json what each attempt ended with.
"""

import contextlib
import json
import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from flagscale.checkpoint import load_weights, save_weights
from flagscale.checkpoint.agreement import same_outcome
from flagscale.errors import Interrupted
from flagscale.execution.signals import signals_raise
from flagscale.megatron import platform
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.global_vars import use_args
from flagscale.megatron.shape import ModelShape
from flagscale.models.megatron import build_model
from flagscale.recipe import TrainingRecipe
from flagscale.train.checkpoints import TrainingCheckpoints, TrainingState
from flagscale.train.setup import build_model_chunks, setup_training


@contextlib.contextmanager
def file_limit(size):
    """This rank can write no file longer than `size` bytes: a fault of its disk alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def failing_metadata():
    """The last file of the tensors, which the first rank writes, cannot be written."""
    finish = FileSystemWriter.finish

    def fail(*args):
        raise OSError(5, "Input/output error")

    FileSystemWriter.finish = fail
    try:
        yield
    finally:
        FileSystemWriter.finish = finish


class Attempts:
    """What each attempt ended with on this rank."""

    def __init__(self):
        self.rank, self.ended = torch.distributed.get_rank(), {}

    def __call__(self, name, action):
        try:
            action()
            self.ended[name] = "ok"
        except (Exception, Interrupted) as error:
            self.ended[name] = f"{type(error).__name__}: {error}"
        torch.distributed.barrier()

    def limited(self, name, rank, size, action):
        with file_limit(size) if self.rank == rank else contextlib.nullcontext():
            self(name, action)

    def once(self, action):
        """The first rank does it, the other waits."""
        if self.rank == 0:
            action()
        torch.distributed.barrier()


@contextlib.contextmanager
def stopped_while_reading():
    """SIGTERM comes while torch, which takes whatever is raised for a failure, reads tensors."""
    read = FileSystemReader.read_data

    def stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return read(*args)

    FileSystemReader.read_data = stop
    try:
        with signals_raise():
            yield
    finally:
        FileSystemReader.read_data = read


def stop_one(rank, folder):
    """SIGTERM to one rank, in what all have to agree on."""
    with signals_raise(), same_outcome(folder, "cannot be read"):
        if torch.distributed.get_rank() == rank:
            signal.raise_signal(signal.SIGTERM)


def damage(folder, pattern, keep=100):
    for path in folder.glob(pattern):
        path.write_bytes(path.read_bytes()[:keep])


def weights(attempt: Attempts, shape: ModelShape, folder: Path) -> None:
    model = build_model(shape, 16)
    for rank in (0, 1):
        for size in (0, 5000):
            name = f"rank {rank} writes {size} bytes"
            attempt.limited(name, rank, size, lambda n=name: save_weights(model, folder / n))
    with failing_metadata():
        attempt("the first rank cannot end", lambda: save_weights(model, folder / "unended"))
    attempt("unended is refused", lambda: load_weights(model, folder / "unended"))
    attempt("saved", lambda: save_weights(model, folder / "good"))
    attempt("loaded", lambda: load_weights(model, folder / "good"))
    with stopped_while_reading():
        attempt("both are stopped", lambda: load_weights(model, folder / "good"))
    for rank in (0, 1):
        attempt(f"rank {rank} is stopped", lambda r=rank: stop_one(r, folder))
    deeper = build_model(replace(shape, num_layers=3), 16)
    attempt("of other layers", lambda: load_weights(deeper, folder / "good"))
    wider = build_model(replace(shape, ffn_hidden_size=96), 16)
    attempt("of other shapes", lambda: load_weights(wider, folder / "good"))
    for pattern in ("__1_*.distcp", "common.pt", ".metadata", "metadata.json"):
        attempt(f"save before {pattern}", lambda p=pattern: save_weights(model, folder / p[:-1]))
        attempt.once(lambda p=pattern: damage(folder / p[:-1], p, keep=20))
        attempt(f"damaged {pattern}", lambda p=pattern: load_weights(model, folder / p[:-1]))


def training(attempt: Attempts, shape: ModelShape, folder: Path, *, async_save: bool) -> None:
    recipe = TrainingRecipe(train_iters=9, global_batch_size=2, lr=1e-3)
    args = training_arguments(shape, 16, recipe)
    with use_args(args):
        trainer = setup_training(build_model_chunks(args), args, recipe)
        trainer.optimizer.step()
        checkpoints = TrainingCheckpoints(folder, async_save=async_save)

        def save(step):
            checkpoints.save(TrainingState(step), trainer)
            checkpoints.wait()

        attempt("first", lambda: save(1))
        attempt.limited("second, rank 1 limited", 1, 5000, lambda: save(2))
        left = sorted(path.name for path in folder.iterdir())
        attempt.ended["left"] = left
        attempt.ended["latest"] = checkpoints.restore(trainer).step
        attempt("third", lambda: save(3))
        attempt.ended["latest after it"] = checkpoints.restore(trainer).step


def main() -> None:
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    shape = ModelShape.load(folder)
    with platform.runtime():
        ended = {}
        for name, attempts in (
            ("weights", lambda attempt: weights(attempt, shape, folder / "weights")),
            ("sync", lambda attempt: training(attempt, shape, folder / "sync", async_save=False)),
            ("async", lambda attempt: training(attempt, shape, folder / "async", async_save=True)),
        ):
            attempt = Attempts()
            attempts(attempt)
            ended[name] = attempt.ended
        (folder / f"{attempt.rank}.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main()
