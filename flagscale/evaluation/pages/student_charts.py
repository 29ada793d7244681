"""Charts of what a student was cut by: its layers, and what widths are made of."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from flagscale.evaluation.pages.charts import ROLES, Chart, chart


def scores(values: Sequence[float], gone: Collection[int], label: str) -> Chart:
    """A figure of each layer by itself, from 0; those that are `gone` stand out."""

    def draw(axes: Axes) -> None:
        for name, role in (("kept", "muted"), ("removed", "before")):
            chosen = [i for i in range(len(values)) if (i in gone) == (name == "removed")]
            axes.bar(chosen, [values[i] for i in chosen], color=ROLES[role], label=name)
        if min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("layer of the teacher")
        axes.set_ylabel(label)

    text = "; ".join(f"layer {i} {value:.3g}" for i, value in enumerate(values))
    return chart("scores", "Each layer by itself", f"{label}: {text}.", draw)


def removals(layers: Sequence[int], kl: Sequence[float], left: Sequence[int]) -> Chart:
    """The KL to the whole model after each removal, with the layer that went."""

    def draw(axes: Axes) -> None:
        axes.plot(left, kl, "o-", color=ROLES["before"], markersize=4)
        for x, y, layer in zip(left, kl, layers, strict=True):
            axes.annotate(
                str(layer), (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=7
            )
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("layers left (at each point: the layer that went)")
        axes.set_ylabel("KL to the teacher, nats a token")
        axes.set_ylim(bottom=0)

    text = "; ".join(
        f"{n} layers without {layer} {y:.3g}" for n, layer, y in zip(left, layers, kl, strict=True)
    )
    return chart("removals", "Layer after layer", f"KL to the teacher: {text}.", draw)


def widths(shares: Mapping[str, Sequence[float]], kept: Mapping[str, int]) -> Chart:
    """How much of all importance the most important channels of a width have between them.

    Args:
        shares: of each width: of the first, the first two, ..., all, which is 1.
        kept: of each, how many are.
    """
    roles = ("after", "before", "teacher", "other")

    def draw(axes: Axes) -> None:
        for (name, shares_n), role in zip(shares.items(), roles, strict=False):
            x = 100 * np.arange(len(shares_n) + 1) / len(shares_n)
            y = 100 * np.array([0, *shares_n])
            axes.plot(x, y, color=ROLES[role], label=name)
            axes.plot(x[kept[name]], y[kept[name]], "o", color=ROLES[role], markersize=6)
        axes.plot([0, 100], [0, 100], "--", color=ROLES["grid"], linewidth=1)
        axes.set_xlabel("% of the teacher's, the most important first (point: kept)")
        axes.set_ylabel("% of all importance")

    text = "; ".join(
        f"{kept[name]} of {len(shares_n)} {name} have {100 * shares_n[kept[name] - 1]:.1f}%"
        for name, shares_n in shares.items()
    )
    return chart("widths", "What the widths kept", f"Of all importance, {text}.", draw)
