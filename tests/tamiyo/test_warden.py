"""The governor's answers carried out on a live model."""

from __future__ import annotations

import pytest
import torch
from loop import EAGER, RANK, WIDE, Loop

from esper.errors import GrowthError
from esper.messages import Decision, ErrorRecoveryEvent

QUICK = {"check_interval_steps": 1, "min_checks": 3, "patience": 2, "embargo_steps": 9}
HELD = EAGER | {"min_holding_steps": 200}


def germinate(loop: Loop, site: str = WIDE, blueprint: str = "widen") -> None:
    loop.controller.request(
        Decision(action="germinate", site=site, blueprint=blueprint, size=2, reason="test", policy="test")
    )


def blow_up(loop: Loop, factor: float = 1e8) -> None:
    with torch.no_grad():
        for seed in loop.body.seeds:
            for p in seed.parameters():
                p.mul_(factor).add_(1.0)


def test_the_newest_seed_goes_first_and_the_older_one_stays():
    loop = Loop(governor=QUICK, lifecycle=HELD, lr=1e-3).run(5)
    germinate(loop)
    loop.run(3)
    germinate(loop, RANK, "lowrank")
    loop.run(3)
    newest = loop.body.seeds[0] if loop.body.seeds[0].seed_id == "s2" else loop.body.seeds[1]
    with torch.no_grad():
        for p in newest.parameters():
            p.mul_(1e4).add_(100.0)
    loop.run(4)
    (record,) = loop.interventions
    assert (record.action, record.target) == ("cull", "s2")
    assert record.measurements["loss"] > 4 * record.measurements["loss_median"]
    assert [seed.seed_id for seed in loop.body.seeds] == ["s1"]
    assert loop.controller.ledger.unavailable(RANK, loop.step).startswith("under embargo")
    errors = [m for m in loop.sink.messages if isinstance(m, ErrorRecoveryEvent)]
    assert [(m.kind, m.layer_id) for m in errors] == [("cull", "s2")]


def test_a_rollback_brings_weights_optimizer_and_structure_back_bit_for_bit():
    loop = Loop(governor=QUICK, lr=1e-3).run(5)
    before = {name: value.clone() for name, value in loop.model.state_dict().items()}
    germinate(loop)
    loop.run(1)
    kept = {name: value.clone() for name, value in loop.model.state_dict().items() if name in before}
    loop.run(10)
    assert loop.body.seeds[0].stage == "fossilized"
    blow_up(loop)
    step = loop.step
    while not loop.interventions:
        loop.run(1)
    (record,) = loop.interventions
    assert (record.action, record.target) == ("rollback", WIDE)
    assert loop.step <= step + 2
    assert loop.body.seeds == []
    assert set(loop.model.state_dict()) == set(kept)
    for name, value in loop.model.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert all(float(s["step"]) == 6 for s in loop.optimizers[0].state.values())
    assert loop.controller.ledger.unavailable(WIDE, loop.step) == f"under embargo until step {loop.step + 9}"
    loop.run(5)
    assert loop.changes >= 2


def test_nothing_is_adapted_while_the_run_is_not_known_to_be_well():
    loop = Loop(governor=QUICK, lifecycle=HELD, lr=1e-3).run(5)
    loop.controller.warden.note_loss(torch.tensor(1e6))
    loop.controller.warden.inspect(6)
    with pytest.raises(
        GrowthError, match="the governor allows no adaptation now: the run is not known to be well"
    ):
        loop.controller.warden.before_adaptation(6, WIDE)


def test_several_adaptations_between_two_steps_share_one_snapshot():
    loop = Loop(governor=QUICK, lifecycle=HELD).run(4)
    germinate(loop)
    germinate(loop, RANK, "lowrank")
    loop.run(1)
    snapshot = loop.controller.warden.governor.snapshot
    assert snapshot is not None
    assert snapshot.step == 5
    assert snapshot.site == WIDE
    assert len(loop.body.seeds) == 2


def test_gradients_of_seeds_are_not_the_hosts():
    loop = Loop(governor=QUICK)
    germinate(loop)
    loop.run(2)
    warden = loop.controller.warden
    loop.train[0]().backward()
    warden.note_gradients(loop.model.named_parameters())
    host = [p for n, p in loop.model.named_parameters() if "esper_seeds" not in n]
    assert float(warden._gradient_norm) == pytest.approx(
        float(torch.nn.utils.get_total_norm([p.grad for p in host]))
    )


def test_gradients_are_looked_at_every_check_only_while_something_can_be_undone():
    loop = Loop(governor=QUICK | {"check_interval_steps": 2, "idle_gradient_checks": 3})
    warden = loop.controller.warden
    assert [step for step in range(1, 13) if warden.wants_gradients(step)] == [6, 12]
    assert [warden.next_gradients(step) for step in (0, 5, 6)] == [6, 6, 12]
    germinate(loop)
    loop.run(1)
    assert [step for step in range(1, 7) if warden.wants_gradients(step)] == [2, 4, 6]
    assert warden.next_gradients(2) == 4


def test_checks_that_were_passed_by_are_judged_before_anything_is_adapted():
    late, eager = (
        Loop(governor=QUICK | {"idle_gradient_checks": checks}, probes={"decision_interval": 0.5})
        for checks in (7, 1)
    )
    warden = late.controller.warden
    judged = []
    for step in range(1, 15):
        late.run(1)
        eager.run(1)
        judged.append(len(warden.governor.state_dict()["detector"]["losses"]))
        assert len(warden._unjudged) == step - judged[-1]
    assert judged == [1] * 6 + [7] * 7 + [14]  # the first step decides, so it judges
    known = [loop.controller.warden.state_dict()["governor"]["detector"] for loop in (late, eager)]
    assert known[0]["losses"] == known[1]["losses"]
    late.run(1)
    warden._unjudged = [torch.tensor(float("nan"))]
    resumed = Loop(governor=QUICK)
    resumed.controller.warden.load_state_dict(warden.state_dict())
    for loop in (late, resumed):
        germinate(loop)
        loop.run(1)
        assert "the loss is nan" in loop.controller.warden.halted
        assert loop.body.seeds == []
        assert any("the governor has stopped growth" in record.refused for record in loop.decisions)


def test_fresh_weights_are_judged_afresh():
    loop = Loop(governor=QUICK).run(8)
    germinate(loop)
    loop.run(1)
    warden = loop.controller.warden
    assert warden.governor.snapshot is not None
    warden.start_afresh()
    warden.note_loss(torch.tensor(1e3))
    warden.inspect(10)
    assert loop.interventions == []
    assert warden.halted == ""
