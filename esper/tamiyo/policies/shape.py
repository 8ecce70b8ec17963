"""What a host's shape says about it: widths, necks, and ways around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
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
    """Channels of a feature map's shape, else its last dimension; shapes leave out the batch.

    A number a sample is one unit.
    """
    return (shape[0] if image else shape[-1]) if shape else 1


def hidden_layers(state: GrowthState) -> list[HiddenLayer]:
    """Every hidden layer over which a widening bypass runs, available or not, in the order of the sites."""
    topology = state.topology
    # A bypass over one hidden layer, norms apart, shares the layer's width out and its target's fan-in.
    over = [view for view in state.sites if view.site.kind == "bypass" and _adjacent(view.site, topology)]
    grown = _grown_units(state)
    widths = {layer.name: _units_out(layer) for layer in topology.layers if not layer.block}
    grown_into: Counter[str] = Counter()
    for view in over:
        site = view.site
        units_here = _units_out(topology.layer(site.source)) + grown[site.name]
        widths[site.source] = max(widths[site.source], units_here)  # one that feeds two has its larger width
        grown_into[site.target] += grown[site.name]
    before, behind = _widest_before(topology, widths), _widest_behind(topology, widths)
    found = []
    for view in over:
        site = view.site
        blueprint = next((name for name in WIDENING if name in site.blueprints), None)
        if blueprint is None:
            continue
        layer = topology.layer(site.source)
        weights = max(1, layer.num_parameters // max(1, units(layer.output_shape, layer.image)))
        inputs = max(1, units(layer.input_shape, layer.image))
        width = widths[site.source]
        neck = width / min(before[site.source] or width, behind[site.source] or width)
        fan_in = weights + weights // inputs * grown_into[site.source]
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


def _grown_units(state: GrowthState) -> Counter[str]:
    """Site -> hidden units that seeds have added there."""
    found: Counter[str] = Counter()
    for seed in state.seeds:
        if seed.blueprint in WIDENING:
            found[seed.site] += seed.size
    return found


def _units_out(layer: LayerInfo) -> int:
    return units(layer.output_shape, layer.image)


def _adjacent(site: Site, topology: ModelTopology) -> bool:
    """Whether nothing but norms lies between source and target: a bypass over one hidden layer."""
    return all(topology.feeds(*pair) for pair in pairwise((site.source, *site.through, site.target)))


def _widest_before(topology: ModelTopology, widths: Mapping[str, int]) -> dict[str, int]:
    """Layer -> the widest layer whose data reaches it, the host's input included; 0 where there is none."""
    found: dict[str, int] = {}
    for layer in topology.layers:  # producers stand first, so one pass settles all
        if not layer.block:
            seen = [max(widths[e.source], found[e.source]) for e in topology.producers(layer.name)]
            own = units(layer.input_shape, layer.image) if layer.reads_input else 0
            found[layer.name] = max([own, *seen])
    return found


def _widest_behind(topology: ModelTopology, widths: Mapping[str, int]) -> dict[str, int]:
    """Layer -> the widest layer that its data reaches; 0 where there is none."""
    found: dict[str, int] = {}
    for layer in reversed(topology.layers):
        if not layer.block:
            seen = [max(widths[e.target], found[e.target]) for e in topology.consumers(layer.name)]
            found[layer.name] = max(seen, default=0)
    return found
