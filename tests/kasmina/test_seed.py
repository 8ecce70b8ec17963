"""What a seed does to its host in each stage, and what it may never do."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from msgspec import structs
from places import PLACES, Blocks, Place, gpt_block, place
from torch import Tensor, nn

from esper.errors import CheckpointError, GrowthError, LifecycleError
from esper.kasmina.seed import Seed, SeedState, decode_state
from esper.kasmina.structure import plant
from esper.messages import Stage

each_place = pytest.mark.parametrize("at", PLACES, ids=str)


def scramble(seed: Seed, value: float | None = None) -> None:
    """Give the branch random weights that are felt, or fill it with one value."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in seed.branch.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) if value is None else torch.full_like(p, value))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y - torch.linspace(-1, 1, y.numel()).view_as(y)).square().mean()


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name; ``get_parameter`` would ask a functional site for its grown weight."""
    return dict(model.named_parameters())


@each_place
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_a_host_with_an_isolated_seed_trains_bit_for_bit_as_without(at, optimizer):
    plain, model = at.model(), at.model()
    names = [name for name, _ in plain.named_parameters()]
    seed = at.plant(model)
    seed.enter("training", 0.0)
    born = copy.deepcopy(seed.branch.state_dict())
    first, second = (optimizer(m.parameters(), lr=0.01) for m in (plain, model))
    for step in range(4):
        x = at.batch() + 0.1 * step
        for m, o in ((plain, first), (model, second)):
            o.zero_grad()
            value = loss(m, x)
            value.backward()
            o.step()
        assert torch.equal(loss(plain, x), loss(model, x))
        for name in names:
            assert torch.equal(parameters(model)[name], parameters(plain)[name]), name
            assert torch.equal(parameters(model)[name].grad, parameters(plain)[name].grad), name
        for name, buffer in plain.named_buffers():
            assert torch.equal(model.get_buffer(name), buffer), name
    moved = [key for key, value in seed.branch.state_dict().items() if not torch.equal(value, born[key])]
    assert len(moved) >= len(list(seed.branch.parameters()))


@each_place
def test_what_an_isolated_seed_learns_lowers_the_loss(at):
    model, x = at.model(), at.batch(32)
    model.eval()  # the contribution is judged on the same function that it is fitted to
    seed = at.plant(model)
    seed.enter("training", 0.0)
    optimizer = torch.optim.Adam(seed.branch.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    with torch.no_grad():
        with seed.overridden(0.0):
            off = loss(model, x)
        with seed.overridden(1.0):
            on = loss(model, x)
    assert on < off


@each_place
@pytest.mark.parametrize("stage", ["training", "blending", "holding"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_seed_reaches_neither_values_nor_gradients(at, stage, bad):
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    seed.enter(stage, {"training": 0.0, "blending": 0.5, "holding": 1.0}[stage])
    scramble(seed, bad)
    a, b = loss(plain, x), loss(model, x)
    assert torch.equal(a, b)
    a.backward()
    b.backward()
    for name, p in plain.named_parameters():
        assert torch.equal(parameters(model)[name].grad, p.grad), name
    assert seed.state.non_finite >= 1


def test_a_finite_seed_whose_gradient_is_not_leaves_upstream_layers_alone():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(7))

        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).abs().sqrt().sum(-1, keepdim=True) + self.scale  # sqrt'(0) is infinite

    at = place("bottleneck")
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    seed.branch = Root()
    seed.enter("holding", 1.0)
    loss(plain, x).backward()
    loss(model, x).backward()
    for name, p in plain.named_parameters():
        assert torch.equal(parameters(model)[name].grad, p.grad), name


@each_place
@pytest.mark.parametrize("stage", ["germinated", "training", "blending", "holding", "fossilized"])
def test_upstream_layers_keep_their_full_gradient_in_every_stage(at, stage):
    """With a silent branch the gradient is the host's own, at every α."""
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    seed.enter(stage, {"blending": 0.5, "holding": 1.0, "fossilized": 1.0}.get(stage, 0.0))
    loss(plain, x).backward()
    loss(model, x).backward()
    for name, p in plain.named_parameters():
        assert p.grad.abs().sum() > 0
        torch.testing.assert_close(parameters(model)[name].grad, p.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("stage", "alpha"), [("blending", 0.3), ("holding", 1.0), ("fossilized", 1.0)])
def test_a_felt_seed_is_an_undetached_weighted_sum(stage, alpha):
    at = place("widen")
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    scramble(seed)
    seed.enter(stage, alpha)
    x.requires_grad_()
    z = plain.fc2(torch.relu(plain.fc1(x))) + alpha * copy.deepcopy(seed.branch)(x)
    expected = plain.fc3(torch.relu(z))
    torch.testing.assert_close(model(x), expected)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *plain.parameters()])
    hosts = [parameters(model)[name] for name, _ in plain.named_parameters()]
    got = torch.autograd.grad(model(x).square().sum(), [x, *hosts])
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@each_place
def test_overriding_turns_a_seed_off_and_on_whatever_its_stage(at):
    plain, model, x = at.model().eval(), at.model().eval(), at.batch()
    seed = at.plant(model)
    scramble(seed)
    twin = copy.deepcopy(model)
    next(m for m in twin.modules() if isinstance(m, Seed)).enter("holding", 1.0)
    for stage in ("germinated", "training", "holding", "fossilized"):
        seed.enter(stage, 0.0)
        with torch.no_grad():
            with seed.overridden(0.0):
                assert torch.equal(model(x), plain(x))
            with seed.overridden(1.0):
                torch.testing.assert_close(model(x), twin(x))
    with pytest.raises(ZeroDivisionError), seed.overridden(1.0):
        raise ZeroDivisionError
    seed.enter("germinated", 0.0)
    assert torch.equal(model(x), plain(x))


def test_an_isolated_seed_is_not_run_without_gradients():
    at = place("widen")
    model = at.model()
    seed = at.plant(model)
    seed.enter("training", 0.0)
    calls: list[int] = []
    seed.branch.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(at.batch())
    assert calls == []
    model(at.batch())
    assert calls == [1]


# Dropout and modes


STACK = Place("stack", gpt_block, (5, 6), "stack", "block", "block", projections=("attn.out", "mlp.proj"))


class Dropping:
    """Builds a GPT block with dropout, which it applies through ``F.dropout`` and inside attention."""

    __name__ = "dropping"

    def __call__(self) -> nn.Module:
        return gpt_block(dropout=0.3)


class DroppingTorch:
    """torch's block, with dropout modules and a functional one inside its attention."""

    __name__ = "dropping_torch"

    def __call__(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, norm_first=True, batch_first=True)
        return Blocks(nn.Linear(6, 8), layer, nn.Linear(8, 3))


@pytest.mark.parametrize(
    "at",
    [
        Place("stack", Dropping(), (5, 6), "stack", "block", "block", projections=("attn.out", "mlp.proj")),
        Place(
            "stack", DroppingTorch(), (5, 6), "stack", "block", "block", projections=("linear2", "self_attn")
        ),
    ],
    ids=str,
)
def test_an_isolated_block_with_dropout_draws_no_random_number_of_the_host(at):
    plain, model, x = at.model(), at.model(), at.batch()
    seed = at.plant(model)
    scramble(seed)
    model.train()
    seed.enter("training", 0.0)
    states = []
    outputs = []
    for m in (plain, model):
        torch.manual_seed(9)
        value = loss(m, x)
        value.backward()
        outputs.append(value.detach())
        states.append(torch.get_rng_state())
    assert torch.equal(*outputs)
    assert torch.equal(*states)
    for name, p in plain.named_parameters():
        assert torch.equal(parameters(model)[name].grad, p.grad)
    seed.enter("blending", 0.5)
    assert all(m.training for m in seed.branch.modules())


def test_modes_follow_stage_and_host():
    at = STACK
    model = at.model()
    seed = at.plant(model)
    seed.enter("training", 0.0)
    assert seed.training
    assert not any(m.training for m in seed.branch.modules())
    model.train()
    assert not any(m.training for m in seed.branch.modules())
    seed.enter("holding", 1.0)
    assert all(m.training for m in seed.branch.modules())
    model.eval()
    assert not any(m.training for m in seed.modules())


def test_modes_that_were_set_past_train_are_put_right_by_the_next_pass():
    """Lightning restores the flags that it saved before validation; the stage may have changed since."""
    model = STACK.model()
    seed = STACK.plant(model)
    seed.enter("training", 0.0)
    saved = {m: m.training for m in model.modules()}
    model.eval()
    seed.enter("blending", 0.5)
    for module, mode in saved.items():
        module.training = mode
    model(STACK.batch())
    assert all(m.training for m in seed.branch.modules())


# Blocks


class MaskedBlock(nn.Module):
    """A residual block with a further argument, or one that writes to its input in place."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.proj, self.in_place = nn.Linear(8, 8), in_place

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        change = self.proj(torch.tanh(x)) * (1.0 if mask is None else mask)
        if self.in_place:
            x += change
            return x
        return x + change


class MaskedHost(nn.Module):
    def __init__(self, call: str = "") -> None:
        super().__init__()
        self.in_, self.block = nn.Linear(6, 8), MaskedBlock(in_place=call == "in place")
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        h, mask = self.in_(x), x[..., :1]
        if self.call == "positional":
            return self.block(h, mask)
        if self.call == "keyword":
            return self.block(h, mask=mask)
        return self.block(x=h, mask=mask) if self.call == "all keywords" else self.block(h)


class Calling:
    def __init__(self, call: str) -> None:
        self.call, self.__name__ = call, call

    def __call__(self) -> nn.Module:
        return MaskedHost(self.call)


def masked(call: str) -> tuple[nn.Module, nn.Module, Seed, Tensor]:
    torch.manual_seed(0)
    plain = MaskedHost(call)
    model = copy.deepcopy(plain)
    place_ = Place("stack", Calling("plain"), (6,), "stack", "block", "block", projections=("proj",))
    model.call = "plain"
    model.block.in_place = False
    seed = place_.plant(model)
    model.call = call
    model.block.in_place = seed.branch.in_place = call == "in place"
    return plain, model, seed, place_.batch()


@pytest.mark.parametrize("call", ["positional", "keyword", "all keywords"])
def test_a_stacked_block_gets_the_further_arguments_of_its_original(call):
    plain, model, seed, x = masked(call)
    nn.init.normal_(seed.branch.proj.weight)
    seed.enter("holding", 1.0)
    branch: Any = seed.branch
    torch.testing.assert_close(model(x), branch(plain(x), x[..., :1]))


@pytest.mark.parametrize("stage", ["training", "holding"])
def test_a_stacked_block_that_writes_in_place_cannot_write_to_the_host(stage):
    plain, model, seed, x = masked("in place")
    nn.init.normal_(seed.branch.proj.weight)
    seed.enter(stage, float(stage == "holding"))
    expected = plain(x)
    if stage == "holding":
        expected = seed.branch(expected.clone())
    out = model(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert seed.branch.proj.weight.grad.abs().sum() > 0


def test_a_seed_whose_source_did_not_run_says_so():
    at = place("widen")
    model = at.model()
    at.plant(model).enter("holding", 1.0)
    with pytest.raises(GrowthError, match="layer 'fc1' should have run before 'fc2'"):
        model.fc2(torch.randn(2, 5))


# Records


def state() -> SeedState:
    at = place("widen")
    return at.plant(at.model()).state


def test_a_record_round_trips_with_whatever_was_measured():
    at = place("widen")
    seed = at.plant(at.model())
    seed.enter("blending", 0.1)
    seed.state.facts.update(gradient_norm=math.nan, output_ratio=math.inf, other=1 / 3)
    seed.state.contributions += [0.1, -math.inf]
    data = seed.get_extra_state()
    assert (data.dtype, data.dim()) == (torch.uint8, 1)
    got = decode_state(data, "here")
    assert math.isnan(got.facts.pop("gradient_norm"))
    assert got.facts == {"output_ratio": math.inf, "other": 1 / 3}
    assert got.contributions == [0.1, -math.inf]
    assert structs.replace(got, facts={}, contributions=[]) == structs.replace(
        seed.state, facts={}, contributions=[]
    )


def test_adopting_a_record_sets_alpha_and_counts():
    at = place("widen")
    seed = at.plant(at.model())
    seed.adopt(structs.replace(state(), stage="blending", alpha=0.75, non_finite=3))
    assert (seed.stage, float(seed.alpha), seed.state.non_finite) == ("blending", 0.75, 3)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (torch.zeros(3), r"expected a 1-d uint8 tensor, got torch.float32 \(3,\)"),
        (torch.zeros(3, 3, dtype=torch.uint8), r"got torch.uint8 \(3, 3\)"),
        ("text", "got str"),
        (torch.tensor([1, 2, 3], dtype=torch.uint8), "cannot be read"),
        (torch.zeros(0, dtype=torch.uint8), "cannot be read"),
    ],
)
def test_a_damaged_record_is_refused(data, text):
    with pytest.raises(CheckpointError, match=f"seed record at 'here'.*{text}"):
        decode_state(data, "here")


def test_entering_a_stage_starts_its_counts_again():
    at = place("widen")
    seed = at.plant(at.model())
    seed.state.stage_age_steps, seed.state.age_steps = 5, 9
    seed.state.contributions.append(1.0)
    seed.enter("training", 0.0)
    assert (seed.state.stage_age_steps, seed.state.age_steps, seed.state.contributions) == (0, 9, [])


def test_advancing_by_hand_walks_the_stages_and_ends():
    at = place("widen")
    seed = at.plant(at.model())
    walked: list[tuple[Stage, float]] = []
    for _ in range(4):
        seed.advance()
        walked.append((seed.stage, float(seed.alpha)))
    assert walked == [("training", 0.0), ("blending", 0.5), ("holding", 1.0), ("fossilized", 1.0)]
    with pytest.raises(LifecycleError, match="seed s1 is fossilized"):
        seed.advance()


def test_culling_needs_a_body():
    at = place("widen")
    with pytest.raises(GrowthError, match="belongs to no attached model; call attach"):
        at.plant(at.model()).cull()


def test_repr_and_size():
    at = place("widen")
    seed = at.plant(at.model(), size=4)
    assert "widen(4) at bypass:fc1->fc2, germinated, alpha=0" in repr(seed)
    assert seed.num_parameters == 6 * 4 + 4 + 4 * 7
    assert (seed.blueprint, seed.size, seed.seed_id, seed.site.name) == ("widen", 4, "s1", "bypass:fc1->fc2")


def test_a_low_precision_host_keeps_its_dtype():
    at = place("widen")
    context = at.context(at.model())
    model = at.model().bfloat16()
    seed = plant(model, SeedState("s1", context.site, "widen", 4), init_seed=0)
    seed.enter("blending", 0.5)
    scramble(seed)
    out = model(at.batch().bfloat16())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert {p.grad.dtype for p in seed.branch.parameters()} == {torch.bfloat16}


def test_autocast_runs_host_and_seed_in_one_dtype():
    at = place("widen")
    model = at.model()
    seed = at.plant(model)
    scramble(seed)
    for stage in ("training", "blending"):
        seed.enter(stage, 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(at.batch())
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()


def test_two_seeds_at_one_target_add_up():
    at, other = place("widen"), place("bottleneck")
    plain, model, x = at.model(), at.model(), at.batch()
    first, second = at.plant(model), other.plant(model, seed_id="s2")
    for seed in (first, second):
        scramble(seed)
        seed.enter("holding", 1.0)
    h = torch.relu(plain.fc1(x))
    z = plain.fc2(h) + first.branch(x) + second.branch(h)
    torch.testing.assert_close(model(x), plain.fc3(torch.relu(z)))
