"""Prices are looked up, and like places share one; a user's blueprint is asked at each place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esper.errors import GrowthError
from esper.hosts import GPT, GPTConfig
from esper.kasmina.blueprints import blueprint, cost, get_blueprint, registry
from esper.kasmina.body import attach
from esper.kasmina.find_sites import context_of
from esper.kasmina.sites import BuildContext


def test_a_shared_price_is_the_one_that_is_counted() -> None:
    model = GPT(GPTConfig(vocab_size=11, context=8, d_model=8, depth=2, num_heads=2))
    model.blocks[1].mlp.fc = nn.Linear(8, 24)  # unlike the first block's
    model.blocks[1].mlp.proj = nn.Linear(24, 8)
    body = attach(model, torch.randint(11, (2, 8)))
    for site in body.sites:
        for name in site.blueprints:
            size = 1 if name == "stack" else 3
            counted = cost(get_blueprint(name), context_of(model, body.topology, site), size)
            assert body.cost(site, name, size) == counted, (site.name, name)


def test_like_places_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(9)))
    body = attach(model, torch.randn(2, 4))
    built = []
    entry = get_blueprint("lowrank")

    def build(context: BuildContext, size: int) -> nn.Module:
        built.append(context.site.name)
        return entry.build(context, size)

    build.__module__ = entry.build.__module__
    counting = registry.Blueprint(
        entry.name, build, entry.kinds, entry.reads, entry.default_size, entry.accepts
    )
    monkeypatch.setitem(registry._REGISTRY, "lowrank", counting)
    prices = {body.cost(f"parallel:{i}", "lowrank", 2) for i in range(9)}
    assert prices == {(16, 32)}
    assert built == ["parallel:0"]


def test_a_users_blueprint_may_depend_on_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @blueprint("by_name", kinds=("parallel",))
    def by_name(context: BuildContext, size: int) -> nn.Module:
        rank = 1 + int(context.site.target)
        return nn.Sequential(nn.Linear(4, rank, bias=False), nn.Linear(rank, 4, bias=False))

    body = attach(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), torch.randn(2, 4))
    assert [body.cost(f"parallel:{i}", "by_name", 1).parameters for i in range(3)] == [8, 16, 24]
    with pytest.raises(GrowthError, match="no site 'parallel:7'"):
        body.cost("parallel:7", "by_name", 1)
