"""Everything that is worth deciding between at one decision point.

Order, always the same: wait; all hidden layers widened alike; long bypasses; single hidden layers widened;
stacks; what lies beside single layers; recycling; culls; holds. What may not be chosen now stays in the list
with the reason, so that its place in the model can be seen; its size is then left open.

On a host with more places than :class:`CandidateConfig` allows, cheap criteria choose: long bypasses always
(those from the host's own input first), hidden layers by how narrow a neck they are, stacks at equal
distances (their position does not matter, GROWTH.md §8), and places beside layers by the target's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from esper.errors import GrowthError
from esper.kasmina.blueprints.registry import Cost
from esper.tamiyo.graph.candidate_config import CandidateConfig
from esper.tamiyo.graph.facts import WAIT, Candidate, CandidateAction, Placement
from esper.tamiyo.graph.plan import HostPlan, fitting
from esper.tamiyo.policies.dormant import recyclable
from esper.tamiyo.policies.shape import units
from esper.tamiyo.policies.sizes import MAX_SIZE, Fit, Room

if TYPE_CHECKING:
    from esper.kasmina.expressivity import SiteScore
    from esper.kasmina.sites import Site
    from esper.tamiyo.state import GrowthState, SeedView, SiteView

__all__ = ["CandidateConfig", "candidates"]

ENOUGH_IN_SERIES = 3
"""Layers in series from which on long bypasses are scored: before, there is nothing to lead around."""


def candidates(
    state: GrowthState,
    config: CandidateConfig | None = None,
    *,
    plan: HostPlan | None = None,
    recycled: Mapping[str, int] | None = None,
) -> tuple[Candidate, ...]:
    """List what could be done, WAIT first.

    Args:
        state: The decision point; its ``score`` is asked at most once, and only where something that is
            scored can be grown.
        config: Options; the defaults when None.
        plan: What earlier decision points of the same run found out about places and prices.
        recycled: Layer -> step at which it was last recycled: not again before it was measured since.
    """
    config = config or CandidateConfig()
    finder = _Finder(state, config, plan or HostPlan())
    grow = list(finder.grow())
    keep = list(finder.recycle(recycled or {}))
    for seed in state.seeds:
        if seed.stage != "fossilized":
            keep.append(finder.about(seed, "cull"))
    keep += [finder.about(seed, "hold") for seed in state.seeds if seed.stage == "holding"]
    # Many seeds at once (an adapter at every layer) may not crowd out all growth.
    keep = keep[: config.max_candidates // 2]
    return finder.scored((WAIT, *grow[: config.max_candidates - 1 - len(keep)], *keep))


class _Finder:
    """The candidates of one state."""

    def __init__(self, state: GrowthState, config: CandidateConfig, plan: HostPlan) -> None:
        self.state, self.config = state, config
        self.room = Room.left(state)
        self.closed = _closed(state)
        self.plan = plan
        plan.follow(state, config)

    def grow(self) -> Iterator[Candidate]:
        """Whatever adds something."""
        config, plan, sites = self.config, self.plan, self.state.sites
        if plan.alike:
            yield from self._sized([sites[i] for i in plan.alike], plan.widens, config.shares)
        for i in plan.long:
            for name in fitting(sites[i].site, config):
                yield from self._sized([sites[i]], name, config.shares)
        for i, name in plan.narrow:
            yield from self._sized([sites[i]], name, config.shares)
        for i in plan.stacks:
            yield from self._sized([sites[i]], "stack", (1.0,))
        for i, name in plan.beside:
            yield from self._sized([sites[i]], name, (1.0,))

    def recycle(self, recycled: Mapping[str, int]) -> Iterator[Candidate]:
        """Inner layers with dormant units, in the order of the topology."""
        state, topology = self.state, self.state.topology
        grown_from = {seed.site for seed in state.seeds}
        read_by_seeds = {view.site.source for view in state.sites if view.site.name in grown_from}
        least, most = self.config.min_dormancy, self.config.max_recycled
        inner = [layer.name for layer in topology.layers if not (layer.block or layer.is_output)]
        dormancy = {name: state.health[name].dormancy for name in inner if name in state.health}
        why: dict[str, str] = {}
        free = 0
        for name in sorted((n for n in dormancy if dormancy[n] > least), key=lambda n: -dormancy[n]):
            if free == most:
                break
            if not recyclable(topology, name, read_by_seeds):
                why[name] = f"what reads the units of {name} is not dense layers of its kind alone"
            else:
                free += 1
                unchanged = state.health[name].step <= recycled.get(name, -1)
                why[name] = (
                    f"{name} was not measured since it was recycled at step {recycled[name]}"
                    if unchanged
                    else ""
                )
        closed = [name for name in why if why[name]]
        for name in closed[max(0, most - free) :]:
            del why[name]
        for name in inner:
            if name in why:
                place = Placement(site="", source=name, target=name)
                yield Candidate(action="recycle", placements=(place,), unavailable=why[name])

    def about(self, seed: SeedView, action: CandidateAction) -> Candidate:
        """What may be done about a seed that is on its way."""
        site = next(view.site for view in self.state.sites if view.site.name == seed.site)
        gone = action == "cull"
        cost = self.state.cost(seed.site, seed.blueprint, seed.size) if gone else Cost(0, 0)
        return Candidate(
            action=action,
            placements=(_placement(site, seed.blueprint, seed.size),),
            seed_id=seed.seed_id,
            parameters=-cost.parameters,
            flops=-cost.flops,
        )

    def scored(self, found: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """``found`` with the scores of those bypasses that are scored."""
        scores = self._scores(found) if self.config.scored and not self.state.transformer else {}
        if not scores:
            return tuple(found)
        return tuple(_with_scores(c, scores) if c.action == "grow" else c for c in found)

    def _sized(self, views: Sequence[SiteView], name: str, shares: Sequence[float]) -> Iterator[Candidate]:
        """A candidate for every different size that ``shares`` of the budget buy; else one that says why none."""
        reason = self.closed or _occupied(views) or self._too_many(len(views))
        fits = [] if reason else self._fits(views, name, shares)
        for size, cost in fits:
            places = tuple(_placement(view.site, name, size) for view in views)
            yield Candidate(action="grow", placements=places, parameters=cost.parameters, flops=cost.flops)
        if not fits:
            left = f"{self.state.parameters_left} parameters and {self.state.flops_left:.3g} training FLOPs"
            yield Candidate(
                action="grow",
                placements=tuple(_placement(view.site, name, 0) for view in views),
                unavailable=reason or f"no size worth having fits the {left} that are left",
            )

    def _fits(self, views: Sequence[SiteView], name: str, shares: Sequence[float]) -> list[Fit]:
        places = [(view.site.name, name) for view in views]
        most = min(_most(view.site, name) for view in views)
        least = min(self.config.min_size, most)
        found: list[Fit] = []
        for share in sorted(shares):
            fit = self.plan.curves.largest(self.state, places, _share(self.room, share), most=most)
            if fit is None or fit in found:
                continue
            if fit.size >= least or self.plan.curves.ends_below(self.state, places[0], least):
                found.append(fit)
        return found

    def _too_many(self, count: int) -> str:
        germinations, seeds = self.state.germinations_left, self.state.seeds_left
        if count <= min(germinations, seeds):
            return ""
        which = f"{germinations} germinations" if germinations < seeds else f"{seeds} seeds alive"
        return f"{count} seeds at once are more than the {which} that are left"

    def _scores(self, found: Sequence[Candidate]) -> dict[str, SiteScore]:
        around = self.plan.series >= ENOUGH_IN_SERIES
        names = {
            place.site: None
            for candidate in found
            if candidate.action == "grow" and not candidate.unavailable and len(candidate.placements) == 1
            for place in candidate.placements
            if place.kind == "bypass" and (place.site in self.plan.over or around)
        }
        if not names:
            return {}
        try:
            return self.state.score(list(names), self.config.score_size)
        except GrowthError:  # beyond its share of the FLOPs, or no gradient: the features say "not scored"
            return {}


def _closed(state: GrowthState) -> str:
    """Why nothing may grow at this decision point."""
    if not state.window_open:
        return "the growth window is closed"
    if state.parameters_left < 1:
        return "the parameter budget is used up"
    return "" if state.flops_left > 0 else "the FLOPs budget is used up"


def _occupied(views: Sequence[SiteView]) -> str:
    taken = [view for view in views if view.unavailable]
    if not taken:
        return ""
    first = f"{taken[0].site.name} is {taken[0].unavailable}"
    return first if len(views) == 1 else f"{len(taken)} of {len(views)} places are not free: {first}"


def _share(room: Room, share: float) -> Room:
    return Room(int(room.parameters * share), room.training_flops * share, room.samples)


def _most(site: Site, blueprint: str) -> int:
    """Largest size that can do more than a smaller one, as far as the registry does not know it itself."""
    if blueprint != "lowrank" or site.functional:
        return MAX_SIZE
    return max(1, min(units(site.source_shape, site.image), site.target_units))


def _placement(site: Site, blueprint: str, size: int) -> Placement:
    return Placement(
        site=site.name,
        source=site.source,
        target=site.target,
        kind=site.kind,
        blueprint=blueprint,
        size=size,
        long=site.long,
    )


def _with_scores(candidate: Candidate, scores: dict[str, SiteScore]) -> Candidate:
    places = [_with_score(place, scores.get(place.site)) for place in candidate.placements]
    return structs.replace(candidate, placements=tuple(places))


def _with_score(place: Placement, score: SiteScore | None) -> Placement:
    if score is None:
        return place
    return structs.replace(place, score=score.score, score_excess=score.excess, score_z=score.z)
