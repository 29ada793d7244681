"""The logs of ranks that failed: their ends in the step's own log, the whole ones beside its run.

torchrun writes each rank's output to a file, from which it also shows it: a rank that is killed has
lost nothing. KFP keeps the log of a step that fails, and none of its outputs; so what failed ranks
said in other pods is repeated there. MLflow has the whole of them, and of one of many students
whose failure is told (`flagscale.execution.absent`) the artifact that says so has them too.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from pathlib import Path

from flagscale import tracking
from flagscale.execution.notes import LOGS, read_log, read_run
from flagscale.execution.rank_folder import RankFolder
from flagscale.execution.step_process import keep_file

_FOLDER = "failed-ranks"  # in MLflow, and in the artifact
_SHOWN_LINES = 100
_MOST_SHOWN = 8


def keep_failed(ranks: RankFolder) -> None:
    """Keep the logs of ranks that failed, or were killed. Those that were stopped have not failed.

    Args:
        ranks: which have all ended.
    """
    found = {rank: log for rank in ranks.failed() if (log := read_log(rank)) is not None}
    when = time.strftime("%Y%m%dT%H%M%S")
    names = {rank: f"{_FOLDER}/{when}-rank-{rank.name}.log" for rank in found}
    told = ranks.path / LOGS / "0"  # of the first node, which the step's log has shown already
    elsewhere = [rank for rank, log in found.items() if told not in log.parents]
    for rank in elsewhere[:_MOST_SHOWN]:
        _show(rank.name, found[rank])
    for rank, log in found.items():
        keep_file(names[rank], log)
    run_id = read_run(ranks.path / "0")
    if run_id is not None and found:
        tracking.keep_files(run_id, {names[rank]: log for rank, log in found.items()})


def _show(rank: str, log: Path) -> None:
    with log.open(encoding="utf-8", errors="replace") as stream:
        lines = deque(stream, maxlen=_SHOWN_LINES)
    sys.stdout.write(f"the end of the log of rank {rank}, which failed:\n")
    sys.stdout.writelines(f"[rank {rank}] {line.rstrip()}\n" for line in lines)
    sys.stdout.flush()
