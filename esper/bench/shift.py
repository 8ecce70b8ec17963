"""Does recycling dormant units keep a narrow net able to learn when its task shifts, and no more than that?

Nets of width 32 on streams of Fashion-MNIST batches, each seen once: every few hundred steps two labels swap
places. Arms see the same stream from the same weights: ``continue``, ``reset`` the net at each shift, and
``recycle`` by the rule of the policy ``expressivity`` (without growth), which is not told of shifts: dormancy
above .30 on a sampled step. On the second kind of stream pixels drift; there the rule must do no harm. The
figure is accuracy on each batch before it is trained on, in per cent. Rates and lengths were chosen on one
half of the training images with other seeds; figures are from the other half. At the rate reported units fall
asleep; that is not the best rate for continuing, which is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.report.statistics import mean, paired_difference

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Shift: recycling dormant units against continuing and against resetting"
TARGETS: dict[str, tuple[str, float]] = {
    "swap_recycle_over_continue": (">=", 1.5),
    "swap_recycle_over_reset": (">=", 10.0),
    "drift_recycle_over_continue_abs": ("<=", 0.2),
}

LR = 7e-3
BEST_LR = 3e-3
STEPS = 150


def run(
    *,
    seeds: int = 8,
    num_tasks: int = 30,
    steps: int = STEPS,
    lr: float = LR,
    best_lr: float = BEST_LR,
    num_workers: int = 2,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Train all arms on all streams.

    Args:
        seeds: Streams of each kind.
        num_tasks: Tasks a stream.
        steps: Batches a task.
        lr: Of Adam, for every arm; a rate at which units fall asleep.
        best_lr: Of Adam, for a second pair of arms: the rate that is best for continuing.
        num_workers: Processes; 0 runs everything in this one.
        quick: Two seeds and six tasks.
        out: Write every run to this JSON file.

    Returns:
        For each shift ``S`` of ``swap`` and ``drift`` and each arm ``A``: ``S_A`` (mean online accuracy in per
        cent) and ``S_A_dormancy`` (after the last step); ``S_recycle_over_continue`` and ``swap_recycle_over_reset``
        in points, with ``_low`` and ``_high``; ``drift_recycle_over_continue_abs``; ``S_recycled`` (layers a stream).
        With ``swap_best`` for ``swap`` at the best rate for continuing.

    Raises:
        DataNotFoundError: Fashion-MNIST is not there; the message says how to get it.
    """
    from esper.bench._shift_stream import Arm, Shift, Stream, one_thread, train_stream
    from esper.hosts import FashionData

    _ = FashionData(inputs="pixels").splits  # missing data are reported here, not from a worker
    if quick:
        seeds, num_tasks = min(seeds, 2), min(num_tasks, 6)
    shape: dict[str, Any] = {"num_tasks": num_tasks, "steps": steps}
    arms: tuple[tuple[Shift, Arm], ...] = (
        ("swap", "continue"), ("swap", "reset"), ("swap", "recycle"), ("drift", "continue"), ("drift", "recycle"),
    )  # fmt: skip
    streams = [Stream(arm, shift, seed, lr, **shape) for seed in range(seeds) for shift, arm in arms]
    careful: tuple[Arm, ...] = ("continue", "recycle")
    streams += [Stream(arm, "swap", seed, best_lr, **shape) for seed in range(seeds) for arm in careful]
    rows = run_all(train_stream, streams, title="shift", num_workers=num_workers, prepare=one_thread)
    figures = _figures(rows, num_first=seeds * len(arms))
    if out:
        options = {"seeds": seeds, "lr": lr, "best_lr": best_lr, **shape}
        write_record(out, benchmark="shift", options=options, figures=figures, runs=rows)
    return figures


def _figures(rows: Sequence[Mapping[str, Any]], num_first: int) -> dict[str, float]:
    """Turn runs into figures; those from ``num_first`` on are at the best rate."""
    figures: dict[str, float] = {}
    by_arm: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for index, row in enumerate(rows):
        shift = row["shift"] if index < num_first else f"{row['shift']}_best"
        by_arm.setdefault((shift, row["arm"]), []).append(row)
    for (shift, arm), members in by_arm.items():
        figures[f"{shift}_{arm}"] = mean([row["accuracy"] for row in members])
        figures[f"{shift}_{arm}_dormancy"] = mean([row["late_dormancy"] for row in members])
        if arm == "recycle":
            figures[f"{shift}_recycled"] = mean([float(row["recycled"]) for row in members])
    for shift, arm in (
        ("swap", "continue"),
        ("swap", "reset"),
        ("drift", "continue"),
        ("swap_best", "continue"),
    ):
        _difference(figures, f"{shift}_recycle_over_{arm}", by_arm[shift, "recycle"], by_arm[shift, arm])
    _difference(
        figures, "swap_recycle_over_best_continue", by_arm["swap", "recycle"], by_arm["swap_best", "continue"]
    )
    figures["drift_recycle_over_continue_abs"] = abs(figures["drift_recycle_over_continue"])
    return figures


def _difference(
    figures: dict[str, float], name: str, a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> None:
    """Put the accuracy of ``a`` minus that of ``b`` with its interval into ``figures``."""
    one, other = ({row["seed"]: row["accuracy"] for row in rows} for rows in (a, b))
    estimate = paired_difference(one, other)
    assert estimate is not None
    figures[name] = estimate.mean
    if estimate.interval is not None:
        figures[f"{name}_low"], figures[f"{name}_high"] = estimate.interval
