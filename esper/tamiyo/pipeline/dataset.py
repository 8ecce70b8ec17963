"""States of the oracle table at every price: training, validation and test apart, the sealed ones out of reach."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.tamiyo.environment.specs import Split
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.learning.rows import ValueRow, oracle_rows
from esper.tamiyo.oracle.records import StateRecord, utilities
from esper.tamiyo.oracle.rules import expressivity
from esper.tamiyo.oracle.splits import of_split
from esper.tamiyo.oracle.table import read_table

__all__ = ["FALLBACK", "Case", "Dataset", "Urgency", "make_dataset", "open_records", "spread", "wait_is_best"]

FALLBACK = partial(expressivity, size="large", least_share=0.025)
"""What decides where the network abstains: policy ``expressivity`` with its own settings, put as one question."""


@dataclass(frozen=True)
class Case:
    """A state of the table at one price.

    Attributes:
        record: The state and what was tried there.
        price: λ.
        state: What a policy sees.
        row: What a value model learns from.
        utility: U against WAIT [C, R]; NaN where a candidate was not tried.
        fallback: What :data:`FALLBACK` would choose.
    """

    record: StateRecord
    price: float
    state: ModelGraphState
    row: ValueRow
    utility: NDArray[np.float64]
    fallback: int

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean utility of each candidate [C]."""
        found: NDArray[np.float64] = self.row.utility
        return found


@dataclass(frozen=True)
class Dataset:
    """All that learning and choosing may look at. There is no place for sealed hosts in it.

    Attributes:
        train: To learn from.
        validation: To stop, to choose and to calibrate by.
        test: To report on.
        digest: Of the facts and outcomes of these states.
    """

    train: tuple[Case, ...]
    validation: tuple[Case, ...]
    test: tuple[Case, ...]
    digest: str

    def __post_init__(self) -> None:
        hosts: dict[str, str] = {}
        for split, cases in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            for case in cases:
                # a leak here would make every figure that is reported later worthless
                assert case.record.split == split, f"{case.record.state_id} is in {split}"
                assert hosts.setdefault(case.record.host_key, split) == split, case.record.host_key

    def rows(self, split: Split) -> list[ValueRow]:
        """Of one open split."""
        cases: Sequence[Case] = getattr(self, split)
        return [case.row for case in cases]


def open_records(table: Path) -> list[StateRecord]:
    """Read a table, and let go of everything that is sealed.

    Raises:
        DataNotFoundError: There is no table.
        DataFormatError: It is damaged, or a split that is needed is missing.
    """
    records = [record for record in read_table(table) if record.split != "sealed"]
    for split in ("train", "validation", "test"):
        if not of_split(records, split):
            raise DataFormatError(
                f"expected training, validation and test states in {table}, but it has none of {split}; "
                "experiments/oracle/generate.py makes more"
            )
    return records


def make_dataset(
    records: Sequence[StateRecord],
    prices: Sequence[float],
    urgency: Iterable[Urgency] = (),
) -> Dataset:
    """Build the graph of every state at every price.

    Prices augment the table truthfully: the utility follows from the outcomes at any of them. Budgets do not, as
    they decide what is offered.

    Args:
        records: Of the open splits.
        prices: λ.
        urgency: Measured costs of waiting, for training states.
    """
    measured = {(u.state_id, u.candidate): u.cost for u in urgency}
    builder = ModelGraphBuilder()
    splits: dict[str, list[Case]] = {"train": [], "validation": [], "test": []}
    for record in records:
        for price in prices:
            splits[record.split].append(_case(record, price, builder, measured))
    return Dataset(
        **{split: tuple(cases) for split, cases in splits.items()},
        digest=_digest(records, prices),
    )


class Urgency(msgspec.Struct, frozen=True, kw_only=True):
    """What it cost to do one candidate of a state a decision interval later.

    Attributes:
        state_id: The state.
        candidate: What was done.
        cost: Utility now less utility later, in nats, mean over repeats, not below 0.
    """

    state_id: str
    candidate: int
    cost: float


def spread(cases: Sequence[Case]) -> list[str]:
    """Ids of the states, in an order of which every beginning holds its share of each family."""
    families: dict[str, dict[str, int]] = {}
    for case in cases:
        families.setdefault(case.record.family, {})[case.record.state_id] = case.record.spec.number
    places = [
        ((rank + 0.5) / len(own), family, state_id)
        for family, own in families.items()
        for rank, (state_id, _) in enumerate(sorted(own.items(), key=lambda pair: (pair[1], pair[0])))
    ]
    return [state_id for _, _, state_id in sorted(places)]


def wait_is_best(case: Case) -> bool:
    """Whether no candidate is worth more than the noise of a difference between two."""
    best = np.where(case.row.tried, case.means, -np.inf)[1:].max(initial=-math.inf)
    return bool(best <= case.row.noise)


def _case(
    record: StateRecord, price: float, builder: ModelGraphBuilder, measured: dict[tuple[str, int], float]
) -> Case:
    states: list[ModelGraphState] = []

    def build(point: DecisionPoint) -> CandidateGraph:
        states.append(builder.build(point))
        return states[-1].graph_data

    (row,) = oracle_rows([record], [price], build)
    (state,) = states
    assert state.point is not None
    best = int(np.where(row.tried, row.utility, -np.inf).argmax())
    # where waiting is best it costs nothing
    cost = 0.0 if best == 0 else measured.get((record.state_id, best), math.nan)
    return Case(
        record=record,
        price=price,
        state=state,
        row=replace(row, urgency=cost),
        utility=utilities(record, price),
        fallback=FALLBACK(state.point),
    )


def _digest(records: Sequence[StateRecord], prices: Sequence[float]) -> str:
    encoder = msgspec.msgpack.Encoder(order="deterministic")
    digest = hashlib.sha256(encoder.encode(list(prices)))
    for record in sorted(records, key=lambda r: r.state_id):
        digest.update(encoder.encode(record))
    return digest.hexdigest()
