"""Decision points made by hand and by real runs, for tests of graphs and candidates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from loop import Loop
from msgspec import structs
from torch import nn

from esper.errors import GrowthError
from esper.hosts.build import build_host
from esper.hosts.cnn import CNNConfig
from esper.hosts.gpt import GPTConfig
from esper.hosts.mlp import MLPConfig
from esper.kasmina.body import Body, attach
from esper.kasmina.expressivity import SiteScore
from esper.kasmina.probes import ProbeRunner
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts, SeedFacts
from esper.tamiyo.state import GrowthState, SiteView


def signal(layer: str = "a", step: int = 0, seed_id: str = "", **changes: Any) -> HealthSignal:
    fields: dict[str, Any] = {
        "layer_id": layer, "seed_id": seed_id, "chunk_id": 0, "epoch": 0, "step": step,
        "activation_variance": 1.0, "dead_neuron_ratio": 0.1, "dormancy": 0.2, "avg_correlation": 0.3,
        "effective_rank": 2.0, "gradient_norm": 1.0, "gradient_snr": 0.5, "update_ratio": 1e-3,
        "expressivity": 0.0, "is_ready_for_transition": False, "health_score": 0.8, "execution_latency": 1.0,
        "error_count": 0, "active_seeds": 0, "total_seeds": 0, "timestamp": float(step),
    }  # fmt: skip
    return HealthSignal(**(fields | changes))


def layer(name: str, inputs: int, outputs: int, **changes: Any) -> LayerInfo:
    fields: dict[str, Any] = {
        "name": name, "type": "Linear", "input_shape": (inputs,), "output_shape": (outputs,),
        "num_parameters": inputs * outputs, "flops": 2 * inputs * outputs, "num_calls": 1,
    }  # fmt: skip
    return LayerInfo(**(fields | changes))


TOPOLOGY = ModelTopology(
    layers=(
        layer("in", 32, 16, reads_input=True),
        layer("a", 16, 8),
        layer("n", 8, 8, type="LayerNorm", flops=0),
        layer("b", 8, 12),
        layer("out", 12, 10, is_output=True),
    ),
    edges=(
        Edge("in", "a", ("relu",)),
        Edge("a", "n", ()),
        Edge("n", "b", ("relu",)),
        Edge("in", "b", ("AddBackward0",)),
        Edge("b", "out", ("relu", "MeanBackward1")),
    ),
    refused={},
    num_parameters=1000,
)
"""``in -> a -> (norm) -> b -> out``, and a residual way from ``in`` to ``b``."""

SEED = SeedFacts(
    seed_id="s0", site="bypass:in->a", source="in", target="a", blueprint="widen", size=8, stage="holding",
    contribution=0.1,
)  # fmt: skip


def place(source: str = "in", target: str = "a", **changes: Any) -> Placement:
    fields: dict[str, Any] = {
        "site": f"bypass:{source}->{target}", "source": source, "target": target, "kind": "bypass",
        "blueprint": "widen", "size": 4,
    }  # fmt: skip
    return Placement(**(fields | changes))


def hand_made(**changes: Any) -> DecisionPoint:
    """A point in the middle of a run: six sampled steps, five losses, one seed, seven candidates."""
    run = RunFacts(
        run_id="r", step=50, total_steps=100, epoch=1, host_parameters=1000, num_parameters=1100,
        parameters_left=900, flops_left=1e9, germinations_left=4, tokens_per_parameter=80.0, transformer=False,
        window_open=True, price=0.1, steps=(10, 20, 30, 40, 50), train_losses=(2.0, 1.6, 1.4, 1.1, 1.0),
        held_out_loss=1.2, seeds=(SEED,),
    )  # fmt: skip
    signals = tuple(
        signal(name, step, health_score=0.8 - 0.02 * step * (name == "a"), gradient_norm=1.0 + step)
        for step in range(6)
        for name in ("in", "a", "b", "out")
    )
    candidates = (
        WAIT,
        Candidate(action="grow", placements=(place(), place("a", "b")), parameters=200, flops=400),
        Candidate(action="grow", placements=(place("a", "b", size=8),), parameters=128, flops=256),
        Candidate(
            action="grow",
            placements=(place("in", "out", blueprint="shortcut", size=10, long=True),),
            parameters=320,
        ),
        Candidate(action="recycle", placements=(Placement(site="", source="a", target="a"),)),
        Candidate(action="cull", placements=(place(size=8),), seed_id="s0", parameters=-200, flops=-400),
        Candidate(action="hold", placements=(place(size=8),), seed_id="s0", unavailable="it is not holding"),
    )
    point = DecisionPoint(run=run, topology=TOPOLOGY, signals=signals, candidates=candidates, timestamp=1.0)
    return changed(point, **changes)


def changed(point: DecisionPoint, **changes: Any) -> DecisionPoint:
    """Replace fields of the point, or of its run."""
    of_run = {name: changes.pop(name) for name in list(changes) if name in RunFacts.__struct_fields__}
    return structs.replace(point, run=structs.replace(point.run, **of_run), **changes)


@cache
def body_of(family: str) -> Body:
    """A small host with sites of every kind; not to be grown."""
    torch.manual_seed(0)
    if family == "mlp":
        return attach(
            build_host(MLPConfig(in_features=20, hidden=(12, 4, 9), num_classes=5)), torch.randn(4, 20)
        )
    if family == "cnn":
        config = CNNConfig(in_channels=1, widths=(6, 3, 8), strides=(1, 2, 1), num_classes=4, norm="batch")
        return attach(build_host(config), torch.randn(4, 1, 8, 8))
    config_gpt = GPTConfig(vocab_size=11, context=6, d_model=8, depth=2, num_heads=2)
    return attach(build_host(config_gpt), torch.randint(0, 11, (4, 6)))


def chain_of(num_layers: int, width: int = 8) -> Body:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(num_layers):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return attach(nn.Sequential(*layers[:-1]), torch.randn(4, width))


def unscored(names: Sequence[str], size: int) -> dict[str, SiteScore]:
    raise GrowthError("scoring is beyond its share of the FLOPs")


def state_of(body: Body, **changes: Any) -> GrowthState:
    """A run of ``body`` at a tenth of its length, with budgets as large as the host."""
    topology = body.topology
    state = GrowthState(
        step=10, total_steps=100, epoch=0, window_open=True, topology=topology,
        sites=[SiteView(site) for site in body.sites], seeds=[], health={},
        host_parameters=topology.num_parameters, num_parameters=topology.num_parameters,
        parameters_left=topology.num_parameters, flops_left=float("inf"), germinations_left=8, train_loss=1.0,
        measure_held_out_loss=lambda: None, tokens_per_parameter=50.0, transformer=topology.transformer,
        cost=body.cost, score=unscored, generator=torch.Generator(), seeds_left=8,
    )  # fmt: skip
    return dataclasses.replace(state, **changes)


class ProbedLoop(Loop):
    """The plain loop, with a sampled step every ``interval_steps``."""

    interval_steps = 2

    def run(self, steps: int = 1) -> ProbedLoop:
        for _ in range(steps):
            batch = self.train[self.step % len(self.train)]
            probes = ProbeRunner(self.body)
            sampled = self.step % self.interval_steps == 0
            if sampled:
                probes.begin()
            self.optimizers[0].zero_grad()
            loss = batch()
            loss.backward()
            self.controller.warden.note_gradients(self.model.named_parameters())
            if sampled:
                probes.note_gradients()
            self.optimizers[0].step()
            self.step += 1
            self.controller.note_batch(loss, batch.num_samples)
            if sampled:
                self.controller.note_health(probes.end(step=self.step, epoch=0))
            self.controller.safe_point(self.step, epoch=self.step // len(self.train))
        return self

    @property
    def state(self) -> GrowthState:
        return self.controller._state(self.step, self.step // len(self.train))
