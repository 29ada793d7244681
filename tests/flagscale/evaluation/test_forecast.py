"""What logs say of a training's end, with no look ahead; and the report's account of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flagscale.evaluation.forecast.accounts import (
    KD_LOSS,
    LM_LOSS,
    accounts,
    curve_of,
    decisive_loss,
)
from flagscale.evaluation.forecast.section import section, told

END = 40


def logs(end: int = END, key: str = KD_LOSS) -> tuple[list[Any], list[Any]]:
    generator = np.random.default_rng(4)

    def loss(step: float) -> float:
        return float(2 * (1 + step / 3) ** -0.4)

    training = [
        {"step": s, key: loss(s - 1) * generator.normal(1, 0.05), "learning rate": 1e-3}
        for s in range(1, end + 1)
    ]
    return training, [{"step": s, key: loss(s)} for s in range(0, end + 1, 10)]


def test_each_forecast_is_of_what_was_known_then() -> None:
    training, validation = logs()
    found = accounts(training, validation)
    assert [account.forecast.made_at for account in found] == [10, 20, 30]
    assert all(account.came == validation[-1][KD_LOSS] for account in found)
    assert all(account.holds for account in found)
    later = [row | {KD_LOSS: 99.0} if row["step"] > 20 else row for row in (*training, *validation)]
    changed = accounts(later[: len(training)], later[len(training) :])
    assert [a.forecast for a in changed][:2] == [a.forecast for a in found][:2]
    assert changed[2].forecast != found[2].forecast
    assert not changed[0].holds


def test_the_loss_that_a_training_is_about() -> None:
    assert decisive_loss(logs()[0]) == KD_LOSS
    assert decisive_loss(logs(key=LM_LOSS)[0]) == LM_LOSS
    none = [{"step": 1, KD_LOSS: 0.0, LM_LOSS: 3.0}]
    assert decisive_loss(none) == LM_LOSS


def test_the_losses_of_rungs_are_forecast_or_help() -> None:
    training, validation = logs()
    rates = [row["learning rate"] for row in training]
    rungs = {4: 1.9, 12: 1.2}  # of other samples, which are harder than the validation's
    of_validation = curve_of(training, validation, rates, KD_LOSS, 12, rungs).forecast(END, 0.9)
    harder = curve_of(training, validation, rates, KD_LOSS, 12, rungs, of_samples=True)
    assert harder.forecast(END, 0.9).value > 1.05 * of_validation.value


def test_a_training_that_left_nothing_to_forecast_from() -> None:
    assert accounts([], []) == []
    assert section([], []) is None
    training, validation = logs(2)
    assert told(training, validation) == []


def test_the_section_says_what_the_accounts_say() -> None:
    training, validation = logs()
    shown = section(training, validation)
    assert shown is not None
    assert shown.note.endswith("3 of 3 intervals hold it.")
    for row, account in zip(shown.rows, told(training, validation), strict=True):
        assert row["made"] == str(account["made_at"])
        assert row["interval"] == f"{account['low']:.4g} to {account['high']:.4g}"
        assert row["came"] == f"{account['came']:.4g}"
        assert (row["outcome"] == "within") == account["holds"]
    validation[-1][KD_LOSS] = 9.0
    above = section(training, validation)
    assert above is not None
    assert {row["outcome"] for row in above.rows} == {"above"}


@pytest.mark.parametrize("step", [0, 10])
def test_a_validation_alone_may_be_too_little(step: int) -> None:
    validation = logs()[1]
    with pytest.raises(ValueError, match="a second loss at another step"):
        curve_of([], validation[:1], [1e-3] * END, KD_LOSS, until=step)
