"""Decision points of a small host, by hand: what the service's tests send."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts

NARROW = "net.0"


def make_topology(widths: Sequence[int] = (16, 4, 16, 16, 3)) -> ModelTopology:
    """An MLP; the layer after the first is a neck by default."""
    layers = tuple(
        LayerInfo(
            name=f"net.{i}",
            type="Linear",
            input_shape=(a,),
            output_shape=(b,),
            num_parameters=(a + 1) * b,
            flops=2 * a * b,
            num_calls=1,
            is_output=i == len(widths) - 2,
            reads_input=i == 0,
        )
        for i, (a, b) in enumerate(itertools.pairwise(widths))
    )
    edges = tuple(Edge(a.name, b.name, ("relu",)) for a, b in itertools.pairwise(layers))
    return ModelTopology(layers, edges, {}, sum(layer.num_parameters for layer in layers))


def make_signal(layer: str, step: int, *, health: float = 0.8, dormancy: float = 0.0) -> HealthSignal:
    return HealthSignal(
        layer_id=layer, seed_id="", chunk_id=0, epoch=0, step=step, activation_variance=0.5, dead_neuron_ratio=0.0,
        dormancy=dormancy, avg_correlation=0.1, effective_rank=3.0, gradient_norm=0.1, gradient_snr=1.0,
        update_ratio=1e-3, expressivity=0.1, is_ready_for_transition=False, health_score=health,
        execution_latency=0.1, error_count=0, active_seeds=0, total_seeds=0, timestamp=float(step),
    )  # fmt: skip


def make_candidates(topology: ModelTopology) -> tuple[Candidate, ...]:
    """WAIT, one widening of each hidden layer, and the recycling of each."""
    names = topology.layer_names
    grown = tuple(
        Candidate(
            action="grow",
            placements=(
                Placement(
                    site=f"bypass:{a}->{b}", source=a, target=b, kind="bypass", blueprint="widen", size=4,
                    score=0.2, score_excess=0.1, score_z=5.0,
                ),
            ),
            parameters=100,
            flops=200,
        )
        for a, b in itertools.pairwise(names)
    )  # fmt: skip
    recycled = tuple(
        Candidate(action="recycle", placements=(Placement(site="", source=a, target=a),)) for a in names[:-1]
    )
    return (WAIT, *grown, *recycled)


def make_point(
    run_id: str = "run",
    step: int = 10,
    *,
    losses: Sequence[float] = (2.0, 1.8, 1.6, 1.4, 1.2),
    widths: Sequence[int] = (16, 4, 16, 16, 3),
    num_signals: int = 1,
) -> DecisionPoint:
    topology = make_topology(widths)
    signals = [make_signal(name, s) for s in range(step - num_signals, step) for name in topology.layer_names]
    return DecisionPoint(
        run=RunFacts(
            run_id=run_id,
            step=step,
            total_steps=100,
            epoch=0,
            host_parameters=topology.num_parameters,
            num_parameters=topology.num_parameters,
            parameters_left=1000,
            flops_left=1e9,
            germinations_left=4,
            tokens_per_parameter=10.0,
            transformer=False,
            window_open=True,
            steps=tuple(range(len(losses))),
            train_losses=tuple(losses),
            held_out_loss=losses[-1] if losses else None,
        ),
        topology=topology,
        signals=tuple(signals),
        candidates=make_candidates(topology),
    )
