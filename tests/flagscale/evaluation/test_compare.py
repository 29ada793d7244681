"""Two runs side by side, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.evaluation.compare import compare, main

Evaluation = Callable[..., Path]


def test_better_run_is_called_better(
    evaluation_of: Evaluation, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = evaluation_of("a", kl_after=2.0), evaluation_of("b", kl_after=2.2)
    assert main([str(a), str(b), "--names", "distilled", "baseline"]) == 0
    text = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    names = [line[0] for line in lines if line]
    assert names[2:6] == ["Teacher", "Student before", "distilled", "baseline"]
    difference = next(line for line in lines if line and line[0] == "KL to the teacher")
    assert difference[1].startswith("-0.184 [-0.")
    assert difference[2] == "better"
    assert "12 documents" in text


def test_differences_are_paired(evaluation_of: Evaluation) -> None:
    found = compare(evaluation_of("a", kl_after=2.0), evaluation_of("b", kl_after=2.2))
    alone = found.models["A"]["kl"]
    pair = found.paired["kl"]
    assert pair["high"] < 0
    assert pair["high"] - pair["low"] < (alone.high - alone.low) / 5


def test_different_starts_leave_out_the_start(evaluation_of: Evaluation) -> None:
    found = compare(evaluation_of("a"), evaluation_of("b", kl_before=11.0))
    assert list(found.models) == ["Teacher", "A", "B"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"documents": 11}, "measured 12 documents and .* 11, of which 11 are the same"),
        ({"seq_length": 64}, "data.seq_length=32, .* with 64"),
        ({"teacher_loss": 3.3}, "have different teachers"),
    ],
)
def test_refuses_what_cannot_be_compared(
    evaluation_of: Evaluation, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare(evaluation_of("a"), evaluation_of("b", **changes))


def test_refuses_confusing_names(evaluation_of: Evaluation) -> None:
    a = evaluation_of("a")
    with pytest.raises(UserError, match="must differ"):
        compare(a, a, ("same", "same"))


def test_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
