"""What a user sees of a run: journal, metrics, figure, tables and the live display.

Nothing here imports torch or Lightning; matplotlib and rich are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.report.comparison import compare
    from esper.report.events import describe
    from esper.report.figure import growth_figure
    from esper.report.folder import report
    from esper.report.journal import Journal, read_journal
    from esper.report.live import LiveDisplay
    from esper.report.metrics import ArmCurves, Series, read_metrics
    from esper.report.summary import ArmSummary, RunSummary, read_summary, write_summary
    from esper.report.table import comparison_table

__all__ = [
    "ArmCurves",
    "ArmSummary",
    "Journal",
    "LiveDisplay",
    "RunSummary",
    "Series",
    "compare",
    "comparison_table",
    "describe",
    "growth_figure",
    "read_journal",
    "read_metrics",
    "read_summary",
    "report",
    "write_summary",
]

_MODULES = {
    "ArmCurves": "metrics",
    "ArmSummary": "summary",
    "Journal": "journal",
    "LiveDisplay": "live",
    "RunSummary": "summary",
    "Series": "metrics",
    "compare": "comparison",
    "comparison_table": "table",
    "describe": "events",
    "growth_figure": "figure",
    "read_journal": "journal",
    "read_metrics": "metrics",
    "read_summary": "summary",
    "report": "folder",
    "write_summary": "summary",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
