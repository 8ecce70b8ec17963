"""From a chosen candidate to the decisions that a run carries out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from msgspec import structs

from esper.errors import GrowthError
from esper.messages import Decision
from esper.tamiyo.graph.candidates import CandidateConfig, candidates

if TYPE_CHECKING:
    from esper.tamiyo.graph.facts import Candidate
    from esper.tamiyo.state import GrowthState

__all__ = ["decisions", "settled"]


def decisions(
    candidate: Candidate,
    *,
    policy: str,
    reason: str,
    confidence: float = 1.0,
    urgency: float = 0.0,
    risk: float = 0.0,
    numbers: Mapping[str, float] | None = None,
) -> list[Decision]:
    """Say what the run is to do: one germination a placement, or one decision of another kind.

    Args:
        candidate: What was chosen.
        policy: Who chose it.
        reason: Why, in words.
        confidence: In [0, 1]; clipped, like urgency and risk.
        urgency: What waiting would cost, in [0, 1].
        risk: Chance that it has to be undone, in [0, 1].
        numbers: What it was chosen from; what is not finite is left out, as JSON has no number for it.

    Raises:
        GrowthError: The candidate may not be chosen, or it leaves site, blueprint or size open.
    """
    if candidate.unavailable:
        raise GrowthError(
            f"a {candidate.action} candidate that may not be chosen cannot be carried out: {candidate.unavailable}"
        )
    told = {name: float(value) for name, value in (numbers or {}).items() if math.isfinite(value)}
    told |= {"parameters": float(candidate.parameters), "forward_flops": float(candidate.flops)}
    decided = Decision(
        action="wait",
        reason=reason,
        policy=policy,
        confidence=_clipped(confidence),
        urgency=_clipped(urgency),
        risk=_clipped(risk),
        numbers=told,
    )
    if candidate.action == "wait":
        return [decided]
    if candidate.action == "grow":
        for place in candidate.placements:
            if not (place.site and place.blueprint and place.size):
                raise GrowthError(
                    f"a candidate that grows into {place.target!r} should name site, blueprint and size, got "
                    f"{place.site!r}, {place.blueprint!r} and {place.size}; let the run choose them with settled()"
                )
        return [
            structs.replace(
                decided, action="germinate", site=place.site, blueprint=place.blueprint, size=place.size
            )
            for place in candidate.placements
        ]
    about = candidate.placements[0].target if candidate.action == "recycle" else candidate.seed_id
    return [structs.replace(decided, action=candidate.action, site=about)]


def settled(candidate: Candidate, state: GrowthState, config: CandidateConfig | None = None) -> Candidate:
    """Give a candidate that leaves its site open the first place of ``state`` that widens or feeds its layer.

    Those that were made from health signals alone know a layer and no sites.

    Args:
        candidate: Any; one that leaves nothing open is returned as it is.
        state: The run that is to carry it out.
        config: Which places are offered.

    Raises:
        GrowthError: Nothing can be grown at that layer now.
    """
    if candidate.action != "grow" or all(place.site for place in candidate.placements):
        return candidate
    layer = candidate.placements[0].target
    why = ""
    for known in candidates(state, config):
        if known.action == "grow" and len(known.placements) == 1:
            place = known.placements[0]
            if layer in (place.source, place.target):
                if not known.unavailable:
                    return known
                why = why or f"; {place.site} is offered, but {known.unavailable}"
    raise GrowthError(f"expected a place to grow at layer {layer!r}, and there is none now{why}")


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, value))
