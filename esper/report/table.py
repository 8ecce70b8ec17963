"""The table at the end of a run: one row an arm, for the terminal, for plain text and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from esper.report import units
from esper.report.events import one_line
from esper.report.summary import ArmSummary

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_markdown", "comparison_table", "comparison_text", "render_text"]

_Cell = Callable[[ArmSummary], str]

_COLUMNS: tuple[tuple[str, _Cell], ...] = (
    ("accuracy", lambda arm: units.percent(arm.accuracy)),
    ("loss", lambda arm: units.loss(arm.loss)),
    ("parameters", lambda arm: _parameters(arm)),
    ("training\nFLOPs", lambda arm: units.scaled(arm.training_flops)),
    ("wall\ntime", lambda arm: units.duration(arm.wall_time_s)),
)
_SEED_COLUMNS: tuple[tuple[str, _Cell], ...] = (
    ("germinated", lambda arm: units.count(arm.germinated)),
    ("fossilised", lambda arm: units.count(arm.fossilized)),
    ("culled", lambda arm: units.count(arm.culled)),
)


def comparison_table(arms: Sequence[ArmSummary], *, title: str | None = None) -> Table:
    """Return the arms side by side; fits 80 columns. The best accuracy and the lowest loss are bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title and Text(one_line(title), style="bold"), caption=_caption(arms), box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1), pad_edge=False, title_justify="left", caption_justify="left",
    )  # fmt: skip
    table.add_column("arm", overflow="fold")
    for header, _ in _COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("seeds\nG / F / C", justify="right", no_wrap=True)
    best = _best(arms)
    for index, arm in enumerate(arms):
        cells = [
            Text(cell(arm), style="bold" if (header, index) in best else "") for header, cell in _COLUMNS
        ]
        table.add_row(Text(_name(arm, "\n")), *cells, Text(_seed_cell(arm)))
    return table


def comparison_text(arms: Sequence[ArmSummary], *, title: str | None = None, width: int | None = None) -> str:
    """Return :func:`comparison_table` as text without control codes."""
    return render_text(comparison_table(arms, title=title), width=width)


def comparison_markdown(arms: Sequence[ArmSummary]) -> str:
    """Return the arms as a Markdown table, for a README or an issue."""
    columns = _COLUMNS + _SEED_COLUMNS
    headers = ["arm", *(header.replace("\n", " ") for header, _ in columns)]
    lines = [headers, [":--", *["--:"] * len(columns)]]
    for arm in arms:
        lines.append([_name(arm).replace("|", "\\|"), *(cell(arm).replace("\n", " ") for _, cell in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def render_text(table: Table, *, width: int | None = None) -> str:
    """Return a rich table as plain text, lines stripped at their ends, wrapped to ``width`` if given."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(file=StringIO(), width=width or 1000, force_terminal=False, color_system=None)
    if width is None:
        console.width = Measurement.get(console, console.options, table).maximum
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n") + "\n"


def _name(arm: ArmSummary, separator: str = " ") -> str:
    return one_line(arm.name) + (f"{separator}({one_line(arm.policy)})" if arm.policy else "")


def _partly_frozen(arm: ArmSummary) -> bool:
    return arm.trainable_parameters is not None and arm.trainable_parameters < arm.parameters


def _parameters(arm: ArmSummary) -> str:
    """All parameters; under those that are trained where some are frozen."""
    every = units.count(arm.parameters)
    return f"{units.count(arm.trainable_parameters)}\nof {every}" if _partly_frozen(arm) else every


def _seed_cell(arm: ArmSummary) -> str:
    if arm.germinated is None and arm.fossilized is None and arm.culled is None:
        return units.DASH
    return " / ".join(cell(arm) for _, cell in _SEED_COLUMNS)


def _caption(arms: Sequence[ArmSummary]) -> str | None:
    splits = sorted({arm.split for arm in arms if arm.accuracy is not None or arm.loss is not None})
    parts = [f"accuracy and loss on the split: {', '.join(splits)}"] if splits else []
    if any(_partly_frozen(arm) for arm in arms):
        parts.append("parameters: trained, of all")
    if any(_seed_cell(arm) != units.DASH for arm in arms):
        parts.append("seeds: G germinated, F fossilised, C culled")
    return "\n".join(parts) or None


def _best(arms: Sequence[ArmSummary]) -> set[tuple[str, int]]:
    """Return (column, row) of the best figures; ties are all best, and one arm alone is not marked."""
    best: set[tuple[str, int]] = set()
    for header, values, pick in (
        ("accuracy", [arm.accuracy for arm in arms], max),
        ("loss", [arm.loss for arm in arms], min),
    ):
        known = {i: value for i, value in enumerate(values) if value is not None and math.isfinite(value)}
        if len(known) > 1:
            top = pick(known.values())
            best |= {(header, index) for index, value in known.items() if value == top}
    return best
