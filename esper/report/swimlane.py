"""The lanes of the figure: one seed a lane, one coloured segment a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from esper.messages import Stage
from esper.report.history import SeedHistory, Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["STAGE_COLOURS", "draw_swimlane", "swimlane_height"]

# Lightness falls from stage to stage, so that the order survives grey printing.
STAGE_COLOURS: dict[Stage, str] = {
    "germinated": "#D9D9D9",
    "training": "#F0E442",
    "blending": "#E69F00",
    "holding": "#56B4E9",
    "fossilized": "#0072B2",
}
STAGE_NAMES: dict[Stage, str] = {
    "germinated": "germinated",
    "training": "training (isolated)",
    "blending": "blending",
    "holding": "holding",
    "fossilized": "fossilised",
}
MAX_LABELLED = 48  # lanes; beyond that a label would be smaller than can be read


def swimlane_height(num_seeds: int) -> float:
    """Inches that the lanes of so many seeds want; 0 without seeds."""
    if num_seeds == 0:
        return 0.0
    pitch = 0.52 if num_seeds <= 6 else 0.4 if num_seeds <= 12 else 0.3 if num_seeds <= MAX_LABELLED else 0.1
    return min(max(num_seeds * pitch, 0.8), 16.0)


def draw_swimlane(axes: Axes, histories: Sequence[SeedHistory], last: float) -> None:
    """Draw one lane a seed, the first one on top, with the legend of stages under the axis.

    Args:
        axes: an empty panel.
        histories: at least one seed.
        last: the last step of the run, where open segments end.
    """
    labelled = len(histories) <= MAX_LABELLED
    height = 0.34 if labelled else 0.8  # of a lane; the rest is for the words above the bar
    font = 9.0 if len(histories) <= 12 else 7.5 if len(histories) <= 24 else 6.5
    mark = 7.0 if len(histories) <= 12 else 5.0
    for lane, seed in enumerate(histories):
        centre = lane + 0.5 + (0.22 if labelled else 0.0)
        for segment in seed.segments:
            _draw_segment(axes, segment, centre, height, last)
        if seed.culled_at is not None:
            _draw_end(axes, seed.culled_at, centre, "X", "#D55E00", mark + 2)
        elif seed.fossilized_at is not None:
            _draw_end(axes, seed.fossilized_at, centre, "D", "#08306B", mark)
        if labelled and seed.segments:
            start = seed.segments[0].start
            late = start > 0.5 * last
            axes.text(last if late else start, centre - 0.24, seed.label, ha="right" if late else "left",
                      va="bottom", fontsize=font, color="#222222", clip_on=False, zorder=4)  # fmt: skip
    axes.set_ylim(len(histories) + 0.15, 0)
    axes.yaxis.set_major_locator(NullLocator())
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(f"Seeds ({len(histories)})")
    _draw_legend(axes, histories)


def _draw_segment(axes: Axes, segment: Segment, centre: float, height: float, last: float) -> None:
    end = last if segment.end is None else segment.end
    if end > segment.start:
        axes.barh(
            centre, end - segment.start, left=segment.start, height=height, linewidth=0,
            color=STAGE_COLOURS[segment.stage], zorder=3,
        )  # fmt: skip
    elif segment.end is None:  # entered at the very last step: a bar without length would not be seen
        axes.plot([segment.start], [centre], "|", color=STAGE_COLOURS[segment.stage], markersize=9,
                  markeredgewidth=2.5, clip_on=False, zorder=4)  # fmt: skip


def _draw_end(axes: Axes, step: int, centre: float, form: str, colour: str, size: float) -> None:
    axes.plot(
        [step],
        [centre],
        form,
        color=colour,
        markersize=size,
        markeredgecolor="white",
        clip_on=False,
        zorder=5,
    )


def _draw_legend(axes: Axes, histories: Sequence[SeedHistory]) -> None:
    seen = {segment.stage for seed in histories for segment in seed.segments}
    handles: list[Patch | Line2D] = [
        Patch(color=colour, label=STAGE_NAMES[stage])
        for stage, colour in STAGE_COLOURS.items()
        if stage in seen
    ]
    if any(seed.culled_at is not None for seed in histories):
        handles.append(
            Line2D([], [], color="#D55E00", marker="X", linestyle="", markersize=8, label="culled")
        )
    axes.figure.legend(
        handles=handles, loc="outside lower right", ncols=len(handles), fontsize=9.5, columnspacing=1.4,
        handlelength=1.4,
    )  # fmt: skip
