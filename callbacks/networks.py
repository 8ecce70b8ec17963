"""Networks that are trained apart, such as the two of a GAN, each by an optimizer of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from esper.kasmina.body import Body

__all__ = ["keep_apart"]


def keep_apart(body: Body, optimizers: Sequence[Optimizer]) -> None:
    """Give up the sites of ``body`` that lead from a layer of one optimizer to a layer of another.

    One of the two is run without the other (a discriminator sees real samples, a generator draws some for a
    user), and a seed between them would find nothing to read there.

    Args:
        body: The attached host.
        optimizers: All that train it, unwrapped.
    """
    if len(optimizers) < 2:
        return
    trained_by = {
        id(p): o
        for o, optimizer in enumerate(optimizers)
        for g in optimizer.param_groups
        for p in g["params"]
    }

    def owners(layer: nn.Module) -> set[int]:
        return {trained_by[id(p)] for p in layer.parameters() if id(p) in trained_by}

    def across(source: str, target: str) -> bool:
        pair = [owners(body.model.get_submodule(name)) for name in (source, target)]
        return all(pair) and pair[0].isdisjoint(pair[1])

    body.sites = [site for site in body.sites if not across(site.source, site.target)]
