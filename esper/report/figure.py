"""``growth.png``: what growth did to a run, on one page that could stand in a talk.

Left: loss, and accuracy where there is one, of every arm, growth marked. Right: parameters, and below them
one lane for each seed. All panels share the axis of steps. Colours are Okabe & Ito's (2008), which
colour-blind readers can tell apart; arms also differ by line weight, stages also by lightness, events also by
the form of their mark.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from esper.atomic import replacing
from esper.messages import Event
from esper.report.history import Mark, growth_marks, seeds
from esper.report.marks import MARK_STYLES, draw_marks, room_above
from esper.report.metrics import ArmCurves
from esper.report.panels import TRAINING_DASHES, draw_accuracy, draw_loss, draw_parameters, label_ends
from esper.report.swimlane import draw_swimlane, swimlane_height

__all__ = ["growth_figure"]

GROWTH_COLOUR = "#0072B2"
CONTROL_COLOURS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "savefig.dpi": 160,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.07,
    "svg.hashsalt": "esper",
}
WIDTH = 13.0  # inches; with the least height a slide's 16:9
LEAST_HEIGHT = 7.3


def growth_figure(
    runs: Sequence[ArmCurves],
    events: Sequence[Event],
    out: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> Path:
    """Draw the figure and write it; works with any number of seeds and arms, and without accuracy.

    Args:
        runs: the arms, the growing one first: the events are its events.
        events: of the growing arm, in order.
        out: file to write; its suffix chooses the format (png, svg, pdf).
        title: above the figure.

    Returns:
        ``out`` as a path.

    Raises:
        ValueError: ``runs`` is empty.
    """
    if not runs:
        raise ValueError("expected the curves of at least one arm to draw, got none")
    out = Path(out)
    with matplotlib.rc_context(STYLE):
        figure = _draw(runs, events, title)
        with replacing(out) as temporary:
            figure.savefig(temporary)
    return out


def _draw(runs: Sequence[ArmCurves], events: Sequence[Event], title: str | None) -> Figure:
    histories, marks = seeds(events), growth_marks(events)
    last = _last_step(runs, events)
    colours = [GROWTH_COLOUR, *(CONTROL_COLOURS[i % len(CONTROL_COLOURS)] for i in range(len(runs) - 1))]
    arms = list(zip(runs, colours, strict=True))
    has_accuracy = any(len(arm.val_acc) for arm in runs)

    lanes = swimlane_height(len(histories))
    height = max(LEAST_HEIGHT, lanes + 4.3)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    page = figure.add_gridspec(1, 2)
    left_ratios = [1.3, 1.0] if has_accuracy else [1.0]
    right_ratios = [height - 2.2 - lanes, lanes] if histories else [1.0]
    left_rows = page[0].subgridspec(len(left_ratios), 1, height_ratios=left_ratios)
    right_rows = page[1].subgridspec(len(right_ratios), 1, height_ratios=right_ratios)

    loss = figure.add_subplot(left_rows[0])
    size = figure.add_subplot(right_rows[0], sharex=loss)
    columns, ends = (
        [[loss], [size]],
        [draw_loss(loss, arms, room_above(marks)), draw_parameters(size, arms, last)],
    )
    curves = [loss, size]
    if has_accuracy:
        accuracy = figure.add_subplot(left_rows[1], sharex=loss)
        ends.append(draw_accuracy(accuracy, arms))
        columns[0].append(accuracy)
        curves.append(accuracy)
    if histories:
        swimlane = figure.add_subplot(right_rows[1], sharex=loss)
        draw_swimlane(swimlane, histories, last)
        columns[1].append(swimlane)

    draw_marks(loss, curves, marks, last)
    _draw_legends(figure, arms, marks, title)
    loss.set_xlim(-0.012 * last, 1.012 * last)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    for column in columns:
        for axes in column[:-1]:
            axes.tick_params(labelbottom=False)
        column[-1].set_xlabel("training step")
        column[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    figure.draw_without_rendering()  # limits and sizes are final now; the end labels need both
    for axes, labels in zip(curves, ends, strict=True):
        label_ends(axes, labels)
    return figure


def _draw_legends(
    figure: Figure, arms: Sequence[tuple[ArmCurves, str]], marks: Sequence[Mark], title: str | None
) -> None:
    """Put title and arms on top, kinds of lines and marks at the bottom left (stages stand at the right)."""
    names = [
        Line2D([], [], color=colour, linewidth=3.2 if index == 0 else 2.2, label=arm.name)
        for index, (arm, colour) in enumerate(arms)
    ]
    longest = max(len(arm.name) for arm, _ in arms)
    figure.legend(
        handles=names, loc="outside upper left", ncols=max(1, min(len(names), int(140 / (longest + 6)))),
        fontsize=11, title=title, alignment="left", title_fontproperties={"size": 15, "weight": "bold"},
        handlelength=1.8,
    )  # fmt: skip
    kinds = []
    if any(len(arm.val_loss) for arm, _ in arms) and any(len(arm.loss) for arm, _ in arms):
        kinds.append(Line2D([], [], color="#666666", linewidth=2.4, label="held-out"))
        kinds.append(
            Line2D([], [], color="#666666", linewidth=1.1, linestyle=TRAINING_DASHES, label="training")
        )
    for kind in dict.fromkeys(mark.kind for mark in marks):
        style = MARK_STYLES[kind]
        kinds.append(
            Line2D(
                [], [], color=style.colour, marker=style.form, linestyle="", markersize=7, label=style.name
            )
        )
    if kinds:
        figure.legend(
            handles=kinds, loc="outside lower left", ncols=min(len(kinds), 5), fontsize=9.5,
            columnspacing=1.4, handlelength=1.8,
        )  # fmt: skip


def _last_step(runs: Sequence[ArmCurves], events: Sequence[Event]) -> float:
    steps = [
        float(series.steps[-1])
        for arm in runs
        for series in (arm.loss, arm.val_loss, arm.val_acc)
        if len(series)
    ]
    steps += [float(step) for arm in runs for step, _ in arm.parameters]
    steps += [float(event.step) for event in events]
    return max([1.0, *steps])
