"""Attaching changes nothing, germinating changes nothing, and both can be taken back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import AttachError, GrowthError
from esper.hosts import CNN, GPT, MLP, CNNConfig, GPTConfig, MLPConfig
from esper.kasmina.body import Body, attach, detach
from esper.kasmina.layer import SeedLayer
from esper.kasmina.optimizer import group_names


def mlp() -> nn.Module:
    return MLP(MLPConfig(in_features=6, hidden=(5, 4, 7), num_classes=3))


def cnn() -> nn.Module:
    return CNN(CNNConfig(widths=(8, 4, 8), norm="batch"))


def gpt() -> nn.Module:
    return GPT(GPTConfig(vocab_size=11, context=8, d_model=16, depth=2, num_heads=2, dropout=0.1, tied=True))


def vectors() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(5, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(11, (3, 8), generator=torch.Generator().manual_seed(1))


HOSTS = pytest.mark.parametrize(
    ("make", "batch"), [(mlp, vectors), (cnn, images), (gpt, tokens)], ids=["mlp", "cnn", "gpt"]
)
Make = Callable[[], nn.Module]
Batch = Callable[[], Tensor]


def built(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def step(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one training step."""
    model.zero_grad()
    torch.manual_seed(7)
    y = model.train()(x)
    y.square().mean().backward()
    return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@HOSTS
def test_attached_and_detached_models_are_bit_identical(make: Make, batch: Batch) -> None:
    plain, model = built(make), built(make)
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    attach(model, batch())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())  # buffers too
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert any(isinstance(module, SeedLayer) for module in model.modules())
    for _ in range(2):
        (y, grads), (expected, wanted) = step(model, batch()), step(plain, batch())
        assert torch.equal(y, expected)
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
        assert torch.equal(evaluate(model, batch()), evaluate(plain, batch()))
        detach(model)
    assert [type(module) for module in model.modules()] == classes
    assert not any("esper" in key for module in model.modules() for key in module.__dict__)


@HOSTS
def test_every_seed_offered_preserves_the_function_at_its_price(make: Make, batch: Batch) -> None:
    model = built(make)
    body = attach(model, batch())
    x = batch()
    before = evaluate(model, x)
    offered = [(site, blueprint) for site in body.sites for blueprint in site.blueprints]
    assert len(offered) >= 10
    host_parameters, host_flops = body.num_parameters, body.flops
    for site, blueprint in offered:
        size = body.default_size(site, blueprint)
        price = body.cost(site, blueprint, size)
        seed = body.germinate(site, blueprint)
        assert seed.size == size
        assert sum(p.numel() for p in seed.parameters()) == price.parameters > 0
        assert body.num_parameters == host_parameters + price.parameters
        assert body.flops == host_flops + price.flops
        for stage in ("germinated", "training", "blending", "holding", "fossilized"):
            assert seed.stage == stage
            assert float((evaluate(model, x) - before).abs().max()) <= 1e-6, (site.name, blueprint, stage)
            if stage != "fossilized":
                seed.advance()
        body.cull(seed)
        assert seed.stage == "culled"
    assert torch.equal(evaluate(model, x), before)
    detach(model)


@HOSTS
def test_many_seeds_at_once_learn_and_travel(make: Make, batch: Batch) -> None:
    model = built(make)
    body = attach(model, batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for site in body.sites:
        seed = body.germinate(site, site.blueprints[-1])
        seed.enter("holding", 1.0)
    added = body.register(optimizer)
    assert added == sum(len(list(seed.parameters())) for seed in body.seeds)
    assert body.register(optimizer) == 0
    names = [name for group in group_names([optimizer], model.named_parameters())[0] for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for _ in range(2):
        step(model, batch())
        optimizer.step()
    expected = evaluate(model, batch())
    fresh = built(make)
    attach(fresh, batch())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(fresh, batch()), expected)
    assert [s.state for s in Body(fresh, body.topology).seeds] == [s.state for s in body.seeds]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(evaluate(twin, batch()), expected)


def test_initial_weights_follow_the_seed_and_not_the_global_generator() -> None:
    weights = []
    for number, noise in ((0, 1), (0, 2), (1, 3)):
        model = built(mlp)
        torch.manual_seed(noise)
        body = attach(model, vectors(), seed=number)
        first, second = (body.germinate("parallel:head", "bottleneck").branch.fan_in.weight for _ in range(2))
        assert not torch.equal(first, second)
        weights.append(first)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_ids_are_never_given_twice_and_travel() -> None:
    body = attach(built(mlp), vectors())
    first = body.germinate("parallel:head", "lowrank")
    body.cull(first)
    assert body.germinate("parallel:head", "lowrank").seed_id == "s2"
    resumed = Body(body.model, body.topology)
    resumed.load_state_dict(body.state_dict())
    assert resumed.germinate("parallel:head", "lowrank").seed_id == "s3"


def test_culling_takes_parameters_and_state_out_of_the_optimizer() -> None:
    model = built(mlp)
    body = attach(model, vectors())
    optimizer = torch.optim.AdamW(model.parameters())
    seed = body.germinate("bypass:layers.0->layers.1", "widen")
    seed.enter("holding", 1.0)
    body.register(optimizer)
    step(model, vectors())
    optimizer.step()
    parameters = list(seed.parameters())
    assert all(p in optimizer.state for p in parameters)
    seed.cull(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert not any(p in optimizer.state for p in parameters)


def test_stacking_puts_each_copied_parameter_into_its_original_s_group() -> None:
    model = built(gpt)
    body = attach(model, tokens())
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}])
    body.germinate("stack:blocks.0", "stack")
    body.register(optimizer)
    assert all(p.dim() > 1 for p in optimizer.param_groups[0]["params"])
    assert all(p.dim() <= 1 for p in optimizer.param_groups[1]["params"])


def test_tied_weights_stay_tied() -> None:
    model = built(gpt)
    body = attach(model, tokens())
    seed = body.germinate("parallel:head", "lowrank")
    assert model.head.weight is model.tokens.weight
    detached = seed.cull()
    assert detached is None
    detach(model)
    assert model.head.weight is model.tokens.weight


def test_a_frozen_host_can_grow() -> None:
    model = built(mlp).requires_grad_(False)
    body = attach(model, vectors())
    seed = body.germinate("bypass:layers.0->head", "shortcut")
    seed.enter("training", 0.0)
    model.train()(vectors()).square().mean().backward()
    assert all(p.grad is not None for p in seed.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if "esper_seeds" not in name)


def test_what_germinate_refuses_changes_nothing() -> None:
    model = built(mlp)
    body = attach(model, vectors())
    keys = list(model.state_dict())
    for arguments, message in (
        (
            ("parallel:nowhere", "lowrank"),
            "no site 'parallel:nowhere' in this model; sites are parallel:layers.0",
        ),
        (("parallel:head", "nothing"), "no blueprint named 'nothing'"),
        (("parallel:head", "widen"), "'widen' does not fit site 'parallel:head'"),
        (("parallel:head", "lowrank", 0), "size should be at least 1, got 0"),
    ):
        with pytest.raises(GrowthError, match=message):
            body.germinate(*arguments)  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="no seed 's7' in this model; seeds are none"):
        body.cull("s7")
    assert list(model.state_dict()) == keys
    assert body.germinate("parallel:head", "lowrank").seed_id == "s1"


def test_a_refused_layer_says_why_when_asked_for() -> None:
    layer = nn.Linear(6, 6)
    body = attach(nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3)), vectors())
    with pytest.raises(GrowthError, match="layer '0' was refused, because it is called 2 times"):
        body.germinate("parallel:0", "lowrank")


def test_attaching_twice_and_detaching_a_grown_model_are_refused() -> None:
    model = built(mlp)
    body = attach(model, vectors())
    with pytest.raises(AttachError, match=r"attached already; call esper.detach\(model\)"):
        attach(model, vectors())
    body.germinate("parallel:head", "lowrank")
    with pytest.raises(AttachError, match=r"still carries seeds \(s1\)"):
        detach(model)
    assert [s.seed_id for s in attach(model, vectors()).seeds] == [
        "s1"
    ]  # a loaded, grown model gets a body again


def test_the_manifest_lists_every_seed() -> None:
    body = attach(built(mlp), vectors())
    body.germinate("parallel:head", "lowrank", 2).advance()
    (record,) = body.manifest()
    assert (record.seed_id, record.blueprint, record.size, record.stage) == ("s1", "lowrank", 2, "training")
    assert record.site.name == "parallel:head"


def test_the_public_names_are_these_functions() -> None:
    assert (esper.attach, esper.detach, esper.Body) == (attach, detach, Body)


class _ShortcutLast(nn.Module):
    """Adds a linear way from its input after everything else has run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.around = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu()) + self.around(x)


def test_no_seed_is_offered_an_input_that_is_not_there_yet():
    torch.manual_seed(0)
    body = attach(_ShortcutLast(), torch.randn(4, 6))
    sites = {site.name: site for site in body.sites}
    assert "bypass:around->head" not in sites
    assert {"bypass:first->head", "bypass:first->around"} <= sites.keys()
    for site in sites.values():
        for name in site.blueprints:
            seed = body.germinate(site, name)
            seed.enter("holding", 1.0)
            body.model(torch.randn(4, 6))
            body.cull(seed)
