"""What the experience store keeps, as structs; how they are packed is :mod:`esper.tamiyo.experience.packing`'s."""

from __future__ import annotations

from typing import Literal

import msgspec

from esper.messages import Count, Fraction, NonNegative
from esper.tamiyo.graph.facts import Candidate, DecisionPoint
from esper.tamiyo.rewards.branch import Outcome
from esper.tamiyo.rewards.reward import Reward

__all__ = ["DecisionFacts", "Experience", "Incident", "Observation", "OutcomeFacts"]


class DecisionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One decision, by whatever policy.

    Attributes:
        decision_id: Unique over all runs that share a store; a decision that is written twice stands there once.
        point: What was known.
        chosen: Index of the candidate that was chosen among those of ``point``.
        logprob: Natural logarithm of the probability with which the policy that acted chose it; 0 for
            a policy that draws nothing.
        policy: Its name.
        version: Which weights or options it had; empty where there is one only.
        confidence: In its choice.
        uncertainty: Epistemic, in [0, 1]; None where it was not measured.
    """

    decision_id: str
    point: DecisionPoint
    chosen: Count
    policy: str
    logprob: float = 0.0
    version: str = ""
    confidence: Fraction = 1.0
    uncertainty: Fraction | None = None

    @property
    def run_id(self) -> str:
        """Of the run."""
        return self.point.run.run_id

    @property
    def candidate(self) -> Candidate:
        """What was chosen."""
        return self.point.candidates[self.chosen]


class OutcomeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a decision; ``reward`` is None where there was nothing to compare with.

    The measurements are kept beside the reward, so that it can be computed again with other weights.
    """

    measured: Outcome
    reward: Reward | None

    @property
    def final(self) -> bool:
        """Nothing will be added to it."""
        return self.reward is not None and self.reward.final


class Experience(msgspec.Struct, frozen=True, kw_only=True):
    """A stored decision with what came of it so far.

    Attributes:
        number: Ascends in the order in which decisions were written; ``since`` of a query.
        decision: What was decided.
        seed_ids: Seeds that it planted.
        refused: Why the run did not carry it out, or a part of it; empty when it did.
        outcome: None until something was measured.
    """

    number: Count
    decision: DecisionFacts
    seed_ids: tuple[str, ...] = ()
    refused: str = ""
    outcome: OutcomeFacts | None = None


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one of its decision points, whatever was decided there.

    Attributes:
        step: Optimizer steps so far.
        train_loss: Mean training loss since the last decision point; NaN where there was none, or it was.
        held_out_loss: None where nothing is held out.
        num_parameters: Before the decision.
        training_flops: Of the whole run so far.
        timestamp: Unix seconds.
    """

    step: Count
    train_loss: float
    held_out_loss: float | None
    num_parameters: Count
    training_flops: NonNegative
    timestamp: float


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """Something that went wrong, or was undone; ``target`` is a seed id or a site, or empty."""

    step: Count
    kind: Literal["cull", "rollback", "non_finite", "adaptation"]
    target: str = ""
