"""Which places of a host are worth offering: chosen once a run by cheap criteria, and their prices."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from esper.tamiyo.graph.sizing import PriceCurves
from esper.tamiyo.policies.shape import WIDENING, layers_in_series

if TYPE_CHECKING:
    from esper.kasmina.sites import Site
    from esper.kasmina.topology import ModelTopology
    from esper.tamiyo.graph.candidate_config import CandidateConfig
    from esper.tamiyo.state import GrowthState

__all__ = ["HostPlan"]


class HostPlan:
    """The places of one host besides its single hidden layers, whose width changes as they grow.

    Give the same plan at every decision point of a run: another host or other options start it afresh.

    Attributes:
        curves: Prices.
        long: Sites of long bypasses, those from the host's input first; indices into the state's sites.
        stacks: Blocks after which a copy may stand, at equal distances.
        beside: Sites beside layers (or around a single one) and a blueprint each, at the narrowest targets
            first, and one blueprint at every place before a second.
        series: Fewest layers between input and output.
    """

    def __init__(self) -> None:
        self.curves = PriceCurves()
        self.long: list[int] = []
        self.stacks: list[int] = []
        self.beside: list[tuple[int, str]] = []
        self.series = 0
        self._topology: ModelTopology | None = None
        self._config: CandidateConfig | None = None

    def follow(self, state: GrowthState, config: CandidateConfig, over: Collection[str]) -> None:
        """See to it that the plan is one for ``state``.

        Args:
            state: Any decision point of the run.
            config: Options.
            over: Sites that run over a single hidden layer.
        """
        if state.topology is self._topology and config == self._config:
            return
        self._topology, self._config = state.topology, config
        sites = [view.site for view in state.sites]
        self.series = layers_in_series(state.topology)
        self.long = self._long(state, config, over)
        stacks = [i for i, site in enumerate(sites) if "stack" in fitting(site, config)]
        most = config.max_stacks
        self.stacks = (
            stacks if len(stacks) <= most else [stacks[i * len(stacks) // most] for i in range(most)]
        )
        wanted: list[tuple[int, int, int, str]] = []
        for at, site in enumerate(sites):
            if site.kind != "stack" and (site.name in over or not site.long):
                names = [name for name in fitting(site, config) if name not in WIDENING]
                wanted += [(i, site.target_units, at, name) for i, name in enumerate(names)]
        wanted.sort()
        self.beside = [(at, name) for _, _, at, name in wanted[: config.max_beside]]

    def _long(self, state: GrowthState, config: CandidateConfig, over: Collection[str]) -> list[int]:
        if not config.shortcut:
            return []
        sites = [view.site for view in state.sites]
        found = [i for i, site in enumerate(sites) if site.long and site.name not in over]
        found.sort(key=lambda i: not state.topology.layer(sites[i].source).reads_input)
        return found[: config.max_long]


def fitting(site: Site, config: CandidateConfig) -> list[str]:
    """The blueprints that are offered at ``site``, most wanted first."""
    return [
        name
        for name in config.blueprints
        if name in site.blueprints and (config.shortcut or not site.long or name in WIDENING)
    ]
