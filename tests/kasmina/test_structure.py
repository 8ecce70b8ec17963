"""A grown model's structure travels with its weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from places import MLP, PLACES, Place, place
from torch import Tensor, nn

from esper.errors import CheckpointError, GrowthError
from esper.kasmina.body import attach, detach
from esper.kasmina.layer import SeedLayer, primary
from esper.kasmina.seed import SeedState
from esper.kasmina.structure import (
    all_seeds,
    conform,
    follow_state_dict,
    has_seeds,
    plant,
    seed_states_in,
    unfollow_state_dict,
    uproot,
)

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def host() -> MLP:
    torch.manual_seed(0)
    return MLP()


def grown(at: Place) -> nn.Module:
    model = at.model()
    follow_state_dict(model)
    seed = at.plant(model)
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.add_(0.1)
    seed.enter("blending", 0.4)
    return model.eval()


def value(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return primary(model(x))


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_structure_and_weights_reach_a_fresh_host_through_bytes(at: Place) -> None:
    model = grown(at)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = at.host().eval()
    follow_state_dict(fresh)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(value(fresh, at.batch()), value(model, at.batch()))
    assert [s.state for s in all_seeds(fresh)] == [s.state for s in all_seeds(model)]


@pytest.mark.parametrize("at", PLACES, ids=str)
def test_copies_and_pickles_compute_the_same_and_are_independent(at: Place) -> None:
    model = grown(at)
    x = at.batch()
    expected = value(model, x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for twin in twins:
        assert torch.equal(value(twin, x), expected)
        twin.load_state_dict(at.host().state_dict())  # the hook came along
        assert not has_seeds(twin)


def test_an_older_smaller_state_dict_removes_seeds_and_taps() -> None:
    model = host()
    old = copy.deepcopy(model.state_dict())
    expected = value(model, X)
    follow_state_dict(model)
    at = place("widen", "MLP", 1)
    at.plant(model)
    at.plant(model, seed_id="s2").enter("holding", 1.0)
    model.load_state_dict(old)
    assert not has_seeds(model)
    assert all(not isinstance(m, SeedLayer) or m._esper_slot is None for m in model.modules())
    assert torch.equal(value(model, X), expected)


def test_loading_keeps_seeds_that_are_there_already() -> None:
    at = place("widen", "MLP", 1)
    model = grown(at)
    (seed,) = all_seeds(model)
    state = copy.deepcopy(model.state_dict())
    seed.enter("holding", 1.0)
    parameters = list(seed.parameters())
    model.load_state_dict(state)
    assert all_seeds(model) == [seed]
    assert all(a is b for a, b in zip(seed.parameters(), parameters, strict=True))  # optimizers hold them
    assert (seed.stage, float(seed.alpha)) == ("blending", pytest.approx(0.4))


def test_a_seed_of_another_size_is_replaced() -> None:
    at = place("widen", "MLP", 1)
    model, other = at.model(), at.model()
    follow_state_dict(model)
    at.plant(model, size=3)
    at.plant(other, size=5)
    model.load_state_dict(other.state_dict())
    (seed,) = all_seeds(model)
    assert seed.size == 5


def test_it_works_under_a_prefix() -> None:
    at = place("widen", "MLP", 1)
    inner = at.model()
    follow_state_dict(inner)
    wrapped = nn.ModuleDict({"module": inner})
    model = grown(at)
    wrapped.load_state_dict({f"module.{key}": v for key, v in model.state_dict().items()})
    assert torch.equal(value(inner.eval(), at.batch()), value(model, at.batch()))


def test_conform_checks_all_seeds_before_it_touches_one() -> None:
    at = place("widen", "MLP", 1)
    model = grown(at)
    (seed,) = all_seeds(model)
    good = SeedState(seed_id="s2", site=seed.site, blueprint="widen", size=3)
    bad = SeedState(seed_id="s3", site=seed.site, blueprint="depthwise", size=3)
    with pytest.raises(
        CheckpointError, match=r"seed 's3' of the checkpoint does not fit this model: .*depthwise"
    ):
        conform(model, [good, bad])
    assert all_seeds(model) == [seed]


def test_planting_that_fails_changes_nothing() -> None:
    at = place("widen", "MLP", 1)
    model = at.model()
    site = at.context(model).site
    with pytest.raises(GrowthError, match="size should be at least 1, got 0"):
        plant(model, SeedState(seed_id="s1", site=site, blueprint="widen", size=0), init_seed=0)
    with pytest.raises(GrowthError, match=r"was the seed grown in another model\?"):
        plant(nn.Linear(2, 2), SeedState(seed_id="s1", site=site, blueprint="widen", size=2), init_seed=0)
    assert not any(isinstance(module, SeedLayer) for module in model.modules())


def test_the_same_init_seed_gives_the_same_branch_and_leaves_the_generator() -> None:
    at = place("widen", "MLP", 1)
    weights = [at.plant(host()).branch.fan_in.weight for _ in range(2)]
    assert torch.equal(*weights)
    model = MLP()
    drawn = torch.get_rng_state()
    at.plant(model)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_uprooting_one_of_two_leaves_the_other_at_work() -> None:
    at = place("widen", "MLP", 1)
    model = at.model().eval()
    first, second = at.plant(model), at.plant(model, seed_id="s2")
    for seed in (first, second):
        seed.enter("holding", 1.0)
        with torch.no_grad():
            seed.branch.fan_out.weight.fill_(0.1)
    uproot(model, first)
    only = value(model, X)
    uproot(model, second)
    assert not torch.allclose(only, value(model, X))
    assert list(model.state_dict()) == list(at.host().state_dict())


def test_records_are_found_under_a_prefix_only() -> None:
    model = grown(place("widen", "MLP", 1))
    state = {f"net.{key}": v for key, v in model.state_dict().items()}
    (record,) = seed_states_in(state, "net.")
    assert (record.seed_id, record.alpha, record.stage) == ("s1", pytest.approx(0.4), "blending")
    assert seed_states_in(state, "other.") == []


def test_following_once_is_enough_and_can_be_undone() -> None:
    model = host()
    follow_state_dict(model)
    follow_state_dict(model)
    assert len(model._load_state_dict_pre_hooks) == 1
    unfollow_state_dict(model)
    assert len(model._load_state_dict_pre_hooks) == 0
    attach(model, X)
    assert len(model._load_state_dict_pre_hooks) == 1
    detach(model)
    assert len(model._load_state_dict_pre_hooks) == 0
