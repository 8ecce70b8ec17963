"""Every way in which a decision is refused, and that nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
from loop import RANK, WIDE, Loop

from esper.messages import Decision
from esper.tamiyo.vetting import refusal


def ask(loop: Loop, action: str, site: str, blueprint: str = "widen", size: int = 2, halted: str = "") -> str:
    decision = Decision(
        action=action, site=site, blueprint=blueprint, size=size, reason="test", policy="test"
    )  # type: ignore[arg-type]
    ledger = loop.controller.ledger
    return refusal(decision, body=loop.body, ledger=ledger, step=10, total_steps=40, epoch=1, halted=halted)


@pytest.mark.parametrize(
    ("action", "site", "blueprint"),
    [("wait", "", ""), ("germinate", WIDE, "widen"), ("germinate", RANK, "lowrank"), ("recycle", "0", "")],
)
def test_what_fits_passes(action, site, blueprint):
    assert ask(Loop(), action, site, blueprint) == ""


@pytest.mark.parametrize(
    ("action", "site", "blueprint", "reason"),
    [
        ("germinate", "bypass:a->b", "widen", "no site 'bypass:a->b' in this model; sites are"),
        ("germinate", WIDE, "nonsense", "nonsense"),
        ("germinate", WIDE, "depthwise", "depthwise"),
        ("cull", "s9", "", "there is no seed 's9'"),
        ("hold", "s9", "", "there is no seed 's9'"),
        ("recycle", "17", "", "there is no layer '17'"),
    ],
)
def test_names_that_do_not_exist(action, site, blueprint, reason):
    assert reason in ask(Loop(), action, site, blueprint)


def test_an_absurd_size_is_refused_by_its_price_without_building_it():
    assert "parameters are more than the" in ask(Loop(), "germinate", WIDE, size=10**9)


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ({"max_parameters_ratio": 1.0}, "parameters are more than the 0 that the budget leaves"),
        ({"max_flops_ratio": 0.0}, "training FLOPs are more than the budget leaves"),
    ],
)
def test_budgets(budget: dict[str, Any], reason: str):
    loop = Loop(budget=budget)
    loop.controller.ledger.charge_step(loop.body.flops, 320)
    assert reason in ask(loop, "germinate", WIDE)


def test_a_halted_run_may_still_cull_and_recycle():
    loop = Loop()
    seed = loop.body.germinate(WIDE, "widen", 2)
    assert ask(loop, "germinate", RANK, "lowrank", halted="NaN") == "the governor has stopped growth: NaN"
    assert ask(loop, "cull", seed.seed_id, halted="NaN") == ""
    assert ask(loop, "recycle", "0", halted="NaN") == ""


def test_occupied_sites_and_seeds_alive():
    loop = Loop(budget={"max_seeds_alive": 1, "max_parameters_ratio": 10.0})
    seed = loop.body.germinate(WIDE, "widen", 2)
    assert "holds a seed that is still on its way" in ask(loop, "germinate", WIDE)
    assert "1 seeds are alive" in ask(loop, "germinate", RANK, "lowrank")
    seed.enter("fossilized", 1.0)
    assert ask(loop, "germinate", WIDE) == ""
