"""Charts of single tokens: how sure models are, and where a student is far from its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE
from flagscale.evaluation.pages.charts import ROLES, Chart, chart
from flagscale.evaluation.report.token_findings import Calibration, Slice

_NAMES = {TEACHER: ("teacher", "teacher"), BEFORE: ("before", "before"), AFTER: ("after", "after")}
_AXES = {
    "position": "tokens seen before in the window",
    "teacher entropy": "entropy of the teacher's prediction, nats",
    "token frequency": "times the token stands in the training text",
}


def slices(name: str, found: Sequence[Slice]) -> Chart:
    """The KL of tokens that have something in common, with its intervals.

    Args:
        name: one of `TokenFindings.slices`.
        found: the slices, in order.
    """

    def draw(axes: Axes) -> None:
        x = range(len(found))
        for model in (BEFORE, AFTER):
            label, role = _NAMES[model]
            values = [one.kl[model] for one in found]
            y = np.array([v["value"] for v in values], dtype=float)
            low, high = (np.array([v[x] for v in values], dtype=float) for x in ("low", "high"))
            below, above = np.nan_to_num(y - low), np.nan_to_num(high - y)
            axes.errorbar(
                x,
                y,
                (below, above),
                color=ROLES[role],
                fmt="o-",
                markersize=4,
                elinewidth=1,
                label=label,
            )
        axes.set_xticks(list(x), [one.label for one in found], rotation=30, ha="right")
        axes.set_xlabel(_AXES[name])
        axes.set_ylabel("KL, nats a token")
        axes.set_ylim(bottom=0)

    text = "; ".join(
        f"{one.label} ({one.tokens:,} tokens) {one.kl[BEFORE]['value']:.3g} before, "
        f"{one.kl[AFTER]['value']:.3g} after"
        for one in found
    )
    return chart(f"kl-{name.replace(' ', '-')}", f"KL by {name}", f"{text}.", draw)


def reliability(found: Mapping[str, Calibration]) -> Chart:
    """Of tokens that a model is so sure of, how many it is right about; without empty bins."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 100], [0, 100], "--", color=ROLES["grid"], linewidth=1)
        for model, one in found.items():
            label, role = _NAMES[model]
            bins = [i for i, tokens in enumerate(one.tokens) if tokens]
            axes.plot(
                [100 * one.confidence[i] for i in bins],
                [100 * one.accuracy[i] for i in bins],
                "o-",
                color=ROLES[role],
                markersize=4,
                label=label,
            )
        axes.set_xlabel("probability of the most probable token, %")
        axes.set_ylabel("it is the text's, %")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)

    text = "; ".join(
        f"{_NAMES[model][0]}: expected calibration error {100 * one.ece:.1f}%, overconfidence "
        f"{100 * one.overconfidence['value']:.1f} points"
        for model, one in found.items()
    )
    return chart("reliability", "Reliability: sure, and right", f"{text}.", draw)
