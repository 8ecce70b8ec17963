"""One state of the oracle table: a decision point, and how the run ended after each of its candidates.

Legend: C candidates of a decision point (WAIT is 0), R repeats. A repeat is an order of the data from the decision
on, shared by all candidates of the state, so that they can be compared pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from esper.errors import DataFormatError
from esper.messages import Count, NonNegative
from esper.tamiyo.environment.specs import HostSpec, Split
from esper.tamiyo.graph.facts import Candidate, DecisionPoint

__all__ = [
    "Moment",
    "Outcome",
    "StateRecord",
    "check_record",
    "restrict",
    "uses_shortcut",
    "utilities",
]

Moment = Literal["early", "late", "grown", "shifted"]
"""Why a state was looked at: at 5-15 % of the run, at 30-50 %, after an earlier growth, after a shift of the data."""

Losses = NDArray[np.float64]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How one run ended after one candidate.

    Attributes:
        candidate: Index among the candidates of the decision point.
        repeat: Index of the data order.
        held_out_loss: At the end of the schedule, nats or squared error; what the utility is made of.
        test_loss: Of the split that nothing was ever chosen by.
        test_accuracy: Of the same; None where the task has none.
        parameters: At the end, without culled seeds.
        training_flops: Of the whole run, the part before the decision included.
        forward_flops: Of one forward pass of one sample at the end.
        wall_time_s: From the decision to the end.
        culled: Seeds that the whole run lost.
        rolled_back: Times that the governor went back to a snapshot, in the whole run.
        refused: Decisions of the whole run that were not carried out, and why.
        error: Why there is no outcome; then the losses are infinite.
    """

    candidate: Count
    repeat: Count
    held_out_loss: float
    test_loss: float
    test_accuracy: float | None
    parameters: Count
    training_flops: NonNegative
    forward_flops: NonNegative
    wall_time_s: NonNegative
    culled: Count = 0
    rolled_back: Count = 0
    refused: str = ""
    error: str = ""


class StateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A decision point on the way of one host, and all outcomes that were tried from it.

    Attributes:
        state_id: Unique in the table.
        moment: Why this state.
        spec: The run of the host, WAIT as all others; says which split the host belongs to.
        point: What a policy knows, with a price of 0.
        outcomes: By candidate, then by repeat.
    """

    state_id: str
    moment: Moment
    spec: HostSpec
    point: DecisionPoint
    outcomes: tuple[Outcome, ...]

    @property
    def split(self) -> Split:
        """Which part of the table the host belongs to."""
        return self.spec.split

    @property
    def family(self) -> str:
        """Of the host."""
        return self.spec.family

    @property
    def num_repeats(self) -> int:
        """R."""
        return 1 + max(outcome.repeat for outcome in self.outcomes)

    @property
    def host_key(self) -> str:
        """Names the host in the whole table."""
        return self.spec.name

    def array(self, read: Callable[[Outcome], float]) -> Losses:
        """Return ``read`` of every outcome [C, R]; NaN where a candidate was not available, so not tried."""
        found = np.full((len(self.point.candidates), self.num_repeats), np.nan)
        for outcome in self.outcomes:
            found[outcome.candidate, outcome.repeat] = read(outcome)
        return found


def utilities(record: StateRecord, price: float) -> Losses:
    """Return what every candidate is worth against WAIT from the same state and data order [C, R].

    U = (loss_wait - loss) - price * log(P / P_wait), with the held-out loss and the parameters at the end.
    NaN where a candidate was not tried. A run that failed or ended without a finite loss is worth minus WAIT's
    loss: as bad as one that ended at twice that loss, but a number.
    """
    loss = record.array(lambda outcome: outcome.held_out_loss)
    parameters = record.array(lambda outcome: float(outcome.parameters))
    failed = ~np.isfinite(loss) & ~np.isnan(loss)
    gain = loss[0] - np.where(failed, 2.0 * loss[0], loss)
    return gain - price * np.log(np.where(failed, parameters[0], parameters) / parameters[0])


def uses_shortcut(candidate: Candidate) -> bool:
    """Whether a candidate lays a long way around the hidden layers."""
    return any(placement.long for placement in candidate.placements)


def restrict(record: StateRecord, keep: Callable[[Candidate], bool]) -> StateRecord:
    """Return the state as it were if only WAIT and the candidates that ``keep`` holds for were offered."""
    old = [i for i, candidate in enumerate(record.point.candidates) if i == 0 or keep(candidate)]
    new = {index: place for place, index in enumerate(old)}
    point = msgspec.structs.replace(
        record.point, candidates=tuple(record.point.candidates[index] for index in old)
    )
    outcomes = tuple(
        msgspec.structs.replace(outcome, candidate=new[outcome.candidate])
        for outcome in record.outcomes
        if outcome.candidate in new
    )
    return msgspec.structs.replace(record, point=point, outcomes=outcomes)


def check_record(record: StateRecord) -> None:
    """Check one state against itself.

    Raises:
        DataFormatError: Candidates or outcomes do not fit together; the text says which.
    """
    where = f"state {record.state_id!r}"
    candidates = record.point.candidates
    if not candidates or candidates[0].action != "wait" or candidates[0].placements:
        raise DataFormatError(f"{where}: expected WAIT as the first candidate, got {candidates[:1]}")
    tried = [(outcome.candidate, outcome.repeat) for outcome in record.outcomes]
    repeats = max((repeat for _, repeat in tried), default=-1) + 1
    available = [i for i, candidate in enumerate(candidates) if not candidate.unavailable]
    expected = [(index, repeat) for index in available for repeat in range(repeats)]
    if repeats < 1 or tried != expected:
        raise DataFormatError(
            f"{where}: expected one outcome of each of {len(available)} available candidates in each repeat, by "
            f"candidate and then by repeat, got {len(tried)} outcomes in {repeats} repeats"
        )
    for outcome in record.outcomes:
        losses = (outcome.held_out_loss, outcome.test_loss)
        if any(math.isnan(loss) for loss in losses) or -math.inf in losses or outcome.parameters < 1:
            raise DataFormatError(
                f"{where}: candidate {outcome.candidate} has the losses {losses} and {outcome.parameters} parameters"
            )
        if outcome.error and math.isfinite(outcome.held_out_loss):
            raise DataFormatError(
                f"{where}: candidate {outcome.candidate} failed ({outcome.error}) but has a loss"
            )
        if outcome.candidate == 0 and not math.isfinite(outcome.held_out_loss):
            raise DataFormatError(
                f"{where}: WAIT ended without a finite loss, so there is nothing to compare with"
            )
