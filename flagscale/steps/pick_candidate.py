"""pick-candidate: a candidate of a search that goes on -> its `student`, which is not copied."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from flagscale.artifacts import open_artifact
from flagscale.evaluation import SEARCH
from flagscale.evaluation.search.board import SearchBoard
from flagscale.execution.absent import write_absent
from flagscale.shared import Pointer, write_pointer

logger = logging.getLogger(__name__)


def pick_candidate(slot: int, search: Path, output: Path) -> None:
    """Point to the student of a candidate, or say that there is none for this slot.

    Args:
        slot: from 1: which of those that go on, the best first.
        search: the `search` artifact of the rung before.
        output: where the `student` artifact is to be.

    Raises:
        UserError: the search is damaged.
    """
    open_artifact(search, "search")
    board = SearchBoard.from_json(json.loads((search / SEARCH).read_text(encoding="utf-8")))
    if slot > len(board.going_on):
        why = f"nothing to do: {len(board.going_on)} candidate(s) go on, and this is slot {slot}"
        logger.info("%s", why)
        write_absent(output, "pick-candidate", why, {}, empty=True)
        return
    one = board.going_on[slot - 1]
    logger.info("candidate %d: %s", one.number, one.name)
    assert one.student is not None, "it was measured"
    write_pointer(Pointer(**one.student), output)
