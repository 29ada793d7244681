"""What a local run shows: the steps' own lines, without KFP's banners, and a log file of it all."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TextIO

from flagscale.secrets import masked

_INDENT = "    "
_EXCEPTION, _STATUS = " failed with exception: ", " finished with status "
_NOISE = re.compile(r"^-{20,}$|Wrote executor output file to|^Found image '")


class StepOutput(io.TextIOBase):
    """Takes what KFP prints; passes on, line by line, what the steps printed.

    Args:
        streams: where the lines go.
    """

    def __init__(self, *streams: TextIO) -> None:
        self._streams = streams
        self._rest = ""
        self._in_executor_input = False

    def writable(self) -> bool:
        """Whether this takes text: yes."""
        return True

    def write(self, text: str) -> int:
        """Take text; complete lines go out at once."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def _line(self, line: str) -> None:
        line = line.removeprefix(_INDENT).rstrip()  # KFP indents what a step prints
        if self._in_executor_input:
            self._in_executor_input = line != "}"
        elif line.startswith("[KFP Executor"):
            self._in_executor_input = line.endswith("Got executor_input:")
        elif line and not _NOISE.search(line):
            for stream in self._streams:
                stream.write(f"{_INDENT}{line}\n")
                stream.flush()


class _KfpFilter(logging.Filter):
    """Keeps what KFP logs from the terminal; its warnings and errors go to a file.

    Args:
        stream: the file.

    Attributes:
        exceptions: those of loops' tasks, but for what follows from a step that failed. They are
            nowhere else: one ends the loop, and the pipeline then says that it failed, and not of
            what.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.exceptions: list[str] = []
        self._stream = stream
        self._has_failed = False

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is not KFP's."""
        if "/kfp/" not in record.pathname:
            return True
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            self._stream.write(f"kfp: {message}\n")
            self._stream.flush()
        _, of_a_task, exception = message.partition(_EXCEPTION)
        if of_a_task and not self._has_failed:
            self.exceptions.append(exception)
        self._has_failed |= record.levelno >= logging.ERROR and _STATUS in message
        return False


@contextmanager
def quiet_kfp(log: Path) -> Iterator[Sequence[str]]:
    """Inside, stdout is for KFP: the steps' lines come through, its own do not.

    This program's log messages go to the terminal and to `log`, and so do the steps' lines.

    Args:
        log: a file, made anew.

    Yields:
        The exceptions that KFP has met in loops' tasks so far.
    """
    root = logging.getLogger()
    with log.open("w", encoding="utf-8") as file, warnings.catch_warnings():
        stream = masked(file)
        handlers: list[logging.Handler] = [logging.StreamHandler(f) for f in (sys.stdout, stream)]
        ours = [logging.getLogger(name) for name in ("flagscale", "pipelines")]
        before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in ours]
        for logger in ours:  # not through the root logger, whose handlers KFP replaces
            logger.handlers, logger.propagate = list(handlers), False
            logger.setLevel(logging.INFO)
        warnings.filterwarnings("ignore", module=r"kfp\.")
        warnings.filterwarnings("ignore", message="You may be attemping to run a task")
        warnings.filterwarnings("ignore", message="Task .* have no effect in the current local")
        kfp = _KfpFilter(stream)
        root.addFilter(kfp)
        try:
            with redirect_stdout(StepOutput(sys.stdout, stream)):
                yield kfp.exceptions
        finally:
            root.removeFilter(kfp)
            for logger, old_handlers, propagate, level in before:
                logger.handlers, logger.propagate = old_handlers, propagate
                logger.setLevel(level)
