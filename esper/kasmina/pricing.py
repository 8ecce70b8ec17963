"""What seeds would cost, looked up: places that are alike share one price.

A price is counted by building a seed's branch without memory and running it, which takes milliseconds; a
policy asks for it at hundreds of equal layers, at a dozen sizes each.
"""

from __future__ import annotations

from collections.abc import Hashable

from msgspec import structs
from torch import nn

from esper.kasmina.blueprints.registry import Cost, cost, get_blueprint
from esper.kasmina.find_sites import context_of
from esper.kasmina.layer import SEEDS, base_class
from esper.kasmina.sites import Site
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
        self._kinds: dict[str, int] = {}
        self._numbers: dict[Hashable, int] = {}

    def of(self, site: Site, blueprint: str, size: int) -> Cost:
        """Parameters, and forward FLOPs a sample, of a seed before it is built.

        Raises:
            GrowthError: Unknown blueprint, or it does not fit the site in this size.
        """
        place = (site.name, blueprint, size)
        if place not in self._of_place:
            entry = get_blueprint(blueprint)
            if not entry.build.__module__.startswith(_OWN):
                context = context_of(self._model, self._topology, site)
                self._of_place[place] = cost(entry, context, size)  # may depend on anything, names included
            else:
                kind = (self._kind(site), blueprint, size)
                if kind not in self._of_kind:
                    context = context_of(self._model, self._topology, site)
                    self._of_kind[kind] = cost(entry, context, size)
                self._of_place[place] = self._of_kind[kind]
        return self._of_place[place]

    def _kind(self, site: Site) -> int:
        """A number for everything about a place that Esper's own blueprints look at."""
        if site.name not in self._kinds:
            context = context_of(self._model, self._topology, site)
            described = (
                structs.replace(site, name="", source="", target="", through=("",) * len(site.through)),
                context.output_projections,
                _geometry(context.source_layer),
                _geometry(context.target_layer),
            )
            # By number, because to hash a description takes longer than to look a price up.
            self._kinds[site.name] = self._numbers.setdefault(described, len(self._numbers))
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
