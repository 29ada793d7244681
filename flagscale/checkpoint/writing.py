"""Writes a distributed checkpoint: every rank its share, at once or while training goes on.

Megatron-Core does the work. Three things are ours. Every rank learns of a failure on any rank.
Files are written by threads, where Megatron-Core forks a process for each. And the writers' results
come back through memory that is shared over the fork: Megatron-Core's own way, a manager process,
takes two seconds to start and outlives a kill for ever.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import queue
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _get_failure_dict

from flagscale.checkpoint.agreement import is_first_rank, same_outcome, storage_error

_WRITING = "could not be written"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def save(sharded_state: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint and wait for it. All ranks call it.

    Args:
        sharded_state: of this rank.
        folder: is made.

    Raises:
        UserError: a rank cannot write, e.g. because the disk is full.
    """
    execute(prepare_save(sharded_state, folder, in_background=False), folder)


def execute(request: AsyncRequest, folder: Path) -> None:
    """Do what `prepare_save` left to do, in this process. All ranks call it.

    Megatron-Core's `execute_sync` hangs if one rank raises.

    Raises:
        UserError: a rank cannot write.
    """
    with same_outcome(folder, _WRITING):
        if request.async_fn is not None:
            rank, _, results = request.async_fn_args
            request.async_fn(rank, request.preload_fn(), results)
    for finalize in request.finalize_fns:
        finalize()


def schedule(request: AsyncRequest, folder: Path, calls: AsyncCallsQueue) -> None:
    """Begin what `prepare_save` left to do, in a forked process. All ranks call it.

    Raises:
        UserError: a rank cannot begin, e.g. because it has no memory left.
    """
    with same_outcome(folder, _WRITING), _children_ignore_signals():
        calls.schedule_async_request(request)


@contextmanager
def _children_ignore_signals() -> Iterator[None]:
    """Whoever stops the training waits for the checkpoint: a signal to all must not spoil it.

    A child inherits what is ignored, so there is no moment at which it could be hit. Here the
    signals are blocked meanwhile, and come afterwards.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def prepare_save(
    sharded_state: dict[str, Any], folder: Path, *, in_background: bool
) -> AsyncRequest:
    """Plan who writes what, and write what is common. All ranks call it.

    This follows `dist_checkpointing.save`, which hangs if the first rank cannot write.

    Args:
        sharded_state: of this rank.
        folder: is made.
        in_background: the request will be executed in a forked process, and not here.

    Returns:
        What is left to do, for `execute` or `schedule`. Its last function makes the checkpoint
        complete.
    """
    with same_outcome(folder, _WRITING):
        if is_first_rank():
            folder.mkdir(parents=True)
    sharded, common = save_preprocess(sharded_state)
    with same_outcome(folder, _WRITING):
        if is_first_rank():
            with (folder / COMMON_STATE_FNAME).open("wb") as stream:
                torch.save(common, stream)
    # Megatron-Core gives it to the writer that it makes in `async_save`.
    filesystem_async._results_queue = _Results() if in_background else queue.SimpleQueue()
    strategy = _Strategy(in_background)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    writing = strategy if group.size() == 1 else FullyParallelSaveStrategyWrapper(strategy, group)
    request: AsyncRequest = writing.async_save(sharded, folder)

    def complete() -> None:
        with same_outcome(folder, _WRITING):
            if is_first_rank():
                save_config(CheckpointingConfig(strategy.backend, strategy.version), str(folder))

    request.add_finalize_fn(complete)
    return request


class _Results:
    """A queue of one item, from a process forked from this one to this one.

    Memory that is shared over the fork, unlike a pipe, needs nobody who reads before the writer can
    end.
    """

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint-results"), "w+b", buffering=0)

    def put(self, results: object) -> None:
        self._file.write(pickle.dumps(results))

    def get_nowait(self) -> Any:  # noqa: ANN401
        self._file.seek(0)
        content = self._file.read()
        self._file.close()
        try:
            return pickle.loads(content)  # noqa: S301 - our own fork wrote it
        except (pickle.UnpicklingError, EOFError):
            return RuntimeError("the writing process was killed, or ran out of memory")


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's, with our way to write, and an end that all ranks agree on."""

    def __init__(self, in_background: bool) -> None:
        super().__init__("torch_dist", 1)
        self._in_background = in_background

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[Any, Any, Any]
    ) -> AsyncRequest:
        _, metadata, ranks = planned

        def finish() -> None:
            results = ranks.gather_object(writer.retrieve_write_results())
            with same_outcome(Path(writer.checkpoint_dir), _WRITING):
                if is_first_rank():
                    failures = _get_failure_dict(results)
                    if failures:
                        raise CheckpointException("write", failures)
                    writer.finish(metadata, results)

        function, preload, arguments = writer.get_save_function_and_args()
        if function is not None:
            write = _write_in_fork if self._in_background else _write
            function = partial(write, getattr(writer, "transforms", None), os.getpid())
        return AsyncRequest(function, arguments, [finish], preload_fn=preload)


def _write_in_fork(transforms: object, parent: int, *arguments: Any) -> None:  # noqa: ANN401
    """`_write` in a process forked from a training one, with which it lives and dies.

    Args:
        transforms: see `_write`.
        parent: id of the training process.
        arguments: see `_write`.
    """
    # Killed without a chance to clean up, the training must not leave a writer behind.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    gc.disable()  # it would free the parent's tensors on the GPU
    _write(transforms, parent, *arguments)


def _write(
    transforms: object,
    _parent: int,
    _rank: int,
    buckets: list[Any],
    results: _Results | queue.SimpleQueue[Any],
) -> None:
    """Write this rank's files, each in a thread of its own; errors are results.

    Args:
        transforms: torch's, of what goes to the files.
        buckets: one a file.
        results: takes number of the file -> what was written where, or an exception.
    """
    written: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    counts: queue.Queue[int] = queue.Queue()  # Megatron-Core's way to count writers that are done
    write = partial(
        FileSystemWriterAsync.write_preloaded_data, [] if transforms is None else [transforms]
    )
    threads = []
    for number, bucket in enumerate(buckets):
        counts.put(number)
        arguments = (number, bucket, written, counts, True)
        threads.append(threading.Thread(target=write, args=arguments))
        threads[-1].start()
    for thread in threads:
        thread.join()
    outcomes = dict(written.get() for _ in threads)
    errors = [outcome for outcome in outcomes.values() if isinstance(outcome, Exception)]
    # As text: not every exception survives pickling.
    told = [RuntimeError(str(storage_error(error) or error)) for error in errors]
    results.put(told[0] if told else outcomes)
