"""Features of candidates, aggregated over their placements."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.tamiyo.graph.features import CANDIDATE_FEATURES, FAMILIES, Column, columns, log_ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.tamiyo.graph.facts import Candidate, Placement, RunFacts
    from esper.tamiyo.graph.layout import Layout
    from esper.tamiyo.graph.structure_features import Grown
    from esper.tamiyo.graph.trends import SignalWindow

__all__ = ["Places", "candidate_features"]

_STAGES = ("germinated", "training", "blending", "holding")
_ACTIONS = ("wait", "grow", "cull", "recycle", "hold")


class Places(NamedTuple):
    """All placements of all candidates, one after another.

    Attributes:
        placements: Themselves [M].
        candidate: The candidate of each [M].
        nodes: Source and target node of each [2, M].
        num: Candidates, C.
    """

    placements: Sequence[Placement]
    candidate: NDArray[np.int64]
    nodes: NDArray[np.int64]
    num: int

    @classmethod
    def of(cls, found: Sequence[Candidate], layout: Layout) -> Places:
        """Find the nodes of every placement; raises MessageError for a layer that the topology lacks."""
        each = [(i, place) for i, candidate in enumerate(found) for place in candidate.placements]
        pairs = [
            (layout.node(place.source, reads=True), layout.node(place.target, reads=False))
            for _, place in each
        ]
        return cls(
            [place for _, place in each],
            np.array([i for i, _ in each], np.int64),
            np.array(pairs, np.int64).reshape(-1, 2).T,
            len(found),
        )

    def share(self, values: Sequence[bool] | NDArray[np.bool_]) -> Column:
        """Share of each candidate's placements for which ``values`` [M] holds [C]."""
        return self.mean(np.asarray(values, np.float64))

    def mean(self, values: Column, where: NDArray[np.bool_] | None = None) -> Column:
        """Mean of ``values`` [M] over each candidate's placements (those ``where`` names) [C]; 0 of none."""
        weights = np.ones(len(values)) if where is None else where.astype(np.float64)
        total = np.bincount(self.candidate, weights=values * weights, minlength=self.num)
        count = np.bincount(self.candidate, weights=weights, minlength=self.num)
        return total / np.maximum(count, 1.0)

    def least(self, values: Column) -> Column:
        """Smallest of ``values`` [M] over each candidate's placements [C]; 0 where there are none."""
        found = np.full(self.num, np.inf)
        np.minimum.at(found, self.candidate, values)
        return np.where(np.isfinite(found), found, 0.0)

    def most(self, values: Column) -> Column:
        """Largest of ``values`` [M] over each candidate's placements [C]; 0 where there are none."""
        return -self.least(-values)


def candidate_features(
    found: Sequence[Candidate],
    places: Places,
    run: RunFacts,
    layout: Layout,
    grown: Grown,
    window: SignalWindow,
) -> NDArray[np.float32]:
    """Features of all candidates [C, F], as :data:`~esper.tamiyo.graph.features.CANDIDATE_FEATURES` names them."""
    values = (
        {action: [c.action == action for c in found] for action in _ACTIONS}
        | _what(places)
        | _price(found, run, layout)
        | _where(places, layout, grown, window)
        | _scores(places, layout)
        | _seeds(found, places, run)
    )
    return columns(CANDIDATE_FEATURES, values, len(found))


def _what(places: Places) -> dict[str, Column]:
    blueprints = [place.blueprint for place in places.placements]
    families = {name: places.share([b == name for b in blueprints]) for name in FAMILIES}
    count = np.bincount(places.candidate, minlength=places.num)
    sizes = np.array([place.size for place in places.placements], np.float64)
    return families | {
        "other": places.share([b != "" and b not in FAMILIES for b in blueprints]),
        "open": places.share([b == "" for b in blueprints]),
        "parallel": places.share([place.kind == "parallel" for place in places.placements]),
        "bypass": places.share([place.kind == "bypass" for place in places.placements]),
        "long": places.share([place.long for place in places.placements]),
        "placements": np.log1p(count),
        "size": np.log2(1.0 + places.mean(sizes)) / 8.0,
    }


def _price(found: Sequence[Candidate], run: RunFacts, layout: Layout) -> dict[str, Column]:
    parameters = np.array([c.parameters for c in found], np.float64)
    flops = np.array([c.flops for c in found], np.float64)
    now = float(run.num_parameters)
    rise = log_ratio(np.maximum(now + parameters, 1.0), now)
    added = np.maximum(parameters, 0.0)
    return {
        "parameters": rise,
        "cost": 3.0 * run.price * rise,
        "flops": np.sign(flops) * np.log1p(np.abs(flops) / max(1, layout.flops)),
        "budget_share": np.minimum(1.0, added / max(1, run.parameters_left)),
    }


def _where(places: Places, layout: Layout, grown: Grown, window: SignalWindow) -> dict[str, Column]:
    source, target = places.nodes
    widths = grown.widths[source]
    sizes = np.array([place.size for place in places.placements], np.float64)
    dormancy = window.last("dormancy")
    pairs = np.unique(places.candidate * max(1, layout.num_nodes) + source)
    touched = np.bincount(pairs // max(1, layout.num_nodes), minlength=places.num)
    return {
        "covered": touched / max(1, layout.num_nodes),
        "widening": places.mean(log_ratio(widths + sizes, widths)),
        "source_width": places.mean(np.log2(1.0 + widths)) / 8.0,
        "source_over_median": places.least(grown.over_median[source]) / 2.0,
        "neck": places.least(grown.necks[source]) / 2.0,
        "source_depth": places.mean(grown.depth[source]),
        "span": places.mean(grown.depth[target] - grown.depth[source]),
        "to_output": places.share(layout.is_output[target]),
        "health": places.least(np.minimum(window.mean_health[source], window.mean_health[target])),
        "dormancy": places.most(np.maximum(dormancy[source], dormancy[target])),
    }


def _scores(places: Places, layout: Layout) -> dict[str, Column]:
    """As policy ``expressivity`` uses them: the excess over the directions that a seed could explain at all."""
    source, target = places.nodes
    scored = np.array([place.score is not None for place in places.placements], bool)
    score = np.array([place.score or 0.0 for place in places.placements])
    excess = np.array([place.score_excess or 0.0 for place in places.placements])
    z = np.array([place.score_z or 0.0 for place in places.placements])
    directions = np.maximum(1.0, np.minimum(layout.inputs[source], layout.widths[target]))
    return {
        "scored": places.share(scored),
        "score": places.mean(np.log1p(np.maximum(score, 0.0)), scored),
        "score_excess": places.mean(np.clip(excess / directions, -1.0, 1.0), scored),
        "score_z": places.mean(np.tanh(z / 10.0), scored),
    }


def _seeds(found: Sequence[Candidate], places: Places, run: RunFacts) -> dict[str, Column]:
    seeds = {seed.seed_id: seed for seed in run.seeds}
    about = [seeds.get(c.seed_id) if c.seed_id else None for c in found]
    taken = {seed.site for seed in run.seeds}
    stages = {
        stage: np.array([seed is not None and seed.stage == stage for seed in about], np.float64)
        for stage in _STAGES
    }
    given = [None if seed is None else seed.contribution for seed in about]
    worth = np.array([0.0 if x is None else x for x in given])
    loss = abs(run.train_losses[-1]) if run.train_losses else 1.0
    share = 10.0 * worth / max(loss, 1e-12)
    return stages | {
        "occupied": places.share([place.site in taken for place in places.placements]),
        "measured": np.array([x is not None for x in given], np.float64),
        "contribution": np.sign(share) * np.log1p(np.abs(share)),
    }
