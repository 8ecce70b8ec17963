"""``metrics.csv``: what Lightning logs, one row a call, complete after every row."""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from esper.atomic import replacing

__all__ = ["MetricsFile"]


class MetricsFile(Logger):
    """Logger that writes ``metrics.csv`` in the form of Lightning's ``CSVLogger``.

    Lightning's own deletes the file of an earlier run in the same folder, also when that run is being
    resumed; this one keeps the rows from before the checkpoint. New metrics become new columns.

    Args:
        path: The file; its folder is made.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns: list[str] = []
        self._file: TextIO | None = None

    @property
    def name(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as the name."""
        return ""

    @property
    def log_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the composed config is in the run folder already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write one row."""
        row: dict[str, Any] = {"step": 0 if step is None else step}
        row.update({key: float(value) for key, value in metrics.items() if key != "step"})
        if self._file is None:
            self._open(self._read())
        if new := [key for key in row if key not in self._columns]:
            self._open(self._read(), self._columns + new)
        assert self._file is not None
        csv.DictWriter(self._file, self._columns).writerow(row)
        self._file.flush()

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows of optimizer steps from ``step`` on: a run that begins there writes them anew."""
        self._open([row for row in self._read() if int(float(row["step"])) < step])

    def finalize(self, status: str) -> None:
        """Close the file; a later row opens it again."""
        self._close()

    def _read(self) -> list[dict[str, str]]:
        self._close()
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a row without its newline was torn by a kill
        return [dict(row) for row in csv.DictReader(whole.splitlines())]

    def _open(self, rows: list[dict[str, str]], columns: list[str] | None = None) -> None:
        """Replace the file by ``rows`` and stay at its end."""
        self._close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = columns or (list(rows[0]) if rows else self._columns)
        with (
            replacing(self.path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, self._columns)
            if self._columns:
                writer.writeheader()
            writer.writerows(rows)
        self._file = self.path.open("a", newline="", encoding="utf-8")

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
