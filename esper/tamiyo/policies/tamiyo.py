"""``tamiyo``: the learned policy; where it does not know the host, a rule decides and the decision says so."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

from esper.messages import Decision
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.candidate_config import LEARNED, CandidateConfig
from esper.tamiyo.graph.carry_out import decisions
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.decision import Verdict, counts
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import load_network, shipped
from esper.tamiyo.policies.base import EventPolicy, wait
from esper.tamiyo.policies.events import check_options
from esper.tamiyo.policies.registry import make_policy

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["Judgement", "TamiyoPolicy", "TamiyoPolicyConfig"]

_SHIPPED = "shipped"
_THRESHOLDS = (
    "enable_uncertainty",
    "uncertainty_samples",
    "epistemic_weight",
    "health_threshold",
    "adaptation_confidence_threshold",
    "uncertainty_threshold",
    "novelty_threshold",
    "max_adaptations_per_epoch",
    "safety_margin",
)


@dataclass(frozen=True)
class TamiyoPolicyConfig:
    """Options; thresholds that are None are those that the network was shipped with.

    Attributes:
        weights: Safetensors file of a policy network; ``shipped`` for the one that came with the package.
        price: λ: the held-out loss, in nats, that a unit of log(parameters / host parameters) has to save.
        moments: Shares of the run from which on the network is asked once each, as it was in training; empty for
            every decision point. Asked more often than it was trained to be, it would grow more often.
        fallback: Policy that decides where the network abstains.
        fallback_options: Of that policy.
        candidates: What is to be offered otherwise than in training
            (:data:`~esper.tamiyo.graph.candidate_config.LEARNED`): ``{shortcut: false}`` offers no way around the
            hidden layers.
        enable_uncertainty: See :class:`~esper.tamiyo.network.config.PolicyConfig`, as for all that follow.
        uncertainty_samples: Passes with dropout.
        epistemic_weight: Spread taken off the odds.
        health_threshold: Health below which a layer is ill.
        adaptation_confidence_threshold: Confidence that a candidate needs.
        uncertainty_threshold: Uncertainty above which the fallback decides.
        novelty_threshold: Novelty above which it does.
        max_adaptations_per_epoch: Candidates carried out in one epoch.
        safety_margin: A candidate of more risk than one less this is refused.
    """

    weights: str = _SHIPPED
    price: float = 0.03
    moments: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    fallback: str = "expressivity"
    fallback_options: Mapping[str, Any] = field(default_factory=dict)
    candidates: Mapping[str, Any] = field(default_factory=dict)
    enable_uncertainty: bool | None = None
    uncertainty_samples: int | None = None
    epistemic_weight: float | None = None
    health_threshold: float | None = None
    adaptation_confidence_threshold: float | None = None
    uncertainty_threshold: float | None = None
    novelty_threshold: float | None = None
    max_adaptations_per_epoch: int | None = None
    safety_margin: float | None = None

    def __post_init__(self) -> None:
        known = [option.name for option in dataclasses.fields(CandidateConfig)]
        unknown = sorted(set(self.candidates) - set(known))
        object.__setattr__(self, "moments", tuple(self.moments))  # lists come from files
        in_order = list(self.moments) == sorted(set(self.moments))
        check_options(
            self,
            (in_order and all(0 <= m < 1 for m in self.moments), "moments should ascend within [0, 1)"),
            (bool(self.weights), "weights should be 'shipped' or the path of a file"),
            (0.0 <= self.price < float("inf"), "price should be finite and not negative"),
            (self.fallback != "tamiyo", "fallback should be another policy than tamiyo itself"),
            (not unknown, f"candidates has no option {', '.join(unknown)}; it has {', '.join(known)}"),
        )
        PolicyConfig(**self.thresholds)

    @property
    def thresholds(self) -> dict[str, Any]:
        """Those that are given."""
        given = {name: getattr(self, name) for name in _THRESHOLDS}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Judgement:
    """A decision point and what the network made of it."""

    point: DecisionPoint
    verdict: Verdict


class TamiyoPolicy:
    """Asks the network at the moments of its options, where something can be done.

    The network chooses one candidate of :func:`~esper.tamiyo.graph.candidates.candidates`, which is carried out,
    or none. Where it abstains the fallback decides as if it were alone; an event of the fallback's that falls
    due while the network grows counts as used, so that the two do not both grow for it.

    Args:
        config: Options.
        network: Decides, instead of the one that ``config.weights`` names: one that is being trained or judged.

    Attributes:
        last: The last decision point and its verdict; None before the first at which the network was asked.
            What learns from decisions keeps it.
    """

    name: str = "tamiyo"
    config_type: ClassVar[type[TamiyoPolicyConfig]] = TamiyoPolicyConfig

    def __init__(self, config: TamiyoPolicyConfig, network: TamiyoNetwork | None = None) -> None:
        self.config = config
        self.fallback = make_policy(config.fallback, **config.fallback_options)
        # a network in hand may serve others too, with thresholds of their own: only the weights are shared
        self.network = copy.copy(network) if network else _load(config.weights)
        self.network.config = dataclasses.replace(self.network.config, **config.thresholds)
        self.last: Judgement | None = None
        self._offers = dataclasses.replace(LEARNED, **config.candidates)
        self._builder = ModelGraphBuilder()
        self._history = History()
        self._asked = 0
        self._epoch = 0
        self._adaptations = 0

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer a decision point with what carries out one candidate, with the fallback's answer, or one WAIT."""
        if not self._due(state):
            self._history.note(state)
            return [wait(self.name, self._next(state))]
        point = decision_point(state, self._history, price=self.config.price, config=self._offers)
        answer = self._answer(state, point)
        self._history.note_decisions(answer, state.step)
        return answer

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "history": self._history.state_dict(),
            "asked": self._asked,
            "epoch": self._epoch,
            "adaptations": self._adaptations,
            "fallback": self.fallback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._history.load_state_dict(state["history"])
        self._asked = int(state["asked"])
        self._epoch = int(state["epoch"])
        self._adaptations = int(state["adaptations"])
        self.fallback.load_state_dict(state["fallback"])

    def _answer(self, state: GrowthState, point: DecisionPoint) -> list[Decision]:
        if state.epoch != self._epoch:
            self._epoch, self._adaptations = state.epoch, 0
        if all(candidate.unavailable for candidate in point.candidates[1:]):
            return [wait(self.name, _nothing(point))]
        verdict = self.network.decide(self._builder.build(point), self._adaptations)
        self.last = Judgement(point, verdict)
        if verdict.outcome == "abstain":
            return self._fall_back(state, verdict)
        if verdict.outcome != "adapt":
            return [self._waiting(verdict)]
        said = verdict.decision
        chosen = point.candidates[said.candidate]
        self._adaptations += counts(chosen)
        if chosen.action == "grow":
            self._use_event(state)
        answer = decisions(
            chosen,
            policy=self.name,
            reason=said.reason,
            confidence=said.confidence,
            urgency=said.urgency,
            risk=said.risk,
            numbers=said.numbers,
        )
        self._history.note_decisions(answer, state.step)
        return answer

    def _due(self, state: GrowthState) -> bool:
        """Whether a moment has passed since the network was last asked; moments that piled up are one."""
        # rounding must not put a moment one decision point later than its exact share
        passed = sum(moment <= state.fraction + 1e-6 for moment in self.config.moments)
        due = passed > self._asked
        self._asked = max(self._asked, passed)
        return due or not self.config.moments

    def _next(self, state: GrowthState) -> str:
        if self._asked == len(self.config.moments):
            return "the network has been asked for the last time"
        return f"the network is asked next at step {math.ceil(self.config.moments[self._asked] * state.total_steps)}"

    def _waiting(self, verdict: Verdict) -> Decision:
        said = verdict.decision
        decision = wait(self.name, said.reason, said.numbers)
        return msgspec.structs.replace(
            decision, confidence=said.confidence, urgency=min(1.0, said.urgency), risk=said.risk
        )

    def _fall_back(self, state: GrowthState, verdict: Verdict) -> list[Decision]:
        """What the fallback decides, with the reason why it was asked."""
        numbers = {**verdict.decision.numbers, "abstained": 1.0}
        return [
            msgspec.structs.replace(
                answer,
                policy=self.name,
                reason=f"{verdict.reason}; {self.config.fallback} decides: {answer.reason}",
                numbers={**numbers, **answer.numbers},
            )
            for answer in self.fallback.decide(state)
        ]

    def _use_event(self, state: GrowthState) -> None:
        if isinstance(self.fallback, EventPolicy):
            events = self.fallback.events
            if events.remaining and events.due(state.step, state.total_steps):
                events.use()


def _load(weights: str) -> TamiyoNetwork:
    return load_network(shipped() if weights == _SHIPPED else weights)


def _nothing(point: DecisionPoint) -> str:
    """Why only waiting is left."""
    reasons = dict.fromkeys(candidate.unavailable for candidate in point.candidates[1:])
    if not reasons:
        return "this host offers nothing to grow, recycle or cull"
    first = next(iter(reasons))
    return (
        first
        if len(reasons) == 1
        else f"nothing but waiting is available: {first}, among {len(reasons)} reasons"
    )
