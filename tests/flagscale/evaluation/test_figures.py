"""What is reported, and how figures are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flagscale.evaluation.fidelity import Fidelity
from flagscale.evaluation.figures import SHOWN, summarise, verdict


def test_summary(fidelity_of: Callable[..., Fidelity]) -> None:
    fidelity = fidelity_of(kl_after=2.0)
    found = summarise(fidelity, 500, 0.95, 0)
    kl = fidelity.sums["distilled"]["kl"].sum() / fidelity.tokens_d.sum()
    assert found["models"]["distilled"]["kl"]["value"] == pytest.approx(kl)
    assert found["models"]["distilled"]["perplexity"]["value"] == pytest.approx(
        np.exp(found["models"]["distilled"]["lm_loss"]["value"])
    )
    assert found["kl_reduction"] == pytest.approx(0.8)
    assert found["kl_reduction_interval"] == pytest.approx([0.8, 0.8])
    assert found["paired"]["kl"]["value"] == pytest.approx(-4 * kl)
    assert (found["documents"], found["tokens"]) == (12, fidelity.tokens_d.sum())


def test_nothing_to_reduce(fidelity_of: Callable[..., Fidelity]) -> None:
    assert summarise(fidelity_of(kl_before=0.0), 500, 0.95, 0)["kl_reduction"] is None


@pytest.mark.parametrize(
    ("figure", "low", "high", "expected"),
    [
        ("kl", -2.0, -1.0, "better"),
        ("kl", 1.0, 2.0, "worse"),
        ("kl", -1.0, 2.0, "not clear"),
        ("kl", 0.0, 0.0, "equal"),
        ("top1_agreement", 0.1, 0.2, "better"),
        ("top1_agreement", -0.2, -0.1, "worse"),
    ],
)
def test_verdict(figure: str, low: float, high: float, expected: str) -> None:
    assert verdict(figure, {"value": 0.0, "low": low, "high": high}) == expected


@pytest.mark.parametrize(
    ("figure", "value", "signed", "expected"),
    [
        ("kl", 2.2712, False, "2.271"),
        ("kl", 12.2249, False, "12.22"),
        ("kl", -9.9541, True, "-9.954"),
        ("kl", 0.00071, False, "0.00071"),
        ("kl", 0.0, False, "0.000"),
        ("perplexity", 12345.6, False, "12,346"),
        ("perplexity", 4.42e6, False, "4.42e6"),
        ("top1_agreement", 0.3312, False, "33.1%"),
        ("top1_agreement", 0.3312, True, "+33.1 points"),
    ],
)
def test_text(figure: str, value: float, signed: bool, expected: str) -> None:
    assert SHOWN[figure].text(value, signed) == expected
