"""What an export did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["ExportReport", "PretrainedReport", "Route"]

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


@dataclass(frozen=True)
class PretrainedReport:
    """What an export to the host's own kind did.

    Attributes:
        kind: Name of the class.
        changed: Fields of the config that growth changed: name -> (before, after).
        folded: Seeds that are now part of the model's layers and blocks.
        left_out: Seeds that did not act on the outputs yet (germinated or in isolated training).
        num_parameters: Of the exported model, tied ones counted once.
        max_difference: Largest absolute difference of any output on the example.
        notes: What else is worth knowing.
        options: What ``from_pretrained`` has to be given beside the folder, as the grown model's constructor was.
    """

    kind: str
    changed: dict[str, tuple[Any, Any]]
    folded: tuple[str, ...]
    left_out: tuple[str, ...]
    num_parameters: int
    max_difference: float
    notes: tuple[str, ...] = ()
    options: dict[str, bool] = field(default_factory=dict)

    def __str__(self) -> str:
        grown = ", ".join(f"{name} {_shown(a)} -> {_shown(b)}" for name, (a, b) in self.changed.items())
        lines = [
            f"{self.kind} with {grown or 'its config unchanged'}; {self.num_parameters:,} parameters, max difference "
            f"{self.max_difference:.2g}; folded: {', '.join(self.folded) or 'none'}; left out: "
            f"{', '.join(self.left_out) or 'none'}"
        ]
        if self.options:
            given = ", ".join(f"{name}={value}" for name, value in self.options.items())
            lines.append(f"  load it by {self.kind}.from_pretrained(folder, {given})")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _shown(value: Any) -> str:
    return f"[{len(value)} entries]" if isinstance(value, (list, tuple)) else str(value)
