"""The learned policy in real training loops, with weights that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from loop import Loop

from esper.errors import CheckpointError, ConfigError
from esper.kasmina.optimizer import group_names, reorder_groups
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import save_network, shipped
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policies.tamiyo import TamiyoPolicy, TamiyoPolicyConfig

BOLD: dict[str, Any] = {
    "adaptation_confidence_threshold": 0.0,
    "uncertainty_threshold": 1.0,
    "safety_margin": 0.0,
}
SIZES = {"hidden_dim": 16, "num_gnn_layers": 2}


def eager_network(seed: int = 0) -> TamiyoNetwork:
    """Random weights that dislike waiting: the first candidate feature says that a candidate is WAIT."""
    torch.manual_seed(seed)
    network = TamiyoNetwork(PolicyConfig(**SIZES))
    with torch.no_grad():
        network.candidate[0].weight[0] = 0.0
        network.candidate[0].weight[0, 0] = 50.0
        network.candidate[2].weight[0, 0] = 50.0
        network.candidate_norm.weight[0] = 4.0
        network.logit_head.first.weight[0] = 0.0
        network.logit_head.first.weight[0, 0] = 4.0
        network.logit_head.out.weight[0, 0] = -0.2
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "eager.safetensors"
    save_network(eager_network(), path, card="# Untrained\n")
    return str(path)


def policy(weights: str, **options: Any) -> TamiyoPolicy:
    made = make_policy("tamiyo", weights=weights, **(BOLD | options))
    assert isinstance(made, TamiyoPolicy)
    return made


def loop(weights: str, steps: int = 40, **options: Any) -> Loop:
    return Loop(policy(weights, **options), probes={"decision_interval": 0.1}).run(steps)


def test_a_network_that_dislikes_waiting_grows_a_real_run(weights: str) -> None:
    run = loop(weights)
    grown = [record for record in run.decisions if record.applied and record.decision.action == "germinate"]
    assert grown
    assert run.body.seeds
    decision = grown[0].decision
    assert decision.policy == "tamiyo"
    assert "beats waiting with probability" in decision.reason
    assert {"value", "confidence", "uncertainty", "p:wait", "parameters"} <= set(decision.numbers)
    assert sum(name.startswith("p:") for name in decision.numbers) == 4
    assert all(not record.refused for record in run.decisions)


def test_the_same_run_twice(weights: str) -> None:
    first, second = loop(weights), loop(weights)
    assert [r.decision for r in first.decisions] == [r.decision for r in second.decisions]


def test_no_more_adaptations_in_an_epoch_than_allowed(weights: str) -> None:
    run = loop(weights, max_adaptations_per_epoch=1, candidates={"max_sites": 2})
    by_epoch: dict[int, set[str]] = {}
    for record in run.decisions:
        if record.decision.action not in ("wait", "hold"):
            by_epoch.setdefault(record.epoch, set()).add(record.decision.reason)
    assert all(len(reasons) == 1 for reasons in by_epoch.values())


def test_a_shy_policy_waits_and_says_what_it_would_have_done(weights: str) -> None:
    run = loop(weights, adaptation_confidence_threshold=1.0)
    assert not run.body.seeds
    assert "is preferred, but beats waiting with probability" in run.decisions[1].decision.reason


def test_where_it_does_not_know_the_fallback_decides_and_the_decision_says_so(weights: str) -> None:
    run = loop(
        weights, uncertainty_threshold=0.0, fallback="narrowest", fallback_options={"min_size": 2, "end": 1.0}
    )
    grown = [record.decision for record in run.decisions if record.decision.action == "germinate"]
    assert grown
    assert "the network's samples contradict one another; narrowest decides: " in grown[0].reason
    assert grown[0].policy == "tamiyo"
    assert grown[0].numbers["abstained"] == 1.0
    assert {"uncertainty", "p:wait", "events_used"} <= set(grown[0].numbers)


def test_growth_by_the_network_uses_up_the_fallbacks_event(weights: str) -> None:
    made = policy(weights, fallback="narrowest", fallback_options={"start": 0.0, "num_events": 2})
    Loop(made, probes={"decision_interval": 0.1}).run(5)
    assert made.fallback.state_dict()["events"]["used"] == 1


def test_outside_the_growth_window_nothing_grows(weights: str) -> None:
    run = Loop(policy(weights), probes={"decision_interval": 0.1}, window=(0.5, 1.0)).run(16)
    assert {record.decision.action for record in run.decisions} <= {"wait", "recycle"}
    assert "the growth window is closed" in run.decisions[1].decision.reason


def test_the_network_is_asked_once_at_each_moment_and_moments_that_pile_up_are_one(weights: str) -> None:
    made = policy(weights, moments=[0.2, 0.35, 0.4])
    run = Loop(made, probes={"decision_interval": 0.1}).run(40)
    asked = {record.step: "asked" not in record.decision.reason for record in run.decisions}
    assert [step for step, was in asked.items() if was] == [9, 17]
    assert "asked next at step 14" in next(r.decision.reason for r in run.decisions if r.step == 13)
    assert "for the last time" in run.decisions[-1].decision.reason
    always = Loop(policy(weights, moments=()), probes={"decision_interval": 0.1}).run(40)
    assert not any("asked" in record.decision.reason for record in always.decisions)


def test_resumed_in_the_middle_it_decides_as_if_nothing_had_happened(weights: str) -> None:
    options = {"uncertainty_threshold": 0.05, "max_adaptations_per_epoch": 1}
    first = policy(weights, **options)
    run = Loop(first, probes={"decision_interval": 0.1}).run(20)
    saved = msgspec.json.decode(msgspec.json.encode(first.state_dict()))
    second = policy(weights, **options)
    second.load_state_dict(saved)
    assert second.state_dict() == first.state_dict()
    state = run.controller._state(run.step, run.step // 4)
    generator = state.generator.get_state()
    answers = []
    for each in (first, second):
        state.generator.set_state(generator)
        answers.append(each.decide(state))
    assert answers[0] == answers[1]
    assert second.state_dict() == first.state_dict()


def test_a_run_resumed_from_a_file_ends_as_one_that_was_not_interrupted(weights: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_adaptations_per_epoch": 1}
    whole = loop(weights, 40, **options)
    half = loop(weights, 20, **options)
    state = {
        "model": half.model.state_dict(),
        "optimizer": half.optimizers[0].state_dict(),
        "groups": group_names(half.optimizers, half.model.named_parameters()),
        "controller": half.controller.state_dict(),
    }
    torch.save(state, tmp_path / "run.pt")
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = loop(weights, 0, **options)
    resumed.model.load_state_dict(state["model"])
    resumed.body.register(*resumed.optimizers)
    reorder_groups(resumed.optimizers, state["groups"], resumed.model.named_parameters())
    resumed.optimizers[0].load_state_dict(state["optimizer"])
    resumed.controller.load_state_dict(state["controller"])
    resumed.step = half.step
    resumed.run(20)
    after = [record.decision for record in whole.decisions if record.step > 20]
    assert [record.decision for record in resumed.decisions] == after
    assert "germinate" in {decision.action for decision in after}
    for name, value in whole.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(resumed.model.state_dict()[name], value), name


def test_what_learns_from_it_finds_the_last_point_and_verdict(weights: str) -> None:
    made = policy(weights)
    assert made.last is None
    Loop(made, probes={"decision_interval": 0.1}).run(5)
    assert made.last is not None
    point, verdict = made.last.point, made.last.verdict
    assert point.candidates[verdict.decision.candidate].action == verdict.decision.action
    assert point.run.price == made.config.price


def test_price_and_offers_reach_the_decision_point(weights: str) -> None:
    made = policy(weights, price=0.3, candidates={"shortcut": False})
    Loop(made, probes={"decision_interval": 0.1}).run(5)
    assert made.last is not None
    assert made.last.point.run.price == 0.3
    offered = {place.blueprint for c in made.last.point.candidates for place in c.placements}
    assert "widen" in offered
    assert "shortcut" not in offered


def test_thresholds_come_with_the_weights_unless_they_are_given(weights: str) -> None:
    stored = make_policy("tamiyo", weights=weights)
    assert isinstance(stored, TamiyoPolicy)
    assert stored.network.config == PolicyConfig(**SIZES)
    assert policy(weights, epistemic_weight=2.0).network.config.epistemic_weight == 2.0


def test_a_network_in_hand_needs_no_file() -> None:
    network = eager_network()
    made = TamiyoPolicy(TamiyoPolicyConfig(**BOLD), network)
    assert network.config.adaptation_confidence_threshold == 0.75
    assert all(a is b for a, b in zip(made.network.parameters(), network.parameters(), strict=True))
    assert Loop(made, probes={"decision_interval": 0.1}).run(8).decisions


def test_without_shipped_weights_the_way_out_is_named() -> None:
    try:
        shipped()
    except ConfigError:
        with pytest.raises(ConfigError, match=r"none came with this installation.*esper learn policy"):
            make_policy("tamiyo")
    else:
        assert make_policy("tamiyo").name == "tamiyo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"price": -1.0}, "price should be finite"),
        ({"fallback": "tamiyo"}, "another policy than tamiyo"),
        ({"fallback": "nobody"}, "no policy named 'nobody'"),
        ({"fallback_options": {"colour": 1}}, "has no option 'colour'"),
        ({"candidates": {"colour": 1}}, "candidates has no option colour; it has blueprints"),
        ({"candidates": {"max_candidates": 1}}, "max_candidates should be at least 2"),
        ({"safety_margin": 2.0}, "safety_margin should lie in"),
        ({"uncertainty_samples": 0}, "uncertainty_samples should be a whole number"),
        ({"moments": [0.2, 0.1]}, "moments should ascend"),
        ({"moments": [1.0]}, "moments should ascend"),
        ({"weights": ""}, "weights should be"),
    ],
)
def test_options_that_will_not_do(weights: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy("tamiyo", **({"weights": weights} | options))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no policy network at .*gone\.safetensors"):
        make_policy("tamiyo", weights=str(tmp_path / "gone.safetensors"))
