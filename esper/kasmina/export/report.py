"""What an export did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ExportReport", "Route"]

Route = Literal["modules", "graph", "program"]


@dataclass(frozen=True)
class ExportReport:
    """What became of each seed, and how far the result is from the original.

    Attributes:
        route: ``modules`` (the host's own classes), ``graph`` (a ``torch.fx`` graph over plain layers, still
            trainable) or ``program`` (captured by ``torch.export``, for evaluation only).
        folded: Seeds that are now part of host layers or containers.
        branches: Seeds that stayed branches next to host layers.
        left_out: Seeds that did not act on the outputs yet (germinated or in isolated training).
        max_difference: Largest absolute difference of any output; None without an example input.
        notes: What else is worth knowing: why a seed was not folded, why a route did not do.
    """

    route: Route
    folded: tuple[str, ...]
    branches: tuple[str, ...]
    left_out: tuple[str, ...]
    max_difference: float | None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        def listed(ids: tuple[str, ...]) -> str:
            return ", ".join(ids) or "none"

        checked = (
            "not checked" if self.max_difference is None else f"max difference {self.max_difference:.2g}"
        )
        lines = [
            f"exported as {self.route} ({checked}); folded: {listed(self.folded)}; "
            f"branches: {listed(self.branches)}; left out: {listed(self.left_out)}"
        ]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
