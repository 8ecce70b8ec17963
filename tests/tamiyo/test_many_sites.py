"""Deep hosts: an event scores a bounded sample of the sites, for a price that is counted once a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from loop import Loop
from torch import nn

from esper.errors import ConfigError
from esper.kasmina.body import Body, attach
from esper.kasmina.expressivity import SiteScore
from esper.kasmina.scoring import estimate_flops
from esper.tamiyo import scorer
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.policies import make_policy

NECKS = (13, 31)
"""Layers that are narrower than the others."""


def deep(num_layers: int) -> Body:
    torch.manual_seed(0)
    widths = [4 if i in NECKS else 8 for i in range(num_layers)] + [3]
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        layers += [nn.Linear(8 if i == 0 else widths[i - 1], width), nn.ReLU()]
    return attach(nn.Sequential(*layers[:-1]), torch.randn(4, 8))


def asked_for(num_layers: int, seed: int = 0, **options: Any) -> list[list[str]]:
    """The lists of sites that the default policy has scored at one event, none of which clears its floor."""
    loop = Loop(total_steps=100)
    loop.step = 10
    state = loop.controller._state(10, 0)
    body = deep(num_layers)
    asked: list[list[str]] = []

    def scores(names: Sequence[str], size: int) -> dict[str, SiteScore]:
        asked.append(list(names))
        return {name: SiteScore(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0) for name in names}

    state = dataclasses.replace(
        state,
        topology=body.topology,
        sites=[dataclasses.replace(state.sites[0], site=site) for site in body.sites],
        score=scores,
        cost=body.cost,
        parameters_left=1000,
        host_parameters=body.topology.num_parameters,
        generator=torch.Generator().manual_seed(seed),
    )
    (decision,) = make_policy("expressivity", **options).decide(state)
    assert decision.action == "wait"
    assert sum(name.startswith("neck:") for name in decision.numbers) == min(32, num_layers)
    assert f"neck:{2 * NECKS[0]}" in decision.numbers or num_layers <= NECKS[0]
    return asked


def test_an_event_scores_the_narrowest_layers_and_a_random_sample_of_the_others() -> None:
    ((lead, *others),) = asked_for(60)  # in one pass, which costs more than the scores in a deep host
    assert lead == "bypass:0->120"
    assert len(others) == 16
    assert {f"bypass:{2 * i}->{2 * i + 2}" for i in NECKS} <= set(others)
    places = [int(name.partition(":")[2].partition("-")[0]) for name in others if name != "bypass:2->120"]
    assert places == sorted(places)
    assert asked_for(60)[0][1:] == others  # the same draw for the same generator
    assert asked_for(60, seed=1)[0][1:] != others
    assert len(asked_for(60, max_sites=5)[0][1:]) == 5


def test_a_host_with_few_sites_is_scored_whole() -> None:
    lead, others = asked_for(10)
    assert lead == ["bypass:0->20"]  # alone first: if it clears the floor, the rest need not be paid for
    # ten one-layer bypasses, the last of which reaches the head, and the way around all but the first layer
    assert others == [*(f"bypass:{2 * i}->{2 * i + 2}" for i in range(10)), "bypass:2->20"]
    with pytest.raises(ConfigError, match="max_sites should be at least 1"):
        make_policy("expressivity", max_sites=0)


def test_scores_run_one_held_out_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(total_steps=100, budget={"max_scoring_fraction": 1.0})
    held_out = loop._held_out[0]
    loop._held_out = [type(held_out)(loop.model, held_out.x + i, held_out.y) for i in range(4)]
    loop.run(2)
    rows: list[torch.Tensor] = []
    loop.model[0].register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    loop.controller._scorer.score(["bypass:0->2"], 4, step=2, total_steps=100)
    (seen,) = rows  # three more would be paid for, and not looked at
    assert torch.equal(seen, loop._held_out[-1].x)
    expected = estimate_flops(
        loop.body, [loop.body.site("bypass:0->2")], 64, max_samples=1024, num_permutations=16
    )
    assert loop.controller.ledger.scoring_flops == pytest.approx(expected)


def test_what_is_affordable_is_found_by_pricing_each_site_once(monkeypatch: pytest.MonkeyPatch) -> None:
    body = deep(20)
    sites = [site for site in body.sites if site.kind == "bypass"]
    priced: list[int] = []
    true_price = estimate_flops

    def counting(body: Body, chosen: Sequence[Any], *args: Any, **kwargs: Any) -> float:
        priced.append(len(chosen))
        return true_price(body, chosen, *args, **kwargs)

    monkeypatch.setattr(scorer, "estimate_flops", counting)

    class Ledger:
        def may_score(self, flops: float, step: int, total_steps: int) -> bool:
            return flops <= self.limit

        def __init__(self, limit: float) -> None:
            self.limit = limit

    cheap = true_price(body, sites[:3], 64, max_samples=256, num_permutations=4)
    made = scorer.Scorer(
        TamiyoConfig(bus=None), body, Loop(), Ledger(cheap), Loop().controller.recorder, torch.Generator()
    )  # type: ignore[arg-type]
    chosen, rows, permutations, price = made._affordable(sites, 64, 1, 100)
    assert price <= cheap
    assert 1 <= len(chosen) < len(sites)
    assert price == pytest.approx(
        true_price(body, chosen, 64, max_samples=rows, num_permutations=permutations)
    )
    assert sum(priced) == 5 * len(sites)  # once for each precision
