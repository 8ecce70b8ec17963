"""Health of every layer and seed on sampled steps.

On a sampled step each dense layer gets an observer that copies small strided samples; between samples
the layers carry nothing and cost nothing. Nothing is fetched from the device before the step ends.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esper.kasmina.body import Body
from esper.kasmina.eager import EagerMode
from esper.kasmina.health import health_scores
from esper.kasmina.layer import SeedLayer, primary, seeds_of, set_observer
from esper.kasmina.linear_like import features
from esper.kasmina.sampling import sample_elements, sample_rows
from esper.kasmina.seed import Seed
from esper.kasmina.statistics import LayerSample, LayerStatistics, drain, summarise, tensor_norm
from esper.messages import HealthSignal
from esper.signal_table import SignalTable

__all__ = ["ProbeRunner"]

_DENSE = (nn.Linear, nn.Conv2d)
_SENT = [
    LayerStatistics._fields.index(name)
    for name in HealthSignal.__struct_fields__
    if name in LayerStatistics._fields and name != "error_count"
]
"""Which statistics stand in a signal, in its order; the rank's fraction serves the health score only."""
_ERRORS = LayerStatistics._fields.index("error_count")
_HEALTH = tuple(inspect.signature(health_scores).parameters)


@dataclass
class _Probe:
    """Samples of one layer on one step; also the observer of that layer."""

    layer: nn.Module
    consumer_of: list[_Probe] = field(default_factory=list)
    has_consumer: bool = False
    activation: Tensor | None = None
    output_gradient: Tensor | None = None
    gradient_norms: list[Tensor] = field(default_factory=list)
    weight_before: Tensor | None = None
    latency_ms: float = 0.0

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        output = primary(y)
        conv = isinstance(layer, nn.Conv2d)
        self.latency_ms += latency_ms
        if self.consumer_of and isinstance(x, Tensor):
            sample = sample_rows(x, channels_first=conv)
            for producer in self.consumer_of:
                producer.activation = sample
        if not self.has_consumer:
            self.activation = sample_rows(output, channels_first=conv)
        if output.requires_grad:
            output.register_hook(lambda grad: self._keep(grad, conv))

    def _keep(self, grad: Tensor, conv: bool) -> None:
        self.output_gradient = sample_rows(grad, channels_first=conv)


@dataclass(frozen=True)
class _Layout:
    """Whose signals a table holds, and how many seeds each of them has."""

    key: tuple[Any, ...]
    layer_ids: tuple[str, ...]
    seed_ids: tuple[str, ...]
    active_seeds: NDArray[np.uint64]
    total_seeds: NDArray[np.uint64]


class ProbeRunner:
    """Takes the health of a body's dense layers and seeds over one training step.

    Call :meth:`begin` before the forward pass, :meth:`note_gradients` before the optimizer's step and
    :meth:`end` after it.

    Args:
        body: The attached host.
    """

    def __init__(self, body: Body) -> None:
        self._body = body
        self._probes: dict[str, _Probe] = {}
        self._seed_gradients: dict[str, list[Tensor]] = {}
        self._layout: _Layout | None = None
        self._eager = EagerMode()
        self.latency_ms = 0.0

    @property
    def active(self) -> bool:
        """Whether a step is being sampled."""
        return bool(self._probes)

    def begin(self) -> None:
        """Install the observers and sample the weights."""
        started = time.perf_counter()
        self.cancel()
        topology = self._body.topology
        model = self._body.model
        for layer in topology.layers:
            module = model.get_submodule(layer.name)
            dense = isinstance(module, _DENSE) or features(module) is not None
            if layer.num_calls == 1 and dense and isinstance(module, SeedLayer):
                self._probes[layer.name] = _Probe(module)
        for edge in topology.edges:
            producer, consumer = self._probes.get(edge.source), self._probes.get(edge.target)
            if (
                producer is not None
                and consumer is not None
                and not producer.has_consumer
                and _plain(edge.ops)
            ):
                producer.has_consumer = True
                consumer.consumer_of.append(producer)
        self._eager.enter()  # compiled code would be compiled anew for a step that is watched
        for probe in self._probes.values():
            probe.weight_before = sample_elements(_weight(probe.layer))
            set_observer(probe.layer, probe)
        for seed in self._body.seeds:
            seed.observing = True
        self.latency_ms = (time.perf_counter() - started) * 1e3

    def note_gradients(self) -> None:
        """Take the gradient norms, before clipping changes the gradients and zeroing drops them."""
        for probe in self._probes.values():
            grads = [p.grad for p in probe.layer._parameters.values() if p is not None and p.grad is not None]
            probe.gradient_norms = [tensor_norm(grad) for grad in grads]
        if self._probes:
            for seed in self._body.seeds:
                grads = [p.grad for p in seed.parameters() if p.grad is not None]
                self._seed_gradients[seed.seed_id] = [tensor_norm(grad) for grad in grads]

    def end(
        self, *, step: int, epoch: int, ready: Iterable[str] = (), scores: dict[str, float] | None = None
    ) -> SignalTable:
        """Remove the observers and turn the samples into signals: layers first, then seeds.

        They come as columns, as they were measured and as the bus carries them; as a sequence the table
        gives ``HealthSignal`` objects.

        Args:
            step: Optimizer steps taken, this one included.
            epoch: Current epoch.
            ready: Ids of seeds whose gate stands open.
            scores: Last whitened expressivity of sites into a layer, by layer name.
        """
        started = time.perf_counter()
        probes = {name: probe for name, probe in self._probes.items() if probe.activation is not None}
        samples = [
            LayerSample(
                activation=_given(probe.activation),
                output_gradient=probe.output_gradient,
                gradients=tuple(probe.gradient_norms),
                weight_before=probe.weight_before,
                weight_after=sample_elements(_weight(probe.layer)),
            )
            for probe in probes.values()
        ]
        seeds = [seed for seed in self._body.seeds if seed.observed is not None]
        for seed in seeds:
            s, _ = _given(seed.observed)
            image = seed.site.image
            gradients = tuple(self._seed_gradients.get(seed.seed_id, ()))
            samples.append(LayerSample(activation=sample_rows(s, channels_first=image), gradients=gradients))
        statistics = summarise(samples).cpu()
        figures = drain(statistics)
        ratios = _output_ratios(seeds)
        for seed, figure, ratio in zip(seeds, figures[len(probes) :], ratios, strict=True):
            seed.state.facts.update(
                gradient_norm=figure.gradient_norm,
                output_ratio=ratio,
                activation_variance=figure.activation_variance,
            )
        scores, open_gates = scores or {}, set(ready)
        layout = self._layout_of(probes, seeds)
        columns = statistics.T.numpy()
        table = SignalTable.of_step(
            layout.layer_ids,
            layout.seed_ids,
            step=step,
            epoch=epoch,
            timestamp=time.time(),
            statistics=columns.take(_SENT, 0),
            expressivity=[scores.get(name, 0.0) for name in probes] + [0.0] * len(seeds),
            ready=[False] * len(probes) + [seed.seed_id in open_gates for seed in seeds],
            health=_health(columns, [bool(probe.gradient_norms) for probe in probes.values()]),
            latency_ms=[probe.latency_ms for probe in probes.values()] + [0.0] * len(seeds),
            error_count=columns[_ERRORS],
            active_seeds=layout.active_seeds,
            total_seeds=layout.total_seeds,
        )
        self.cancel()
        self._body.keep_health(table)
        self.latency_ms += (time.perf_counter() - started) * 1e3
        return table

    def _layout_of(self, probes: Mapping[str, _Probe], seeds: Sequence[Seed]) -> _Layout:
        """What stays the same from step to step until a seed comes, goes or changes its stage."""
        on_layers = [[seed for seed in seeds_of(p.layer) if isinstance(seed, Seed)] for p in probes.values()]
        key = (*probes, *((seed.seed_id, seed.stage) for group in (*on_layers, seeds) for seed in group))
        if self._layout is None or self._layout.key != key:
            groups = [*on_layers, *([seed] for seed in seeds)]
            self._layout = _Layout(
                key=key,
                layer_ids=(*probes, *(seed.site.target for seed in seeds)),
                seed_ids=("",) * len(probes) + tuple(seed.seed_id for seed in seeds),
                active_seeds=np.array([*map(_num_active, groups)], dtype=np.uint64),
                total_seeds=np.array([*map(len, groups)], dtype=np.uint64),
            )
        return self._layout

    def cancel(self) -> None:
        """Remove the observers and forget the samples."""
        self._eager.leave()
        for probe in self._probes.values():
            set_observer(probe.layer, None)
        self._probes = {}
        self._seed_gradients = {}
        for seed in self._body.seeds:
            seed.observing, seed.observed = False, None


def _health(columns: NDArray[np.float64], trained: Sequence[bool]) -> NDArray[np.float64]:
    """Health of layers, then of seeds, of which only errors and rank count.

    Args:
        columns: ``[10, L + S]``, see :class:`LayerStatistics`.
        trained: for each layer, whether it had a gradient; ``[L]``.
    """
    measured = dict(zip(LayerStatistics._fields, columns.copy(), strict=True))
    num = len(trained)
    measured["dead_neuron_ratio"][num:] = measured["dormancy"][num:] = 0.0
    frozen = ~np.array([*trained, *[False] * (columns.shape[1] - num)], dtype=bool)
    measured["gradient_snr"][frozen] = measured["update_ratio"][frozen] = np.nan
    return health_scores(**{name: measured[name] for name in _HEALTH})


def _num_active(seeds: list[Seed]) -> int:
    return sum(seed.stage != "fossilized" for seed in seeds)


def _output_ratios(seeds: list[Seed]) -> list[float]:
    """``‖s‖/‖y‖`` of each observed seed, fetched together."""
    if not seeds:
        return []
    pairs = [_given(seed.observed) for seed in seeds]
    norms = [
        torch.linalg.vector_norm(s.float()) / torch.linalg.vector_norm(y.float()).clamp_min(1e-12)
        for s, y in pairs
    ]
    return [
        float(value)
        for value in torch.stack([norm.cpu() for norm in norms]).nan_to_num(0.0, 0.0, 0.0).tolist()
    ]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight


def _plain(ops: tuple[str, ...]) -> bool:
    """Whether units stay units on the way: no flattening of positions into units in between."""
    return "reshape" not in ops


def _given(value: Any) -> Any:
    assert value is not None
    return value
