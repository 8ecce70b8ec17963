"""What a host's shape says about it: widths, necks, and ways around them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.kasmina.sites import Site
    from esper.kasmina.topology import LayerInfo, ModelTopology
    from esper.tamiyo.state import GrowthState, SiteView

__all__ = [
    "WIDENING",
    "HiddenLayer",
    "LongBypass",
    "hidden_layers",
    "layers_in_series",
    "long_bypasses",
    "units",
]

WIDENING = ("widen", "conv_widen")
"""Blueprints that add units to a hidden layer."""


@dataclass(frozen=True)
class HiddenLayer:
    """A hidden layer that can be widened, as it stands now: grown units count.

    Attributes:
        view: The bypass site over it.
        blueprint: What widens it.
        width: Its units or channels.
        fan_in: Weights that one unit reads through, the bias included ((d_in + 1); patches for images).
        fan_out: Units of the layer that it feeds.
        neck: ``width`` over the smaller of the widest layer before it (the host's input included) and
            the widest behind it (the output included); below 1 the data has to squeeze through.
    """

    view: SiteView
    blueprint: str
    width: int
    fan_in: int
    fan_out: int
    neck: float

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.view.site.source


@dataclass(frozen=True)
class LongBypass:
    """A way around the hidden layers.

    Attributes:
        view: The site.
        blueprint: What can be laid along it.
        from_input: It starts at the host's own input.
        used: A seed that is in the model lies along it already.
    """

    view: SiteView
    blueprint: str
    from_input: bool
    used: bool


def units(shape: Sequence[int], image: bool) -> int:
    """Channels of a feature map's shape, else its last dimension; shapes leave out the batch."""
    return shape[0] if image else shape[-1]


def hidden_layers(state: GrowthState) -> list[HiddenLayer]:
    """Every hidden layer over which a widening bypass runs, available or not, in the order of the sites."""
    topology = state.topology
    widths = {layer.name: _grown_width(state, layer) for layer in topology.layers if not layer.block}
    found = []
    for view in state.sites:
        site = view.site
        blueprint = next((name for name in WIDENING if name in site.blueprints), None)
        if site.kind != "bypass" or blueprint is None or not _adjacent(site, topology):
            continue
        layer = topology.layer(site.source)
        weights = max(1, layer.num_parameters // max(1, units(layer.output_shape, layer.image)))
        inputs = max(1, units(layer.input_shape, layer.image))
        grown = sum(_grown_units(state, producer) for producer in _bypassed_into(state, site.source))
        before = [widths[name] for name in _reach(topology, site.source, forward=False)]
        before += [
            units(topology.layer(name).input_shape, topology.layer(name).image)
            for name in (site.source, *_reach(topology, site.source, forward=False))
            if topology.layer(name).reads_input
        ]
        behind = [widths[name] for name in _reach(topology, site.source, forward=True)]
        width = widths[site.source]
        neck = width / min(max(before, default=width), max(behind, default=width))
        fan_in = weights + weights // inputs * grown
        found.append(HiddenLayer(view, blueprint, width, fan_in, widths[site.target], neck))
    return found


def long_bypasses(state: GrowthState, blueprints: Sequence[str]) -> list[LongBypass]:
    """Every long bypass that one of ``blueprints`` fits (the first that does), those from the input first."""
    topology = state.topology
    taken = {seed.site for seed in state.seeds}
    found = []
    for view in state.sites:
        blueprint = next((name for name in blueprints if name in view.site.blueprints), None)
        if view.site.long and blueprint is not None:
            from_input = topology.layer(view.site.source).reads_input
            found.append(LongBypass(view, blueprint, from_input, view.site.name in taken))
    return sorted(found, key=lambda bypass: not bypass.from_input)


def layers_in_series(topology: ModelTopology) -> int:
    """Fewest layers that data passes from the host's input to an output; norms do not count.

    1 or 2 means that the host is well connected: a long bypass has nothing, or one hidden layer, to go
    around. A chain of three hidden layers gives 4.
    """
    leaves = [layer for layer in topology.layers if not layer.block]
    starts = [layer.name for layer in leaves if layer.reads_input]
    starts = starts or [layer.name for layer in leaves if not topology.producers(layer.name)]
    passed: dict[str, int] = {}
    # Layers stand producers first, so one pass settles every distance.
    for layer in leaves:
        before = [passed[e.source] for e in topology.producers(layer.name) if e.source in passed]
        if layer.name in starts:
            before.append(0)
        if before:
            passed[layer.name] = min(before) + ("Norm" not in layer.type)
    return min(
        (passed[layer.name] for layer in leaves if layer.is_output and layer.name in passed), default=0
    )


def _grown_units(state: GrowthState, view: SiteView) -> int:
    return sum(
        seed.size for seed in state.seeds if seed.site == view.site.name and seed.blueprint in WIDENING
    )


def _grown_width(state: GrowthState, layer: LayerInfo) -> int:
    """Units of a layer with those grown next to it; a layer that feeds two has its larger width."""
    over = [
        view
        for view in state.sites
        if view.site.kind == "bypass"
        and view.site.source == layer.name
        and _adjacent(view.site, state.topology)
    ]
    grown = max((_grown_units(state, view) for view in over), default=0)
    return units(layer.output_shape, layer.image) + grown


def _bypassed_into(state: GrowthState, target: str) -> list[SiteView]:
    return [
        view
        for view in state.sites
        if view.site.kind == "bypass" and view.site.target == target and _adjacent(view.site, state.topology)
    ]


def _adjacent(site: Site, topology: ModelTopology) -> bool:
    """Whether nothing but norms lies between source and target: a bypass over one hidden layer."""
    edges = {(edge.source, edge.target) for edge in topology.edges}
    return all(pair in edges for pair in pairwise((site.source, *site.through, site.target)))


def _reach(topology: ModelTopology, start: str, *, forward: bool) -> Iterable[str]:
    """Layers that data from ``start`` reaches, or that reach it."""
    found: dict[str, None] = {}
    stack = [start]
    while stack:
        name = stack.pop()
        edges = topology.consumers(name) if forward else topology.producers(name)
        for edge in edges:
            other = edge.target if forward else edge.source
            if other not in found:
                found[other] = None
                stack.append(other)
    return found
