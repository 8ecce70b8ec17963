"""What growth has cost and may still cost."""

from __future__ import annotations

import math

import pytest
import torch
from loop import WIDE, Loop

from esper.tamiyo.config import BudgetConfig
from esper.tamiyo.ledger import Ledger


def ledger(**budget: float) -> Ledger:
    return Ledger(BudgetConfig(**budget), host_parameters=100, host_flops=10)  # type: ignore[arg-type]


def test_a_step_costs_three_forwards_and_measurements_are_charged_beside():
    books = ledger()
    books.charge_step(12, 5)
    books.charge_scoring(7.0)
    books.charge_measurement(4.0)
    assert books.num_samples == 5
    assert books.host_training_flops == 3 * 10 * 5
    assert books.training_flops == 3 * 12 * 5 + 7 + 4
    assert (books.scoring_flops, books.measuring_flops) == (7.0, 4.0)


def test_scoring_may_take_its_share_of_the_whole_run():
    books = ledger(max_scoring_fraction=0.1)
    books.charge_step(10, 10)  # one step of 300 FLOPs out of 20
    assert books.may_score(600.0, 1, 20)
    assert not books.may_score(601.0, 1, 20)
    books.charge_measurement(1e6)
    assert books.may_score(600.0, 1, 20)
    books.charge_scoring(500.0)
    assert not books.may_score(101.0, 1, 20)


def test_flops_left_shrink_by_what_growth_has_added():
    assert ledger().flops_left(1, 20) == math.inf
    books = ledger(max_flops_ratio=0.5)
    books.charge_step(10, 10)
    assert books.flops_left(1, 20) == 0.5 * 300 * 20
    books.charge_step(14, 10)
    assert books.flops_left(2, 20) == 0.5 * 300 * 20 - 3 * 4 * 10


def test_germinations_are_counted_by_epoch_and_sites_cool_down():
    books = ledger(max_germinations_per_epoch=2, site_cooldown_steps=5)
    books.note_germination("a", 3, epoch=0)
    books.note_germination("b", 4, epoch=0)
    assert books.germinations_left(0) == 0
    assert books.germinations_left(1) == 2
    assert books.unavailable("a", 7) == "cooling down until step 8"
    assert books.unavailable("a", 8) == ""
    assert books.unavailable("c", 4) == ""
    books.note_germination("c", 9, epoch=1)
    assert books.germinations_left(1) == 1
    assert books.germinated == 3


def test_the_longer_embargo_counts_and_ends_once():
    books = ledger()
    books.embargo("a", 10)
    books.embargo("a", 7)
    assert books.unavailable("a", 9) == "under embargo until step 10"
    assert books.lifted(9) == []
    assert books.lifted(10) == ["a"]
    assert books.lifted(11) == []
    assert books.unavailable("a", 10) == ""


def test_parameters_left_follow_the_body():
    loop = Loop(budget={"max_parameters_ratio": 1.5})
    books, host = loop.controller.ledger, loop.body.num_parameters
    assert books.parameters_left(loop.body) == int(1.5 * host) - host
    seed = loop.body.germinate(WIDE, "widen", 2)
    assert books.parameters_left(loop.body) == int(1.5 * host) - host - seed.num_parameters


def test_the_books_travel_as_plain_values(tmp_path):
    books = ledger()
    books.charge_step(12, 5)
    books.note_germination("a", 3, epoch=2)
    books.embargo("b", 9)
    torch.save(books.state_dict(), tmp_path / "ledger.pt")
    other = ledger()
    other.load_state_dict(torch.load(tmp_path / "ledger.pt", weights_only=True))
    assert other.state_dict() == books.state_dict()
    assert other.unavailable("b", 4) == books.unavailable("b", 4) != ""
    other.embargo("c", 3)
    assert books.unavailable("c", 1) == ""  # nothing is shared


@pytest.mark.parametrize("total", [10, 1000])
def test_a_longer_run_may_score_more(total):
    books = ledger(max_scoring_fraction=0.01)
    books.charge_step(10, 10)
    assert books.may_score(3.0 * total, 1, total)
    assert not books.may_score(3.0 * total + 1, 1, total)
