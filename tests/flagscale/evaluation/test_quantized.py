"""Whether what quantisation costs is significant."""

import numpy as np
import pytest

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import FIGURES, Fidelity
from flagscale.evaluation.quantized import QUANTIZED, UNQUANTIZED, cost_of_quantization


def fidelity(losses, changes):
    tokens_d = np.full(len(losses), 100)
    lm_loss_d = np.array(losses) * tokens_d
    sums = {
        UNQUANTIZED: {f: lm_loss_d for f in FIGURES},
        QUANTIZED: {f: lm_loss_d + np.array(changes) * tokens_d for f in FIGURES},
    }
    return Fidelity(tuple(map(str, losses)), tokens_d, sums)


LOSSES = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("changes", "significant"),
    [
        # Small against the documents' own spread, but the same on each: pairs tell.
        ([0.010, 0.011, 0.009, 0.010, 0.012, 0.008], True),
        ([0.010, -0.011, 0.009, -0.010, 0.012, -0.008], False),
        ([0.0] * 6, False),
        # Significantly better is no loss.
        ([-0.010, -0.011, -0.009, -0.010, -0.012, -0.008], False),
    ],
)
def test_it_is_decided_by_pairs(changes, significant):
    cost = cost_of_quantization(fidelity(LOSSES, changes))
    assert cost["significant"] is significant
    change = cost["paired"]["lm_loss"]
    assert change["value"] == pytest.approx(np.mean(changes), abs=1e-12)
    assert change["low"] <= change["value"] <= change["high"]
    assert cost["documents"] == 6
    assert cost["tokens"] == 600


def test_one_document_says_nothing():
    with pytest.raises(UserError, match="at least 2"):
        cost_of_quantization(fidelity([1.0], [0.1]))
