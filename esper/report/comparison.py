"""Many runs in one table, paired by seed (``esper compare RUN...``)."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from esper.report import units
from esper.report.events import one_line
from esper.report.folder import SUMMARY, find_runs
from esper.report.statistics import Estimate, bootstrap_mean, mean, paired_difference
from esper.report.summary import ArmSummary, RunSummary, read_summary

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["ComparisonRow", "compare", "compare_arms", "comparison_rows"]

BASELINES = ("host", "growth (off)")
"""Arms that others are measured against, the first one present in an experiment is taken."""


@dataclass(frozen=True)
class ComparisonRow:
    """One arm over its seeds. ``*_gain`` are paired differences to ``baseline``: better is positive
    for accuracy, negative for loss; None for the baseline itself or where no seed is shared.
    """

    experiment: str
    arm: str
    seeds: tuple[int, ...]
    accuracy: Estimate | None
    loss: Estimate | None
    parameters: float
    training_flops: float | None
    wall_time_s: float | None
    baseline: str | None = None
    accuracy_gain: Estimate | None = None
    loss_gain: Estimate | None = None


def compare(paths: Sequence[str | os.PathLike[str]]) -> Table:
    """Return a table of all arms of all runs: best first, means with 95 % bootstrap intervals.

    Args:
        paths: run folders, or sweep folders holding them.

    Raises:
        ConfigError: a path is no run folder.
        MessageError: a ``summary.json`` is damaged.
    """
    return comparison_rows(compare_arms(read_summary(run / SUMMARY) for run in find_runs(paths)))


def compare_arms(runs: Iterable[RunSummary]) -> list[ComparisonRow]:
    """Gather equal arms of several runs, pair them by seed, and sort: by experiment, then best first.

    A control that several runs of one seed repeat counts once (its figures are averaged). A growing arm
    whose config differs beyond the seed gets a row for each config.
    """
    rows: list[ComparisonRow] = []
    by_experiment: dict[str, dict[str, dict[int, list[ArmSummary]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    runs = list(runs)
    labels = _labels(runs)
    for run in runs:
        for arm in run.arms:
            label = labels[run.experiment, arm.name, arm.policy, run.config_hash]
            by_experiment[run.experiment][label][run.seed].append(arm)
    for experiment in sorted(by_experiment):
        arms = by_experiment[experiment]
        baseline = next((name for name in BASELINES if name in arms), None)
        found = [_row(experiment, label, by_seed, baseline, arms) for label, by_seed in arms.items()]
        rows.extend(sorted(found, key=_rank))
    return rows


def comparison_rows(rows: Sequence[ComparisonRow]) -> Table:
    """Return the rows as a table; columns that say nothing (one seed, no baseline) are left out."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    several = any(len(row.seeds) > 1 for row in rows)
    experiments = len({row.experiment for row in rows}) > 1
    baselines = sorted({row.baseline for row in rows if row.baseline})
    gains = any(row.accuracy_gain or row.loss_gain for row in rows)
    has_accuracy = any(row.accuracy for row in rows)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
        caption=_caption(several, gains, baselines),
        caption_justify="left",
    )
    columns = [  # header, least width (an interval may break at its comma, a number may not), shown
        ("experiment", 10, experiments), ("arm", 10, True), ("n", 2, several), ("accuracy", 8, has_accuracy),
        ("loss", 7, True), ("Δ accuracy", 8, gains and has_accuracy), ("Δ loss", 8, gains),
        ("params", 6, True), ("FLOPs", 6, True), ("time", 6, True),
    ]  # fmt: skip
    for name, width, shown in columns:
        if shown:
            side: Literal["left", "right"] = "left" if name in ("experiment", "arm") else "right"
            table.add_column(name, justify=side, overflow="fold", min_width=width)
    for row in rows:
        cells = [
            row.experiment, row.arm, str(len(row.seeds)), _accuracy(row.accuracy), _loss(row.loss),
            _gain(row.accuracy_gain, 100, 1, " pt"), _gain(row.loss_gain, 1, 3, ""),
            units.scaled(row.parameters),
            units.scaled(row.training_flops),
            units.duration(row.wall_time_s),
        ]  # fmt: skip
        shown_cells = [cell for cell, (_, _, shown) in zip(cells, columns, strict=True) if shown]
        table.add_row(*(Text("\n".join(map(one_line, cell.split("\n")))) for cell in shown_cells))
    return table


def _labels(runs: Sequence[RunSummary]) -> dict[tuple[str, str, str, str], str]:
    """Name every (experiment, arm, policy, config); the config's hash shows only where it is needed."""
    configs: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for run in runs:
        for arm in run.arms:
            configs[run.experiment, arm.name, arm.policy].add(run.config_hash)
    labels: dict[tuple[str, str, str, str], str] = {}
    for (experiment, name, policy), hashes in configs.items():
        for digest in hashes:
            label = f"{name} ({policy})" if policy else name
            if policy and len(hashes) > 1:
                label += f"\n#{digest[:4]}"
            labels[experiment, name, policy, digest] = label
    return labels


def _row(
    experiment: str,
    label: str,
    by_seed: dict[int, list[ArmSummary]],
    baseline: str | None,
    arms: dict[str, dict[int, list[ArmSummary]]],
) -> ComparisonRow:
    accuracy, loss = _by_seed(by_seed, "accuracy"), _by_seed(by_seed, "loss")
    flops, seconds = _by_seed(by_seed, "training_flops"), _by_seed(by_seed, "wall_time_s")
    compared = baseline is not None and label != baseline
    return ComparisonRow(
        experiment=experiment,
        arm=label,
        seeds=tuple(sorted(by_seed)),
        accuracy=bootstrap_mean(list(accuracy.values())) if accuracy else None,
        loss=bootstrap_mean(list(loss.values())) if loss else None,
        parameters=mean(list(_by_seed(by_seed, "parameters").values())),
        training_flops=mean(list(flops.values())) if flops else None,
        wall_time_s=mean(list(seconds.values())) if seconds else None,
        baseline=baseline if compared else None,
        accuracy_gain=paired_difference(accuracy, _by_seed(arms[baseline], "accuracy"))
        if compared and baseline
        else None,
        loss_gain=paired_difference(loss, _by_seed(arms[baseline], "loss"))
        if compared and baseline
        else None,
    )


def _by_seed(arms: dict[int, list[ArmSummary]], figure: str) -> dict[int, float]:
    values: dict[int, float] = {}
    for seed, repeats in sorted(arms.items()):
        known = [float(value) for arm in repeats if (value := getattr(arm, figure)) is not None]
        if known:
            values[seed] = mean(known)
    return values


def _rank(row: ComparisonRow) -> tuple[float, float, str]:
    """Sort key: highest accuracy, then lowest loss, then name; what is unknown or diverged comes last."""

    def last_if_unknown(value: float | None) -> float:
        return math.inf if value is None or math.isnan(value) else value

    accuracy = None if row.accuracy is None else -row.accuracy.mean
    loss = None if row.loss is None else row.loss.mean
    return last_if_unknown(accuracy), last_if_unknown(loss), row.arm


def _accuracy(estimate: Estimate | None) -> str:
    if estimate is None:
        return units.DASH
    if estimate.interval is None:
        return units.percent(estimate.mean)
    low, high = estimate.interval
    return f"{units.percent(estimate.mean)}\n[{100 * low:.1f}, {100 * high:.1f}]"


def _loss(estimate: Estimate | None) -> str:
    if estimate is None:
        return units.DASH
    if estimate.interval is None:
        return units.loss(estimate.mean)
    low, high = estimate.interval
    return f"{units.loss(estimate.mean)}\n[{low:.3f}, {high:.3f}]"


def _gain(estimate: Estimate | None, scale: float, digits: int, unit: str) -> str:
    if estimate is None:
        return units.DASH
    text = f"{scale * estimate.mean:+.{digits}f}{unit}"
    if estimate.interval is not None:
        low, high = (f"{scale * bound:+.{digits}f}" for bound in estimate.interval)
        text += f"\n[{low}, {high}]"
    return text


def _caption(several: bool, gains: bool, baselines: list[str]) -> str:
    parts = ["n: seeds; brackets: 95 % bootstrap interval over them"] if several else []
    if gains:
        parts.append(f"Δ: against {', '.join(baselines)}, paired by seed")
    parts.append("FLOPs: of training; time: of the training loop")
    return "\n".join(parts)
