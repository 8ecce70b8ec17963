"""The class swap keeps everything that can be told from outside."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from places import MLP, PLACES, place
from torch import Tensor, nn

from esper.kasmina.layer import (
    SEEDS,
    SeedLayer,
    Slot,
    Tap,
    WeightSeedLayer,
    base_class,
    get_slot,
    observed,
    primary,
    replace_primary,
    rest,
    restore_class,
    seeds_of,
    set_observer,
    swap_class,
)
from esper.kasmina.seed import Seed
from esper.kasmina.structure import uproot

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def swapped(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            swap_class(module)
    return model


def host() -> MLP:
    torch.manual_seed(0)
    return MLP()


class Pair(NamedTuple):
    value: Any
    extra: Any


class Watcher:
    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, Any, Any, float]] = []

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        self.calls.append((layer, x, y, latency_ms))


def test_a_swap_keeps_keys_identity_and_isinstance():
    model = host()
    keys, parameters, layer = list(model.state_dict()), list(model.parameters()), model.fc1
    swapped(model)
    assert model.fc1 is layer
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, SeedLayer)
    assert base_class(layer) is nn.Linear
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert repr(layer).startswith("SeedLinear(in_features=6")


def test_a_dormant_host_is_bit_identical_in_outputs_and_gradients():
    plain, model = host(), swapped(host())
    a, b = plain(X), model(X)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_a_swap_keeps_ties_and_hooks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("called"))
    swapped(model)
    assert model[1].weight is model[0].weight
    model(torch.randn(2, 4))
    assert seen == ["called"]


def test_restoring_leaves_no_trace():
    model = swapped(host())
    get_slot(model.fc1)
    for module in model.modules():
        restore_class(module)
    assert type(model.fc1) is nn.Linear
    assert model.fc1.__dict__.keys() == nn.Linear(6, 5).__dict__.keys()


def test_swapping_twice_changes_nothing_and_classes_are_shared():
    model = swapped(host())
    cls = type(model.fc1)
    swapped(model)
    assert type(model.fc1) is cls is type(model.fc2)


def test_a_swapped_layer_can_become_one_whose_weight_is_read():
    layer = nn.Linear(3, 3)
    swap_class(layer)
    swap_class(layer, functional=True)
    assert isinstance(layer, WeightSeedLayer)
    swap_class(layer)
    assert isinstance(layer, WeightSeedLayer)
    assert base_class(layer) is nn.Linear
    restore_class(layer)
    assert type(layer) is nn.Linear


def test_a_user_s_subclass_with_its_own_forward_goes_on_working():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer = Doubled(6, 2)
    expected = layer(X)
    swap_class(layer)
    get_slot(layer)
    assert torch.equal(layer(X), expected)
    assert base_class(layer) is Doubled


@pytest.mark.parametrize("grown", [False, True], ids=["dormant", "grown"])
def test_a_deepcopy_runs_on_its_own_weights(grown):
    at = place("widen")
    model = swapped(at.model())
    if grown:
        seed = at.plant(model)
        nn.init.normal_(seed.branch.fan_out.weight)
        seed.enter("holding", 1.0)
    twin = copy.deepcopy(model)
    expected = model(X)
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(twin(X), expected)
    assert isinstance(twin.fc1, SeedLayer)


@pytest.mark.parametrize("grown", [False, True], ids=["dormant", "grown"])
def test_a_module_pickles(grown):
    at = place("widen")
    model = swapped(at.model())
    if grown:
        seed = at.plant(model)
        nn.init.normal_(seed.branch.fan_out.weight)
        seed.enter("holding", 1.0)
    twin = pickle.loads(pickle.dumps(model))
    assert isinstance(twin.fc1, SeedLayer)
    assert base_class(twin.fc1) is nn.Linear
    assert torch.equal(twin(X), model(X))
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(X), model(X))


def test_copies_and_pickles_have_taps_of_their_own():
    at = place("widen")
    model = at.model()
    seed = at.plant(model)
    get_slot(model.fc1).taps[0].value = X
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        planted = seeds_of(twin.fc2)[0]
        assert isinstance(planted, Seed)
        assert get_slot(twin.fc1).taps == [planted.tap]
        assert planted.tap is not seed.tap
        assert planted.tap.value is None


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_a_state_dict_of_a_grown_model_saves_and_loads_weights_only(at):
    model = at.model()
    host_keys = set(model.state_dict())
    seed = at.plant(model)
    with torch.no_grad():
        for p in seed.branch.parameters():
            p.normal_(std=0.1)
    seed.enter("blending", 0.25)
    state = model.state_dict()
    assert host_keys < set(state)
    assert all(SEEDS in key for key in set(state) - host_keys)
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    twin = at.model()
    twin_seed = at.plant(twin)
    twin.load_state_dict(loaded)
    assert twin_seed.state == seed.state
    assert torch.equal(twin.eval()(at.batch()), model.eval()(at.batch()))


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_a_germinated_seed_changes_no_bit(at):
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    with torch.no_grad():
        for p in seed.branch.parameters():
            p.normal_()
    a, b = plain(x), model(x)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(a, b)
    for name, p in plain.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name].grad, p.grad)
    assert all(p.grad is None for p in seed.branch.parameters())


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_a_culled_seed_leaves_the_host_as_it_was(at):
    model = at.model()
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    seed = at.plant(model)
    uproot(model, seed)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    for module in model.modules():
        assert getattr(module, "_esper_slot", None) is None


def test_an_observer_sees_calls_and_is_forgotten():
    model = swapped(host())
    watcher = Watcher()
    expected = model(X)
    with observed([(model.fc1, watcher), (model.fc3, watcher)]):
        assert torch.equal(model(X), expected)
    model(X)
    assert [call[0] for call in watcher.calls] == [model.fc1, model.fc3]
    assert watcher.calls[0][1] is X
    assert torch.equal(watcher.calls[1][2], expected)
    assert all(call[3] > 0 for call in watcher.calls)
    assert model.fc1._esper_slot is None


def test_observers_leave_when_the_pass_raises():
    model = swapped(host())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), observed([(model.fc1, Watcher())]):
        model(torch.randn(2, 5))
    assert model.fc1._esper_slot is None


def test_a_layer_that_still_feeds_a_tap_does_not_rest():
    at = place("widen")
    model = at.model()
    at.plant(model)
    set_observer(model.fc1, Watcher())
    set_observer(model.fc1, None)
    assert get_slot(model.fc1).taps
    rest(model.fc2)
    assert model.fc2._esper_slot is not None


def test_an_observer_neither_pickles_nor_copies():
    model = swapped(host())
    set_observer(model.fc1, Watcher())
    assert copy.deepcopy(model).fc1._esper_slot.observer is None
    assert pickle.loads(pickle.dumps(model)).fc1._esper_slot.observer is None


def test_a_slot_of_a_plain_layer_is_a_mistake():
    with pytest.raises(AssertionError, match="Linear is not a seed layer"):
        get_slot(nn.Linear(2, 2))


def test_a_tap_gives_its_value_once():
    tap = Tap()
    tap.value = X
    assert tap.take() is X
    assert tap.take() is None
    assert Slot().idle


@pytest.mark.parametrize("value", [X, (X, 1), [X, 1], Pair(X, 1)])
def test_primary_is_the_first_tensor_and_can_be_replaced(value):
    assert primary(value) is X
    other = X + 1
    replaced = replace_primary(value, other)
    assert type(replaced) is type(value)
    assert primary(replaced) is other
    assert value is X or replaced[1] == 1
