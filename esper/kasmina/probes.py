"""Health of every layer and seed on sampled steps.

On a sampled step each dense layer gets an observer that copies small strided samples; between samples
the layers carry nothing and cost nothing. Nothing is fetched from the device before the step ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.body import Body
from esper.kasmina.health import health_score
from esper.kasmina.layer import SeedLayer, primary, seeds_of, set_observer
from esper.kasmina.sampling import sample_elements, sample_rows
from esper.kasmina.seed import Seed
from esper.kasmina.statistics import LayerSample, LayerStatistics, drain, gradient_norm, summarise
from esper.messages import HealthSignal

__all__ = ["ProbeRunner"]

_DENSE = (nn.Linear, nn.Conv2d)


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
            if layer.num_calls == 1 and isinstance(module, _DENSE) and isinstance(module, SeedLayer):
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
            if grads:
                probe.gradient_norms = [gradient_norm(*grads)]
        if self._probes:
            for seed in self._body.seeds:
                grads = [p.grad for p in seed.parameters() if p.grad is not None]
                if grads:
                    self._seed_gradients[seed.seed_id] = [gradient_norm(*grads)]

    def end(
        self, *, step: int, epoch: int, ready: Iterable[str] = (), scores: dict[str, float] | None = None
    ) -> list[HealthSignal]:
        """Remove the observers and turn the samples into signals: layers first, then seeds.

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
        figures = drain(summarise(samples)) if samples else []
        ratios = _output_ratios(seeds)
        scores = scores or {}
        signals = [
            self._layer_signal(name, probe, figure, step, epoch, scores.get(name, 0.0))
            for (name, probe), figure in zip(probes.items(), figures, strict=False)
        ]
        for seed, figure, ratio in zip(seeds, figures[len(probes) :], ratios, strict=True):
            seed.state.facts.update(
                gradient_norm=figure.gradient_norm,
                output_ratio=ratio,
                activation_variance=figure.activation_variance,
            )
            signals.append(self._seed_signal(seed, figure, step, epoch, seed.seed_id in set(ready)))
        self.cancel()
        self.latency_ms += (time.perf_counter() - started) * 1e3
        return signals

    def cancel(self) -> None:
        """Remove the observers and forget the samples."""
        for probe in self._probes.values():
            set_observer(probe.layer, None)
        self._probes = {}
        self._seed_gradients = {}
        for seed in self._body.seeds:
            seed.observing, seed.observed = False, None

    def _layer_signal(
        self, name: str, probe: _Probe, figure: LayerStatistics, step: int, epoch: int, score: float
    ) -> HealthSignal:
        seeds = [seed for seed in seeds_of(probe.layer) if isinstance(seed, Seed)]
        trained = bool(probe.gradient_norms)
        health = health_score(
            dead_neuron_ratio=figure.dead_neuron_ratio,
            dormancy=figure.dormancy,
            rank_fraction=figure.rank_fraction,
            gradient_snr=figure.gradient_snr if trained else None,
            update_ratio=figure.update_ratio if trained else None,
            error_count=figure.error_count,
        )
        active = sum(seed.stage != "fossilized" for seed in seeds)
        return _signal(
            name, "", figure, step, epoch, score, False, health, probe.latency_ms, active, len(seeds)
        )

    def _seed_signal(
        self, seed: Seed, figure: LayerStatistics, step: int, epoch: int, ready: bool
    ) -> HealthSignal:
        health = health_score(rank_fraction=figure.rank_fraction, error_count=figure.error_count)
        active = int(seed.stage != "fossilized")
        return _signal(
            seed.site.target, seed.seed_id, figure, step, epoch, 0.0, ready, health, 0.0, active, 1
        )


def _signal(
    layer_id: str, seed_id: str, figure: LayerStatistics, step: int, epoch: int, score: float, ready: bool,
    health: float, latency_ms: float, active: int, total: int,
) -> HealthSignal:  # fmt: skip
    return HealthSignal(
        layer_id=layer_id,
        seed_id=seed_id,
        chunk_id=0,
        epoch=epoch,
        step=step,
        activation_variance=figure.activation_variance,
        dead_neuron_ratio=figure.dead_neuron_ratio,
        dormancy=figure.dormancy,
        avg_correlation=figure.avg_correlation,
        effective_rank=figure.effective_rank,
        gradient_norm=figure.gradient_norm,
        gradient_snr=figure.gradient_snr,
        update_ratio=figure.update_ratio,
        expressivity=score,
        is_ready_for_transition=ready,
        health_score=health,
        execution_latency=latency_ms,
        error_count=figure.error_count,
        active_seeds=active,
        total_seeds=total,
        timestamp=time.time(),
    )


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
