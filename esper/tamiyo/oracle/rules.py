"""Fixed rules as choosers among candidates: what a learned policy has to beat. Each reads the decision point alone.

They are the policies of :mod:`esper.tamiyo.policies` put as one question, which candidate of this point, so they
have no schedule, and the size is the smallest or the largest that is offered. Their options are few and are
chosen on the validation split.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from esper.kasmina.topology import ModelTopology
from esper.tamiyo.graph.facts import Candidate, DecisionPoint
from esper.tamiyo.policies.expressivity import AROUND, ENOUGH_IN_SERIES
from esper.tamiyo.policies.shape import WIDENING, layers_in_series, units

__all__ = ["RULES", "Rule"]

Size = Literal["small", "large"]
_SIZES: tuple[Size, ...] = ("small", "large")
_WAIT = 0


@dataclass(frozen=True)
class Rule:
    """A rule with its options.

    Attributes:
        name: Of the rule.
        options: As text, to tell variants apart.
        choose: Decision point -> index of a candidate.
    """

    name: str
    options: str
    choose: Callable[[DecisionPoint], int]

    def __str__(self) -> str:
        return f"{self.name}({self.options})"


@dataclass(frozen=True)
class _Widening:
    """A candidate that adds units to one hidden layer; ``neck`` below 1: narrower than what is around it."""

    index: int
    layer: str
    width: int
    product: int
    parameters: int
    neck: float
    scored: bool
    share: float
    z: float


def wait(point: DecisionPoint) -> int:
    """Never do anything."""
    return _WAIT


def draw(point: DecisionPoint, *, seed: int) -> int:
    """Any available growth, uniformly; the draw follows from the run, the step and ``seed``."""
    growths = [index for index, _ in _offered(point, "grow")]
    mark = zlib.crc32(f"{seed}/{point.run.run_id}/{point.run.step}".encode())
    return growths[mark % len(growths)] if growths else _WAIT


def narrowest(point: DecisionPoint, *, size: Size) -> int:
    """Widen the narrowest hidden layer."""
    found = _widenings(point)
    return _sized([w for w in found if w.width == min(w.width for w in found)], size)


def cond(point: DecisionPoint, *, size: Size, ratio: float) -> int:
    """Widen the narrowest hidden layer if it is below ``ratio`` of the median width (GROWTH.md §6)."""
    widths = {w.layer: w.width for w in _widenings(point)}
    if not widths or min(widths.values()) >= ratio * statistics.median(widths.values()):
        return _WAIT
    return narrowest(point, size=size)


def shortcut(point: DecisionPoint, *, size: Size, prefer: str, least_layers: int) -> int:
    """Lay a long way around the hidden layers, if at least ``least_layers`` stand in series.

    From the host's own input where there is such a way, else the first that is offered (a language model's input
    is no number that a way around could start from). It is of the blueprint ``prefer`` where that fits there,
    hidden units (``widen``) or a linear map (``shortcut``).
    """
    if layers_in_series(point.topology) < least_layers:
        return _WAIT
    ways = [
        (index, candidate)
        for index, candidate in _offered(point, "grow")
        if len(candidate.placements) == 1
        and candidate.placements[0].long
        and candidate.placements[0].blueprint in AROUND
        and not _over_one_layer(point.topology, candidate)
    ]
    ways.sort(key=lambda way: not point.topology.layer(way[1].placements[0].source).reads_input)
    first = [way for way in ways if way[1].placements[0].site == ways[0][1].placements[0].site]
    preferred = [way for way in first if way[1].placements[0].blueprint == prefer]
    return _by_size(preferred or first, size)


def dimensions(point: DecisionPoint, *, size: Size) -> int:
    """Add units where (d_in + 1) x d_out is largest (GROWTH.md §5)."""
    found = _widenings(point)
    return _sized([w for w in found if w.product == max(w.product for w in found)], size)


def uniform(point: DecisionPoint, *, size: Size) -> int:
    """Widen several layers at once."""
    several = [
        (index, candidate)
        for index, candidate in _offered(point, "grow")
        if len(candidate.placements) > 1 and all(p.blueprint in WIDENING for p in candidate.placements)
    ]
    return _by_size(several, size)


def tokens_per_parameter(point: DecisionPoint, *, size: Size, above: float) -> int:
    """A transformer that sees more than ``above`` tokens a parameter has all its MLPs widened (GROWTH.md §8)."""
    if not point.run.transformer or point.run.tokens_per_parameter <= above:
        return _WAIT
    return uniform(point, size=size) or narrowest(point, size=size)  # of one block, the one MLP is all


def recycle(point: DecisionPoint, *, above: float) -> int:
    """Recycle the layer with most dormant units, if more than ``above`` of them are (GROWTH.md §9)."""
    dormancy = {signal.layer_id: signal.dormancy for signal in point.signals if not signal.seed_id}
    layers = [
        (dormancy.get(candidate.placements[0].target, 0.0), -index)
        for index, candidate in _offered(point, "recycle")
    ]
    share, index = max(layers, default=(0.0, 0))
    return -index if share > above else _WAIT


def expressivity(
    point: DecisionPoint, *, size: Size, least_share: float, least_z: float = 3.0, bad_shape: float = 0.5
) -> int:
    """Recycle what sleeps; else the best site whose whitened score clears its noise floor.

    The order of :class:`~esper.tamiyo.policies.expressivity.ExpressivityPolicy`: transformers by tokens per
    parameter; the way around first, where three or more layers stand in series. A site that could not be scored
    within its share of the FLOPs counts as clear where a layer is a neck.
    """
    if asleep := recycle(point, above=0.3):
        return asleep
    if point.run.transformer:
        return tokens_per_parameter(point, size=size, above=110.0)
    found = _widenings(point)
    neck = min(found, key=lambda w: w.neck, default=None)
    is_neck = neck is not None and neck.neck < bad_shape
    around = shortcut(point, size=size, prefer=AROUND[0], least_layers=ENOUGH_IN_SERIES)
    if around:
        scored = point.candidates[around].placements[0].score is not None
        share, z = _score(point.topology, point.candidates[around])
        if (share >= least_share and z >= least_z) if scored else is_neck:
            return around
    clear = [w for w in found if w.scored and w.share >= least_share and w.z >= least_z]
    if clear:
        best = max(w.share for w in clear)
        return _sized([w for w in clear if w.share == best], size)
    if neck is None or not is_neck or neck.scored:
        return _WAIT
    return _sized([w for w in found if w.layer == neck.layer], size)


def _offered(point: DecisionPoint, action: str) -> list[tuple[int, Candidate]]:
    return [
        (index, candidate)
        for index, candidate in enumerate(point.candidates)
        if candidate.action == action and not candidate.unavailable
    ]


def _widenings(point: DecisionPoint) -> list[_Widening]:
    """Every available candidate that widens one hidden layer, grown units counted in its width."""
    topology = point.topology
    found = []
    for index, candidate in _offered(point, "grow"):
        if len(candidate.placements) != 1 or not _over_one_layer(topology, candidate):
            continue
        placement = candidate.placements[0]
        layer, target = topology.layer(placement.source), topology.layer(placement.target)
        grown = sum(
            seed.size
            for seed in point.run.seeds
            if seed.site == placement.site and seed.blueprint in WIDENING
        )
        width = units(layer.output_shape, layer.image)
        product = layer.num_parameters // max(1, width) * units(target.output_shape, target.image)
        share, z = _score(topology, candidate)
        neck = _neck(topology, layer.name, width + grown)
        scored = placement.score is not None
        found.append(
            _Widening(index, layer.name, width + grown, product, candidate.parameters, neck, scored, share, z)
        )
    return found


def _neck(topology: ModelTopology, name: str, width: int) -> float:
    """Width over the smaller of the widest layer before and the widest behind; in and output count as layers."""
    leaves = [layer for layer in topology.layers if not layer.block]
    place = next(index for index, layer in enumerate(leaves) if layer.name == name)
    before = max(units(layer.input_shape, layer.image) for layer in leaves[: place + 1])
    behind = max(units(layer.output_shape, layer.image) for layer in leaves[place + 1 :])
    return width / max(1, min(before, behind))


def _over_one_layer(topology: ModelTopology, candidate: Candidate) -> bool:
    """Whether nothing but norms lies between the source and the target of a widening."""
    placement = candidate.placements[0]
    if placement.kind != "bypass" or placement.blueprint not in WIDENING:
        return False
    ahead, seen = [placement.source], set()
    while ahead:
        for edge in topology.consumers(ahead.pop()):
            if edge.target == placement.target:
                return True
            if "Norm" in topology.layer(edge.target).type and edge.target not in seen:
                seen.add(edge.target)
                ahead.append(edge.target)
    return False


def _score(topology: ModelTopology, candidate: Candidate) -> tuple[float, float]:
    """Excess over the directions that the seed could explain, and its z; zeros where it was not scored."""
    placement = candidate.placements[0]
    source, target = topology.layer(placement.source), topology.layer(placement.target)
    inputs = units(source.input_shape, source.image)
    directions = max(1, min(inputs, units(target.output_shape, target.image)))
    return (placement.score_excess or 0.0) / directions, placement.score_z or 0.0


def _sized(widenings: Sequence[_Widening], size: Size) -> int:
    """The smallest or largest of the first layer in ``widenings``; WAIT when there is none."""
    own = [w for w in widenings if w.layer == widenings[0].layer]
    pick = min if size == "small" else max
    return pick(own, key=lambda w: w.parameters).index if own else _WAIT


def _by_size(offered: Sequence[tuple[int, Candidate]], size: Size) -> int:
    pick = min if size == "small" else max
    return pick(offered, key=lambda pair: pair[1].parameters)[0] if offered else _WAIT


def _variants(choose: Callable[..., int], *options: dict[str, Any]) -> tuple[Rule, ...]:
    name = {"draw": "random"}.get(choose.__name__, choose.__name__)
    return tuple(
        Rule(name, ", ".join(f"{key}={value}" for key, value in chosen.items()), partial(choose, **chosen))
        for chosen in options
    )


def _sizes(**options: Any) -> list[dict[str, Any]]:
    return [{"size": size, **options} for size in _SIZES]


RULES: dict[str, tuple[Rule, ...]] = {
    "wait": _variants(wait, {}),
    "random": _variants(draw, {"seed": 0}),
    "narrowest": _variants(narrowest, *_sizes()),
    "cond": _variants(cond, *(o for ratio in (0.2, 0.35, 0.5, 0.7) for o in _sizes(ratio=ratio))),
    "shortcut": _variants(
        shortcut,
        *(
            o
            for least in (0, 3, 4)
            for prefer in AROUND
            for o in _sizes(prefer=prefer, least_layers=least)
        ),
    ),
    "dimensions": _variants(dimensions, *_sizes()),
    "uniform": _variants(uniform, *_sizes()),
    "tokens_per_parameter": _variants(
        tokens_per_parameter, *(o for above in (60.0, 110.0, 200.0) for o in _sizes(above=above))
    ),
    "recycle": _variants(recycle, *({"above": above} for above in (0.1, 0.2, 0.3, 0.5))),
    "expressivity": _variants(
        expressivity, *(o for share in (0.0, 0.025, 0.1) for o in _sizes(least_share=share))
    ),
}  # fmt: skip
"""Rule name -> its variants; which one counts is decided on the validation split."""
