"""The panels of curves: loss, held-out accuracy and parameters of every arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from esper.report import units
from esper.report.metrics import ArmCurves, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TRAINING_DASHES", "EndLabel", "draw_accuracy", "draw_loss", "draw_parameters", "label_ends"]

Arm = tuple[ArmCurves, str]
"""An arm and its colour; the first arm of a list is the growing one."""

EndLabel = tuple[float, str, str]
"""A height in data units, a text and a colour."""

TRAINING_DASHES = (0, (4, 1.6))
SMOOTHED_FROM = 80  # points; a shorter training curve is drawn as it is


def draw_loss(axes: Axes, arms: Sequence[Arm], room_above: float) -> list[EndLabel]:
    """Draw training loss (dashed, smoothed over a faint raw trace) and held-out loss (solid).

    ``room_above`` is in points, between panel and title, for the marks of growth.
    """
    axes.set_title("Loss", pad=room_above)
    ends, training, held_out = [], [], []
    for index, (arm, colour) in _back_to_front(arms):
        smooth = _smoothed(arm.loss)
        if len(smooth) < len(arm.loss) or len(arm.loss) > SMOOTHED_FROM:
            axes.plot(arm.loss.steps, arm.loss.values, color=colour, alpha=0.12, linewidth=0.6, zorder=1.5)
        axes.plot(
            smooth.steps, smooth.values, color=colour, linewidth=1.1, linestyle=TRAINING_DASHES, alpha=0.85,
            marker="." if len(smooth) == 1 else "", zorder=2.5 - 0.01 * index,
        )  # fmt: skip
        _plot_held_out(axes, arm.val_loss, colour, index)
        training.append(smooth.values)
        held_out.append(arm.val_loss.values)
        final = arm.val_loss.last if len(arm.val_loss) else smooth.last
        if final is not None:
            ends.append((final, units.loss(final), colour))
    _scale_loss(axes, np.concatenate(training), np.concatenate(held_out))
    return ends


def draw_accuracy(axes: Axes, arms: Sequence[Arm]) -> list[EndLabel]:
    """Draw held-out accuracy; the first climb is left out of sight where it would flatten the rest."""
    axes.set_title("Held-out accuracy")
    ends = []
    for index, (arm, colour) in _back_to_front(arms):
        _plot_held_out(axes, arm.val_acc, colour, index)
        if arm.val_acc.last is not None:
            ends.append((arm.val_acc.last, units.percent(arm.val_acc.last), colour))
    values = np.concatenate([arm.val_acc.values for arm, _ in arms])
    values = values[np.isfinite(values)]
    if len(values):
        low, high = (
            float(np.quantile(values, 0.12)) if len(values) >= 12 else float(values.min()),
            values.max(),
        )
        margin = max(0.06 * (high - low), 0.005)
        axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(100 * value, 2):g} %"))
    return ends


def draw_parameters(axes: Axes, arms: Sequence[Arm], last: float) -> list[EndLabel]:
    """Draw the number of parameters as steps; arms that do not grow are dashed lines of reference."""
    axes.set_title("Parameters")
    ends = []
    for index, (arm, colour) in _back_to_front(arms):
        if not arm.parameters:
            continue
        steps, counts = zip(*arm.parameters, strict=True)
        axes.step(
            [*steps, last], [*counts, counts[-1]], where="post", color=colour,
            linewidth=2.8 if index == 0 else 1.7, linestyle="-" if index == 0 else (0, (6, 2)),
            solid_joinstyle="miter", zorder=3 - 0.01 * index,
        )  # fmt: skip
        ends.append((float(counts[-1]), units.scaled(counts[-1]), colour))
    highest = max((count for arm, _ in arms for _, count in arm.parameters), default=1)
    axes.set_ylim(0, 1.12 * highest)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    return ends


def label_ends(axes: Axes, ends: Sequence[EndLabel]) -> None:
    """Write each arm's last value right of the panel in its colour, moved apart where two would touch.

    The axis limits and the layout must be final.
    """
    ends = [end for end in ends if np.isfinite(end[0])]
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform((0.0, value))[1]) for value, _, _ in ends]
    panel_points = axes.get_window_extent().height * 72 / axes.figure.dpi
    order = [int(i) for i in np.argsort(heights, kind="stable")]
    for position, index in zip(_spread([heights[i] for i in order], 12.5 / panel_points), order, strict=True):
        _, text, colour = ends[index]
        axes.annotate(
            text, (1.0, position), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points",
            color=colour, fontsize=9.5, fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip


def _back_to_front(arms: Sequence[Arm]) -> list[tuple[int, Arm]]:
    return list(reversed(list(enumerate(arms))))


def _plot_held_out(axes: Axes, series: Series, colour: str, index: int) -> None:
    if len(series):
        axes.plot(
            series.steps, series.values, color=colour, linewidth=2.8 if index == 0 else 1.9,
            marker="o" if len(series) <= 2 else "", markersize=5, solid_capstyle="round",
            zorder=4 - 0.01 * index,
        )  # fmt: skip


def _scale_loss(axes: Axes, training: NDArray[np.float64], held_out: NDArray[np.float64]) -> None:
    """Take a logarithmic axis where the loss spans more than a factor of eight, else a linear one.

    A training loss on its way to zero leaves the panel at the bottom, a decade under the held-out loss, which
    is what arms are compared by and would be pressed flat.
    """
    values = np.concatenate([training, held_out])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, "no finite loss", transform=axes.transAxes, ha="center", color="#777777")
        return
    low, high = float(values.min()), float(values.max())
    if low > 0 and high / low > 8:
        finite = held_out[np.isfinite(held_out)]
        if len(finite):
            low = max(low, float(finite.min()) / 10)
        low, high = low / 1.2, high * 1.2
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        if high / low < 1000:  # else matplotlib's powers of ten do
            ticks = [factor * 10.0**power for power in range(-12, 13) for factor in (1, 2, 5)]
            axes.set_yticks([tick for tick in ticks if low <= tick <= high])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif high > low:
        margin = 0.06 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move ascending positions apart to at least ``gap``, groups staying centred on where they belong."""
    groups: list[list[float]] = []  # each: the heights wanted by its members
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _top(groups[-2], gap) + gap > _bottom(groups[-1], gap):
            last = groups.pop()
            groups[-1].extend(last)
    return [_bottom(group, gap) + gap * i for group in groups for i in range(len(group))]


def _bottom(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def _smoothed(series: Series) -> Series:
    """Return a centred running mean over 4 % of the points, of the finite ones; short series stay."""
    if len(series) <= SMOOTHED_FROM:
        return series
    finite = np.isfinite(series.values)
    steps, values = series.steps[finite], series.values[finite]
    half = len(values) // 50
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - half, 0)
    # at the start the window stays centred by shrinking, so that it does not lag where the loss falls fast
    high = np.minimum(index + np.minimum(half, index) + 1, len(values))
    return Series(steps, (total[high] - total[low]) / (high - low))


def _tick(value: float) -> str:
    text = units.scaled(value)
    digits, _, prefix = text.partition(" ")
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return f"{digits} {prefix}".rstrip()
