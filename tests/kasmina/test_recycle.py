"""Recycling: the function stays, the moments of exactly these slices go, and bad requests change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from esper.errors import GrowthError
from esper.kasmina.recycle import Consumer, change_bound, dormant_units, recycle

DORMANT = [1, 4]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def starve(layer: nn.Linear | nn.Conv2d) -> None:
    """Make two units dormant: a nearly constant small output, and none at all."""
    with torch.no_grad():
        layer.weight[DORMANT] *= 1e-3
        assert layer.bias is not None
        layer.bias[DORMANT] = torch.tensor([1e-2, -1.0])


def network(kind: str) -> tuple[nn.Sequential, list[int], int, Tensor]:
    """Return a network, the indices of producer and consumer, columns per unit, and data."""
    torch.manual_seed(0)
    if kind == "linear":
        layers: list[nn.Module] = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)]
        at, columns, x = [0, 2], 1, torch.randn(200, 6)
    elif kind == "conv":
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)]
        at, columns, x = [0, 2], 1, torch.randn(20, 2, 8, 8)
    elif kind == "padded":
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)]
        at, columns, x = [0, 2], 1, torch.randn(20, 2, 8, 8)
    else:
        layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)]
        at, columns, x = [0, 3], 36, torch.randn(20, 2, 8, 8)
    model = nn.Sequential(*layers)
    producer = model[0]
    assert isinstance(producer, nn.Linear | nn.Conv2d)
    starve(producer)
    return model, at, columns, x


def activations_of(model: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = model[1](model[0](x))
    return h if h.ndim == 2 else h.movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("kind", ["linear", "conv", "padded", "flatten"])
def test_function_is_kept_within_the_reported_bound(kind: str) -> None:
    model, at, columns, x = network(kind)
    sample = activations_of(model, x)
    units = dormant_units(sample)
    assert units.tolist() == DORMANT
    before = model(x).detach()
    report = recycle(model[at[0]], [Consumer(model[at[1]], columns)], units, sample, generator=generator())
    change = float((model(x).detach() - before).abs().max())
    assert change <= report.max_change * (1 + 1e-5) + 1e-6
    # Folding the mean matters: padding apart, a tenth of what zeroing the columns alone would do.
    assert report.max_change < 0.1
    assert report.units == tuple(DORMANT)


def test_constant_units_are_replaced_without_any_change() -> None:
    model, _, _, x = network("linear")
    with torch.no_grad():
        model[0].weight[DORMANT] = 0.0
    before = model(x).detach()
    sample = activations_of(model, x)
    report = recycle(model[0], [Consumer(model[2])], DORMANT, sample, generator=generator(), tolerance=1e-6)
    assert report.max_change <= 1e-6
    torch.testing.assert_close(model(x), before, rtol=0.0, atol=1e-6)


def test_recycled_units_work_again_and_the_others_are_untouched() -> None:
    model, _, _, x = network("linear")
    old = copy.deepcopy(model)
    recycle(model[0], [Consumer(model[2])], DORMANT, activations_of(model, x), generator=generator())
    rest = [i for i in range(8) if i not in DORMANT]
    assert torch.equal(model[0].weight[rest], old[0].weight[rest])
    assert torch.equal(model[0].bias[rest], old[0].bias[rest])
    assert torch.equal(model[2].weight[:, rest], old[2].weight[:, rest])
    assert torch.count_nonzero(model[2].weight[:, DORMANT]) == 0
    assert torch.count_nonzero(model[0].bias[DORMANT]) == 0
    assert not set(dormant_units(activations_of(model, x)).tolist()) & set(DORMANT)
    again = copy.deepcopy(old)
    recycle(again[0], [Consumer(again[2])], DORMANT, activations_of(old, x), generator=generator())
    assert torch.equal(again[0].weight, model[0].weight)


def test_fresh_rows_are_he() -> None:
    producer, consumer = nn.Linear(50, 300), nn.Linear(300, 2)
    sample = torch.rand(10, 300)
    recycle(producer, [Consumer(consumer)], range(300), sample, generator=generator())
    assert float(producer.weight.detach().std()) == pytest.approx(math.sqrt(2 / 50), rel=0.03)


def test_several_consumers_and_one_without_a_bias() -> None:
    torch.manual_seed(0)
    producer, left, right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2, bias=False)
    starve(producer)
    x = torch.randn(100, 6)
    hidden = producer(x).relu().detach()
    before = [left(hidden), right(hidden)]
    report = recycle(producer, [Consumer(left), Consumer(right)], DORMANT, hidden, generator=generator())
    hidden = producer(x).relu()
    for layer, old in zip((left, right), before, strict=True):
        assert float((layer(hidden) - old).detach().abs().max()) <= report.max_change + 1e-6


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["linear", "flatten"])
def test_moments_are_reset_there_and_nowhere_else(name: str, kind: str) -> None:
    model, at, columns, x = network(kind)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
    producer, consumer = model[at[0]], model[at[1]]
    old = copy.deepcopy(dict(optimizer.state))  # keyed by copies of the parameters, in the same order
    report = recycle(
        producer,
        [Consumer(consumer, columns)],
        DORMANT,
        activations_of(model, x),
        generator=generator(),
        optimizers=[optimizer],
    )
    fresh = {"step_size": 1e-2, "sum": 0.1}
    touched = {
        id(producer.weight): torch.zeros_like(producer.weight, dtype=torch.bool),
        id(producer.bias): torch.zeros_like(producer.bias, dtype=torch.bool),
        id(consumer.weight): torch.zeros_like(consumer.weight, dtype=torch.bool),
    }
    touched[id(producer.weight)][DORMANT] = True
    touched[id(producer.bias)][DORMANT] = True
    touched[id(consumer.weight)].unflatten(1, (8, columns))[:, DORMANT] = True
    count = 0
    for (parameter, state), before in zip(optimizer.state.items(), old.values(), strict=True):
        mask = touched.get(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                assert value == before[key]
                continue
            expected = parameter.detach() if key == "ax" else torch.full_like(value, fresh.get(key, 0.0))
            if key in ("exp_avg_sq", "max_exp_avg_sq") and mask.any():
                expected = torch.full_like(value, float(before[key][~mask].mean()))
            torch.testing.assert_close(value, torch.where(mask, expected, before[key]), rtol=0, atol=0)
            count += bool(mask.any())
    assert report.num_states == count > 0
    optimizer.step()  # the state is still valid


def test_fresh_units_take_steps_of_the_usual_size() -> None:
    """Zero second moments under an old step count would make Adam's first steps several times too large."""
    model, _, _, x = network("linear")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()

    for _ in range(2000):
        step()
    recycle(
        model[0],
        [Consumer(model[2])],
        DORMANT,
        activations_of(model, x),
        generator=generator(),
        optimizers=[optimizer],
    )
    largest = 0.0
    for _ in range(10):
        before = model[2].weight.detach().clone()
        step()
        largest = max(largest, float((model[2].weight.detach() - before)[:, DORMANT].abs().max()))
    assert 0 < largest < 3e-3


def test_an_optimizer_without_state_or_with_other_parameters_is_left_alone() -> None:
    model, _, _, x = network("linear")
    other = nn.Parameter(model[0].bias.detach().clone())  # equal by value, not by identity
    foreign = torch.optim.SGD([other], lr=0.1, momentum=0.9)
    other.grad = torch.ones_like(other)
    foreign.step()
    report = recycle(
        model[0],
        [Consumer(model[2])],
        DORMANT,
        activations_of(model, x),
        generator=generator(),
        optimizers=[foreign, torch.optim.Adam(model.parameters())],
    )
    assert report.num_states == 0
    assert torch.equal(foreign.state[other]["momentum_buffer"], torch.ones(8))


def test_no_units_change_nothing() -> None:
    model, _, _, x = network("linear")
    before = copy.deepcopy(model.state_dict())
    report = recycle(model[0], [Consumer(model[2])], [], activations_of(model, x), generator=generator())
    assert report.units == ()
    assert report.max_change == 0.0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def bad_requests() -> dict[str, tuple[str, Callable[[nn.Sequential, Tensor], object]]]:
    def call(
        m: nn.Sequential, a: Tensor, units: list[int], consumer: Consumer, tolerance: float = math.inf
    ) -> object:
        return recycle(m[0], [consumer], units, a, generator=generator(), tolerance=tolerance)

    return {
        "width": (
            "reads 8 units x 1 columns",
            lambda m, a: call(m, a, [1], Consumer(nn.Linear(9, 3))),
        ),
        "columns": (
            "reads 8 units x 2 columns",
            lambda m, a: call(m, a, [1], Consumer(nn.Linear(8, 3), columns_per_unit=2)),
        ),
        "groups": ("groups=1", lambda m, a: call(m, a, [1], Consumer(nn.Conv2d(16, 8, 3, groups=2)))),
        "index": (r"indices in \[0, 7\]", lambda m, a: call(m, a, [8], Consumer(m[2]))),
        "negative": (r"indices in \[0, 7\]", lambda m, a: call(m, a, [-1], Consumer(m[2]))),
        "twice": ("each unit once", lambda m, a: call(m, a, [1, 1], Consumer(m[2]))),
        "sample": (r"finite activations \[n, 8\]", lambda m, a: call(m, a[:, :7], [1], Consumer(m[2]))),
        "nan": ("with NaN or inf", lambda m, a: call(m, a / 0.0, [1], Consumer(m[2]))),
        "empty": (r"n >= 1, got shape \(0, 8\)", lambda m, a: call(m, a[:0], [1], Consumer(m[2]))),
        "tolerance": ("at most 0.001", lambda m, a: call(m, a, [0, 2], Consumer(m[2]), 1e-3)),
        "type": (
            "expected Linear or Conv2d",
            lambda m, a: call(m, a, [1], Consumer(nn.LayerNorm(8))),  # type: ignore[arg-type]
        ),
        "tied": ("share one", lambda m, a: call(m, a, [1], Consumer(m[0]))),
        "computed": (
            "own its weight",
            lambda m, a: call(m, a, [1], Consumer(parametrizations.weight_norm(nn.Linear(8, 3)))),
        ),
    }


@pytest.mark.parametrize("name", list(bad_requests()))
def test_refuses_before_it_changes_anything(name: str) -> None:
    model, _, _, x = network("linear")
    match, request = bad_requests()[name]
    sample = activations_of(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(GrowthError, match=match):
        request(model, sample)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_dormant_units_follow_the_threshold() -> None:
    sample = torch.tensor([[1.0, -1.0, 0.05, 0.0], [1.0, 1.0, 0.05, 0.0]])
    assert dormant_units(sample).tolist() == [2, 3]
    assert dormant_units(sample, threshold=0.0).tolist() == [3]
    assert dormant_units(torch.zeros(3, 2)).tolist() == [0, 1]
    with pytest.raises(GrowthError, match=r"\[n, units\]"):
        dormant_units(torch.zeros(3))


def test_bound_of_units_that_do_much_is_large() -> None:
    model, _, _, x = network("linear")
    sample = activations_of(model, x)
    consumers = [Consumer(model[2])]
    assert change_bound(consumers, [0, 2], sample) > 20 * change_bound(consumers, DORMANT, sample)
    assert change_bound([], [0], sample) == 0.0
