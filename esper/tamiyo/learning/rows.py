"""Decision points whose candidates were tried to the end: what a value model learns from and is judged on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.learning.packed import PackedGraph
from esper.tamiyo.oracle.analysis import difference_stderr
from esper.tamiyo.oracle.records import Outcome, StateRecord, utilities

__all__ = ["ValueRow", "oracle_rows"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ValueRow:
    """One decision point and what its candidates were worth.

    Attributes:
        graph: The state, its price included.
        utility: U against WAIT, in nats [C]; 0 for WAIT, NaN where a candidate was not tried.
        stderr: Standard error of each [C]; 0 where it is not known.
        harm: Share of tries in which a candidate was culled or rolled back [C]; NaN where that is not known.
        urgency: Measured cost of waiting one decision interval, in nats; NaN when it was not measured.
        noise: Standard error of the difference between two candidates of this state, in nats.
        group: Host that the state belongs to; states of one host are alike.
    """

    graph: PackedGraph
    utility: Floats
    stderr: Floats = field(default_factory=lambda: np.empty(0))
    harm: Floats = field(default_factory=lambda: np.empty(0))
    urgency: float = math.nan
    noise: float = 0.0
    group: str = ""

    def __post_init__(self) -> None:
        num = self.graph.num_candidates
        for name, default in (("stderr", 0.0), ("harm", math.nan)):
            if not getattr(self, name).size:
                object.__setattr__(self, name, np.full(num, default))
        shapes = [a.shape for a in (self.utility, self.stderr, self.harm)]
        if any(shape != (num,) for shape in shapes):
            raise DataFormatError(
                f"expected utility, stderr and harm of {num} candidates, got shapes {shapes}; {self.group}"
            )
        if self.utility[0] != 0 or np.isinf(self.utility).any():
            raise DataFormatError(
                f"expected utilities against WAIT, so 0 for WAIT and finite or NaN for others, got {self.utility}; "
                f"{self.group}"
            )
        if not (np.isfinite(self.stderr).all() and (self.stderr >= 0).all() and 0 <= self.noise < math.inf):
            raise DataFormatError(
                f"expected finite standard errors of at least 0, got {self.stderr} and {self.noise}; {self.group}"
            )

    @property
    def tried(self) -> NDArray[np.bool_]:
        """Candidates that were available and have a utility [C]."""
        return self.graph.mask & ~np.isnan(self.utility)


def oracle_rows(
    records: Sequence[StateRecord],
    prices: Sequence[float],
    build: Callable[[DecisionPoint], CandidateGraph],
) -> list[ValueRow]:
    """Turn states of the oracle table into rows, one for each price.

    A candidate did harm in a repeat where it lost more seeds or was rolled back more often than WAIT, or failed.

    Args:
        records: States.
        prices: λ; the utility and the state depend on it.
        build: Decision point -> its graph.
    """
    rows = []
    for record in records:
        lost = record.array(_lost)
        harm = np.where(np.isnan(lost), np.nan, lost > lost[:1]).mean(axis=1)
        harm[0] = math.nan
        for price in prices:
            table = utilities(record, price)
            spread = table.std(axis=1, ddof=1) if table.shape[1] > 1 else np.zeros(len(table))
            run = msgspec.structs.replace(record.point.run, price=price)
            rows.append(
                ValueRow(
                    PackedGraph.pack(build(msgspec.structs.replace(record.point, run=run))),
                    utility=table.mean(axis=1),
                    stderr=np.nan_to_num(spread / math.sqrt(table.shape[1])),
                    harm=harm,
                    noise=difference_stderr(table),
                    group=record.host_key,
                )
            )
    return rows


def _lost(outcome: Outcome) -> float:
    """Seeds lost and snapshots gone back to in a whole run; inf of one that failed."""
    if outcome.error or not math.isfinite(outcome.held_out_loss):
        return math.inf
    return float(outcome.culled + outcome.rolled_back)
