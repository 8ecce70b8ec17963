"""Why a layer has no site, in words that a user can act on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import nn

from esper.kasmina.layer import SEEDS, base_class
from esper.kasmina.sites import Site
from esper.kasmina.topology import LayerInfo, ModelTopology

__all__ = ["BlockLists", "why_no_site"]

_SHOWN = 3


def why_no_site(model: nn.Module, topology: ModelTopology, sites: Iterable[Site]) -> dict[str, str]:
    """Explain every traced layer at whose output no seed can stand.

    Args:
        model: The host.
        topology: As traced from it; layers that it refuses itself keep the reason given there.
        sites: As :func:`esper.kasmina.find_sites.find_sites` found them.

    Returns:
        Layer name -> what it is, as the end of a sentence "... was refused, because it is".
    """
    targets, blocks = {site.target for site in sites}, BlockLists(model)
    reasons = {}
    for layer in topology.layers:
        if layer.name in targets or layer.name in topology.refused:
            continue
        if layer.block:
            reason = blocks.why_not_stacked(layer) if layer.output_projections else None
        elif f"{layer.name}.out_proj" in targets:
            continue
        else:
            reason = _why_not_grown(model, layer)
        if reason is not None:
            reasons[layer.name] = reason
    return reasons | _never_called(model, topology)


def _never_called(model: nn.Module, topology: ModelTopology) -> dict[str, str]:
    """Layers with parameters that did not run on their own, nor inside another that did."""
    known = {layer.name for layer in topology.layers if not layer.block} | set(topology.refused)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if not own or not name or SEEDS in name.split(".") or any(True for _ in module.children()):
            continue
        parts = name.split(".")
        if not any(".".join(parts[:end]) in known for end in range(1, len(parts) + 1)):
            found[name] = (
                "never called as a module in training: its parameters are used elsewhere, or not at all"
            )
    return found


def _why_not_grown(model: nn.Module, layer: LayerInfo) -> str:
    if layer.num_calls > 1:
        return f"called {layer.num_calls} times in one forward pass: a seed would run each time"
    cls = base_class(model.get_submodule(layer.name))
    name = f"{cls.__module__}.{cls.__qualname__}"
    if name.startswith("torch.nn.modules."):
        name = f"nn.{cls.__qualname__}"
    return f"of type {name}, for which there is no blueprint"


class BlockLists:
    """The lists of blocks in a host; each is looked at once, however many blocks it has."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: dict[str, tuple[set[type], Counter[str]]] = {}

    def why_not_stacked(self, layer: LayerInfo) -> str | None:
        """Why no copy of a residual block can run behind it; None where one can.

        A host that hands its blocks more than one value may tell different layers in a list apart by their place,
        and may hand on what one block computes for all.
        """
        if layer.plain_call:
            return None
        path, _, _ = layer.name.rpartition(".")
        container = self._model.get_submodule(path) if path else self._model
        if not isinstance(container, nn.ModuleList):
            return None
        if path not in self._known:
            blocks = list(container.children())
            holders = Counter(name for block in blocks for name in _parameter_names(block))
            self._known[path] = {base_class(block) for block in blocks}, holders
        kinds, holders = self._known[path]
        if len(kinds) > 1:
            return (
                f"one of several different layers in the list {path!r}, which its host tells apart by their place; "
                "stack the block around it"
            )
        own = _parameter_names(self._model.get_submodule(layer.name))
        extra = sorted(name for name in own if holders[name] == 1) if len(container) > 1 else []
        if extra:
            return (
                f"unlike the other blocks in {path!r}: it alone holds {', '.join(extra[:_SHOWN])}, and computes with "
                "it what the others are given; stack one of them"
            )
        return None


def _parameter_names(block: nn.Module) -> set[str]:
    return {name for name, _ in block.named_parameters() if SEEDS not in name.split(".")}
