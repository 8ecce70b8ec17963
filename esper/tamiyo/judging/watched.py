"""Counts what a learned policy decides while it decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.messages import Decision

if TYPE_CHECKING:
    from esper.tamiyo.policies.tamiyo import TamiyoPolicy
    from esper.tamiyo.state import GrowthState

__all__ = ["Watched"]


class Watched:
    """The policy, and how it came to its decisions.

    Args:
        policy: That decides.

    Attributes:
        asked: Decision points at which the network judged candidates.
        waited: Those at which nothing was done, whoever decided.
        fell_back: Those at which the gate left the decision to the fallback.
    """

    def __init__(self, policy: TamiyoPolicy) -> None:
        self.policy = policy
        self.name = policy.name
        self.asked = self.waited = self.fell_back = 0

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer as the policy does."""
        before = self.policy.last
        answer = self.policy.decide(state)
        last = self.policy.last
        if last is not None and last is not before:
            self.asked += 1
            self.waited += all(decision.action == "wait" for decision in answer)
            self.fell_back += last.verdict.outcome == "abstain"
        return answer

    def state_dict(self) -> dict[str, Any]:
        """Of the policy."""
        return self.policy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the policy."""
        self.policy.load_state_dict(state)
