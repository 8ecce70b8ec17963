"""States of an oracle table made by hand, with outcomes that are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.environment.specs import DigitsTask, FashionTask, HostSpec, MLPShape, Split
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts
from esper.tamiyo.oracle.records import Outcome, StateRecord

WIDTHS = (64, 6, 24, 10)


def layer(name: str, d_in: int, d_out: int, *, first: bool = False, last: bool = False) -> LayerInfo:
    return LayerInfo(
        name=name, type="Linear", input_shape=(d_in,), output_shape=(d_out,), num_parameters=(d_in + 1) * d_out,
        flops=2 * d_in * d_out, num_calls=1, is_output=last, reads_input=first, plain_call=True,
    )  # fmt: skip


def chain(widths: Sequence[int] = WIDTHS) -> ModelTopology:
    """``0 -> 1 -> 2``: dense layers with ReLU between."""
    last = len(widths) - 2
    layers = tuple(
        layer(str(i), widths[i], widths[i + 1], first=i == 0, last=i == last) for i in range(last + 1)
    )
    edges = tuple(Edge(str(i), str(i + 1), ("relu",)) for i in range(last))
    return ModelTopology(layers, edges, {}, sum(entry.num_parameters for entry in layers))


def signal(layer_id: str, dormancy: float) -> HealthSignal:
    return HealthSignal(
        layer_id,
        "",
        0,
        0,
        10,
        1.0,
        0.0,
        dormancy,
        0.0,
        4.0,
        1.0,
        1.0,
        1e-3,
        0.0,
        False,
        1.0,
        0.1,
        0,
        0,
        0,
        0.0,
    )


def widen(source: int, size: int, **score: float) -> Candidate:
    site = f"bypass:{source}->{source + 1}"
    place = Placement(
        site=site,
        source=str(source),
        target=str(source + 1),
        kind="bypass",
        blueprint="widen",
        size=size,
        **score,
    )
    parameters = size * (WIDTHS[source] + 1 + WIDTHS[source + 2])
    return Candidate(action="grow", placements=(place,), parameters=parameters, flops=2 * parameters)


def candidates() -> tuple[Candidate, ...]:
    """WAIT; the narrow layer by 4 and by 16; the wide one by 16; both; the way around; recycle; one closed."""
    around = Placement(
        site="bypass:0->2", source="0", target="2", kind="bypass", blueprint="shortcut", size=1, long=True,
        score=0.9, score_excess=0.8, score_z=9.0,
    )  # fmt: skip
    both = widen(0, 8).placements + widen(1, 8).placements
    return (
        WAIT,
        widen(0, 4, score=0.5, score_excess=0.4, score_z=5.0),
        widen(0, 16, score=0.5, score_excess=0.4, score_z=5.0),
        widen(1, 16, score=0.2, score_excess=0.01, score_z=0.5),
        Candidate(action="grow", placements=both, parameters=900, flops=1800),
        Candidate(action="grow", placements=(around,), parameters=640, flops=1280),
        Candidate(action="recycle", placements=(Placement(site="", source="1", target="1"),)),
        Candidate(
            action="grow", placements=widen(1, 64).placements, parameters=9000, unavailable="too large"
        ),
    )


def make_point(run_id: str = "run", *, dormancy: float = 0.0, **facts: object) -> DecisionPoint:
    topology = chain()
    run = {
        "run_id": run_id, "step": 20, "total_steps": 200, "epoch": 0, "host_parameters": topology.num_parameters,
        "num_parameters": topology.num_parameters, "parameters_left": 5000, "flops_left": math.inf,
        "germinations_left": 8, "tokens_per_parameter": 12.5, "transformer": False, "window_open": True,
        "steps": (10, 20), "train_losses": (2.1, 1.7), "held_out_loss": 1.8,
    }  # fmt: skip
    return DecisionPoint(
        run=RunFacts(**(run | facts)),  # type: ignore[arg-type]
        topology=topology,
        signals=(signal("0", 0.1), signal("1", dormancy)),
        candidates=candidates(),
    )


def make_record(
    number: int = 0,
    losses: Sequence[Sequence[float]] | None = None,
    *,
    split: Split = "train",
    parameters: Sequence[int] | None = None,
    dormancy: float = 0.0,
    state_id: str = "",
) -> StateRecord:
    """A state whose candidate c ended repeat r at ``losses[c][r]``."""
    losses = losses or [[1.0, 1.1], [0.9, 1.0], [0.8, 0.8], [1.0, 1.2], [0.85, 0.9], [0.7, 0.75], [1.0, 1.1]]
    sealed = split == "sealed"
    spec = HostSpec(
        family="fashion_mlp" if sealed else "digits_mlp", split=split, number=number, shape="random",
        architecture=MLPShape(hidden=(6, 24)), batch_size=32, total_steps=200 + number, learning_rate=1e-3,
        task=FashionTask(num_train=1000) if sealed else DigitsTask(num_train=1000),
    )  # fmt: skip
    point = make_point(spec.name, dormancy=dormancy)
    sizes = parameters or [point.run.num_parameters + c.parameters for c in point.candidates]
    outcomes = tuple(
        Outcome(
            candidate=c, repeat=r, held_out_loss=loss, test_loss=loss, test_accuracy=0.5, parameters=sizes[c],
            training_flops=1e6, forward_flops=1e3, wall_time_s=0.5,
        )
        for c, row in enumerate(losses)
        for r, loss in enumerate(row)
    )  # fmt: skip
    return StateRecord(
        state_id=state_id or f"{split}-{number}", moment="early", spec=spec, point=point, outcomes=outcomes
    )
