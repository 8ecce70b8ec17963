"""New parameters in live optimizers: groups, state, schedulers and resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.optimizer import Optimizer

from esper.errors import CheckpointError, GrowthError, UnsupportedError
from esper.kasmina.optimizer import (
    check_optimizer,
    group_names,
    register_parameters,
    reorder_groups,
    unregister_parameters,
)

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda s: 0.9**s),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda s: 0.9),
    "step": lambda o: schedulers.StepLR(o, 3),
    "multistep": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "constant": lambda o: schedulers.ConstantLR(o, 0.5, 5),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 6),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 3), schedulers.CosineAnnealingLR(o, 6)], [3]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, step_size_up=3),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.01, total_steps=12),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.001, anneal_epochs=5),
}


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)


def grouped(model: nn.Module) -> torch.optim.AdamW:
    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if "seed" in n or p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for n, p in named if "seed" not in n and p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )


def test_parameters_join_the_group_of_their_anchor_in_place() -> None:
    model = host()
    optimizer = grouped(model)
    lists = [group["params"] for group in optimizer.param_groups]
    weight, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))

    added = register_parameters(optimizer, [("w", weight), ("b", bias)], [model[2].weight, model[2].bias])

    assert added == ["w", "b"]
    assert [group["params"] is old for group, old in zip(optimizer.param_groups, lists, strict=True)] == [
        True
    ] * 2
    assert lists[0][-1] is weight
    assert lists[1][-1] is bias
    assert register_parameters(optimizer, [("w", weight)], [model[2].weight]) == []
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == 8


def test_equal_values_are_not_mistaken_for_each_other() -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.5}], lr=0.1)
    new = nn.Parameter(torch.zeros(3))

    register_parameters(optimizer, [("new", new)], [second])

    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    assert unregister_parameters(optimizer, [new]) == 1
    assert optimizer.param_groups[1]["params"][0] is second


def test_param_names_follow() -> None:
    model = host()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    new = nn.Parameter(torch.zeros(2, 4))
    register_parameters(optimizer, [("4.seed", new)], [model[4].weight])
    assert optimizer.param_groups[0]["param_names"][-1] == "4.seed"
    unregister_parameters(optimizer, [model[0].bias, new])
    assert optimizer.param_groups[0]["param_names"] == [
        n for n, _ in model.named_parameters() if n != "0.bias"
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_late_parameter_is_updated_as_by_a_fresh_optimizer(name: str) -> None:
    make = OPTIMIZERS[name]
    model = host()
    optimizer = make(list(model.parameters()))
    check_optimizer(optimizer)
    new = nn.Parameter(torch.randn(3, 3))
    alone = nn.Parameter(new.detach().clone())
    fresh = make([alone])
    for step in range(6):
        if step == 2:
            register_parameters(optimizer, [("new", new)], [model[0].weight])
        set_gradients(list(model.parameters()), step)
        if step >= 2:
            set_gradients([new], 100 + step)
            set_gradients([alone], 100 + step)
            fresh.step()
        optimizer.step()
    assert torch.equal(new, alone)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_growth_and_removal_leave_host_updates_bit_identical(name: str) -> None:
    def run(grow: bool) -> list[torch.Tensor]:
        model = host()
        optimizer = OPTIMIZERS[name](list(model.parameters()))
        new = nn.Parameter(torch.ones(3, 3))
        for step in range(6):
            if grow and step == 1:
                register_parameters(optimizer, [("new", new)], [model[0].weight])
            if grow and step == 4:
                assert unregister_parameters([optimizer], [new]) == 1
                assert new not in optimizer.state
            set_gradients([*model.parameters()], step)
            # No gradient in the first steps: a seed that does nothing yet.
            new.grad = torch.ones(3, 3) if step >= 3 else None
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for grown, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(grown, plain)


def test_fused_sgd_grows_before_its_first_step() -> None:
    model = host()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True)
    new = nn.Parameter(torch.zeros(3, 3))
    register_parameters(optimizer, [("new", new)], [model[0].weight])
    for step in range(3):
        set_gradients(list(model.parameters()), step)
        if step:
            new.grad = torch.ones(3, 3)
        optimizer.step()
    assert torch.isfinite(new).all()
    assert new.abs().sum() > 0


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_as_without_growth(name: str) -> None:
    def run(grow: bool) -> list[list[float]]:
        model = host()
        optimizer = torch.optim.SGD(
            [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.005}],
            lr=0.01,
            momentum=0.9,
        )
        scheduler = SCHEDULERS[name](optimizer)
        rates = []
        for step in range(11):
            if grow and step in (2, 6):
                new = nn.Parameter(torch.zeros(3, 3))
                register_parameters(optimizer, [(f"new{step}", new)], [model[2].weight])
            for group in optimizer.param_groups:
                set_gradients(group["params"], step)
            optimizer.step()
            scheduler.step(1.0) if name == "plateau" else scheduler.step()
            rates.append([group["lr"] for group in optimizer.param_groups])
        return rates

    assert run(True) == run(False)


def test_frozen_host_falls_back_to_the_only_group() -> None:
    model = host()
    new = nn.Parameter(torch.zeros(2))
    head = torch.optim.AdamW(model[4].parameters())
    register_parameters(head, [("new", new)], [model[0].weight])
    assert head.param_groups[0]["params"][-1] is new


def test_seed_of_a_frozen_layer_joins_the_only_group_of_its_kind() -> None:
    model = host()
    matrix, vector = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    split = torch.optim.AdamW(
        [{"params": [model[4].weight], "weight_decay": 0.1}, {"params": [model[4].bias], "weight_decay": 0.0}]
    )
    register_parameters(split, [("m", matrix), ("v", vector)], [model[0].weight, model[0].weight])
    assert split.param_groups[0]["params"][-1] is matrix
    assert split.param_groups[1]["params"][-1] is vector


def test_seed_of_a_frozen_layer_is_refused_where_two_groups_could_take_it() -> None:
    model = host()
    two = torch.optim.AdamW([{"params": [model[4].weight]}, {"params": [model[2].weight, model[4].bias]}])
    with pytest.raises(
        GrowthError, match=r"'x'.*none of the 2 groups.*2 of them hold matrices.*put the host"
    ):
        register_parameters(
            two,
            [("y", nn.Parameter(torch.zeros(2, 2))), ("x", nn.Parameter(torch.zeros(2, 2)))],
            [model[4].weight, model[0].weight],
        )
    assert [len(group["params"]) for group in two.param_groups] == [1, 2]


def test_muon_takes_matrices_and_leaves_the_rest_to_the_other_optimizer() -> None:
    model = host()
    muon = torch.optim.Muon([model[0].weight, model[2].weight], lr=0.01)
    adam = torch.optim.AdamW([model[0].bias, model[2].bias, *model[4].parameters()], lr=0.01)
    weight, bias = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))
    anchors = [model[0].weight] * 2
    register_parameters([muon, adam], [("w", weight), ("b", bias)], anchors)
    set_gradients([weight, bias, *model.parameters()], 0)
    muon.step()
    adam.step()
    assert weight in muon.state
    assert bias in adam.state
    unregister_parameters([muon, adam], [bias])
    with pytest.raises(GrowthError, match="Muon trains matrices only"):
        register_parameters(muon, [("b", bias)], [model[0].weight])


def test_optimizers_that_cannot_grow_are_refused() -> None:
    parameters = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(UnsupportedError, match=r"LBFGS .* use AdamW or SGD"):
        check_optimizer(torch.optim.LBFGS(parameters))
    with pytest.raises(UnsupportedError, match=r"SparseAdam .* use Adam"):
        check_optimizer(torch.optim.SparseAdam(parameters))
    with pytest.raises(UnsupportedError, match="set fused=False"):
        check_optimizer(torch.optim.SGD(parameters, momentum=0.9, dampening=0.1, fused=True))


def grow(model: nn.Sequential, at: int) -> nn.Parameter:
    seed = nn.Parameter(torch.full((4, 4), 0.1))
    model[at].register_parameter("seed", seed)
    return seed


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(list(model.parameters()), step)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw_groups", "sgd"])
def test_resume_in_saved_order_is_bit_identical(kind: str) -> None:
    def configure(model: nn.Module) -> Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        named = list(model.named_parameters())
        # On resume this rule puts the seed elsewhere than growth did.
        decay = [p for n, p in named if p.ndim > 1 and "seed" not in n]
        rest = [p for n, p in named if p.ndim == 1 or "seed" in n]
        return torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}], lr=0.01)

    model = host()
    optimizer = configure(model)
    train(model, optimizer, range(3))
    # Growth appends: the middle layer first, then the first one; both have the shape of their hosts.
    for at in (2, 0):
        register_parameters(optimizer, [(f"{at}.seed", grow(model, at))], [model[at].weight])
        train(model, optimizer, range(3 + at, 6 + at))
    names = group_names(optimizer, model.named_parameters())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(20, 40))

    resumed = host()
    for at in (0, 2):
        grow(resumed, at)
    resumed.load_state_dict(saved[0])
    again = configure(resumed)
    reorder_groups(again, names, resumed.named_parameters())
    again.load_state_dict(saved[1])
    train(resumed, again, range(20, 40))

    assert group_names(again, resumed.named_parameters()) == names
    for name, p in model.named_parameters():
        assert torch.equal(p, resumed.get_parameter(name)), name


def test_reorder_joins_parameters_that_the_fresh_optimizer_lacks() -> None:
    model = host()
    seed = grow(model, 0)
    outside = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([*model[4].parameters(), outside])
    register_parameters(optimizer, [("0.seed", seed)], [model[0].weight])
    names = group_names(optimizer, model.named_parameters())
    assert names == [[["4.weight", "4.bias", "<outside 0.0.0>", "0.seed"]]]

    fresh = torch.optim.AdamW([outside, *model[4].parameters()])
    reorder_groups(fresh, names, model.named_parameters())
    expected = [model[4].weight, model[4].bias, outside, seed]
    assert [id(p) for p in fresh.param_groups[0]["params"]] == [id(p) for p in expected]


def test_reorder_refuses_what_does_not_correspond() -> None:
    model = host()
    optimizer = torch.optim.AdamW(model.parameters())
    before = list(optimizer.param_groups[0]["params"])
    [[names]] = group_names(optimizer, model.named_parameters())

    def attempt(wanted: list[list[list[str]]], match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            reorder_groups(optimizer, wanted, model.named_parameters())

    attempt([], "0 optimizers, but the run has 1")
    attempt([[names, []]], "1 parameter groups, but the checkpoint has 2")
    attempt([[[*names, "0.esper_seeds.s1.branch.weight"]]], "s1.branch.weight .* no such parameters")
    attempt([[names[1:]]], r"hold 0\.weight \(1 in all\), which the checkpoint's do not")
    attempt([[[*names, names[0]]]], r"hold 0\.weight more than once")
    assert all(a is b for a, b in zip(before, optimizer.param_groups[0]["params"], strict=True))
