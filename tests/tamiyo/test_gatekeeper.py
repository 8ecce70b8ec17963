"""Seeds age, are measured and move through their gates; every move is written down."""

from __future__ import annotations

import pytest
import torch
from loop import EAGER, WIDE, Loop

from esper.errors import LifecycleError
from esper.messages import Decision


def grow(loop: Loop, size: int = 3) -> Loop:
    loop.controller.request(
        Decision(action="germinate", site=WIDE, blueprint="widen", size=size, reason="test", policy="test")
    )
    return loop.run(1)


def test_a_birth_is_measured_before_anything_learns():
    loop = grow(Loop())
    first, second = loop.transitions
    assert (first.source, first.target) == ("dormant", "germinated")
    assert (second.source, second.target) == ("germinated", "holding")
    assert second.measurements["preserved_error"] == 0.0
    assert second.measurements["registered"] == 1.0
    assert loop.controller.ledger.measuring_flops == pytest.approx(loop.body.flops * 64)


def test_a_seed_that_changes_the_function_at_birth_is_culled():
    loop = Loop()
    germinated = loop.body.germinate

    def loud(*args, **kwargs):  # type: ignore[no-untyped-def]
        seed = germinated(*args, **kwargs)
        with torch.no_grad():
            seed.branch.fan_out.weight.fill_(0.5)
        return seed

    loop.body.germinate = loud  # type: ignore[method-assign]
    grow(loop)
    assert loop.body.seeds == []
    assert [t.target for t in loop.transitions] == ["germinated", "culled", "embargoed"]
    assert "germination changed an output" in loop.transitions[1].reason


def test_alpha_follows_the_schedule_while_blending():
    loop = grow(Loop(lifecycle=EAGER | {"mode": "isolated"}))
    (seed,) = loop.body.seeds
    seed.record.facts.update(gradient_norm=1.0, output_ratio=0.5)
    seen = []
    for _ in range(12):
        loop.run(1)
        seen.append((seed.stage, round(float(seed.alpha), 6)))
    blending = [alpha for stage, alpha in seen if stage == "blending"]
    assert blending == [0.25, 0.5, 0.75, 1.0]
    assert seen[0] == ("training", 0.0)
    assert seen[-1][0] in ("holding", "fossilized")


def test_contributions_are_measured_sparsely_while_a_seed_waits():
    patient = EAGER | {"min_contribution": 100.0, "max_holding_steps": 60, "num_measurements": 3}
    loop = grow(Loop(lifecycle=patient, total_steps=100))
    (seed,) = loop.body.seeds
    counts = []
    for _ in range(61):
        loop.run(1)
        counts.append(len(seed.record.contributions))
    measured = max(counts)
    assert 3 <= measured <= 14  # spaced by a growing part of the age, not once a gate
    cull = next(t for t in loop.transitions if t.target == "culled")
    assert "contribution" in cull.reason
    assert "allowed" in cull.reason
    assert cull.measurements["num_measurements"] == 3.0


def test_a_held_seed_stays_until_the_next_decision_point_and_no_longer():
    free, loop = (grow(Loop(total_steps=100, probes={"decision_interval": 0.3})) for _ in range(2))
    (seed,) = loop.body.seeds
    loop.controller.request(
        Decision(action="hold", site=seed.seed_id, reason="it may be a peak", policy="test")
    )
    next_decision = loop.controller._next_decision
    while free.body.seeds[0].stage == "holding":
        free.run(1)
        loop.run(1)
    assert free.step < next_decision
    assert seed.stage == "holding"
    while seed.stage == "holding":
        loop.run(1)
    assert seed.stage == "fossilized"
    assert loop.step > next_decision


def test_ready_lists_seeds_whose_age_suffices():
    loop = grow(Loop(lifecycle=EAGER | {"min_holding_steps": 8}))
    assert loop.controller.gatekeeper.ready == []
    loop.run(7)
    assert loop.controller.gatekeeper.ready == []
    loop.body.seeds[0].record.contributions.clear()
    loop.controller.gatekeeper.tick(9)
    assert loop.controller.gatekeeper.ready == ["s1"]


def test_embargoes_are_lifted_with_a_record_and_the_site_is_free_again():
    loop = grow(Loop(lifecycle=EAGER | {"min_holding_steps": 30}))
    loop.controller.request(Decision(action="cull", site="s1", reason="enough", policy="test"))
    loop.run(1)
    cull, rest = loop.transitions[-2:]
    assert (cull.target, cull.reason) == ("culled", "enough")
    assert rest.measurements == {"until_step": 8.0}
    assert loop.controller.ledger.unavailable(WIDE, loop.step) == "under embargo until step 8"
    loop.run(6)
    lifted = loop.transitions[-1]
    assert (lifted.source, lifted.target, lifted.step, lifted.seed_id) == ("embargoed", "dormant", 8, "s1")
    grow(loop)
    assert [seed.seed_id for seed in loop.body.seeds] == ["s2"]


def test_a_part_of_the_host_cannot_be_culled_but_a_rollback_may_forget_it():
    loop = grow(Loop())
    loop.run(20)
    (seed,) = loop.body.seeds
    assert seed.stage == "fossilized"
    with pytest.raises(LifecycleError, match="cannot go from fossilized to culled"):
        loop.controller.gatekeeper.cull("s1", "no", loop.step)
    assert loop.body.seeds == [seed]
    loop.controller.gatekeeper.forget(seed, "rolled back")
    assert loop.body.seeds == []
    assert (loop.transitions[-2].source, loop.transitions[-2].target) == ("fossilized", "culled")


def test_a_seed_moved_by_hand_goes_on_from_there():
    loop = grow(Loop(lifecycle=EAGER | {"mode": "isolated", "min_training_steps": 100}))
    (seed,) = loop.body.seeds
    seed.advance()
    assert seed.stage == "blending"
    loop.run(12)
    assert seed.stage == "fossilized"


def test_histories_and_resting_sites_travel(tmp_path):
    loop = grow(Loop(lifecycle=EAGER | {"min_holding_steps": 30}))
    loop.controller.request(Decision(action="cull", site="s1", reason="enough", policy="test"))
    grow(loop)
    state = loop.controller.gatekeeper.state_dict()
    torch.save(state, tmp_path / "g.pt")
    other = Loop()
    other.controller.gatekeeper.load_state_dict(torch.load(tmp_path / "g.pt", weights_only=True))
    assert other.controller.gatekeeper.state_dict() == state
    assert state["resting"] == {WIDE: ["s1", "widen"]}
