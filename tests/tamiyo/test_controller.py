"""The loop of a growing run, under a plain training loop."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loop import RANK, WIDE, Loop

from esper.errors import ConfigError, GrowthError
from esper.messages import CacheHitRates, Decision, ErrorRecoveryEvent, ModelPerformance
from esper.tamiyo.state import GrowthState


class Asking:
    """A policy that does with each state what a test wants."""

    name = "asking"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.states: list[GrowthState] = []

    def decide(self, state: GrowthState) -> list[Decision]:
        self.states.append(state)
        return self.answer(state) or [Decision(action="wait", reason="nothing asked", policy=self.name)]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": len(self.states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = [None] * state["seen"]  # type: ignore[list-item]


def germinate(site: str = WIDE, blueprint: str = "widen", size: int = 3) -> Decision:
    return Decision(
        action="germinate", site=site, blueprint=blueprint, size=size, reason="a test asks", policy="asking"
    )


def test_a_decision_point_comes_at_its_interval_and_sees_the_run_as_it_is():
    policy = Asking(lambda state: [germinate()] if state.step == 11 else [])
    loop = Loop(policy, total_steps=40, probes={"decision_interval": 0.25}).run(40)
    assert [state.step for state in policy.states] == [1, 11, 21, 31]
    first, _, third, _ = policy.states
    assert (first.fraction, first.epoch) == (1 / 40, 0)
    assert third.num_parameters == loop.body.num_parameters > first.num_parameters == first.host_parameters
    assert third.seeds[0].site == WIDE
    assert 0 < third.train_loss < first.train_loss
    assert first.measure_held_out_loss() == first.measure_held_out_loss()
    assert third.tokens_per_parameter == pytest.approx(40 * 32 / first.host_parameters)
    assert not third.transformer
    view = {view.site.name: view.unavailable for view in third.sites}
    assert view[RANK] == ""
    performance = [m for m in loop.sink.messages if isinstance(m, ModelPerformance)]
    assert [m.step for m in performance] == [1, 11, 21, 31]
    assert performance[2].train_loss == pytest.approx(third.train_loss)


def test_the_window_closes():
    policy = Asking(lambda state: [])
    Loop(policy, window=(0.25, 0.5), probes={"decision_interval": 0.1}).run(40)
    assert [state.window_open for state in policy.states] == [
        0.25 <= s.fraction <= 0.5 for s in policy.states
    ]


def test_scores_are_cached_within_a_decision_point_and_charged_once():
    spent: list[float] = []

    def look(state: GrowthState) -> None:
        loop.controller.ledger.scoring_flops = 0.0
        first = state.score([WIDE], 2)
        once = loop.controller.ledger.scoring_flops
        assert state.score([WIDE], 2) is first
        spent.append(once)
        assert loop.controller.ledger.scoring_flops == once > 0

    loop = Loop(Asking(look), probes={"decision_interval": 0.5}, budget={"max_scoring_fraction": 1.0})
    loop.run(40)
    assert len(spent) == 2
    rates = [m for m in loop.sink.messages if isinstance(m, CacheHitRates)]
    assert [(m.hits, m.misses) for m in rates] == [(0, 1), (1, 2)]
    assert loop.controller.scores["2"] > 0


def test_scoring_that_does_not_fit_its_share_becomes_a_wait_with_the_reason():
    loop = Loop(Asking(lambda state: state.score([WIDE], 2)), budget={"max_scoring_fraction": 1e-6}).run(1)
    (record,) = loop.decisions
    assert record.decision.action == "wait"
    assert "could not decide" in record.decision.reason
    assert "max_scoring_fraction=1e-06" in record.decision.reason
    assert any(isinstance(m, ErrorRecoveryEvent) and m.kind == "policy" for m in loop.sink.messages)


def test_a_mistake_in_the_settings_ends_the_run():
    def wrong(state: GrowthState) -> None:
        raise ConfigError("no such site")

    with pytest.raises(ConfigError, match="no such site"):
        Loop(Asking(wrong)).run(1)


def test_a_birth_that_cannot_be_registered_leaves_no_seed():
    loop = Loop()
    for group in loop.optimizers[0].param_groups:
        group["params"] = group["params"][4:]
    loop.optimizers = [*loop.optimizers, torch.optim.SGD(list(loop.model[4].parameters()), lr=0.1)]
    loop.controller.request(germinate())
    loop.run(1)
    record = loop.decisions[0]
    assert not record.applied
    assert "put the host layer's weight into the group" in record.refused
    assert loop.body.seeds == []
    assert loop.changes == 0


def test_a_birth_whose_measurement_fails_leaves_no_seed():
    loop = Loop()

    class Broken:
        num_samples = 4

        def __call__(self) -> torch.Tensor:
            raise GrowthError("no loss on this batch")

    loop._held_out = [Broken()]  # type: ignore[list-item]
    loop.controller.request(germinate())
    loop.run(1)
    assert loop.decisions[0].refused == "no loss on this batch"
    assert loop.body.seeds == []
    held = {id(p) for g in loop.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in loop.model.parameters()}


@pytest.mark.parametrize("held_out", [True, False])
def test_growth_helps_with_and_without_held_out_batches(held_out):
    loop = Loop(held_out=held_out, total_steps=80)
    alone = Loop(held_out=held_out, total_steps=80).run(80)
    loop.controller.request(germinate(size=16))
    loop.run(80)
    assert loop.changes == 1
    assert [seed.stage for seed in loop.body.seeds] == ["fossilized"]
    losses = [sum(float(b().detach()) for b in one.train) for one in (loop, alone)]
    assert losses[0] < losses[1]


def test_the_closed_form_start_grows_too_and_is_charged():
    loop = Loop(widen_start="closed_form")
    loop.controller.request(germinate())
    loop.run(12)
    (seed,) = loop.body.seeds
    assert loop.decisions[0].applied
    assert loop.controller.ledger.measuring_flops > 0
    other = Loop()
    other.controller.request(germinate())
    other.run(1)
    assert not torch.equal(other.body.seeds[0].branch.fan_in.weight, seed.branch.fan_in.weight)


def test_state_travels_through_weights_only_files(tmp_path):
    policy = Asking(lambda state: [germinate()] if state.step == 5 else [])
    loop = Loop(policy, total_steps=20, probes={"decision_interval": 0.2}, finish="retrain").run(9)
    loop.controller.request(germinate(RANK, "lowrank", 1))
    torch.save(loop.controller.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["pending"][0]["site"] == RANK
    other = Loop(
        Asking(lambda state: []), total_steps=20, probes={"decision_interval": 0.2}, finish="retrain"
    )
    other.model.load_state_dict(loop.model.state_dict())
    other.body.register(*other.optimizers)
    other.controller.load_state_dict(state)
    other.step = loop.step
    other.run(1)
    assert {seed.site.name for seed in other.body.seeds} == {WIDE, RANK}
    assert other.body.seeds[-1].seed_id != other.body.seeds[0].seed_id
    assert other.controller.ledger.germinated == 2


def test_nan_losses_do_not_stop_the_records():
    policy = Asking(lambda state: [])
    loop = Loop(policy, probes={"decision_interval": 0.1})
    loop.controller.note_batch(torch.tensor(math.nan), 4)
    loop.controller.safe_point(1, 0)
    assert math.isnan(policy.states[0].train_loss)
    loop.controller.note_batch(torch.tensor(2.0), 4)
    loop.controller.safe_point(9, 0)
    assert policy.states[1].train_loss == 2.0
