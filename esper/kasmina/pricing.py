"""What seeds would cost, looked up: places that are alike share one price.

A price is counted by building a seed's branch without memory and running it, which takes milliseconds; a
policy asks for it at hundreds of equal layers, at a dozen sizes each.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from esper.kasmina.blueprints.registry import Cost, cost, get_blueprint
from esper.kasmina.find_sites import context_of
from esper.kasmina.layer import SEEDS, base_class
from esper.kasmina.sites import BuildContext, Site
from esper.kasmina.topology import ModelTopology

__all__ = ["Prices"]

_OWN = "esper.kasmina.blueprints."


class Prices:
    """Prices of seeds in one host.

    Args:
        model: The host.
        topology: Traced from it.
    """

    def __init__(self, model: nn.Module, topology: ModelTopology) -> None:
        self._model, self._topology = model, topology
        self._of_place: dict[tuple[str, str, int], Cost] = {}
        self._of_kind: dict[Hashable, Cost] = {}
        self._kinds: dict[str, Hashable] = {}

    def of(self, site: Site, blueprint: str, size: int) -> Cost:
        """Parameters, and forward FLOPs a sample, of a seed before it is built.

        Raises:
            GrowthError: Unknown blueprint, or it does not fit the site in this size.
        """
        place = (site.name, blueprint, size)
        if place not in self._of_place:
            entry = get_blueprint(blueprint)
            context = context_of(self._model, self._topology, site)
            if not entry.build.__module__.startswith(_OWN):
                self._of_place[place] = cost(entry, context, size)  # may depend on anything, names included
            else:
                kind = (self._kind(context), blueprint, size)
                if kind not in self._of_kind:
                    self._of_kind[kind] = cost(entry, context, size)
                self._of_place[place] = self._of_kind[kind]
        return self._of_place[place]

    def _kind(self, context: BuildContext) -> Hashable:
        """Everything about a place that Esper's own blueprints look at."""
        site = context.site
        if site.name not in self._kinds:
            self._kinds[site.name] = (
                *(site.kind, site.source_shape, site.target_shape, site.ops, site.functional, site.image),
                context.output_projections,
                _geometry(context.source_layer),
                _geometry(context.target_layer),
            )
        return self._kinds[site.name]


def _geometry(layer: nn.Module) -> Hashable:
    modules = tuple(
        (name, base_class(module), module.extra_repr())
        for name, module in layer.named_modules()
        if SEEDS not in name.split(".")
    )
    parameters = tuple(
        (name, tuple(p.shape)) for name, p in layer.named_parameters() if SEEDS not in name.split(".")
    )
    return modules, parameters
