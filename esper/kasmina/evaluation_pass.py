"""Which layers an evaluation pass of the host leaves out, and for which of them there is a cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper.kasmina.fast_path import fused_layer_around, without_fast_path
from esper.kasmina.layer import SeedLayer, observed
from esper.kasmina.sites import Site
from esper.kasmina.trace import preserved

__all__ = ["Skipped", "find_skipped"]

_TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, that leaving a fused kernel may make."""

SKIPPED = (
    "never called in evaluation, so validation would not see a seed: the host calls it in training only, or uses "
    "its weights functionally; seed the block around it instead"
)
PACKED = (
    "never called in evaluation: nn.TransformerEncoder packs padded batches for a fused kernel, and the host's "
    "outputs would change if it did not; build it with enable_nested_tensor=False"
)


class Skipped(NamedTuple):
    """Layers that evaluation leaves out.

    Attributes:
        names: Of all of them.
        curable: Those that run when torch's fused path is left, which a seed in them sees to.
        reason: Why the others' sites are given up.
    """

    names: frozenset[str]
    curable: frozenset[str]
    reason: str

    def hides(self, model: nn.Module, site: Site) -> bool:
        """Whether evaluation would not notice a seed at ``site``.

        A seed that reads from another fused layer than the one it stands in does not make that one leave its path.
        """
        if site.functional:
            return False
        if site.target in self.names - self.curable:
            return True
        if site.source not in self.names or site.source == site.target:
            return False
        together = fused_layer_around(model, site.source) is fused_layer_around(model, site.target)
        return site.source not in self.curable or not together


def find_skipped(model: nn.Module, run: Callable[[], Any]) -> Skipped:
    """Run ``model`` in evaluation and list the seed layers that were not called.

    Args:
        model: The attached host.
        run: Calls the model once; runs in eval mode without gradients, a second time where layers were skipped.
    """
    layers = [(n, m) for n, m in model.named_modules() if issubclass(type(m), SeedLayer)]
    skipped, fused_output = _skipped(model, layers, run)
    inside = {name for name in skipped if fused_layer_around(model, name) is not None}
    if not inside:
        return Skipped(frozenset(skipped), frozenset(), SKIPPED)
    with without_fast_path():
        still, output = _skipped(model, layers, run)
    if not _alike(fused_output, output):
        return Skipped(frozenset(skipped), frozenset(), PACKED)
    return Skipped(frozenset(skipped), frozenset(inside - still), SKIPPED)


class _CallCounter:
    """Observer that remembers which layers ran."""

    def __init__(self) -> None:
        self.called: set[nn.Module] = set()

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        self.called.add(layer)


def _skipped(
    model: nn.Module, layers: list[tuple[str, nn.Module]], run: Callable[[], Any]
) -> tuple[set[str], Any]:
    counter = _CallCounter()
    with observed([(module, counter) for _, module in layers]), preserved(model), torch.no_grad():
        model.eval()
        output = run()
    return {name for name, module in layers if module not in counter.called}, output


def _alike(first: Any, second: Any) -> bool:
    """Whether two outputs of the host hold the same floats, up to rounding."""
    a, b = ([t.float() for t in pytree.tree_leaves(out) if _is_float(t)] for out in (first, second))
    return len(a) == len(b) and all(
        x.shape == y.shape and bool((x - y).abs().max() <= _TOLERANCE * (1.0 + x.abs().max()))
        for x, y in zip(a, b, strict=True)
        if x.numel()
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
