"""What a policy network answers: a candidate, what speaks for it, and whether it is to be done."""

from __future__ import annotations

from typing import Literal

import msgspec

from esper.messages import Fraction, NonNegative
from esper.tamiyo.graph.facts import Candidate, CandidateAction

__all__ = ["AdaptationDecision", "Outcome", "Verdict", "counts", "describe"]

Outcome = Literal["adapt", "wait", "unsure", "abstain", "unsafe", "spent"]
"""``adapt``: do it. ``wait``: WAIT is preferred. ``unsure``: something is preferred, not surely enough. ``abstain``:
the network does not know this state, somebody else should decide. ``unsafe``: too likely to be undone.
``spent``: this epoch has had its adaptations."""


class AdaptationDecision(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate, and what speaks for it.

    Attributes:
        action: What to do.
        layer: Layer that it is about (of several, the first): whose output a seed would add to, or whose units
            would be recycled; empty for WAIT.
        candidate: Its place among the state's candidates; 0 is WAIT.
        confidence: Probability that it beats WAIT (:class:`~esper.tamiyo.network.config.PolicyConfig`); of WAIT
            itself, that it beats the best other candidate.
        urgency: Expected cost of waiting one decision interval, in nats.
        risk: Probability that it ends in a cull or a rollback.
        uncertainty: Epistemic uncertainty, in [0, 1]; 0 where it was not sampled.
        value: Expected utility of the state under the network's preferences, in nats.
        reason: For people.
        numbers: What it was made from: the fields above, thresholds, and the likeliest candidates.
    """

    action: CandidateAction
    layer: str
    candidate: int
    confidence: Fraction
    urgency: NonNegative
    risk: Fraction
    uncertainty: Fraction
    value: float
    reason: str
    numbers: dict[str, float]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """How a decision point was judged: the candidate that is preferred, and whether it is to be done.

    Attributes:
        outcome: Only ``adapt`` means that ``decision`` is to be carried out.
        decision: About the preferred candidate, with the reason for the outcome.
    """

    outcome: Outcome
    decision: AdaptationDecision

    @property
    def reason(self) -> str:
        """For people."""
        return self.decision.reason


def counts(candidate: Candidate) -> bool:
    """Whether it is an adaptation: waiting, and keeping a seed as it is, changes nothing."""
    return candidate.action not in ("wait", "hold")


def describe(candidate: Candidate) -> str:
    """A candidate in a few words."""
    if candidate.seed_id:
        return f"{candidate.action} {candidate.seed_id}"
    places = candidate.placements
    if not places:
        return candidate.action
    first = places[0]
    if candidate.action == "recycle":
        return f"recycle {first.target}"
    where = (first.site or first.target) if len(places) == 1 else f"{len(places)} sites"
    size = f" {first.size}" if first.size else ""
    return f"{candidate.action} {where} {first.blueprint}{size}".rstrip()
