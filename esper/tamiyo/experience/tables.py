"""What a store holds, for people: a row a policy, and which parts of a reward foretell the end of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper.report import units
from esper.report.events import one_line
from esper.tamiyo.experience.store import ExperienceStore, PolicyCount
from esper.tamiyo.rewards.config import COMPONENTS, HORIZONS
from esper.tamiyo.rewards.correlation import ComponentCorrelation, correlations

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["correlation_table", "policy_table", "reward_correlations"]


def policy_table(counts: Sequence[PolicyCount], *, title: str | None = None) -> Table:
    """Return a row for each policy and version."""
    table = _table(title, "rewards: means over those with a reward; waiting earns 0 by definition")
    table.add_column("policy", overflow="fold")
    for header in ("runs", "decisions", "waits", "refused", "rewarded", "mean\nreward", "of\nadaptations"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in counts:
        name = one_line(f"{row.policy} {row.version}".strip())
        table.add_row(
            _text(name), units.count(row.runs), units.count(row.decisions), units.percent(row.waits / row.decisions),
            units.count(row.refused), units.count(row.rewarded), _signed(row.mean_reward),
            _signed(row.mean_reward_of_adaptations),
        )  # fmt: skip
    return table


def reward_correlations(store: ExperienceStore) -> list[ComponentCorrelation]:
    """Correlate the rewards of a store, over all its runs, with how the runs ended."""
    return correlations(
        (e.decision.run_id, e.outcome.reward)
        for e in store.iterate(rewarded=True)
        if e.outcome is not None and e.outcome.reward is not None
    )


def correlation_table(found: Sequence[ComponentCorrelation], *, title: str | None = None) -> Table:
    """Return a row for each component, a column for each horizon: rank correlation with its interval."""
    counted = {(c.component, c.horizon): c for c in found}
    most = max(found, key=lambda c: c.count)
    table = _table(
        title,
        f"Spearman's rank correlation with the utility at the end of the run, with its 95 % bootstrap interval, over "
        f"{most.count:,} adaptations of {most.num_runs:,} runs; {units.DASH}: never differs",
    )
    table.add_column("component")
    for horizon in HORIZONS:
        table.add_column(horizon, justify="right", no_wrap=True)
    for component in (*COMPONENTS, "total"):
        table.add_row(component, *(_cell(counted[component, horizon]) for horizon in HORIZONS))
    return table


def _cell(found: ComponentCorrelation) -> str:
    if found.rho is None:
        return units.DASH
    if found.low is None or found.high is None:
        return f"{found.rho:+.2f}"
    return f"{found.rho:+.2f} ({found.low:+.2f} … {found.high:+.2f})"


def _signed(value: float | None) -> str:
    return units.DASH if value is None else f"{value:+.3f}"


def _text(name: str) -> Text:
    from rich.text import Text

    return Text(name)  # a policy's name is no markup


def _table(title: str | None, caption: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(
        title=title and Text(title, style="bold"), caption=caption, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1),
        pad_edge=False, title_justify="left", caption_justify="left",
    )  # fmt: skip
