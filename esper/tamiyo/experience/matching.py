"""Which candidate a policy's answer is, for policies that know nothing of candidates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from esper.messages import Decision
from esper.tamiyo.graph.facts import Candidate, DecisionPoint, Placement

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["match"]


def match(
    point: DecisionPoint, answers: Sequence[Decision], state: GrowthState
) -> list[tuple[DecisionPoint, int, list[Decision]]]:
    """Find the candidates that a policy's answer amounts to.

    Decisions of one kind are one candidate (all that is germinated at once, say); an answer of several kinds is
    several. What is not among the point's candidates, such as a size that none has, is put at their end.

    Args:
        point: With its candidates.
        answers: At least one decision.
        state: Gives sites and prices.

    Returns:
        For each candidate the point, its index there, and the decisions that it stands for.
    """
    kinds: dict[str, list[Decision]] = {}
    for answer in answers:
        if answer.action != "wait":
            kinds.setdefault(answer.action, []).append(answer)
    if not kinds:
        return [(point, 0, list(answers))]
    return [_find(point, decisions, state) for decisions in kinds.values()]


def _find(
    point: DecisionPoint, decisions: list[Decision], state: GrowthState
) -> tuple[DecisionPoint, int, list[Decision]]:
    made = _candidate(decisions, state)
    for index, known in enumerate(point.candidates):
        if not known.unavailable and _key(known) == _key(made):
            return point, index, decisions
    extended = msgspec.structs.replace(point, candidates=(*point.candidates, made))
    return extended, len(point.candidates), decisions


def _key(candidate: Candidate) -> tuple[str, str, frozenset[tuple[str, ...]]]:
    """What tells candidates apart; scores do not."""
    if candidate.action in ("cull", "hold"):
        return candidate.action, candidate.seed_id, frozenset()
    places = frozenset(
        (p.site, p.blueprint, str(p.size), "" if p.site else p.target) for p in candidate.placements
    )
    return candidate.action, "", places


def _candidate(decisions: Sequence[Decision], state: GrowthState) -> Candidate:
    first = decisions[0]
    if first.action == "germinate":
        return _growth(decisions, state)
    if first.action == "recycle":
        places = tuple(Placement(site="", source=d.site, target=d.site) for d in decisions)
        return Candidate(action="recycle", placements=places)
    assert first.action in ("cull", "hold")
    return Candidate(action=first.action, seed_id=first.site)


def _growth(decisions: Sequence[Decision], state: GrowthState) -> Candidate:
    sites = {view.site.name: view.site for view in state.sites}
    places, parameters, flops = [], 0, 0
    for decision in decisions:
        site = sites.get(decision.site)  # a policy may name one that does not exist, and is refused
        if site is None:
            places.append(
                Placement(
                    site=decision.site, source="", target="", blueprint=decision.blueprint, size=decision.size
                )
            )
            continue
        places.append(
            Placement(
                site=site.name, source=site.source, target=site.target, kind=site.kind, blueprint=decision.blueprint,
                size=decision.size, long=site.long,
            )
        )  # fmt: skip
        if decision.size and decision.blueprint in site.blueprints:
            cost = state.cost(site.name, decision.blueprint, decision.size)
            parameters, flops = parameters + cost.parameters, flops + cost.flops
    return Candidate(action="grow", placements=tuple(places), parameters=parameters, flops=flops)
