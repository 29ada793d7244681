"""The figures of an evaluation: what is reported of each model, with intervals, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flagscale.evaluation import bootstrap
from flagscale.evaluation.bootstrap import Estimate
from flagscale.evaluation.fidelity import ALL_FIGURES, TEACHER, Fidelity

BEFORE = "student"
AFTER = "distilled"
LABELS = {TEACHER: "Teacher", BEFORE: "Student before", AFTER: "Student after"}
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Figure:
    """How a figure is shown.

    Attributes:
        label: for people.
        meaning: one sentence.
        lower_is_better: direction of progress.
        percent: a share of tokens, shown in percent.
    """

    label: str
    meaning: str
    lower_is_better: bool = True
    percent: bool = False

    def text(self, value: float, signed: bool = False) -> str:
        """The value with the digits that matter."""
        sign = "+" if signed else ""
        if self.percent:
            return f"{100 * value:{sign}.1f}{' points' if signed else '%'}"
        if abs(value) >= 1e6:
            return f"{value:{sign}.2e}".replace("e+0", "e").replace("e+", "e")
        if abs(value) >= 100:
            return f"{value:{sign},.0f}"
        if abs(value) >= 10:
            return f"{value:{sign}.2f}"
        if value == 0 or abs(value) >= 0.01:
            return f"{value:{sign}.3f}"
        return f"{value:{sign}.2g}"


SHOWN = {
    "kl": Figure(
        "KL to the teacher",
        "Forward KL(teacher || student), nats a token, over the full vocabulary at temperature 1.",
    ),
    "top1_agreement": Figure(
        "Top-1 agreement",
        "Share of tokens where teacher and student would say the same next token.",
        lower_is_better=False,
        percent=True,
    ),
    "lm_loss": Figure("LM loss", "Cross-entropy with the text itself, nats a token."),
    PERPLEXITY: Figure("Perplexity", "The exponential of the LM loss."),
    "accuracy": Figure(
        "Token accuracy",
        "Share of tokens where the most probable next token is the text's.",
        lower_is_better=False,
        percent=True,
    ),
}

# What the report has beside them.
DETAILS = {
    "reverse_kl": Figure(
        "Reverse KL",
        "KL(student || teacher), nats a token: large where the student holds likely what its "
        "teacher does not.",
    ),
    "js_divergence": Figure(
        "JS divergence", "Jensen-Shannon: the symmetric one, nats a token, at most log 2 = 0.693."
    ),
    "top5_agreement": Figure(
        "Top-5 agreement",
        "Share of the teacher's five most probable next tokens that are among the student's five.",
        lower_is_better=False,
        percent=True,
    ),
}


def estimates(fidelity: Fidelity, samples: int, seed: int) -> dict[str, dict[str, Estimate]]:
    """Model -> figure -> estimate, all on the same draws of documents.

    Figures are the keys of `SHOWN`, and of `DETAILS` where they were measured.

    Raises:
        UserError: fewer than two documents.
    """
    flat = bootstrap.ratios(
        {
            f"{m} {f}": sums_d
            for m, figures in fidelity.sums.items()
            for f, sums_d in figures.items()
        },
        fidelity.tokens_d,
        samples,
        seed,
    )
    found = {m: {f: flat[f"{m} {f}"] for f in sums} for m, sums in fidelity.sums.items()}
    return {m: {**figures, PERPLEXITY: figures["lm_loss"].exp()} for m, figures in found.items()}


def differences(
    after: Mapping[str, Estimate], before: Mapping[str, Estimate], confidence: float
) -> dict[str, dict[str, float]]:
    """Paired `after - before` of every figure but the perplexity, which is not additive."""
    return {
        f: asdict((after[f] - before[f]).interval(confidence))
        for f in ALL_FIGURES
        if f in after and f in before
    }


def summarise(fidelity: Fidelity, samples: int, confidence: float, seed: int) -> dict[str, Any]:
    """The figures of `metrics.json`.

    Returns:
        `models`: model -> figure -> value, low, high; `paired`: figure -> the same, of distilled
        minus student; `kl_reduction`: share of the student's KL that distillation removed, None
        where there was none to remove; `kl_reduction_interval`: its low and high; counts.

    Raises:
        UserError: fewer than two documents.
    """
    found = estimates(fidelity, samples, seed)
    before, after = found[BEFORE], found[AFTER]
    reduction, shown = None, {**SHOWN, **DETAILS}
    if before["kl"].resamples_r.min() > 0:
        reduction = after["kl"].reduction_from(before["kl"]).interval(confidence)
    return {
        "models": {
            m: {f: asdict(figures[f].interval(confidence)) for f in shown if f in figures}
            for m, figures in found.items()
        },
        "paired": differences(after, before, confidence),
        "kl_reduction": reduction.value if reduction else None,
        "kl_reduction_interval": [reduction.low, reduction.high] if reduction else None,
        "documents": len(fidelity.documents),
        "tokens": int(fidelity.tokens_d.sum()),
        "confidence": confidence,
        "bootstrap_samples": samples,
        "seed": seed,
    }


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What `summarise` found as one level of names: `distilled/kl`, ..., and the counts.

    `kl_reduction` is left out where the student began as a copy of the teacher.
    """
    flat = {
        f"{model}/{figure}": interval["value"]
        for model, figures in metrics["models"].items()
        for figure, interval in figures.items()
    }
    flat |= {
        f"{model}/{name}": value["value"] if isinstance(value, Mapping) else value
        for model, found in metrics.get("calibration", {}).items()
        for name, value in found.items()
    }
    if metrics["kl_reduction"] is not None:
        flat["kl_reduction"] = metrics["kl_reduction"]
    return flat | {name: float(metrics[name]) for name in ("documents", "tokens")}


def verdict(figure: str, difference: Mapping[str, float]) -> str:
    """`better`, `worse`, or `not clear` where the interval of a difference holds 0."""
    if difference["low"] <= 0 <= difference["high"]:
        return "not clear" if difference["low"] < difference["high"] else "equal"
    lower_is_better = {**SHOWN, **DETAILS}[figure].lower_is_better
    return "better" if (difference["high"] < 0) == lower_is_better else "worse"
