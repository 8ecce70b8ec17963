"""A run folder on disk: find its parts, and draw its figure and table again (``esper report RUN``).

Layout, with the names that ``esper train`` writes::

    RUN/summary.json     result of every arm, and where each arm's metrics are
    RUN/growth.jsonl     events of the growing arm
    RUN/metrics.csv      its curves; controls name theirs in summary.json, e.g. controls/host/metrics.csv
    RUN/growth.png       drawn from the three above
    RUN/experiences.sqlite  decisions and what came of them; the journal may name a store elsewhere

A run that was killed has no summary; it is drawn from what it left.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper.errors import ConfigError
from esper.messages import Event
from esper.report.history import parameter_curve
from esper.report.journal import last_run, read_journal
from esper.report.metrics import EMPTY, ArmCurves, Series, find_metric, read_metrics
from esper.report.summary import ArmSummary, RunSummary, read_summary

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "FIGURE", "JOURNAL", "METRICS", "SUMMARY", "RunReport", "arm_curves", "find_runs", "report", "run_curves",
]  # fmt: skip

SUMMARY, JOURNAL, METRICS, FIGURE = "summary.json", "growth.jsonl", "metrics.csv", "growth.png"


@dataclass(frozen=True)
class RunReport:
    """What :func:`report` made; ``summary`` and ``table`` are None for a run that never ended.

    ``rewards`` is None unless the run has kept experiences that tell something.
    """

    figure: Path
    summary: RunSummary | None
    table: Table | None
    rewards: Table | None = None


def report(path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> RunReport:
    """Draw ``growth.png`` again from a run folder's files, and return it with the table.

    Args:
        path: the run folder.
        out: where to put the figure instead; the suffix chooses the format (png, svg, pdf).

    Raises:
        ConfigError: ``path`` is no run folder.
        MessageError: one of its files is damaged.
        DataFormatError: the store of its experiences is.
    """
    from esper.report.figure import growth_figure
    from esper.report.rewards import find_store, reward_table
    from esper.report.table import comparison_table

    folder = _require_run(path)
    summary = read_summary(folder / SUMMARY) if (folder / SUMMARY).exists() else None
    events = last_run(read_journal(folder / JOURNAL)) if (folder / JOURNAL).exists() else []
    arms = run_curves(folder, summary, events)
    title = f"{summary.experiment}, seed {summary.seed}" if summary else f"{folder.name} (not finished)"
    figure = growth_figure(arms, events, Path(out) if out else folder / FIGURE, title=title)
    table = comparison_table(summary.arms, title=title) if summary else None
    store = find_store(folder, events)
    return RunReport(figure, summary, table, None if store is None else reward_table(store))


def run_curves(folder: Path, summary: RunSummary | None, events: Sequence[Event]) -> list[ArmCurves]:
    """Return the curves of every arm of a run folder, the growing one first."""
    if summary is None:
        return [arm_curves("growth", folder / METRICS, parameter_curve(events))]
    arms = []
    for index, arm in enumerate(summary.arms):
        parameters = _parameters(arm, events if index == 0 else ())
        arms.append(arm_curves(arm.name, folder / arm.metrics if arm.metrics else None, parameters))
    return arms


def arm_curves(name: str, metrics: Path | None, parameters: Sequence[tuple[float, int]] = ()) -> ArmCurves:
    """Return one arm's curves from its ``metrics.csv``; without the file there are only parameters."""
    columns = read_metrics(metrics) if metrics is not None and metrics.exists() else {}

    def series(column: str | None) -> Series:
        return EMPTY if column is None else columns[column]

    return ArmCurves(
        name,
        loss=series(find_metric(columns, "train_loss")),
        val_loss=series(find_metric(columns, "val_loss")),
        val_acc=series(find_metric(columns, "val_acc")),
        parameters=parameters,
    )


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the finished runs among ``paths``; a sweep's folder stands for the runs inside it.

    Raises:
        ConfigError: a path is neither, with what was found there.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if (path / SUMMARY).is_file():
            found.append(path)
            continue
        children = sorted(child.parent for child in path.glob(f"*/{SUMMARY}")) if path.is_dir() else []
        if not children:
            raise ConfigError(
                f"expected a run folder with {SUMMARY} in it, or a folder of such folders, at {path}; "
                f"{_what_is(path)}; give the folder that `esper train` named at its end"
            )
        found.extend(children)
    unique: dict[Path, Path] = {}
    for path in found:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _require_run(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not any((folder / name).is_file() for name in (SUMMARY, JOURNAL, METRICS)):
        raise ConfigError(
            f"expected a run folder with {SUMMARY}, {JOURNAL} or {METRICS} in it at {folder}; "
            f"{_what_is(folder)}; give the folder that `esper train` named at its end"
        )
    return folder


def _parameters(arm: ArmSummary, events: Sequence[Event]) -> list[tuple[float, int]]:
    initial = arm.parameters if arm.initial_parameters is None else arm.initial_parameters
    curve = parameter_curve(events, initial)
    if curve[-1][1] != arm.parameters and arm.steps:
        curve.append((arm.steps, arm.parameters))
    return curve


def _what_is(path: Path) -> str:
    if not path.exists():
        return "nothing is there"
    if not path.is_dir():
        return "it is a file"
    names = sorted(child.name for child in path.iterdir())
    return f"it holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "it is empty"
