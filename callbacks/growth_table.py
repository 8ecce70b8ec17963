"""The table that stands beside a model summary after each growth: what came and went, and the sizes since.

Lightning's summary callbacks count once, before training. Where one of them is in the trainer, each safe
point that changed the structure is told in the same way as the summary: as text, or by rich.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from esper.kasmina.seed import Seed

__all__ = ["GrowthTable"]

_MAX_ROWS = 24
_HEADER = ("", "Seed", "Where", "Made of", "Params", "Trainable")


@dataclass(frozen=True)
class _Entry:
    """What is told of one seed; kept, because a culled seed can no longer be asked."""

    seed_id: str
    where: str
    made_of: str
    num_parameters: int
    num_trainable: int

    @classmethod
    def of(cls, seed: Seed) -> _Entry:
        return cls(seed.seed_id, seed.site.name, f"{seed.blueprint}({seed.size})", *_count(seed.branch))

    def cells(self, sign: str) -> tuple[str, ...]:
        return (
            sign,
            self.seed_id,
            self.where,
            self.made_of,
            f"{self.num_parameters:,}",
            f"{self.num_trainable:,}",
        )


class GrowthTable:
    """Shows each change of a module's seeds, on rank zero, if a summary callback is in the trainer.

    Args:
        trainer: Its callbacks say whether and how to show it.
        module: The module that grows.
    """

    def __init__(self, trainer: L.Trainer, module: nn.Module) -> None:
        summaries: list[ModelSummary] = [
            callback
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, ModelSummary) and callback._max_depth
        ]
        self._shown = bool(summaries) and trainer.is_global_zero
        self._rich = any(isinstance(summary, RichModelSummary) for summary in summaries)
        self._module = module
        self._known: dict[str, _Entry] = {}
        self._sizes = (0, 0)

    def begin(self, seeds: Sequence[Seed]) -> None:
        """Take the module as it is for what the summary has told of."""
        if self._shown:
            self._known = {seed.seed_id: _Entry.of(seed) for seed in seeds}
            self._sizes = _count(self._module)

    def show(self, seeds: Sequence[Seed], step: int) -> None:
        """Print what changed since the last call; nothing when no seed came or went.

        Args:
            seeds: Of the module, as they are now.
            step: Optimizer steps taken so far.
        """
        if not self._shown or [seed.seed_id for seed in seeds] == [*self._known]:
            return
        before, known = self._sizes, self._known
        self.begin(seeds)
        new = [entry for seed_id, entry in self._known.items() if seed_id not in known]
        gone = [entry for seed_id, entry in known.items() if seed_id not in self._known]
        rows = [entry.cells("+") for entry in new] + [entry.cells("-") for entry in gone]
        if rows:
            if len(rows) > _MAX_ROWS:  # the totals count all of them
                rows[_MAX_ROWS:] = [("", f"... and {len(rows) - _MAX_ROWS} more", "", "", "", "")]
            totals = [
                f"{old:,} -> {now:,} {what}"
                for what, old, now in zip(
                    ("Total params", "Trainable params"), before, self._sizes, strict=True
                )
            ]
            self._print(f"Growth at step {step}", rows, totals)

    def _print(self, title: str, rows: list[tuple[str, ...]], totals: list[str]) -> None:
        if not self._rich:
            rank_zero_info("\n" + "\n".join(_text(title, rows, totals)))
            return
        from rich import get_console  # comes with Lightning's rich callbacks only
        from rich.table import Table

        table = Table(title=title, caption="\n".join(totals), header_style="bold magenta")
        for name in _HEADER:
            right = name in ("Params", "Trainable")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        get_console().print(table)


def _count(module: nn.Module) -> tuple[int, int]:
    """Parameters of ``module``, all and trainable ones."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def _text(title: str, rows: list[tuple[str, ...]], totals: list[str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (_HEADER, *rows)
    ]
    rule = "-" * len(lines[0])
    return [title, lines[0], rule, *lines[1:], rule, *totals]
