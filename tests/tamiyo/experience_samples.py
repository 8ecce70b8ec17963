"""Decision points, decisions and outcomes for tests of the experience store; also run by processes of their own."""

from __future__ import annotations

import math
import random
from typing import Any

from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import HealthSignal
from esper.tamiyo.experience import DecisionFacts, OutcomeFacts
from esper.tamiyo.graph.facts import WAIT, Candidate, DecisionPoint, Placement, RunFacts, SeedFacts
from esper.tamiyo.rewards import Branch, Outcome, RewardComputer

GROW = Candidate(
    action="grow",
    placements=(
        Placement(
            site="bypass:a->b", source="a", target="b", kind="bypass", blueprint="widen", size=8, long=True, score=0.5,
            score_excess=1e-9, score_z=-1.5,
        ),
    ),
    parameters=40,
    flops=80,
)  # fmt: skip
CULL = Candidate(action="cull", seed_id="s1", parameters=-40, flops=-80)
SHUT = Candidate(
    action="recycle", placements=(Placement(site="", source="a", target="a"),), unavailable="cooling"
)


def topology(layers: int = 2) -> ModelTopology:
    return ModelTopology(
        layers=tuple(
            LayerInfo(f"layer{i}", "Linear", (8,), (4,), 36, 64, 1, output_projections=("p",), output_rows=3)
            for i in range(layers)
        ),
        edges=tuple(Edge(f"layer{i}", f"layer{i + 1}", ("relu",)) for i in range(layers - 1)),
        refused={"norm": "has no weights"},
        num_parameters=72,
    )


def signal(step: int, layer: str = "layer0", seed_id: str = "") -> HealthSignal:
    draw = random.Random(f"{step} {layer} {seed_id}").random
    return HealthSignal(
        layer, seed_id, 0, 1, step, draw(), draw(), draw(), draw(), 1 + draw(), draw(), draw(), draw(), draw(), False,
        draw(), draw(), 0, 0, 0, 1e9 + step,
    )  # fmt: skip


def point(run_id: str = "run", step: int = 10, **facts: Any) -> DecisionPoint:
    run: dict[str, Any] = {
        "run_id": run_id, "step": step, "total_steps": 100, "epoch": 1, "host_parameters": 72, "num_parameters": 112,
        "parameters_left": 50, "flops_left": math.inf, "germinations_left": 3, "tokens_per_parameter": 12.5,
        "transformer": False, "window_open": True, "price": 0.03, "steps": (1, 5, 10),
        "train_losses": (2.0, 1.5, 1 / 3), "held_out_loss": 0.7,
        "seeds": (SeedFacts(seed_id="s1", site="bypass:a->b", source="a", target="b", blueprint="widen", size=8,
                            stage="holding", contribution=None),),
    }  # fmt: skip
    return DecisionPoint(
        run=RunFacts(**(run | facts)),
        topology=topology(),
        signals=tuple(signal(s, layer) for s in range(1, step) for layer in ("layer0", "layer1")),
        candidates=(WAIT, GROW, CULL, SHUT),
        timestamp=1.7e9 + step,
    )


def decision(run_id: str = "run", step: int = 10, chosen: int = 1, **changes: Any) -> DecisionFacts:
    given: dict[str, Any] = {
        "decision_id": f"{run_id}:{step}", "point": point(run_id, step), "chosen": chosen, "policy": "tamiyo",
        "version": "v1", "logprob": math.log(0.3), "confidence": 0.8, "uncertainty": 0.1,
    }  # fmt: skip
    return DecisionFacts(**(given | changes))


def outcome(facts: DecisionFacts, *, gain: float = 0.1, over: bool = True) -> OutcomeFacts:
    start = facts.point.run.step
    steps = (start, start + 20, start + 40)

    def branch(end: float, flops: float) -> Branch:
        return Branch(
            steps=steps, losses=(0.7, 0.6, end), training_flops=(0.0, flops, 2 * flops), num_parameters=112
        )

    measured = Outcome(
        candidate=facts.candidate,
        total_steps=100,
        price=0.03,
        taken=branch(0.5 - gain, 1.1e6),
        control=branch(0.5, 1e6),
    )
    return OutcomeFacts(measured=measured, reward=RewardComputer().compute(measured, over=over))
