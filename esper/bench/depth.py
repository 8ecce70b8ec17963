"""Is it worth growing a GPT in depth? Two blocks to six by ``stack``, against six from the start, and two alone.

Character-level models of width 64 on tiny Shakespeare. All three spend the same training FLOPs, so the
shallower net takes more steps; each has its own learning rate, the best on the validation split at a quarter
of the budget. The loss reported is the test split's, in nats a character.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from esper.bench._record import write_record
from esper.bench._workers import run_all
from esper.errors import ConfigError
from esper.report.statistics import mean, paired_difference

if TYPE_CHECKING:
    from esper.bench._depth_arms import DepthRun

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Depth: a GPT grown from 2 to 6 blocks, 6 blocks from scratch, and 2 alone, at equal training FLOPs"
TARGETS: dict[str, tuple[str, float]] = {"grown_minus_deep": ("<=", -0.11)}
"""What was measured before (GROWTH.md §5, §8): -.11 to -.18 nats."""

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
_TUNING_SEED = 1_000


def run(
    *,
    seeds: int = 2,
    deep_steps: int = 600,
    batch_size: int = 12,
    rates: Sequence[float] = RATES,
    depths: Sequence[int] = (2, 6),
    num_workers: int = 2,
    quick: bool = False,
    out: str = "",
) -> dict[str, float]:
    """Tune and train the three arms.

    Args:
        seeds: Runs of each arm.
        deep_steps: Budget, in steps of the deep net.
        batch_size: Windows a step.
        rates: Learning rates to choose from.
        depths: Blocks of the shallow and the deep net.
        num_workers: Processes; 0 runs everything in this one.
        quick: A tenth of the budget, two rates, one seed.
        out: Write every run to this JSON file.

    Returns:
        For each arm ``A`` of ``shallow``, ``deep`` and ``grown``: ``A_loss`` (test, nats), ``A_lr``, ``A_steps``,
        ``A_parameters``, ``A_training_flops``, ``A_wall_time_s``; ``grown_minus_deep`` and ``grown_minus_shallow``
        in nats with ``_low`` and ``_high`` where there are two seeds or more.

    Raises:
        ConfigError: Depths that do not grow, or no rate.
        DataNotFoundError: Tiny Shakespeare is not there; the message says how to get it.
    """
    from esper.bench._depth_arms import Arm, DepthRun, quiet_worker, train_depth
    from esper.hosts import ShakespeareData

    if len(depths) != 2 or not 1 <= depths[0] < depths[1] or not rates:
        raise ConfigError(f"depth needs two growing depths and a rate, got depths={depths}, rates={rates}")
    _ = ShakespeareData().splits  # missing data are reported here, not from a worker
    if quick:
        seeds, deep_steps, rates = 1, max(1, deep_steps // 10), tuple(rates)[:2]
    trials = [
        DepthRun(
            arm, _TUNING_SEED, rate, max(1, deep_steps // 4), (depths[0], depths[1]), batch_size=batch_size, split="val"
        )
        for arm in get_args(Arm)
        for rate in rates
    ]  # fmt: skip
    tuned = run_all(train_depth, trials, title="tune", num_workers=num_workers, prepare=quiet_worker)
    runs = [
        replace(_best(trials, tuned, arm), seed=seed, deep_steps=deep_steps, split="test")
        for seed in range(seeds)
        for arm in get_args(Arm)
    ]
    rows = run_all(train_depth, runs, title="train", num_workers=num_workers, prepare=quiet_worker)
    figures = _figures(rows)
    if out:
        options = {"seeds": seeds, "deep_steps": deep_steps, "batch_size": batch_size, "rates": list(rates)}
        write_record(out, benchmark="depth", options=options, figures=figures, runs=[*tuned, *rows])
    return figures


def _best(trials: Sequence[DepthRun], tuned: Sequence[Mapping[str, Any]], arm: str) -> DepthRun:
    """The trial of ``arm`` with the lowest validation loss."""
    own = [(row["loss"], index) for index, row in enumerate(tuned) if row["arm"] == arm]
    return trials[min(own)[1]]


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    losses: dict[str, dict[int, float]] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        members = [row for row in rows if row["arm"] == arm]
        losses[arm] = {row["seed"]: row["loss"] for row in members}
        for name in ("loss", "lr", "steps", "parameters", "training_flops", "wall_time_s"):
            figures[f"{arm}_{name}"] = mean([float(row[name]) for row in members])
    for other in ("deep", "shallow"):
        estimate = paired_difference(losses["grown"], losses[other])
        assert estimate is not None
        figures[f"grown_minus_{other}"] = estimate.mean
        if estimate.interval is not None:
            low, high = estimate.interval
            figures[f"grown_minus_{other}_low"], figures[f"grown_minus_{other}_high"] = low, high
    return figures
