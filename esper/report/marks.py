"""Marks of growth on the figure: forms on a rail above the loss, and fine lines through every panel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from matplotlib.transforms import ScaledTranslation, Transform

from esper.report.history import Mark, MarkKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MARK_STYLES", "MarkStyle", "draw_marks", "room_above"]


class MarkStyle(NamedTuple):
    """How one kind of mark looks."""

    form: str
    colour: str
    name: str


MARK_STYLES: dict[MarkKind, MarkStyle] = {
    "germinate": MarkStyle("^", "#0072B2", "germinated"),
    "fossilise": MarkStyle("D", "#08306B", "fossilised"),
    "cull": MarkStyle("X", "#D55E00", "culled"),
    "recycle": MarkStyle("o", "#009E73", "recycled"),
    "rollback": MarkStyle("v", "#000000", "rolled back"),
    "restart": MarkStyle(">", "#CC79A7", "trained afresh"),
}
RAIL_POINTS = 9.0  # the rail's height above the panel
LEVEL_POINTS = (16.0, 28.0)  # two rows for the words
LETTER = 0.0125  # width of a letter as a share of the panel's
MANY = 12  # marks; with more, words are left out and lines are only drawn for what germinates or is undone


def room_above(marks: Sequence[Mark]) -> float:
    """Points that the rail and its words need between the panel and its title."""
    return 6.0 if not marks else 44.0 if len(marks) <= MANY else 20.0


def draw_marks(loss: Axes, panels: Sequence[Axes], marks: Sequence[Mark], last: float) -> None:
    """Mark growth above the ``loss`` panel and by vertical lines in all ``panels``."""
    if not marks:
        return
    few = len(marks) <= MANY
    for step in sorted({mark.step for mark in marks if few or mark.kind != "fossilise"}):
        for axes in panels:
            axes.axvline(step, color="#888888", linewidth=0.8, alpha=0.9 if few else 0.45,
                         linestyle=(0, (1, 2)), zorder=0.6)  # fmt: skip
    rail = _raised(loss, RAIL_POINTS)
    loss.plot([0, last], [1, 1], color="#DDDDDD", linewidth=0.8, transform=rail, clip_on=False, zorder=1)
    for mark in marks:
        style = MARK_STYLES[mark.kind]
        loss.plot(
            [mark.step], [1], style.form, transform=rail, clip_on=False, color=style.colour, markersize=7.5,
            markeredgecolor="white", markeredgewidth=0.7, zorder=7 if mark.kind == "cull" else 6,
        )  # fmt: skip
    if few:
        _draw_words(loss, marks, last)


def _draw_words(axes: Axes, marks: Sequence[Mark], last: float) -> None:
    """Write over each mark that has room in one of two rows; a mark without room goes without words."""
    free_from = [-last, -last]
    for step, text in _words(marks):
        width = LETTER * last * (len(text) + 1)
        start = step - width if step + width > last else step
        row = next((row for row, free in enumerate(free_from) if start >= free), None)
        if row is None:
            continue
        axes.text(step, 1, text, transform=_raised(axes, LEVEL_POINTS[row]), fontsize=8.5, color="#333333",
                  ha="left" if start == step else "right", va="bottom", clip_on=False)  # fmt: skip
        free_from[row] = start + width


def _words(marks: Sequence[Mark]) -> Iterator[tuple[int, str]]:
    """Yield a text for each step where something germinated or was put back, like ``3 × widen 16``."""
    spoken = [mark for mark in marks if mark.kind in ("germinate", "recycle", "rollback", "restart")]
    for step, group in groupby(spoken, key=lambda mark: mark.step):
        labels = [mark.label for mark in group]
        first = labels[0]
        same = labels.count(first)
        text = f"{same} \N{MULTIPLICATION SIGN} {first}" if same > 1 else first
        yield step, text if same == len(labels) else f"{text} + {len(labels) - same} more"


def _raised(axes: Axes, points: float) -> Transform:
    """Steps across; upwards ``1`` is ``points`` above the panel, whatever its height."""
    return axes.get_xaxis_transform() + ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)
