"""``uniform``: everywhere alike or not at all, and only while it pays; seeds that are judged together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from loop import EAGER, Loop

from esper.errors import ConfigError
from esper.tamiyo.evaluation import contribution
from esper.tamiyo.policies import make_policy

PLACES = ["parallel:0", "parallel:2"]
"""Beside both hidden layers; the third one gives the output."""


def uniform(*, judged: str = "together", held_out: bool = True, most: int = 8, **options: Any) -> Loop:
    return Loop(
        make_policy("uniform", **options),
        held_out=held_out,
        lifecycle=EAGER | {"judged": judged},
        budget={"max_parameters_ratio": 3.0, "site_cooldown_steps": 0, "max_germinations_per_epoch": most},
    )


def germinated(loop: Loop) -> list[tuple[str, str, int]]:
    found = [r.decision for r in loop.decisions if r.decision.action == "germinate" and r.applied]
    return [(d.site, d.blueprint, d.size) for d in found]


def reasons(loop: Loop) -> list[str]:
    return [record.decision.reason for record in loop.decisions]


def test_every_layer_but_the_output_gets_a_seed_of_one_size_after_the_first_step() -> None:
    loop = uniform().run(1)
    assert [site for site, _, _ in germinated(loop)] == PLACES
    # One rank costs 14 + 11 parameters at the two places, and twice the host's 113 may be added.
    assert {(blueprint, size) for _, blueprint, size in germinated(loop)} == {("lowrank", 226 // 25)}
    assert loop.controller.ledger.parameters_left(loop.body) == 226 % 25
    assert all(seed.stage == "holding" for seed in loop.body.seeds)


def test_layers_are_named_by_the_end_of_their_names_and_unknown_ones_are_refused() -> None:
    assert [site for site, _, _ in germinated(uniform(layers=["2"]).run(1))] == ["parallel:2"]
    # The output layer too, where it is asked for.
    assert [site for site, _, _ in germinated(uniform(layers=["0", "4"]).run(1))] == [
        "parallel:0",
        "parallel:4",
    ]
    with pytest.raises(
        ConfigError, match=r"no layer for lowrank is meant by layers=\['query'\].* fits: 0, 2, 4"
    ):
        uniform(layers=["query"]).run(1)


def test_the_first_blueprint_that_fits_is_laid() -> None:
    laid = germinated(uniform(blueprints=["conv_widen", "bottleneck", "lowrank"]).run(1))
    assert [blueprint for _, blueprint, _ in laid] == ["bottleneck", "bottleneck"]


def test_all_places_are_used_at_once_or_none() -> None:
    loop = uniform(most=1).run(3)
    assert germinated(loop) == []
    assert "2 places want a seed at once, but 1 germinations are left" in reasons(loop)[0]
    assert "max_germinations_per_epoch" in reasons(loop)[0]


def test_a_second_event_waits_for_the_first_and_adds_to_it() -> None:
    loop = uniform(num_events=2, end=0.1).run(12)
    sizes = [size for _, _, size in germinated(loop)]
    assert sizes == [4, 4, 5, 5]  # half of what is left, then all of it
    waits = [reason for reason in reasons(loop) if "not free" in reason]
    assert waits
    assert waits[0] == "2 of 2 places are not free: parallel:0 is occupied"
    born = {seed.seed_id: seed for seed in loop.body.seeds}
    assert [born[name].stage for name in ("s1", "s2")] == ["fossilized", "fossilized"]


def test_growth_ends_when_the_last_event_does_not_pay() -> None:
    dear = uniform(num_events=3, end=0.3, min_saved=0.9).run(20)
    assert len(germinated(dear)) == 2
    ended = [reason for reason in reasons(dear) if reason.startswith("growth has ended")]
    assert "the seeds of event 1 save " in ended[0]
    assert "of the held-out loss, less than 90.00%" in ended[0]
    assert len(set(ended)) == 1  # it was measured once
    cheap = uniform(num_events=3, end=0.3, min_saved=1e-9).run(20)
    assert len(germinated(cheap)) > 2
    numbers = [r.decision.numbers for r in cheap.decisions if r.decision.action == "germinate"]
    assert "saved" not in numbers[0]
    assert numbers[2]["saved"] > 0.0


def test_what_an_event_saves_is_the_held_out_loss_off_minus_on_over_on() -> None:
    loop = uniform().run(6)
    batch = loop.held_out()[0]
    on = float(batch().detach())
    for seed in loop.body.seeds:
        torch.nn.init.zeros_(seed.branch.B.weight)
    off = float(batch().detach())
    other = uniform().run(6)  # the policy's own measurement, on a loop of the same steps
    state = other.controller._state(6, 1)
    ids = [seed.seed_id for seed in state.seeds]
    assert state.measure_saving(ids) == pytest.approx((off - on) / on, rel=1e-4)
    charged = other.controller.ledger.measuring_flops
    state.measure_saving(ids)
    assert other.controller.ledger.measuring_flops == charged + 2.0 * other.body.flops * 64


def test_culled_seeds_have_saved_nothing() -> None:
    loop = uniform(num_events=2, end=0.1, min_saved=1e-9).run(1)
    for seed in list(loop.body.seeds):
        loop.controller.gatekeeper.cull(seed.seed_id, "by hand", 1)
    loop.run(12)
    assert len(germinated(loop)) == 2
    assert any("save 0.00% of the held-out loss" in reason for reason in reasons(loop))


def test_without_held_out_data_nothing_can_pay() -> None:
    loop = uniform(held_out=False, num_events=2, end=0.1, min_saved=0.01).run(14)
    assert len(germinated(loop)) == 2
    assert any("holds no data out" in reason for reason in reasons(loop))


def test_a_restored_policy_goes_on_where_it_was() -> None:
    loop = uniform(num_events=3, end=0.3, min_saved=0.9).run(20)
    saved = json.loads(json.dumps(loop.controller.policy.state_dict()))
    again = make_policy("uniform", num_events=3, end=0.3, min_saved=0.9)
    again.load_state_dict(saved)
    assert again.state_dict() == loop.controller.policy.state_dict()
    state = loop.controller._state(30, 7)
    assert [d.reason for d in again.decide(state)] == [d.reason for d in loop.controller.policy.decide(state)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "query"}, r"blueprints and layers should be lists of names"),
        ({"blueprints": []}, r"blueprints should not be empty"),
        ({"min_saved": 1.0}, r"min_saved should lie in \[0, 1\)"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy("uniform", **options)


def test_seeds_of_one_birth_are_judged_by_what_they_contribute_together() -> None:
    together = uniform().run(8)
    fossilised = [t for t in together.transitions if t.target == "fossilized"]
    assert [t.seed_id for t in fossilised] == ["s1", "s2"]
    assert fossilised[0].reason == fossilised[1].reason
    assert fossilised[0].reason.startswith("with the 2 seeds of its birth off the held-out loss is")
    assert fossilised[0].measurements["num_judged"] == 2.0
    seeds = together.body.seeds
    both = contribution(together.body, seeds, together.held_out()).mean
    each = [contribution(together.body, [seed], together.held_out()).mean for seed in seeds]
    assert both != pytest.approx(each[0])
    assert both != pytest.approx(each[1])


def test_seeds_of_different_births_are_judged_apart() -> None:
    loop = uniform(num_events=2, end=0.1).run(14)
    fossilised = [t for t in loop.transitions if t.target == "fossilized"]
    assert [t.seed_id for t in fossilised] == ["s1", "s2", "s3", "s4"]
    assert [t.measurements["num_judged"] for t in fossilised] == [2.0] * 4
    assert fossilised[0].step < fossilised[2].step
    assert fossilised[0].measurements["contribution"] != fossilised[2].measurements["contribution"]


def test_judged_together_costs_two_passes_whatever_the_number_of_seeds() -> None:
    def measured(judged: str) -> float:
        loop = uniform(judged=judged).run(1)
        births = loop.controller.ledger.measuring_flops
        loop.run(3)
        return loop.controller.ledger.measuring_flops - births

    assert 0 < measured("together") == measured("alone") / 2


def test_the_budget_is_relative_to_what_is_trained() -> None:
    loop = uniform()
    for layer in (loop.model[0], loop.model[2]):
        layer.requires_grad_(False)
    head = 5 * 4 + 4
    assert loop.controller.ledger.parameters_left(loop.body) == 2 * head
    loop.model[0].requires_grad_(True)  # thawed in mid-run: the budget stays what it was
    assert loop.controller.ledger.parameters_left(loop.body) == 2 * head
    books = loop.controller.ledger.state_dict()
    assert books["base_parameters"] == head
    frozen = uniform()
    frozen.model.requires_grad_(False)  # nothing is trained yet, so all of the host counts
    assert frozen.controller.ledger.parameters_left(frozen.body) == 2 * frozen.body.num_parameters
