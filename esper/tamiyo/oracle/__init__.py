"""The oracle table: every candidate of a decision point, tried to the end of the run's schedule.

Names load on first use, because reading a table needs pyarrow (extra ``learn``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.tamiyo.oracle.analysis import Judgement, judge
    from esper.tamiyo.oracle.records import Outcome, StateRecord, utilities
    from esper.tamiyo.oracle.rules import RULES, Rule
    from esper.tamiyo.oracle.splits import check_splits, of_split
    from esper.tamiyo.oracle.table import read_table, write_table

__all__ = [
    "RULES",
    "Judgement",
    "Outcome",
    "Rule",
    "StateRecord",
    "check_splits",
    "judge",
    "of_split",
    "read_table",
    "utilities",
    "write_table",
]

_HOMES = {
    "analysis": ("Judgement", "judge"),
    "records": ("Outcome", "StateRecord", "utilities"),
    "rules": ("RULES", "Rule"),
    "splits": ("check_splits", "of_split"),
    "table": ("read_table", "write_table"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
