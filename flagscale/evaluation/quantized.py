"""What quantisation alone costs a student, and whether that is significant."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flagscale.evaluation.fidelity import FIGURES, Fidelity
from flagscale.evaluation.figures import differences, estimates

UNQUANTIZED = "unquantized"
QUANTIZED = "quantized"
# The figure that decides: against a teacher that is the very student, every KL is significant.
DECISIVE = "lm_loss"

_SAMPLES, _CONFIDENCE, _SEED = 1000, 0.95, 0


def cost_of_quantization(fidelity: Fidelity) -> dict[str, Any]:
    """Compare a student before and after post-training quantisation, document by document.

    Args:
        fidelity: of both, under the names above.

    Returns:
        `models`: model -> figure -> value, low, high; `paired`: figure -> the same, of quantised
        minus unquantised, by a paired bootstrap over documents; `significant`: whether the LM loss
        is worse, that is whether its interval lies above 0; counts.

    Raises:
        UserError: fewer than two documents.
    """
    found = estimates(fidelity, _SAMPLES, _SEED)
    paired = differences(found[QUANTIZED], found[UNQUANTIZED], _CONFIDENCE)
    return {
        "models": {
            name: {f: asdict(figures[f].interval(_CONFIDENCE)) for f in FIGURES}
            for name, figures in found.items()
        },
        "paired": paired,
        "significant": paired[DECISIVE]["low"] > 0,
        "confidence": _CONFIDENCE,
        "documents": len(fidelity.documents),
        "tokens": int(fidelity.tokens_d.sum()),
    }
