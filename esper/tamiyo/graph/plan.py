"""Which places of a host are worth offering, chosen by cheap criteria once a run, and their prices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.tamiyo.graph.sizing import PriceCurves
from esper.tamiyo.policies.shape import WIDENING, hidden_layers, layers_in_series

if TYPE_CHECKING:
    from esper.kasmina.sites import Site
    from esper.kasmina.topology import ModelTopology
    from esper.tamiyo.graph.candidate_config import CandidateConfig
    from esper.tamiyo.state import GrowthState

__all__ = ["HostPlan", "fitting"]


class HostPlan:
    """The places of one host, as indices into the sites of its states.

    Give the same plan at every decision point of a run: another host or other options start it afresh, and
    hidden layers are looked at again when one of them has grown.

    Attributes:
        curves: Prices.
        over: Sites that run over a single hidden layer, by name.
        alike: Those of all hidden layers, if there are several and one blueprint widens them all; else empty.
        widens: That blueprint; empty where there is none.
        narrow: The narrowest hidden layers, and what widens each, in the order of the sites.
        long: Long bypasses, those from the host's input first.
        stacks: Blocks after which a copy may stand, at equal distances.
        beside: Places beside layers (or around a single one) and a blueprint each, at the narrowest targets
            first, and one blueprint at every place before a second.
        series: Fewest layers between input and output.
    """

    def __init__(self) -> None:
        self.curves = PriceCurves()
        self.over: frozenset[str] = frozenset()
        self.alike: list[int] = []
        self.widens = ""
        self.narrow: list[tuple[int, str]] = []
        self.long: list[int] = []
        self.stacks: list[int] = []
        self.beside: list[tuple[int, str]] = []
        self.series = 0
        self._topology: ModelTopology | None = None
        self._config: CandidateConfig | None = None
        self._grown: list[tuple[str, int]] = []

    def follow(self, state: GrowthState, config: CandidateConfig) -> None:
        """See to it that the plan is one for ``state``."""
        grown = [(seed.site, seed.size) for seed in state.seeds if seed.blueprint in WIDENING]
        known = state.topology is self._topology and config == self._config
        if not known or grown != self._grown:
            self._look_at_hidden(state, config)
        if not known:
            self._look_at_others(state, config)
        self._topology, self._config, self._grown = state.topology, config, grown

    def _look_at_hidden(self, state: GrowthState, config: CandidateConfig) -> None:
        layers = hidden_layers(state)
        at = {view.site.name: i for i, view in enumerate(state.sites)}
        self.over = frozenset(layer.view.site.name for layer in layers)
        wanted = [layer for layer in layers if layer.blueprint in config.blueprints]
        by_neck = sorted(wanted, key=lambda layer: (layer.neck, layer.width))  # stable: the first of equals
        narrow = ((at[layer.view.site.name], layer.blueprint) for layer in by_neck[: config.max_sites])
        self.narrow = sorted(narrow)
        kinds = {layer.blueprint for layer in wanted} if len(wanted) > 1 else set()
        self.widens = kinds.pop() if len(kinds) == 1 else ""
        self.alike = [at[layer.view.site.name] for layer in wanted] if self.widens else []

    def _look_at_others(self, state: GrowthState, config: CandidateConfig) -> None:
        sites = [view.site for view in state.sites]
        self.series = layers_in_series(state.topology)
        self.long = self._long(state, config)
        stacks = [i for i, site in enumerate(sites) if "stack" in fitting(site, config)]
        most = config.max_stacks
        self.stacks = (
            stacks if len(stacks) <= most else [stacks[i * len(stacks) // most] for i in range(most)]
        )
        wanted: list[tuple[int, int, int, str]] = []
        for at, site in enumerate(sites):
            if site.kind != "stack" and (site.name in self.over or not site.long):
                names = [name for name in fitting(site, config) if name not in WIDENING]
                wanted += [(i, site.target_units, at, name) for i, name in enumerate(names)]
        wanted.sort()
        self.beside = [(at, name) for _, _, at, name in wanted[: config.max_beside]]

    def _long(self, state: GrowthState, config: CandidateConfig) -> list[int]:
        if not config.shortcut:
            return []
        sites = [view.site for view in state.sites]
        found = [i for i, site in enumerate(sites) if site.long and site.name not in self.over]
        found.sort(key=lambda i: not state.topology.layer(sites[i].source).reads_input)
        return found[: config.max_long]


def fitting(site: Site, config: CandidateConfig) -> list[str]:
    """The blueprints that are offered at ``site``, most wanted first."""
    return [
        name
        for name in config.blueprints
        if name in site.blueprints and (config.shortcut or not site.long or name in WIDENING)
    ]
