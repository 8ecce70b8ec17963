"""What could grow in a model, what could not and why, and what it would cost; nothing is grown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.body import Body, detach
from esper.kasmina.layer import SEEDS, SeedLayer, base_class
from esper.kasmina.sites import Site
from esper.kasmina.structure import has_seeds
from esper.kasmina.topology import ModelTopology
from esper.kasmina.trace import trace

__all__ = ["Diagnosis", "Price", "SitePrices", "diagnose"]

_USUAL = ("widen", "conv_widen", "lowrank", "depthwise", "stack", "shortcut")
"""What policies lay at a site, the first that fits: hidden units over a layer, a low rank beside one."""


class Price(NamedTuple):
    """What one seed would cost: parameters, and forward FLOPs a sample."""

    blueprint: str
    size: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class SitePrices:
    """One site with the price of the blueprint that is usual there, and of the cheapest, at their default sizes."""

    site: Site
    usual: Price
    cheapest: Price


@dataclass(frozen=True)
class Diagnosis:
    """What a traced model is made of, as far as growth is concerned.

    Attributes:
        num_parameters: Of the host.
        num_trained: Of these, those that are trained: a frozen part does not count.
        num_grown: Of seeds that are in the model already.
        flops: FLOPs of one forward pass of one sample of the host.
        sites: Where seeds can attach.
        refused: Layer -> why it cannot carry a seed, to stand behind "because it is".
        faults: Blueprint and site -> why that blueprint, though it says that it fits, cannot be built there.
    """

    num_parameters: int
    num_trained: int
    num_grown: int
    flops: int
    sites: tuple[SitePrices, ...]
    refused: dict[str, str]
    faults: dict[str, str]


def diagnose(model: nn.Module, run: Callable[[Any], Tensor], batch: Any) -> Diagnosis:
    """Trace ``model``, find its sites and price them.

    Args:
        model: A copy that is not needed afterwards: its layers become seed layers.
        run: Runs ``model`` on a batch and returns a scalar that depends on it; called a few times, in training and
            in evaluation mode, also on parts of ``batch``.
        batch: Tensors in any nesting of tuples, lists and dicts.

    Raises:
        AttachError: The loss has no graph to learn the data flow from.
    """
    if any(isinstance(module, SeedLayer) for module in model.modules()) and not has_seeds(model):
        detach(model)
    body = Body(model, trace(model, lambda: run(batch)))
    body.measure_layout(run, batch)
    body.check_evaluation(lambda: run(batch))
    topology = body.topology
    sites: list[SitePrices] = []
    faults: dict[str, str] = {}
    for site in body.sites:
        prices = _prices(body, site, faults)
        if prices:
            usual = next((prices[name] for name in _USUAL if name in prices), next(iter(prices.values())))
            sites.append(SitePrices(site, usual, min(prices.values(), key=lambda p: (p.parameters, p.flops))))
    return Diagnosis(
        num_parameters=topology.num_parameters,
        num_trained=sum(
            p.numel()
            for name, p in model.named_parameters()
            if p.requires_grad and SEEDS not in name.split(".")
        ),
        num_grown=body.num_parameters - topology.num_parameters,
        flops=sum(layer.flops for layer in topology.layers if not layer.block),
        sites=tuple(sites),
        refused=_refused(model, topology, body, sites),
        faults=faults,
    )


def _prices(body: Body, site: Site, faults: dict[str, str]) -> dict[str, Price]:
    found = {}
    for name in site.blueprints:
        try:
            size = body.default_size(site, name)
            found[name] = Price(name, size, *body.cost(site, name, size))
        except GrowthError as error:  # a blueprint of the user's that gives another shape than it should
            faults[f"{name} at {site.name}"] = str(error)
    return found


def _refused(
    model: nn.Module, topology: ModelTopology, body: Body, sites: list[SitePrices]
) -> dict[str, str]:
    """Every layer with parameters of its own to which no seed can add, with the reason."""
    growing = {entry.site.target for entry in sites}
    around = {outer for name in growing for outer in _outer(name)}
    known = growing | around
    found = {name: why for name, why in body.refused.items() if name not in known}
    leaves = {layer.name for layer in topology.layers if not layer.block}
    for name, module in model.named_modules():
        if not name or name in known or name in found or SEEDS in name.split("."):
            continue
        inside = any(outer in leaves or outer in found for outer in _outer(name))
        if inside or not any(True for _ in module.parameters(recurse=False)):
            continue
        kind = base_class(module).__name__
        if name in leaves:
            found[name] = f"of type {kind}, for which there is no blueprint"
        elif any(True for _ in module.children()):
            found[name] = f"a {kind} with parameters of its own, which are used without a layer"
        else:
            found[name] = "never called as a module in the step that was looked at"
    return found


def _outer(name: str) -> list[str]:
    """Names of the modules around module ``name``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
