"""What each threshold does, on readings written by hand; and the network's own decisions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from policy_graphs import SMALL, random_graph

from esper.messages import HealthSignal
from esper.tamiyo.graph.data import ModelGraphState
from esper.tamiyo.graph.facts import WAIT, Candidate, Placement
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.decision import Verdict, describe
from esper.tamiyo.network.judging import Reading, confidence_needed, judge
from esper.tamiyo.network.network import TamiyoNetwork


def grow(layer: str, size: int = 8) -> Candidate:
    place = Placement(site=f"s:{layer}", source="stem", target=layer, blueprint="widen", size=size)
    return Candidate(action="grow", placements=(place,))


CANDIDATES = (WAIT, grow("a"), grow("b"), Candidate(action="hold", seed_id="seed-1"))


def signal(layer: str, health: float, step: int = 0) -> HealthSignal:
    return HealthSignal(
        layer_id=layer, seed_id="", chunk_id=0, epoch=0, step=step, activation_variance=1.0,
        dead_neuron_ratio=0.0, dormancy=0.0, avg_correlation=0.0, effective_rank=1.0, gradient_norm=1.0,
        gradient_snr=1.0, update_ratio=0.0, expressivity=0.0, is_ready_for_transition=False,
        health_score=health, execution_latency=0.0, error_count=0, active_seeds=0, total_seeds=0, timestamp=0.0,
    )  # fmt: skip


def state(mask: list[bool] | None = None, health: tuple[HealthSignal, ...] = ()) -> ModelGraphState:
    graph = random_graph(4, len(CANDIDATES))
    graph.candidate_mask = torch.tensor(mask or [True] * len(CANDIDATES))
    return ModelGraphState(graph, CANDIDATES, ["stem", "a", "b", "c"], 0.0, health, None)


def reading(logits: list[float], **changes: Any) -> Reading:
    plain = {
        "risk": torch.zeros(4),
        "value": 0.1,
        "urgency": 0.02,
        "spread": torch.zeros(4),
        "epistemic": 0.05,
        "aleatoric": 0.3,
    }
    return Reading(torch.tensor(logits), **(plain | changes))


def judged(said: Reading, at: ModelGraphState | None = None, adaptations: int = 0, **config: Any) -> Verdict:
    return judge(PolicyConfig(**config), at or state(), said, adaptations)


SURE = [0.0, 2.0, 1.0, -1.0]


def test_a_sure_candidate_is_carried_out_with_what_speaks_for_it() -> None:
    verdict = judged(reading(SURE, risk=torch.tensor([0.0, 0.2, 0.0, 0.0])))
    decision = verdict.decision
    assert (verdict.outcome, decision.action, decision.layer, decision.candidate) == ("adapt", "grow", "a", 1)
    assert decision.confidence == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert (decision.risk, decision.urgency, decision.value) == pytest.approx((0.2, 0.02, 0.1))
    assert decision.reason == "grow s:a widen 8 beats waiting with probability 0.88, at least 0.75"
    probs = torch.tensor(SURE).softmax(0).tolist()
    assert decision.numbers["p:wait"] == pytest.approx(probs[0])
    assert decision.numbers["p:grow s:a widen 8"] == pytest.approx(probs[1])
    assert {"confidence", "confidence_needed", "uncertainty", "aleatoric", "value"} <= set(decision.numbers)


def test_many_candidates_of_equal_worth_do_not_lower_the_confidence_that_acting_is_right() -> None:
    verdict = judged(reading([0.0, 2.0, 2.0, 2.0]))
    assert verdict.decision.numbers["p:grow s:a widen 8"] < 0.75
    assert verdict.outcome == "adapt"


def test_many_bad_candidates_do_not_make_acting_right() -> None:
    verdict = judged(reading([0.0, -0.1, -0.1, -0.1]))
    assert verdict.decision.numbers["p:wait"] < 0.5
    assert verdict.outcome == "wait"
    assert "waiting is preferred: grow s:a widen 8 would beat it" in verdict.reason
    assert verdict.decision.confidence == pytest.approx(1 / (1 + math.exp(-0.1)))


def test_confidence_threshold() -> None:
    said = reading([0.0, 0.8, 0.0, 0.0])
    verdict = judged(said)
    assert verdict.outcome == "unsure"
    assert "beats waiting with probability 0.69, less than 0.75" in verdict.reason
    assert judged(said, adaptation_confidence_threshold=0.6).outcome == "adapt"


def test_an_ill_layer_needs_less_confidence() -> None:
    said = reading([0.0, 0.8, 0.0, 0.0])
    well, ill = (state(health=(signal("a", h), signal("stem", 0.9))) for h in (0.31, 0.1))
    assert judged(said, well).outcome == "unsure"
    assert judged(said, ill).outcome == "adapt"
    assert judged(said, ill, health_threshold=0.05).outcome == "unsure"
    cured = state(health=(signal("a", 0.1, step=1), signal("a", 0.9, step=2)))
    assert judged(said, cured).outcome == "unsure"
    elsewhere = state(health=(signal("b", 0.0),))
    assert judged(said, elsewhere).outcome == "unsure"


def test_illness_lowers_what_is_needed_to_one_half_and_no_further() -> None:
    config = PolicyConfig()
    needed = [confidence_needed(config, health) for health in (None, 0.9, 0.3, 0.15, 0.0)]
    assert needed == pytest.approx([0.75, 0.75, 0.75, 0.625, 0.5])
    low = PolicyConfig(adaptation_confidence_threshold=0.4)
    assert confidence_needed(low, 0.0) == 0.4


def test_uncertainty_threshold_abstains_whatever_is_preferred() -> None:
    verdict = judged(reading(SURE, epistemic=0.25))
    assert verdict.outcome == "abstain"
    assert "0.25, is above 0.20" in verdict.reason
    assert judged(reading([0.0, -1.0, -1.0, -1.0], epistemic=0.25)).outcome == "abstain"
    assert judged(reading(SURE, epistemic=0.25), uncertainty_threshold=0.3).outcome == "adapt"
    assert judged(reading(SURE, epistemic=0.25), enable_uncertainty=False).outcome == "adapt"


def test_novelty_threshold_abstains_too() -> None:
    verdict = judged(reading(SURE, novelty=0.15))
    assert verdict.outcome == "abstain"
    assert "novelty of this state, 0.15, is above 0.10" in verdict.reason
    assert verdict.decision.numbers["novelty"] == 0.15
    assert judged(reading(SURE, novelty=0.15), novelty_threshold=0.2).outcome == "adapt"
    assert judged(reading(SURE, novelty=0.15), enable_uncertainty=False).outcome == "adapt"


def test_epistemic_weight_takes_spread_off_the_odds() -> None:
    said = reading(SURE, spread=torch.tensor([0.0, 3.0, 0.0, 0.0]))
    assert judged(said).decision.layer == "a"
    assert judged(said).decision.confidence == pytest.approx(1 / (1 + math.exp(-1.7)))
    assert judged(said, epistemic_weight=0.5).decision.layer == "b"
    assert judged(said, epistemic_weight=0.0).decision.confidence == pytest.approx(1 / (1 + math.exp(-2)))


def test_safety_margin_refuses_what_is_nearly_sure_to_be_undone() -> None:
    said = reading(SURE, risk=torch.tensor([0.0, 0.85, 0.0, 0.0]))
    assert judged(said).outcome == "adapt"
    verdict = judged(said, safety_margin=0.2)
    assert verdict.outcome == "unsafe"
    assert "culled or rolled back with probability 0.85, more than 0.80" in verdict.reason


def test_adaptations_of_an_epoch_are_limited_and_holding_a_seed_is_none() -> None:
    assert judged(reading(SURE), adaptations=1).outcome == "adapt"
    verdict = judged(reading(SURE), adaptations=2)
    assert verdict.outcome == "spent"
    assert "this epoch has had its 2 adaptations" in verdict.reason
    assert judged(reading(SURE), adaptations=2, max_adaptations_per_epoch=3).outcome == "adapt"
    assert judged(reading([0.0, 0.0, 0.0, 3.0]), adaptations=2).outcome == "adapt"


def test_unavailable_candidates_are_not_chosen() -> None:
    assert (
        judged(
            reading(SURE), state([True, False, True, True]), adaptation_confidence_threshold=0.7
        ).decision.layer
        == "b"
    )
    nothing = judged(reading(SURE), state([True, False, False, False]))
    assert (nothing.outcome, nothing.reason) == ("wait", "nothing but waiting is available")


@pytest.mark.parametrize("changes", [{"value": math.nan}, {"spread": torch.tensor([0.0, math.inf, 0, 0])}])
def test_an_output_that_is_not_finite_is_not_heard(changes: dict[str, Any]) -> None:
    verdict = judged(reading(SURE, **changes))
    assert verdict.outcome == "abstain"
    assert "not finite" in verdict.reason


def test_candidates_in_words() -> None:
    place = CANDIDATES[1].placements[0]
    recycle = Candidate(action="recycle", placements=(Placement(site="", source="a", target="a"),))
    several = Candidate(action="grow", placements=(place, place))
    words = [describe(candidate) for candidate in (*CANDIDATES, recycle, several)]
    assert words == [
        "wait", "grow s:a widen 8", "grow s:b widen 8", "hold seed-1", "recycle a", "grow 2 sites widen 8"
    ]  # fmt: skip


def biased(**config: Any) -> TamiyoNetwork:
    """Random weights, made to like the candidate that its own logits like best."""
    torch.manual_seed(0)
    network = TamiyoNetwork(dataclasses.replace(SMALL, **config))
    with torch.no_grad():
        network.logit_head.out.weight.mul_(40)
    return network


def test_a_networks_decision_is_the_same_in_any_mode_and_the_mode_of_its_distribution() -> None:
    network, at = biased(epistemic_weight=0.0, uncertainty_threshold=1.0), state()
    torch.manual_seed(5)
    verdicts = [network.train(mode).decide(at) for mode in (True, False, True)]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    with torch.no_grad():
        distribution = network.distribution(network.eval()(at.graph_data), at.graph_data)
    assert verdicts[0].decision.candidate == int(distribution.mode)


def test_make_decision_is_none_unless_something_is_to_be_done() -> None:
    at = state()
    bold = biased(adaptation_confidence_threshold=0.0, uncertainty_threshold=1.0, epistemic_weight=0.0)
    verdict, decision = bold.decide(at), bold.make_decision(at)
    assert verdict.outcome in ("adapt", "wait")
    assert decision == (verdict.decision if verdict.outcome == "adapt" else None)
    shy = biased(adaptation_confidence_threshold=1.0, uncertainty_threshold=1.0)
    assert shy.make_decision(at) is None


def test_samples_are_taken_only_where_uncertainty_is_enabled() -> None:
    graph = state().graph_data
    with_samples, without = biased().read(graph)[0], biased(enable_uncertainty=False).read(graph)[0]
    assert with_samples.epistemic > 0
    assert bool(with_samples.spread[1:].all())
    assert (without.epistemic, without.spread.any().item()) == (0.0, False)
    torch.testing.assert_close(with_samples.logits, without.logits)


def test_many_states_are_judged_as_each_alone() -> None:
    network = biased(uncertainty_threshold=1.0)
    states = [state(), state([True, False, True, True]), state([True, False, False, False])]
    together = network.decide_all(states, [0, 2, 0])
    for verdict, at, count in zip(together, states, [0, 2, 0], strict=True):
        alone = network.decide(at, count)
        assert (verdict.outcome, verdict.decision.candidate) == (alone.outcome, alone.decision.candidate)
        assert verdict.decision.numbers == pytest.approx(alone.decision.numbers, abs=1e-5)
    assert network.decide_all([], []) == []
