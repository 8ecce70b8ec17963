"""Recycle the dormant units of one layer of a live model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import GrowthError
from esper.kasmina.activations import is_elementwise
from esper.kasmina.body import Body
from esper.kasmina.layer import observed
from esper.kasmina.recycle import Consumer, RecycleReport, dormant_units, recycle
from esper.kasmina.sampling import sample_rows
from esper.kasmina.sharded import is_sharded
from esper.kasmina.trace import preserved

__all__ = ["recyclable", "recycle_layer"]

_DENSE = (nn.Linear, nn.Conv2d)
_MAX_ROWS = 4096


def recyclable(body: Body, layer: str) -> str:
    """Why the units of ``layer`` cannot be recycled; empty when they can.

    Every reader of a unit has to be a dense layer reached through element-wise operations alone;
    otherwise zeroing what the unit feeds would change the function.
    """
    module = body.model.get_submodule(layer)
    consumers = body.topology.consumers(layer)
    if not isinstance(module, _DENSE):
        return f"layer {layer!r} is no Linear or Conv2d"
    if body.topology.layer(layer).is_output or not consumers:
        return f"layer {layer!r} is an output layer: its units are the answer"
    for edge in consumers:
        reader = body.model.get_submodule(edge.target)
        if not isinstance(reader, _DENSE):
            return f"units of {layer!r} are read by {edge.target!r}, which is no Linear or Conv2d"
        if isinstance(reader, nn.Linear) != isinstance(module, nn.Linear):
            return f"units of {layer!r} are reshaped before {edge.target!r}"
        if not all(is_elementwise(op) for op in edge.ops) or len(body.topology.producers(edge.target)) != 1:
            return f"units of {layer!r} are mixed before {edge.target!r} reads them"
        readers = [s.seed_id for s in body.seeds if s.site.source == edge.target and s.reads == "source"]
        if readers:
            return f"seeds {', '.join(readers)} read the units of {layer!r} too"
    return ""


def recycle_layer(
    body: Body,
    layer: str,
    batches: Sequence[Callable[[], Any]],
    *,
    optimizers: Sequence[Optimizer],
    generator: torch.Generator,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> RecycleReport:
    """Re-initialise the dormant units of ``layer`` with zero fan-out and fresh moments.

    Args:
        body: The attached host.
        layer: Name of a Linear or Conv2d.
        batches: Each runs the host on one batch; the units are judged by their mean activation there.
        optimizers: Their moments of the recycled units are reset.
        generator: Source of the fresh fan-in.
        gather: Makes one sample of the samples ``[n, u]`` of all processes that train this model: what one of
            them recycles, all have to.

    Raises:
        GrowthError: The layer's units cannot be recycled. Nothing was changed.
    """
    reason = recyclable(body, layer)
    if is_sharded(body.model):
        reason = f"the weights of {layer!r} are sharded by FSDP2, and a unit's lie in several processes"
    if reason:
        raise GrowthError(f"cannot recycle units: {reason}; choose another layer")
    consumers = [body.model.get_submodule(edge.target) for edge in body.topology.consumers(layer)]
    activations = gather(_activations(body, consumers[0], batches))
    producer = body.model.get_submodule(layer)
    assert isinstance(producer, _DENSE)
    return recycle(
        producer,
        [Consumer(consumer) for consumer in consumers if isinstance(consumer, _DENSE)],
        dormant_units(activations),
        activations,
        generator=generator,
        optimizers=optimizers,
    )


class _Inputs:
    """Observer that keeps a sample of a layer's input."""

    def __init__(self) -> None:
        self.samples: list[Tensor] = []

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        conv = isinstance(layer, nn.Conv2d)
        units = x.shape[1] if conv else x.shape[-1]
        self.samples.append(sample_rows(x, channels_first=conv, max_rows=_MAX_ROWS, max_units=units))


def _activations(body: Body, consumer: nn.Module, batches: Sequence[Callable[[], Any]]) -> Tensor:
    inputs = _Inputs()
    with observed([(consumer, inputs)]), preserved(body.model), torch.no_grad():
        body.model.eval()
        for run in batches:
            run()
    return torch.cat(inputs.samples)
