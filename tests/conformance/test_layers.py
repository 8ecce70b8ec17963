"""Odd layers, crossed with growth during the run: they grow and resume, or are left alone with the reason."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from fits import F_IN, B, Classifies, K, fit, loader, mlp
from hosts import host
from runs import QUICK, Every, assert_registered, differing, growing
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import esper
from esper.errors import GrowthError
from esper.kasmina.export import save
from esper.kasmina.structure import all_seeds

SHORT = {"min_training_steps": 2, "blend_steps": 2, "min_holding_steps": 2, "gate_interval_steps": 1}


@dataclass(frozen=True)
class Row:
    """One kind of layer.

    Attributes:
        name: What it is.
        make: Builds the network.
        grows: Site (below ``net.``) and blueprint of every seed.
        refused: Layer (below ``net.``) -> how its reason begins.
        absent: Sites that may not be offered.
        make_x: From features to what the network takes.
        trainer: Settings of the trainer.
    """

    name: str
    make: Callable[[], nn.Module]
    grows: tuple[tuple[str, str], ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    make_x: Callable[[Tensor], Tensor] | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def fit(self, module: Classifies, folder: Path, **options: Any) -> Any:
        """Fit with growth in both halves of the run."""
        entries = [
            (0.1 + 0.4 * i / len(self.grows), site, blueprint, 1 if blueprint == "stack" else 2)
            for i, (site, blueprint) in enumerate(self.grows)
        ]
        data = loader(make=self.make_x)
        return fit(
            module, folder, *entries, data=data, lifecycle=SHORT, trainer=dict(self.trainer), epochs=3, **options
        )  # fmt: skip


def frozen() -> nn.Module:
    net = mlp(6, 6)
    for i in (0, 2):
        net[i].requires_grad_(False)
    return net


class Tied(nn.Module):
    """Token network whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(K, 6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, K, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(x).mean(1))))


def tokens(x: Tensor) -> Tensor:
    return (x > 0).long() + (x > 0.7).long()


def lazy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, K))


def shared() -> nn.Module:
    net = mlp(6, 6)
    return nn.Sequential(net[0], nn.ReLU(), net[2], nn.ReLU(), net[2], nn.ReLU(), net[4])


def changed(change: Callable[[nn.Linear], nn.Module]) -> Callable[[], nn.Module]:
    """The network with its second layer changed."""

    def make() -> nn.Module:
        net = mlp(6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch deprecates the old ones
            net[2] = change(net[2])
        return net

    return make


class Scaled(nn.Linear):
    """A library's own layer: passes for Linear, computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Int8(nn.Linear):
    """Holds its weight in int8, as bitsandbytes does."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.weight = nn.Parameter((like.weight.data * 100).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


class PackedTensor(Tensor):
    """A tensor subclass, as torchao's quantised weights are."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().clone()


torch.serialization.add_safe_globals([PackedTensor])


def packed(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(PackedTensor), requires_grad=False)
    return layer


def scaled(layer: nn.Linear) -> nn.Module:
    return Scaled(layer.in_features, layer.out_features)


def hooked(layer: nn.Linear) -> nn.Module:
    """As accelerate hooks a layer."""
    own = layer.forward
    layer.forward = lambda x: own(x)  # type: ignore[method-assign]
    return layer


def quantised_first() -> nn.Module:
    net = mlp(6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what it has of its own: torchao takes over
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(net[0]), {nn.Linear})
    return nn.Sequential(quantised[0], *list(net)[1:])


def lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(mlp(6, 6), LoraConfig(target_modules=["2"], r=2, modules_to_save=["4"]))  # type: ignore[arg-type]


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(F_IN, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 6), nn.BatchNorm1d(6),
        nn.ReLU(), nn.Linear(6, K),
    )  # fmt: skip


class Checkpointed(nn.Module):
    """Two residual blocks, each computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(F_IN, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, K)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            recompute = self.reentrant is not None and self.training
            x = checkpoint(block, x, use_reentrant=self.reentrant) if recompute else block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 8)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(self.norm(x)))))


IN_BLOCKS = (
    ("bypass:net.blocks.0.up->net.blocks.0.down", "widen"),
    ("parallel:net.blocks.1.down", "lowrank"),
    ("stack:net.blocks.1", "stack"),
)
ACROSS_BLOCKS = ("bypass:net.stem->net.blocks.0.up", "bypass:net.stem->net.blocks.1.up")

AROUND = (("bypass:net.0->net.4", "shortcut"), ("parallel:net.0", "lowrank"))
LEFT = ("parallel:net.2", "bypass:net.0->net.2", "bypass:net.2->net.4")

QUANTISED_BY_OTHERS = "given a weight of another kind \\(PackedTensor\\)"
WITHIN = (("bypass:net.0->net.2", "widen"), ("parallel:net.2", "lowrank"))
LORA = "net.base_model.model.2"

ROWS = (
    Row("frozen backbone", frozen, WITHIN),
    Row(
        "tied weights", Tied, (("parallel:net.head", "lowrank"), ("bypass:net.hidden->net.head", "widen")),
        make_x=tokens,
    ),
    Row("lazy layers", lazy, WITHIN, trainer={"num_sanity_val_steps": 0}),
    Row(
        "a module used twice", shared, (("bypass:net.0->net.6", "shortcut"), ("parallel:net.6", "lowrank")),
        {"net.2": "called 2 times"},
    ),
    Row("weight_norm", changed(nn.utils.parametrizations.weight_norm), AROUND, {"net.2": "parametrised"}, LEFT),
    Row("spectral_norm", changed(nn.utils.parametrizations.spectral_norm), AROUND, {"net.2": "parametrised"}, LEFT),
    Row("old weight_norm", changed(nn.utils.weight_norm), AROUND, {"net.2": "computed from other"}, LEFT),
    Row("old spectral_norm", changed(nn.utils.spectral_norm), AROUND, {"net.2": "computed from other"}, LEFT),
    Row("BatchNorm and dropout", normalised, (("bypass:net.0->net.4", "widen"), ("parallel:net.7", "lowrank"))),
    Row(
        "torch.ao quantised layer", quantised_first, (("bypass:net.2->net.4", "widen"),),
        {"net.0": "quantised \\(Linear\\)"}, ("parallel:net.0",),
    ),
    Row("int8 weight", changed(Int8), AROUND, {"net.2": "quantised \\(weight of torch.int8\\)"}, LEFT),
    Row("weight of a tensor subclass", changed(packed), AROUND, {"net.2": QUANTISED_BY_OTHERS}, LEFT),
    Row("a forward of its own", changed(scaled), AROUND, {"net.2": "a .* Scaled that computes its output"}, LEFT),
    Row("a forward put on the instance", changed(hooked), AROUND, {"net.2": "called through a forward"}, LEFT),
    Row(
        "PEFT's LoRA layers", lora, (("parallel:net.base_model.model.0", "lowrank"),),
        {LORA: "an adapter \\(peft's Linear\\)", f"{LORA}.base_layer": "part of a layer that is an adapter"},
        (f"parallel:{LORA}.base_layer", f"parallel:{LORA}.lora_A.default"),
    ),
    Row("bf16-true", lambda: mlp(6, 6), WITHIN, trainer={"precision": "bf16-true"}),
    Row("no gradient checkpointing", lambda: Checkpointed(None), (*IN_BLOCKS, (ACROSS_BLOCKS[0], "widen"))),
    Row("gradient checkpointing", lambda: Checkpointed(False), IN_BLOCKS, absent=ACROSS_BLOCKS),
    Row("gradient checkpointing, reentrant", lambda: Checkpointed(True), IN_BLOCKS, absent=ACROSS_BLOCKS),
)  # fmt: skip
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@by_row
def test_a_layer_grows_and_resumes_or_is_left_alone_with_the_reason(row: Row, tmp_path: Path) -> None:
    module = Classifies(row.make())
    frozen_before = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    birth: dict[str, Tensor] = {}

    def look(runner: L.Trainer, _: Any) -> None:
        assert_registered(runner, module)
        for seed in all_seeds(module):
            birth.setdefault(seed.seed_id, flat(seed))

    callback = row.fit(module, tmp_path, callbacks=[Every(look)])
    body = callback.body
    for layer, reason in row.refused.items():
        assert re.match(reason, body.refused[layer]), body.refused[layer]
    assert not {site.name for site in body.sites} & set(row.absent)
    for name in row.absent:
        with pytest.raises(GrowthError, match="no site"):
            body.germinate(name, "lowrank")
    seeds = all_seeds(module)
    assert {(seed.site.name, seed.blueprint) for seed in seeds} == set(row.grows)
    for seed in seeds:
        assert seed.stage in ("holding", "fossilized")
        assert bool(flat(seed).isfinite().all())
        assert not torch.equal(flat(seed), birth[seed.seed_id]), "it learns"
        assert flat(seed).dtype == next(module.get_submodule(seed.site.target).parameters()).dtype
    for name, p in module.named_parameters():
        assert name not in frozen_before or torch.equal(p, frozen_before[name]), name

    resumed = Classifies(row.make())
    row.fit(resumed, tmp_path, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert differing(weights(module), weights(resumed)) == []


def weights(module: nn.Module) -> dict[str, Tensor]:
    """The state dict; what quantised layers put there besides tensors left out."""
    return {
        name: value.detach().clone()
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor) and not value.is_quantized
    }


def flat(seed: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in seed.branch.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_in_a_growing_run(reentrant: bool, tmp_path: Path) -> None:
    plain, recomputed = Classifies(Checkpointed(None)), Classifies(Checkpointed(reentrant))
    Row("", lambda: plain, IN_BLOCKS).fit(plain, tmp_path / "plain")
    callback = Row("", lambda: recomputed, IN_BLOCKS).fit(recomputed, tmp_path / "recomputed")
    assert differing(weights(plain), weights(recomputed)) == []
    regions = {layer.name: layer.region for layer in callback.body.topology.layers}
    assert regions["net.blocks.0.up"] == regions["net.blocks.0.down"] == 1
    assert regions["net.blocks.1.up"] == 2
    assert regions["net.stem"] == regions["net.head"] == 0


def test_a_seed_whose_layers_are_recomputed_apart_since_says_so() -> None:
    model, x = Checkpointed(None), torch.randn(B, F_IN)
    seed = esper.attach(model, x).germinate(ACROSS_BLOCKS[0].replace("net.", ""), "widen")
    seed.advance()
    model(x).sum().backward()
    model.reentrant = False
    with pytest.raises(
        GrowthError, match=r"'stem' should have run before 'blocks.0.up' .* gradient checkpointing"
    ):
        model(x).sum().backward()


@pytest.mark.parametrize(("name", "reentrant"), [("gpt2", False), ("gpt2", True), ("llama", True)])
def test_transformers_models_with_gradient_checkpointing_grow_as_without(
    name: str, reentrant: bool, tmp_path: Path
) -> None:
    case = host(name)
    states = []
    for on in (False, True):
        module = case.build(dropout=True)
        case.net(module).config.use_cache = False  # checkpointing switches it off, and rounding changes
        if on:
            net: Any = case.net(module)
            # transformers 5 renamed it
            enable = (
                getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable
            )
            enable({"use_reentrant": reentrant})
        attached = esper.attach(case.net(module), case.example())
        stacks = [site.name for site in attached.sites if site.kind == "stack"]
        others = [site for site in attached.sites if site.kind == "parallel"]
        grown = [(stacks[0], "stack", 1)] if stacks else []
        grown += [(others[0].name, others[0].blueprints[0], 2)] if others else []
        esper.detach(case.net(module))
        prefix = case.network
        entries = [(0.2, below(site, prefix), *rest) for site, *rest in grown]
        fit(module, tmp_path / str(on), *entries, data=case.loader(), lifecycle=SHORT, epochs=2)
        assert len(all_seeds(module)) == len(entries) > 0
        states.append(weights(module))
    assert differing(*states) == []


def below(site: str, prefix: str) -> str:
    """The name of a site in the module that holds the network as ``prefix``."""
    kind, _, layers = site.partition(":")
    return f"{kind}:{'->'.join(f'{prefix}.{layer}' for layer in layers.split('->'))}"


@pytest.mark.parametrize("policy", ["expressivity", "uniform"])
def test_measurements_move_neither_running_statistics_nor_dropout(policy: str, tmp_path: Path) -> None:
    plain, watched = Classifies(normalised()), Classifies(normalised())
    quiet = {"mode": "isolated", "min_training_steps": 1000, "max_training_steps": 1000}
    states, summaries = [], []
    for module, chosen in ((plain, "off"), (watched, policy)):
        grow = growing(tmp_path / chosen, policy=chosen, policy_options={}, lifecycle=QUICK | quiet,
                       probes={"interval_steps": 2, "decision_interval": 0.1},
                       budget={"max_parameters_ratio": 20.0, "max_scoring_fraction": 1.0})  # fmt: skip
        callback = fit(module, tmp_path / chosen, grow=grow)
        states.append({n: v for n, v in weights(module).items() if "esper_seeds" not in n})
        summaries.append(callback.summary())
    assert differing(*states) == []
    assert summaries[1]["scoring_flops" if policy == "expressivity" else "seeds_germinated"] > 0


def test_validation_under_inference_mode_leaves_the_run_as_it_is(tmp_path: Path) -> None:
    states = []
    for on in (True, False):
        module = Classifies(mlp(6, 6))
        entries = ((0.1, "bypass:net.0->net.2", "widen", 2), (0.3, "parallel:net.2", "lowrank", 2))
        fit(module, tmp_path / str(on), *entries, lifecycle=SHORT, trainer={"inference_mode": on})
        with torch.inference_mode():
            seen = module.eval()(torch.ones(1, F_IN))
        with torch.no_grad():
            assert torch.equal(seen, module(torch.ones(1, F_IN)))
        states.append(weights(module))
    assert differing(*states) == []


def grown(stage: str) -> tuple[nn.Module, Tensor]:
    """A network with a bypass and a parallel seed in ``stage`` whose weights are not at zero."""
    net, x = mlp(6, 6), torch.randn(B, F_IN)
    body = esper.attach(net, x)
    for site, blueprint in (("bypass:0->2", "widen"), ("parallel:4", "lowrank")):
        seed = body.germinate(site, blueprint)
        for p in seed.branch.parameters():
            nn.init.normal_(p)
        while seed.stage != stage:
            seed.advance()
    return net, x


def loss_of(net: nn.Module) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    return lambda parameters, x: functional_call(net, parameters, (x,)).square().sum()


@pytest.mark.parametrize("stage", ["germinated", "training", "blending", "holding", "fossilized"])
def test_functional_gradients_are_the_usual_ones(stage: str) -> None:
    net, x = grown(stage)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = torch.func.grad(loss_of(net))(parameters, x)
    net(x).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize("stage", ["training", "blending", "fossilized"])
def test_gradients_a_sample_by_vmap_are_those_of_single_samples(stage: str) -> None:
    net, x = grown(stage)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss_of(net)), in_dims=(None, 0))(parameters, x)
    for i in range(B):
        net.zero_grad()
        net(x[i]).square().sum().backward()
        for name, p in net.named_parameters():
            expected = torch.zeros_like(p) if p.grad is None else p.grad
            torch.testing.assert_close(found[name][i], expected, rtol=1e-3, atol=1e-4)


# torch 2.13 scripts its decompositions for forward mode, which it deprecates
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_is_refused_by_torch_until_a_seed_is_part_of_the_host() -> None:
    refused = pytest.raises(NotImplementedError, match="jvp")
    for stage, expected in (("blending", refused), ("fossilized", nullcontext())):
        net, x = grown(stage)
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        with expected:
            torch.func.jvp(lambda p, net=net, x=x: loss_of(net)(p, x), (parameters,), (parameters,))


def test_a_seed_keeps_its_weight_in_full_precision_when_the_model_is_cast() -> None:
    net, _ = grown("blending")
    seed = all_seeds(net)[0]
    seed.set_alpha(0.3)
    net.to(torch.bfloat16)
    assert float(seed.alpha) == pytest.approx(0.3, abs=1e-7)
    assert {p.dtype for p in seed.branch.parameters()} == {torch.bfloat16}


def test_a_layer_that_evaluation_skips_is_found_without_validation_too(tmp_path: Path) -> None:
    class Shortcut(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else nn.functional.linear(x, self[0].weight[:K])

    module = Classifies(Shortcut(*mlp(6, 6)))
    callback = fit(module, tmp_path, trainer={"limit_val_batches": 0})
    assert callback.body.refused["net.2"].startswith("never called in evaluation")
    assert not callback.body.sites


def test_a_slice_as_example_input_is_exported(tmp_path: Path) -> None:
    net, x = mlp(6, 6), torch.randn(B, F_IN + 1)[:, :-1]
    assert not x.is_contiguous()
    seed = esper.attach(net, x).germinate("bypass:0->2", "widen", 2)
    while seed.stage != "fossilized":
        seed.advance()
    save(net, tmp_path / "grown.pt", x)
    program = torch.export.load(tmp_path / "grown.pt").module()
    for given in (x, x.contiguous(), x[:4]):
        torch.testing.assert_close(program(given), net.eval()(given))
