"""A small table made by hand, and a learning of it that takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oracle_states import make_record

from esper.tamiyo.oracle.records import StateRecord
from esper.tamiyo.oracle.table import write_table
from esper.tamiyo.pipeline.config import Effort, LearnConfig

TINY = Effort(
    hidden_sizes=(8,),
    num_seeds=2,
    max_epochs=2,
    batch_size=8,
    max_trees=10,
    fresh_states=0,
    urgency_states=0,
    transfer=True,
    curve_points=2,
    ppo_rounds=2,
    ppo_episodes=2,
    judged_episodes=1,
)


def losses(best: int, waits: bool = False) -> list[list[float]]:
    """Candidate ``best`` ends lowest; with ``waits`` nothing is better than WAIT."""
    rows = [[1.0 + 0.01 * c + 0.02 * (c > 0), 1.01 + 0.01 * c] for c in range(7)]
    if not waits:
        rows[best] = [0.5, 0.52]
    return rows


def records() -> list[StateRecord]:
    """Twelve states of open hosts, a third of them better left alone, and one sealed state."""
    found = []
    for split, first, num in (("train", 0, 6), ("validation", 20, 3), ("test", 40, 3)):
        for number in range(first, first + num):
            own = losses(1 + number % 5, waits=number % 3 == 2)
            found.append(make_record(number, own, split=split, dormancy=0.1 * (number % 4)))  # type: ignore[arg-type]
    return [*found, make_record(60, losses(2), split="sealed")]


def tiny_config(folder: Path, out: str = "out", **settings: Any) -> LearnConfig:
    """A learning of :func:`records`, in this process."""
    table = folder / "table"
    if not table.is_dir():
        write_table(table, records())
    settings = {"stages": ("supervised",), "effort": TINY, **settings}
    return LearnConfig(table=table, out=folder / out, num_workers=0, **settings)


def names(cases: Sequence[Any]) -> set[str]:
    """Ids of the states of cases."""
    return {case.record.state_id for case in cases}
