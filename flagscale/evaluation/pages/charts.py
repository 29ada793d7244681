"""The report's charts: inline SVG whose colours follow the page's light or dark mode.

Matplotlib draws with one placeholder colour per role, which becomes a CSS variable. The same data
gives the same bytes: identifiers are hashed with a fixed salt and no date is written.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

ROLES = {
    "ink": "#010203",
    "muted": "#010204",
    "grid": "#010205",
    "teacher": "#010206",
    "before": "#010207",
    "after": "#010208",
    "other": "#010209",
    "surface": "#01020a",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flagscale",
    "font.size": 8.5,
    "text.color": ROLES["ink"],
    "axes.edgecolor": ROLES["grid"],
    "axes.labelcolor": ROLES["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": ROLES["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": ROLES["grid"],
    "ytick.color": ROLES["grid"],
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_LOSSES = {  # key of training.jsonl -> label and role
    "logits distillation loss": ("distillation loss", "after"),
    "lm loss": ("LM loss", "other"),
    "intermediate distillation loss": ("intermediate loss", "teacher"),
    "attention distillation loss": ("attention loss", "before"),
}
_MOST_DUMBBELLS = 120
_LONGEST_NAME = 60  # characters beside an axis
_SIZE = (4.3, 2.7)  # inches; half the page
WIDE = 7.6  # inches; the whole page
_LONGEST_LABEL = 36  # characters beside an upright axis

Log = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Chart:
    """A chart for a page.

    Attributes:
        title: its caption.
        svg: the drawing, which describes itself to screen readers.
    """

    title: str
    svg: Markup


def losses(training: Log, validation: Log) -> Chart | None:
    """Losses against the optimiser step: training as lines, validation as points.

    A loss that is 0 throughout was not part of the training and is left out.
    """
    shown = [k for k in _LOSSES if any(row.get(k) for row in (*training, *validation))]
    if not shown:
        return None

    def draw(axes: Axes) -> None:
        for key in shown:
            label, role = _LOSSES[key]
            colour, points = ROLES[role], _series(validation, key)
            steps, values = _series(training, key)
            if steps:
                axes.plot(steps, values, color=colour, label=label)
            elif points[0]:
                axes.plot(*points, "--", color=colour, linewidth=1, label=label)
            axes.plot(*points, "o", color=colour, markeredgecolor=ROLES["surface"], markersize=6.5)
        if validation:
            axes.plot([], [], "o", color=ROLES["muted"], markersize=5, label="validation")
        axes.set_ylabel("nats a token")
        axes.set_ylim(bottom=0)

    text = f"{_describe(training, shown, 'Training')} {_describe(validation, shown, 'Validation')}"
    return chart("losses", "Losses during training", text, draw)


def curve(training: Log, key: str, title: str, role: str) -> Chart | None:
    """One quantity of training.jsonl against the optimiser step; None where it was not logged."""
    steps, values = _series(training, key)
    if not steps:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=ROLES[role])
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))

    return chart(key.replace(" ", "-"), title, _describe(training, (key,), "Training"), draw)


def documents(before_d: np.ndarray, after_d: np.ndarray) -> Chart:
    """KL of each document before and after, in nats a token, by its KL afterwards."""
    order = np.argsort(after_d, kind="stable")
    if len(order) > _MOST_DUMBBELLS:
        order = order[np.linspace(0, len(order) - 1, _MOST_DUMBBELLS).round().astype(int)]

    def draw(axes: Axes) -> None:
        x = np.arange(1, len(order) + 1)
        low, high = before_d[order], after_d[order]
        axes.vlines(x, low, high, color=ROLES["grid"], linewidth=1.2)
        axes.plot(x, low, "o", color=ROLES["before"], markersize=3.6, label="before")
        axes.plot(x, high, "o", color=ROLES["after"], markersize=3.6, label="after")
        axes.set_ylabel("KL, nats a token")
        axes.set_xlabel("documents, the best matched first")
        axes.set_ylim(bottom=0)
        axes.set_xticks([])

    better = int((after_d < before_d).sum())
    text = (
        f"{better} of {len(after_d)} documents are closer to the teacher after training. "
        f"Median KL before {np.median(before_d):.3g}, after {np.median(after_d):.3g}."
    )
    return chart("documents", "KL to the teacher, document by document", text, draw)


def ranking(
    names: Sequence[str],
    intervals: Sequence[Mapping[str, float]],
    roles: Sequence[str],
    label: str,
    percent: bool = False,
    page_id: str = "ranking",
) -> Chart:
    """A figure of several models with its intervals, one below the other.

    Args:
        names: of the models, the first at the top.
        intervals: value, low, high of each.
        roles: colour of each: `after`, `before` or `muted`.
        label: of the axis.
        percent: whether the figure is a share, shown in percent.
        page_id: unique on its page.
    """
    scale = 100 if percent else 1
    value, low, high = (
        np.array([interval[key] * scale for interval in intervals])
        for key in ("value", "low", "high")
    )

    def draw(axes: Axes) -> None:
        y = -np.arange(len(names))
        for i, role in enumerate(roles):
            axes.plot([low[i], high[i]], [y[i], y[i]], color=ROLES[role], linewidth=2)
            axes.plot(value[i], y[i], "o", color=ROLES[role], markersize=6)
        axes.set_yticks(y, [_shortened(name) for name in names])
        axes.set_ylim(-len(names) + 0.4, 0.6)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(label)
        axes.margins(x=0.06)

    text = "; ".join(
        f"{name} {v:.3g} ({lo:.3g} to {hi:.3g})"
        for name, v, lo, hi in zip(names, value, low, high, strict=True)
    )
    size = (WIDE, 0.75 + 0.27 * len(names))
    return chart(page_id, f"{label}, best first", f"{text}.", draw, size)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _series(log: Log, key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
    return [p[0] for p in points], [p[1] for p in points]


def _describe(log: Log, keys: Sequence[str], name: str) -> str:
    parts = []
    for key in keys:
        steps, values = _series(log, key)
        if steps:
            label = _LOSSES[key][0] if key in _LOSSES else key
            first, last = f"{values[0]:.3g} at step {steps[0]:.0f}", f"{values[-1]:.3g} at step"
            parts.append(f"{label} {first}, {last} {steps[-1]:.0f}")
    return f"{name}: {'; '.join(parts)}." if parts else ""


def chart(
    name: str,
    title: str,
    description: str,
    draw: Callable[[Axes], None],
    size: tuple[float, float] = _SIZE,
) -> Chart:
    """One drawing as a chart.

    Args:
        name: unique on its page.
        title: its caption.
        description: what it shows, for who does not see it.
        draw: on the axes, in colours of `ROLES`.
        size: inches.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_ylabel(textwrap.fill(axes.get_ylabel(), _LONGEST_LABEL))
        if not axes.get_xlabel():
            axes.set_xlabel("optimiser step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            figure.legend(handles, labels, loc="outside upper left", ncols=2, handlelength=1.4)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    shape = ' class="wide"' if size[0] == WIDE else ""
    return Chart(title, _inline(stream.getvalue(), name, title, description, shape))


def _inline(svg: str, name: str, title: str, description: str, shape: str) -> Markup:
    """An SVG file as an element of a page: no prologue, no sizes, no shared ids, CSS colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    for role, colour in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]+", r"font-size: \1px", svg)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box, "Matplotlib writes a viewBox"
    opening = (
        f'<svg{shape} {box.group()} role="img" aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>'
    )
    # Its parts are Matplotlib's own; only the labels above could have held anything else.
    return Markup(opening + svg[svg.index(">") + 1 :].rstrip())  # noqa: S704
