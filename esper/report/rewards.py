"""Which parts of a reward foretell how a run ends, where a run has kept its experiences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper.messages import Event, RunRecord

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EXPERIENCES", "find_store", "reward_table"]

EXPERIENCES = "experiences.sqlite"


def find_store(folder: Path, events: Sequence[Event]) -> Path | None:
    """The store of a run's experiences: in its folder, else where its journal says, if it is still there."""
    named = [e.info.get("experience") for e in events if isinstance(e, RunRecord)]
    for path in (folder / EXPERIENCES, *(Path(name) for name in reversed(named) if isinstance(name, str))):
        if path.is_file():
            return path
    return None


def reward_table(store: Path) -> Table | None:
    """Rank correlations over all runs of a store; None where nothing can be correlated yet.

    Raises:
        DataFormatError: The store is damaged, or is none.
    """
    from esper.tamiyo.experience.store import ExperienceStore
    from esper.tamiyo.experience.tables import correlation_table, reward_correlations

    with ExperienceStore(store, readonly=True) as opened:
        found = reward_correlations(opened)
    if all(c.rho is None for c in found):
        return None
    return correlation_table(found, title=f"rewards and the end of the run ({store.name})")
