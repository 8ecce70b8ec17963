"""Requests that name a layer and leave the rest to the run: whoever saw health signals alone knows no sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import structs

from esper.errors import GrowthError
from esper.tamiyo.graph.candidate_config import CandidateConfig
from esper.tamiyo.graph.carry_out import settled
from esper.tamiyo.graph.facts import Candidate, Placement

if TYPE_CHECKING:
    from esper.kasmina.topology import ModelTopology
    from esper.messages import Decision
    from esper.tamiyo.state import GrowthState

__all__ = ["is_open", "settle"]


def is_open(decision: Decision, topology: ModelTopology) -> bool:
    """Whether a decision names a layer where it should name a site and a blueprint, or a seed."""
    leaves_open = decision.action in ("cull", "hold") or (
        decision.action == "germinate" and not decision.blueprint
    )
    return leaves_open and decision.site in topology.layer_names


def settle(decision: Decision, state: GrowthState) -> Decision:
    """Fill in what an open decision leaves to the run.

    Growth takes the first place that widens or feeds the layer, in the size that the budget offers; a cull or a hold
    is about the seed that came last among those at the layer that it can be about.

    Args:
        decision: One that :func:`is_open`.
        state: The run now.

    Raises:
        GrowthError: Nothing can be grown at that layer now, or no seed is there.
    """
    layer = decision.site
    if decision.action == "germinate":
        wanted = Candidate(action="grow", placements=(Placement(site="", source=layer, target=layer),))
        place = settled(wanted, state, CandidateConfig(scored=False)).placements[0]
        return structs.replace(decision, site=place.site, blueprint=place.blueprint, size=place.size)
    sites = {view.site.name: view.site for view in state.sites}
    stages = ("holding",) if decision.action == "hold" else ("germinated", "training", "blending", "holding")
    found = [
        seed.seed_id
        for seed in state.seeds
        if seed.stage in stages and layer in (sites[seed.site].source, sites[seed.site].target)
    ]
    if not found:
        raise GrowthError(f"expected a seed at layer {layer!r} to {decision.action}, and there is none now")
    return structs.replace(decision, site=found[-1])
