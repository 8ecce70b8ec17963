"""From what the network says of a decision point to what is done: every threshold in its place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from esper.tamiyo.graph.data import ModelGraphState
from esper.tamiyo.graph.facts import Candidate
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.decision import AdaptationDecision, Outcome, Verdict, counts, describe

__all__ = ["Reading", "confidence_needed", "judge"]

_MOST_TOLD = 3


@dataclass(frozen=True)
class Reading:
    """What the network says of one graph with C candidates.

    Attributes:
        logits: [C].
        risk: [C].
        value: In nats.
        urgency: In nats.
        spread: Standard deviation of each candidate's log-odds against WAIT [C]; 0 where it was not sampled.
        epistemic: In [0, 1].
        aleatoric: In [0, 1].
        novelty: In [0, 1).
    """

    logits: Tensor
    risk: Tensor
    value: float
    urgency: float
    spread: Tensor
    epistemic: float = 0.0
    aleatoric: float = 0.0
    novelty: float = 0.0

    @property
    def finite(self) -> bool:
        """Whether there is a number wherever one should be."""
        tensors = (self.logits, self.risk, self.spread)
        numbers = (self.value, self.urgency, self.epistemic, self.aleatoric, self.novelty)
        return all(bool(t.isfinite().all()) for t in tensors) and all(map(math.isfinite, numbers))


def judge(
    config: PolicyConfig, state: ModelGraphState, reading: Reading, adaptations_this_epoch: int = 0
) -> Verdict:
    """Choose a candidate, and decide whether to act on it.

    The preferred candidate has the highest lower bound of log-odds against WAIT, ``logit(c) − logit(WAIT) −
    epistemic_weight · spread(c)``; WAIT is preferred where none of them is positive. Without sampled
    uncertainty that is the mode of the distribution. It is then held against the thresholds, those first
    that say that the network should not be heard at all.

    Args:
        config: Thresholds.
        state: The decision point.
        reading: What the network says of it.
        adaptations_this_epoch: Candidates chosen in this epoch so far.
    """
    if not reading.finite:
        return _unheard("the network's output for this state is not finite")
    candidates = state.candidates
    odds = reading.logits - reading.logits[0] - config.epistemic_weight * reading.spread
    odds = odds.masked_fill(~state.mask, -math.inf)
    if not bool(state.mask[1:].any()):
        return _unheard("nothing but waiting is available", "wait")
    rival = 1 + int(odds[1:].argmax())
    best = rival if float(odds[rival]) > 0 else 0
    beats = float(odds[rival].double().sigmoid())
    needed = confidence_needed(config, _health(state, candidates[best]))
    risk = float(reading.risk[best])
    outcome, reason = _outcome(config, candidates[best], reading, risk, beats, needed, adaptations_this_epoch)
    if outcome == "wait":
        reason = (
            f"waiting is preferred: {describe(candidates[rival])} would beat it with probability {beats:.2f}"
        )
    fields = {
        "confidence": beats if best else 1.0 - beats,
        "urgency": max(0.0, reading.urgency),
        "risk": min(1.0, max(0.0, risk)),
        "uncertainty": min(1.0, max(0.0, reading.epistemic)),
        "value": reading.value,
    }
    numbers = {
        **fields,
        "confidence_needed": needed,
        "aleatoric": reading.aleatoric,
        "novelty": reading.novelty,
        **_likeliest(state, reading),
    }
    decision = AdaptationDecision(
        action=candidates[best].action,
        layer=_layer(candidates[best]),
        candidate=best,
        reason=reason,
        numbers=numbers,
        **fields,
    )
    return Verdict(outcome=outcome, decision=decision)


def confidence_needed(config: PolicyConfig, health: float | None) -> float:
    """What a candidate's confidence has to reach, given the health of the sickest layer that it touches.

    ``t − max(0, 1 − health / health_threshold) · max(0, t − 1/2)`` with t =
    ``adaptation_confidence_threshold``: t for a layer that is well (or was never measured), and one half, level
    with waiting, for one at health 0.
    """
    threshold = config.adaptation_confidence_threshold
    if health is None or health >= config.health_threshold:
        return threshold
    illness = 1 - health / config.health_threshold
    return threshold - illness * max(0.0, threshold - 0.5)


def _outcome(
    config: PolicyConfig,
    best: Candidate,
    reading: Reading,
    risk: float,
    confidence: float,
    needed: float,
    adaptations: int,
) -> tuple[Outcome, str]:
    name, safe, most = describe(best), 1 - config.safety_margin, config.max_adaptations_per_epoch
    if unknown := _unknown(config, reading):
        return "abstain", unknown
    if best.action == "wait":
        return "wait", ""
    if risk > safe:
        undone = f"culled or rolled back with probability {risk:.2f}, more than {safe:.2f}"
        return "unsafe", f"{name} is preferred, but would be {undone}"
    if confidence < needed:
        beats = f"beats waiting with probability {confidence:.2f}, less than {needed:.2f}"
        return "unsure", f"{name} is preferred, but {beats}"
    if counts(best) and adaptations >= most:
        return "spent", f"{name} is preferred, but this epoch has had its {most} adaptations"
    return "adapt", f"{name} beats waiting with probability {confidence:.2f}, at least {needed:.2f}"


def _unknown(config: PolicyConfig, reading: Reading) -> str:
    """Why the network does not know this state; empty if it does, or was not asked."""
    if not config.enable_uncertainty:
        return ""
    if reading.epistemic > config.uncertainty_threshold:
        above = f"{reading.epistemic:.2f}, is above {config.uncertainty_threshold:.2f}"
        return f"uncertainty about this state, {above}: the network's samples contradict one another"
    if reading.novelty > config.novelty_threshold:
        above = f"{reading.novelty:.2f}, is above {config.novelty_threshold:.2f}"
        return f"novelty of this state, {above}: the network was trained on others"
    return ""


def _unheard(reason: str, outcome: Outcome = "abstain") -> Verdict:
    """A verdict that rests on nothing that the network says."""
    decision = AdaptationDecision(
        action="wait",
        layer="",
        candidate=0,
        confidence=1.0 if outcome == "wait" else 0.0,
        urgency=0.0,
        risk=0.0,
        uncertainty=0.0 if outcome == "wait" else 1.0,
        value=0.0,
        reason=reason,
        numbers={},
    )
    return Verdict(outcome=outcome, decision=decision)


def _layer(candidate: Candidate) -> str:
    return candidate.placements[0].target if candidate.placements else ""


def _health(state: ModelGraphState, candidate: Candidate) -> float | None:
    """Last health score of the sickest layer that a candidate touches; None where none was measured."""
    last = {signal.layer_id: signal.health_score for signal in state.health_signals if not signal.seed_id}
    layers = {name for place in candidate.placements for name in (place.source, place.target)}
    return min((last[name] for name in layers if name in last), default=None)


def _likeliest(state: ModelGraphState, reading: Reading) -> Mapping[str, float]:
    """Probabilities of WAIT and of the likeliest other candidates."""
    probs = reading.logits.masked_fill(~state.mask, -math.inf).softmax(0)
    order = [i for i in probs.argsort(descending=True, stable=True).tolist() if i and bool(state.mask[i])]
    named = {f"p:{describe(state.candidates[i])}": float(probs[i]) for i in order[:_MOST_TOLD]}
    return {"p:wait": float(probs[0]), **named}
