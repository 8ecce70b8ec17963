"""Export: a grown model as plain torch, in memory or in a file."""

from esper.kasmina.export.exporter import export, export_with_report
from esper.kasmina.export.files import save
from esper.kasmina.export.report import ExportReport

__all__ = ["ExportReport", "export", "export_with_report", "save"]
