"""``judgement.png``: what the learned policy is worth against each rival, on one page that could stand in a talk."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esper.atomic import replacing
from esper.report.figure import STYLE
from esper.report.statistics import Estimate

__all__ = ["ForestRow", "forest_figure"]

_BETTER, _WORSE, _OPEN = "#0072B2", "#D55E00", "#777777"
"""Okabe & Ito (2008): the interval is above zero, below it, or holds it."""

_ROW_INCHES = 0.36


@dataclass(frozen=True)
class ForestRow:
    """One line: a difference with its interval.

    Attributes:
        label: What is compared.
        estimate: Mean over hosts.
        median: Over hosts.
        hosts: How many.
        head: Stands apart, as the sum of those below it.
    """

    label: str
    estimate: Estimate
    median: float
    hosts: int
    head: bool = False


def forest_figure(
    panels: Mapping[str, Sequence[ForestRow]], out: str | os.PathLike[str], *, title: str, axis: str
) -> Path:
    """Draw one panel for each group of hosts, all on one axis, and write the file.

    Args:
        panels: Heading -> its rows, from above.
        out: Its suffix chooses the format (png, svg, pdf).
        title: Above all panels.
        axis: What is drawn, with its unit.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: There is nothing to draw.
    """
    if not any(panels.values()):
        raise ValueError("expected at least one row to draw, got none")
    out = Path(out)
    with matplotlib.rc_context(STYLE):
        figure = _draw({heading: rows for heading, rows in panels.items() if rows}, title, axis)
        with replacing(out) as temporary:
            figure.savefig(temporary)
    return out


def _draw(panels: Mapping[str, Sequence[ForestRow]], title: str, axis: str) -> Figure:
    lengths = [len(rows) for rows in panels.values()]
    height = 1.6 + _ROW_INCHES * sum(lengths) + 0.5 * len(lengths)
    figure = Figure(figsize=(13.0, max(4.0, height)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[n + 0.8 for n in lengths])
    shared: Axes | None = None
    low, high = _limits([row for rows in panels.values() for row in rows])
    for index, (heading, rows) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[index], sharex=shared)
        shared = shared or axes
        _panel(axes, heading, rows, (low, high))
        last = index == len(panels) - 1
        axes.tick_params(axis="x", labelbottom=last)
        if last:
            axes.set_xlabel(axis)
    return figure


def _panel(axes: Axes, heading: str, rows: Sequence[ForestRow], limits: tuple[float, float]) -> None:
    axes.set_title(heading)
    axes.axvline(0.0, color="#333333", linewidth=1.0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    for place, row in enumerate(rows):
        _row(axes, place, row, limits)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.head else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(*limits)
    axes.set_ylim(len(rows) - 0.4, -0.6)


def _row(axes: Axes, place: int, row: ForestRow, limits: tuple[float, float]) -> None:
    interval = row.estimate.interval
    colour = _OPEN
    if interval is not None:
        colour = _BETTER if interval[0] > 0 else _WORSE if interval[1] < 0 else _OPEN
        ends = [min(max(end, limits[0]), limits[1]) for end in interval]
        axes.plot(
            ends, [place, place], color=colour, linewidth=3.2 if row.head else 2.0, solid_capstyle="butt"
        )
    marks: list[tuple[float, dict[str, Any]]] = [
        (row.estimate.mean, {"marker": "D" if row.head else "o", "color": colour, "markersize": 8}),
        (row.median, {"marker": "|", "color": "#222222", "markersize": 13, "markeredgewidth": 1.6}),
    ]
    for value, style in marks:
        axes.plot([min(max(value, limits[0]), limits[1])], [place], linestyle="none", **style)
    text = f"{row.estimate.mean:+.3f}"
    if interval is not None:
        text += f"  [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    axes.annotate(
        f"{text}   n = {row.hosts}",
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9.5,
        color="#333333",
        annotation_clip=False,
    )


def _limits(rows: Sequence[ForestRow]) -> tuple[float, float]:
    """Wide enough for all intervals of whole groups; a small family's may end at the edge."""
    heads = [row for row in rows if row.head] or list(rows)
    ends = [0.0]
    for row in heads:
        ends += [row.estimate.mean, row.median, *(row.estimate.interval or ())]
    span = max(max(ends) - min(ends), 0.02)
    return min(ends) - 0.35 * span, max(ends) + 0.35 * span
