"""Every blueprint at every kind of place: silent at first, alive at once, and as dear as it said."""

from __future__ import annotations

import pytest
import torch
from places import PLACES, Place, place
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.errors import GrowthError
from esper.kasmina.blueprints import blueprint, cost, fitting, get_blueprint, make_branch, names
from esper.kasmina.blueprints.attention import CausalHead
from esper.kasmina.blueprints.dense import LowRank, init_widen_closed_form
from esper.kasmina.blueprints.norm import GroupedLayerNorm
from esper.kasmina.blueprints.registry import _REGISTRY
from esper.kasmina.blueprints.stack import plain_copy
from esper.kasmina.blueprints.units import HiddenUnits
from esper.kasmina.body import attach
from esper.kasmina.closed_form import closed_form_start
from esper.kasmina.layer import SEEDS, SeedLayer, get_slot
from esper.kasmina.sites import BuildContext

CPU = torch.device("cpu")
each_place = pytest.mark.parametrize("at", PLACES, ids=str)


def built(at: Place, size: int | None = None) -> tuple[nn.Module, BuildContext]:
    context = at.context(at.model())
    torch.manual_seed(0)
    branch = make_branch(
        get_blueprint(at.blueprint), context, at.size(context) if size is None else size, device=CPU
    )
    return branch, context


def test_the_nine_are_registered_on_import():
    assert {
        "attention",
        "bottleneck",
        "conv_widen",
        "depthwise",
        "lowrank",
        "norm",
        "shortcut",
        "stack",
        "widen",
    } <= set(names())


@each_place
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_new_seed_at_full_strength_preserves_the_function(at, training):
    model, x = at.model(), at.batch()
    model.train(training)
    before = model(x)
    seed = at.plant(model)
    seed.enter("holding", 1.0)
    assert float((model(x) - before).detach().abs().max()) <= 1e-6


@each_place
def test_no_dead_start(at):
    """The part that starts at zero learns at the first step, everything else by the second."""
    model, x = at.model(), at.batch(16)
    seed = at.plant(model)
    seed.enter("holding", 1.0)
    torch.manual_seed(2)
    goal = torch.randn_like(model(x))

    def gradients() -> list[tuple[str, Tensor, float]]:
        model.zero_grad()
        (model(x) - goal).square().mean().backward()
        return [(name, p, float(p.grad.abs().max())) for name, p in seed.branch.named_parameters()]

    first = gradients()
    silent = [g for _, p, g in first if not p.any()]
    assert silent
    assert max(silent) > 1e-6
    with torch.no_grad():
        for p in seed.branch.parameters():
            p -= 0.1 * p.grad
    assert [name for name, _, g in gradients() if g <= 1e-9] == []


@each_place
def test_cost_is_what_the_built_branch_costs(at):
    branch, context = built(at)
    promised = cost(get_blueprint(at.blueprint), context, at.size(context))
    assert promised.parameters == sum(p.numel() for p in branch.parameters())
    shape = (
        context.site.source_shape
        if get_blueprint(at.blueprint).reads == "source"
        else context.site.target_shape
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if at.functional:
            branch.delta_weight()
        else:
            branch(torch.randn(1, *shape))
    counted = counter.get_total_flops()
    if at.host.__name__ in ("gpt_block", "torch_block"):
        tokens, width = context.site.target_shape
        counted = 2 * tokens * sum(p.numel() for p in branch.parameters() if p.dim() > 1)
        assert counted <= counter.get_total_flops() + 4 * tokens * tokens * width
    assert promised.flops == counted


@each_place
def test_it_fits_and_costing_allocates_nothing(at):
    context = at.context(at.model())
    assert at.blueprint in fitting(context)
    branch = make_branch(get_blueprint(at.blueprint), context, 1, device=torch.device("meta"))
    assert {p.device.type for p in branch.parameters()} == {"meta"}
    assert {p.device.type for p in context.target_layer.parameters()} == {"cpu"}


@each_place
def test_the_global_random_stream_is_left_alone_by_planting(at):
    model = at.model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    at.plant(model)
    assert torch.equal(torch.rand(3), expected)


def test_default_sizes():
    wide = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 80))
    at = Place("widen", lambda: wide, (64,), "bypass", "0", "2", ops=("relu",))
    context = at.context(wide)
    assert get_blueprint("widen").default_size(context) == 50
    assert place("widen").size(place("widen").context(place("widen").model())) == 16
    assert get_blueprint("lowrank").default_size(context) == 8
    assert place("lowrank").size(place("lowrank").context(place("lowrank").model())) == 5
    assert place("shortcut").size(place("shortcut").context(place("shortcut").model())) == 3


def test_widen_draws_he_weights_and_has_a_silent_fan_out():
    at = Place(
        "widen",
        lambda: nn.Sequential(nn.Linear(50, 4), nn.ReLU(), nn.Linear(4, 3)),
        (50,),
        "bypass",
        "0",
        "2",
        ops=("relu",),
    )
    branch, _ = built(at, size=4000)
    assert branch.fan_in.weight.std().item() == pytest.approx((2 / 50) ** 0.5, rel=0.02)
    assert not branch.fan_in.bias.any()
    assert not branch.fan_out.weight.any()
    assert branch.fan_out.bias is None


def test_widen_equals_a_wider_host():
    at = place("widen")
    branch, context = built(at)
    nn.init.normal_(branch.fan_out.weight)
    x = at.batch()
    first, second = context.source_layer, context.target_layer
    wide_in = torch.cat([first.weight, branch.fan_in.weight])
    bias = torch.cat([first.bias, branch.fan_in.bias])
    wide_out = torch.cat([second.weight, branch.fan_out.weight], dim=1)
    wider = torch.relu(x @ wide_in.T + bias) @ wide_out.T + second.bias
    torch.testing.assert_close(second(torch.relu(first(x))) + branch(x), wider)


def test_a_closed_form_start_sets_the_fan_in_only():
    at = place("widen")
    branch, _ = built(at, size=8)
    generator = torch.Generator().manual_seed(0)
    A, B, G = (torch.randn(200, d, generator=generator) for d in (6, 5, 7))
    start = closed_form_start(A, B, G, 8, generator=generator)
    nn.init.ones_(branch.fan_out.weight)
    init_widen_closed_form(branch, start.weight_in, start.bias_in)
    torch.testing.assert_close(branch.fan_in.weight.double(), start.weight_in, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(branch.fan_in.bias.double(), start.bias_in, atol=1e-6, rtol=1e-6)
    assert not branch.fan_out.weight.any()


def test_a_closed_form_start_of_a_convolution_takes_flat_rows():
    branch, _ = built(place("conv_widen"), size=3)
    rows = torch.randn(3, 2 * 25, generator=torch.Generator().manual_seed(0))
    init_widen_closed_form(branch, rows, torch.ones(3))
    assert torch.equal(branch.fan_in.weight.flatten(1), rows)


@pytest.mark.parametrize(
    ("weight", "bias", "text"),
    [
        (torch.zeros(8, 5), torch.zeros(8), r"expected a fan-in of shape \(8, 6\)"),
        (torch.zeros(8, 6), torch.zeros(7), r"got \(8, 6\) and \(7,\)"),
        (torch.full((8, 6), float("nan")), torch.zeros(8), "NaN or an inf"),
    ],
)
def test_a_closed_form_start_that_does_not_fit_changes_nothing(weight, bias, text):
    branch, _ = built(place("widen"), size=8)
    before = branch.fan_in.weight.clone()
    with pytest.raises(GrowthError, match=text):
        init_widen_closed_form(branch, weight, bias)
    assert torch.equal(branch.fan_in.weight, before)


def test_conv_widen_takes_strides_pools_and_activation_from_the_host():
    branch, _ = built(place("conv_widen"))
    assert isinstance(branch, HiddenUnits)
    assert (branch.fan_in.stride, branch.fan_in.kernel_size) == ((2, 2), (5, 5))
    assert [type(m) for m in branch.between] == [nn.GELU, nn.MaxPool2d]
    assert (branch.fan_out.dilation, branch.fan_out.padding_mode) == ((2, 2), "circular")
    grouped, _ = built(
        Place("conv_widen", place("conv_widen").host, (2, 16, 16), "bypass", "conv2", "conv3", ops=("relu",))
    )
    assert grouped.fan_out.groups == 1


def test_lowrank_changes_the_weight_as_it_changes_the_output():
    at = place("lowrank", "MLP")
    branch, context = built(at)
    assert isinstance(branch, LowRank)
    nn.init.normal_(branch.B.weight)
    x = torch.randn(4, 5)
    expected = nn.functional.linear(
        x, context.target_layer.weight + branch.delta_weight(), context.target_layer.bias
    )
    torch.testing.assert_close(context.target_layer(x) + branch(x), expected)


def test_shortcut_is_one_matrix_at_full_rank_and_two_below():
    at = place("shortcut")
    full, _ = built(at)
    assert [tuple(p.shape) for p in full.parameters()] == [(3, 6)]
    low, _ = built(at, size=2)
    assert [tuple(p.shape) for p in low.parameters()] == [(2, 6), (3, 2)]
    assert not list(low.parameters())[1].any()


def test_shortcuts_follow_an_image_of_another_size():
    dense, _ = built(place("shortcut", "CNN"))
    assert dense(torch.randn(2, 2, 21, 19)).shape == (2, 3)
    model = place("shortcut", "ConvHost").model()
    conv, _ = built(place("shortcut", "ConvHost"))
    x = torch.randn(2, 2, 31, 24)
    assert conv(x).shape == model(x).shape


def test_shortcut_to_small_maps_pools_to_what_there_is():
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 2, 1), nn.Linear(18, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(x).flatten(1))

    branch, _ = built(Place("shortcut", Small, (1, 3, 3), "bypass", "conv", "out", long=True))
    assert tuple(next(branch.parameters()).shape) == (2, 9)


def test_the_head_never_reads_the_future():
    head = CausalHead(8, 4)
    nn.init.normal_(head.out.weight)
    y = torch.randn(2, 6, 8)
    later = y.clone()
    later[:, 3:] += 1.0 + torch.randn(2, 3, 8)
    assert torch.equal(head(y)[:, :3], head(later)[:, :3])
    assert not torch.allclose(head(y)[:, 3:], head(later)[:, 3:])


def test_the_head_is_causal_attention():
    head = CausalHead(8, 4)
    nn.init.normal_(head.out.weight)
    y = torch.randn(2, 6, 8)
    q, k, v = head.qkv(nn.functional.layer_norm(y, (8,))).split(4, dim=-1)
    expected = head.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(head(y), expected)


def test_squeeze_excite_scales_channels_by_at_most_two():
    branch, context = built(place("attention", "CNN"))
    nn.init.normal_(branch.excite.weight, std=100.0)
    y = torch.randn(2, *context.site.target_shape)
    ratio = ((y + branch(y)) / y).detach()
    torch.testing.assert_close(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    assert 0.0 <= float(ratio.min()) <= float(ratio.max()) <= 2.0


def test_norm_is_layer_norm_with_one_group_and_group_norm_with_more():
    y = torch.randn(4, 12)
    one, three = GroupedLayerNorm(12, 1), GroupedLayerNorm(12, 3)
    for layer in (one, three):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    torch.testing.assert_close(one(y), nn.functional.layer_norm(y, (12,), one.weight, one.bias))
    torch.testing.assert_close(three(y), nn.functional.group_norm(y, 3, three.weight, three.bias))


def test_norm_lowers_its_groups_to_a_divisor_of_at_least_two_values():
    branch, _ = built(place("norm", "CNN"), size=4)
    assert branch.num_groups == 3
    vector, _ = built(place("norm", "MLP"), size=7)
    assert vector.groups == 1


def test_stack_copies_a_block_as_if_it_had_never_grown():
    at = place("stack", "gpt_block")
    model = at.model()
    block = model.block
    Place("lowrank", at.host, at.shape, "parallel", "block.mlp.fc", "block.mlp.fc").plant(model, seed_id="s0")
    Place("widen", at.host, at.shape, "bypass", "block.mlp.fc", "block.mlp.proj", ops=("gelu",)).plant(model)
    assert get_slot(block.mlp.fc).taps
    copy = plain_copy(block)
    assert not any(isinstance(m, SeedLayer) or SEEDS in m._modules for m in copy.modules())
    assert not any("_esper_slot" in m.__dict__ for m in copy.modules())
    assert type(copy.mlp.fc) is nn.Linear
    assert [n for n, _ in copy.named_parameters()] == [
        n for n, _ in block.named_parameters() if SEEDS not in n
    ]
    assert torch.equal(copy.attn.qkv.weight, block.attn.qkv.weight)
    assert copy.attn.qkv.weight is not block.attn.qkv.weight
    assert SEEDS in block.mlp.fc._modules  # the host keeps its own


def test_stack_keeps_sharing_and_frozen_flags_and_drops_gradients():
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[1].weight = block[0].weight
    block[0].bias.requires_grad_(False)
    block(torch.randn(2, 4)).sum().backward()
    copy = plain_copy(block)
    assert copy[0].weight is copy[1].weight
    assert copy[0].weight is not block[0].weight
    assert not copy[0].bias.requires_grad
    assert copy[0].weight.grad is None


def test_stack_adds_one_block_at_a_time():
    at = place("stack")
    with pytest.raises(GrowthError, match="size should be 1, got 2; germinate again"):
        built(at, size=2)


def refusal(at: Place) -> str:
    context = at.context(at.model())
    assert at.blueprint not in fitting(context)
    with pytest.raises(GrowthError) as caught:
        make_branch(get_blueprint(at.blueprint), context, 1, device=CPU)
    return str(caught.value)


MLP_, CNN_, ATTENTION, TOKENS = (
    place("widen").host,
    place("conv_widen").host,
    place("lowrank", "Attention").host,
    place("shortcut", "Tokens").host,
)


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (
            Place("widen", CNN_, (2, 16, 16), "bypass", "conv3", "out", ops=("relu",)),
            "source 'conv3' should be an nn.Linear, but is Conv2d",
        ),
        (
            Place("widen", MLP_, (6,), "bypass", "fc1", "fc2", ops=("relu", "AddBackward0")),
            "only element-wise operations may lie, but there is AddBackward0",
        ),
        (
            Place("widen", TOKENS, (5, 6), "bypass", "embed", "out", ops=("tanh",)),
            r"positions \(5,\) are not the target's \(\)",
        ),
        (Place("widen", MLP_, (6,), "parallel", "fc1", "fc1"), "it fits bypass sites"),
        (
            Place("conv_widen", MLP_, (6,), "bypass", "fc1", "fc2", ops=("relu",)),
            "source 'fc1' should be an nn.Conv2d, but is Linear",
        ),
        (
            Place("conv_widen", CNN_, (2, 16, 16), "bypass", "conv1", "conv2", ops=("gelu",)),
            r"gives an output of \(6, 8, 8\), but the target's is \(6, 4, 4\)",
        ),
        (
            Place("conv_widen", CNN_, (2, 16, 16), "bypass", "conv2", "conv3", ops=("reshape",)),
            "there is reshape",
        ),
        (
            Place("bottleneck", CNN_, (2, 16, 16), "parallel", "conv1", "conv1"),
            "should be an nn.Linear, but is Conv2d",
        ),
        (
            Place(
                "bottleneck", ATTENTION, (5, 8), "parallel", "attn.out_proj", "attn.out_proj", functional=True
            ),
            "without calling it.*use 'lowrank'",
        ),
        (
            Place("norm", ATTENTION, (5, 8), "parallel", "attn.out_proj", "attn.out_proj", functional=True),
            "without calling it",
        ),
        (
            Place(
                "attention", ATTENTION, (5, 8), "parallel", "attn.out_proj", "attn.out_proj", functional=True
            ),
            "without calling it",
        ),
        (Place("attention", MLP_, (6,), "parallel", "fc2", "fc2"), r"has shape \(7,\)"),
        (Place("attention", MLP_, (1, 6), "parallel", "fc2", "fc2"), "one token has nothing to attend to"),
        (
            Place("norm", lambda: nn.Sequential(nn.Linear(6, 1)), (6,), "parallel", "0", "0"),
            "one value has no mean and spread",
        ),
        (
            Place("lowrank", CNN_, (2, 16, 16), "parallel", "conv1", "conv1"),
            "should be an nn.Linear, but is Conv2d",
        ),
        (Place("depthwise", MLP_, (6,), "parallel", "fc1", "fc1"), "should be an nn.Conv2d, but is Linear"),
        (Place("shortcut", MLP_, (6,), "bypass", "fc1", "fc2", ops=("relu",)), "it is for long bypasses"),
        (
            Place("stack", place("stack").host, (5, 6), "stack", "block", "block"),
            "no pre-norm residual block",
        ),
        (
            Place("stack", place("stack").host, (5, 6), "stack", "block", "block", projections=("mlp.nope",)),
            "has no output projection 'mlp.nope'",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, Place) else "",
)
def test_refusals_say_why(at, text):
    import re

    assert re.search(text, refusal(at)), refusal(at)


@pytest.fixture
def registry():
    saved = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(saved)


def test_a_user_adds_a_blueprint_with_one_decorated_function(registry):
    @blueprint("tiny", kinds=("parallel",), default_size=3)
    def tiny(context: BuildContext, size: int) -> nn.Module:
        branch = nn.Linear(context.site.source_shape[-1], context.site.target_units)
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
        return branch

    at = Place("tiny", MLP_, (6,), "parallel", "fc2", "fc2")
    context = at.context(at.model())
    assert "tiny" in fitting(context)
    assert at.size(context) == 3
    assert cost(get_blueprint("tiny"), context, 3) == (5 * 7 + 7, 2 * 5 * 7)
    blueprint("tiny", kinds=("parallel",), default_size=4)(tiny)  # the notebook cell again
    assert at.size(context) == 4


def test_registry_errors(registry):
    def other(context: BuildContext, size: int) -> nn.Module:
        return nn.Linear(5, size)

    with pytest.raises(
        GrowthError, match=r"'widen' is already registered by esper\.kasmina\.blueprints\.dense\.widen"
    ):
        blueprint("widen", kinds=("bypass",))(other)
    with pytest.raises(GrowthError, match="no blueprint named 'wide'; registered are attention, bottleneck"):
        get_blueprint("wide")
    with pytest.raises(GrowthError, match="kinds should be some of parallel, bypass, stack"):
        blueprint("odd", kinds=("sideways",))  # type: ignore[arg-type]
    with pytest.raises(GrowthError, match="got kinds=\\('parallel',\\) and reads='input'"):
        blueprint("odd", kinds=("parallel",), reads="input")  # type: ignore[arg-type]
    blueprint("misfit", kinds=("parallel",))(other)
    at = place("bottleneck")
    context = at.context(at.model())
    with pytest.raises(GrowthError, match=r"should give shape \(1, 7\), but gives \(1, 4\)"):
        cost(get_blueprint("misfit"), context, 4)
    with pytest.raises(GrowthError, match="size should be at least 1, got 0"):
        make_branch(get_blueprint("bottleneck"), context, 0, device=CPU)


def test_a_stacked_block_registers_beside_a_seed_on_a_weight_of_its_original():
    """Each new parameter follows its original's group, also where a seed stands in for that weight."""
    at = place("stack", "torch_block")
    model = at.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    body = attach(model, at.batch())
    body.germinate("parallel:block.self_attn.out_proj", "lowrank").enter("training", 0.0)
    stacked = body.germinate("stack:block", "stack")
    assert body.register(optimizer) == 2 + len(list(stacked.branch.parameters()))
