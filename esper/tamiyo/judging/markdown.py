"""The judgement as Markdown, for a README."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.report.statistics import Estimate
from esper.tamiyo.judging.figures import ArmFigures, Board, Difference

__all__ = ["arms_table", "differences_table", "families_table", "interval"]


def arms_table(board: Board) -> str:
    """One row an arm, the best mean utility first."""
    rows = [(name, board.arm(name)) for name in board.arms]
    rows.sort(key=lambda row: -row[1].utility.mean)
    head = (
        "| arm | U (nats) | median U | loss | accuracy | parameters | FLOPs | time | idle | WAIT | fallback | failed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    )
    return "\n".join([*head, *(_arm(name, found) for name, found in rows)])


def differences_table(found: Sequence[tuple[str, Difference]]) -> str:
    """One row a comparison."""
    head = ("| comparison | mean (nats) | median | hosts better |", "|---|---|---|---|")
    rows = [f"| {label} | {interval(d.estimate)} | {d.median:+.3f} | {d.better:.0%} |" for label, d in found]
    return "\n".join([*head, *rows])


def families_table(board: Board, arms: Sequence[str]) -> str:
    """Mean and median utility of some arms on each family."""
    head = (f"| family | {' | '.join(arms)} |", f"|---|{'---|' * len(arms)}")
    rows = []
    for family in board.families:
        found = [board.arm(name, family) for name in arms]
        cells = " | ".join(f"{f.utility.mean:+.3f} ({f.median:+.3f})" for f in found)
        rows.append(f"| {family} | {cells} |")
    return "\n".join([*head, *rows])


def interval(estimate: Estimate) -> str:
    """A mean with its interval, in nats."""
    text = f"{estimate.mean:+.3f}"
    if estimate.interval is None:
        return text
    low, high = estimate.interval
    return f"{text} [{low:+.3f}, {high:+.3f}]"


def _arm(name: str, found: ArmFigures) -> str:
    cells = (
        name,
        interval(found.utility),
        f"{found.median:+.3f}",
        _number(found.loss, ".3f"),
        _number(found.accuracy, ".3f"),
        _number(found.parameters, ".2f"),
        _number(found.flops, ".3f"),
        _number(found.seconds, ".2f"),
        _number(found.idle, ".0%"),
        "" if found.waited is None else f"{found.waited:.0%}",
        "" if found.fell_back is None else f"{found.fell_back:.0%}",
        f"{found.failed} of {found.runs}",
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else ""
