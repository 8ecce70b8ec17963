"""Does recycling dormant units keep a narrow net able to learn when its task shifts, and no more than that?

Nets of width 32 on streams of Fashion-MNIST batches, each seen once: every few hundred steps two labels swap
places. Arms see the same stream from the same weights: ``continue``, ``reset`` the net at each shift, and
``recycle`` by the rule of the policy ``expressivity`` (without growth), which is not told of shifts: dormancy
above .30 on a sampled step. On the second kind of stream pixels drift; there the rule must do no harm. The
figure is accuracy on each batch before it is trained on, in per cent. Rates and lengths were chosen on one
half of the training images with other seeds; figures are from the other half.
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

LR = 1e-2
STEPS = 250


def run(
    *,
    seeds: int = 8,
    num_tasks: int = 30,
    steps: int = STEPS,
    lr: float = LR,
    num_workers: int = 2,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Train all arms on all streams.

    Args:
        seeds: Streams of each kind.
        num_tasks: Tasks a stream.
        steps: Batches a task.
        lr: Of Adam, for every arm.
        num_workers: Processes; 0 runs everything in this one.
        quick: Two seeds and six tasks.
        out: Write every run to this JSON file.

    Returns:
        For each shift ``S`` of ``swap`` and ``drift`` and each arm ``A``: ``S_A`` (mean online accuracy in per
        cent) and ``S_A_dormancy`` (after the last step); ``S_recycle_over_continue`` and ``swap_recycle_over_reset``
        in points, with ``_low`` and ``_high``; ``drift_recycle_over_continue_abs``; ``S_recycled`` (layers a stream).

    Raises:
        DataNotFoundError: Fashion-MNIST is not there; the message says how to get it.
    """
    from esper.bench._shift_stream import Stream, one_thread, train_stream
    from esper.hosts import FashionData

    _ = FashionData(inputs="pixels").splits  # missing data are reported here, not from a worker
    if quick:
        seeds, num_tasks = min(seeds, 2), min(num_tasks, 6)
    shape: dict[str, Any] = {"lr": lr, "num_tasks": num_tasks, "steps": steps}
    streams = [
        Stream(arm, shift, seed, **shape)
        for seed in range(seeds)
        for shift, arms in (("swap", ("continue", "reset", "recycle")), ("drift", ("continue", "recycle")))
        for arm in arms
    ]
    rows = run_all(train_stream, streams, title="shift", num_workers=num_workers, prepare=one_thread)
    figures = _figures(rows)
    if out:
        options = {"seeds": seeds, **shape}
        write_record(out, benchmark="shift", options=options, figures=figures, runs=rows)
    return figures


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    by_arm: dict[tuple[str, str], dict[int, float]] = {}
    for shift, arm in dict.fromkeys((row["shift"], row["arm"]) for row in rows):
        members = [row for row in rows if (row["shift"], row["arm"]) == (shift, arm)]
        by_arm[shift, arm] = {row["seed"]: row["accuracy"] for row in members}
        figures[f"{shift}_{arm}"] = mean([row["accuracy"] for row in members])
        figures[f"{shift}_{arm}_dormancy"] = mean([row["late_dormancy"] for row in members])
        if arm == "recycle":
            figures[f"{shift}_recycled"] = mean([float(row["recycled"]) for row in members])
    for shift, arm in (("swap", "continue"), ("swap", "reset"), ("drift", "continue")):
        name = f"{shift}_recycle_over_{arm}"
        estimate = paired_difference(by_arm[shift, "recycle"], by_arm[shift, arm])
        assert estimate is not None
        figures[name] = estimate.mean
        if estimate.interval is not None:
            figures[f"{name}_low"], figures[f"{name}_high"] = estimate.interval
    figures["drift_recycle_over_continue_abs"] = abs(figures["drift_recycle_over_continue"])
    return figures
