"""Room for what is kept of the teacher."""

from pathlib import Path

import pytest
import torch

from flagscale.errors import UserError
from flagscale.evaluation.measure.teacher import check_room


def test_a_disk_that_is_too_small_is_refused(tmp_path: Path) -> None:
    check_room(tmp_path, 1000, 64, torch.float32)
    with pytest.raises(
        UserError, match=r"4,000,000,000,000 test tokens take 16384000\.0 GB.*TMPDIR"
    ):
        check_room(tmp_path, 4 * 10**12, 2048, torch.bfloat16)
