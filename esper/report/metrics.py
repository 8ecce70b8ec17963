"""Curves of a run, read from the ``metrics.csv`` that Lightning's CSVLogger writes.

Rows are sparse: a training row holds the training loss, a validation row the held-out figures, and every
other cell is empty. Each column becomes one :class:`Series` of the rows where it has a value.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from esper.errors import MessageError

__all__ = ["EMPTY", "ArmCurves", "Role", "Series", "find_metric", "read_metrics"]

Role = Literal["train_loss", "val_loss", "val_acc"]

# Normalised names in order of preference; the per-step training loss shows more than its epoch mean.
_NAMES: dict[Role, tuple[str, ...]] = {
    "train_loss": (
        "train_loss_step", "train_loss", "training_loss", "loss_train", "train_loss_epoch", "loss_step",
        "loss",
    ),
    "val_loss": (
        "val_loss", "valid_loss", "validation_loss", "held_out_loss", "loss_val", "val_loss_epoch",
    ),
    "val_acc": (
        "val_acc", "val_accuracy", "valid_acc", "valid_accuracy", "validation_accuracy", "held_out_accuracy",
        "acc_val", "accuracy_val", "val_acc_epoch", "val_accuracy_epoch",
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Series:
    """Values of one metric over steps, ``steps`` ascending; non-finite values are kept.

    Shape:
        steps: [M], values: [M], M the number of measurements.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> Series:
        """Build from (step, value) pairs in any order; of several values at one step the last one stands."""
        latest = dict(pairs)
        steps = sorted(latest)
        return cls(
            np.array(steps, dtype=np.float64), np.array([latest[step] for step in steps], dtype=np.float64)
        )

    @property
    def last(self) -> float | None:
        """The latest value, or None when there is none."""
        return float(self.values[-1]) if len(self.values) else None

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        if not len(self):
            return "Series(empty)"
        return f"Series({len(self)} values, steps {self.steps[0]:g} to {self.steps[-1]:g})"


EMPTY = Series.of(())


@dataclass(frozen=True, eq=False)
class ArmCurves:
    """What the figure draws of one arm (one training run among those compared).

    Args:
        name: as shown in the legend.
        loss: training loss.
        val_loss: held-out loss.
        val_acc: held-out accuracy in [0, 1]; empty for tasks without one.
        parameters: (step, number of parameters), one pair for an arm that does not grow.
    """

    name: str
    loss: Series = EMPTY
    val_loss: Series = EMPTY
    val_acc: Series = EMPTY
    parameters: Sequence[tuple[float, int]] = ()


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
    """Return every column of a ``metrics.csv`` as a series over ``step``; empty columns are left out.

    A last row without its newline was torn by a kill, and is left out: ``0.12`` may be half of ``0.1234``.

    Raises:
        MessageError: no ``step`` column, a row without a step, or a cell that is no number (file, line and
            column are named).
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(rows.fieldnames or ())
    if not columns:
        return {}
    if "step" not in columns:
        raise MessageError(
            f"{path}: expected the columns of Lightning's CSVLogger with 'step' among them, got {columns}"
        )
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in columns if name != "step"}
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        step = _number(row["step"], where, "step")
        if step is None:
            raise MessageError(f"{where}: expected a number in column 'step', got an empty cell")
        for name, series in pairs.items():
            value = _number(row[name], where, name)
            if value is not None:
                series.append((step, value))
    return {name: Series.of(series) for name, series in pairs.items() if series}


def find_metric(metrics: Mapping[str, Any], role: Role) -> str | None:
    """Return the name under which ``metrics`` holds a role, whatever the user calls it, or None.

    Case and separators do not matter (``val/loss``, ``Val_Loss``, ``val.loss`` are one name). The lists of
    names known are in this module.
    """
    known = {re.sub(r"[^a-z0-9]+", "_", name.lower()): name for name in metrics}
    return next((known[name] for name in _NAMES[role] if name in known), None)


def _number(cell: str | None, where: str, column: str) -> float | None:
    if cell is None or cell.strip() == "":
        return None
    try:
        return float(cell)
    except ValueError:
        raise MessageError(f"{where}: expected a number in column {column!r}, got {cell!r}") from None
