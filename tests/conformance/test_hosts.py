"""Models of other libraries grow: host x check. What :mod:`hosts` declares is asserted here."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import HOSTS, HostCase, host, host_names
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import QUICK, assert_registered, differing, growing, stages, trainer, weights
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import esper
from esper.kasmina.body import Body
from esper.kasmina.example import Example
from esper.kasmina.seed import Seed
from esper.kasmina.sites import Site
from esper.kasmina.trace import preserved

EXACT = 1e-6
"""Growth may change no output by more."""
EXPORT = 1e-5
EPOCHS, STOP = 8, 17
"""Length of the training runs; where the resumed one starts: inside an epoch, while the seed blends."""

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@functools.cache
def attached(name: str) -> tuple[HostCase, nn.Module, Body]:
    """One attached network a host: growth is undone after each test."""
    case = host(name)
    net = case.net(case.build())
    return case, net, esper.attach(net, case.example())


def floats(output: Any) -> list[Tensor]:
    """What a model returns, without a cache of keys and values."""
    if isinstance(output, Mapping):
        output = {key: value for key, value in output.items() if key != "past_key_values"}
    return [
        leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def outputs(model: nn.Module, inputs: Any, *, train: bool | None = False) -> list[Tensor]:
    """Run ``model`` in a mode (None: in its own), leaving modes and statistics as they are."""
    with preserved(model), torch.no_grad():
        if train is not None:
            model.train(train)
        return [t.clone() for t in floats(Example.of(inputs).run(model))]


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def other_first(inputs: Any) -> Any:
    """The inputs with the second sample in the first one's place, too."""
    return pytree.tree_map(lambda t: torch.cat([t[1:2], t[1:]]), inputs)


def changes_of_others(a: list[Tensor], b: list[Tensor], samples: int) -> float:
    """Largest difference in what belongs to other samples than the first."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.dim() and x.shape[0] % samples == 0:
            first = x.shape[0] // samples
            worst = max(worst, float((x[first:] - y[first:]).abs().max()))
    return worst


def place(body: Body, wanted: str, blueprint: str) -> Site:
    """The site of that name; of a kind, the last called one that ``blueprint`` fits."""
    if ":" in wanted:
        return body.site(wanted)
    return [s for s in body.sites if s.kind == wanted and blueprint in s.blueprints and not s.functional][-1]


GROWTHS = [
    pytest.param(case.name, where, blueprint, id=f"{case.name}-{where}-{blueprint}")
    for case in HOSTS
    for where, blueprint in [(kind, b) for kind, fitting in case.grows.items() for b in fitting]
    + [*case.also]
]


@pytest.fixture
def grown(request: pytest.FixtureRequest) -> Iterator[tuple[HostCase, nn.Module, Seed, list[list[Tensor]]]]:
    """A host with one new seed, and what it returned before in training and in evaluation."""
    name, where, blueprint = request.param
    case, net, body = attached(name)
    before = [outputs(net, case.example(), train=mode) for mode in (True, False)]
    seed = body.germinate(place(body, where, blueprint), blueprint)
    yield case, net, seed, before
    body.cull(seed)


# ---------------------------------------------------------------- what attach finds


@pytest.mark.parametrize("name", host_names())
def test_attach_finds_the_sites_that_the_table_says(name: str) -> None:
    case, _, body = attached(name)
    found: dict[str, set[str]] = {}
    for site in body.sites:
        found.setdefault(site.kind, set()).update(site.blueprints)
    assert {kind: tuple(sorted(names)) for kind, names in found.items()} == dict(case.grows)
    for layer, reason in case.left_alone.items():
        assert reason in body.refused[layer]


@pytest.mark.parametrize("name", host_names())
def test_every_layer_with_parameters_grows_or_says_why_not(name: str) -> None:
    _, net, body = attached(name)
    told = {site.target for site in body.sites} | set(body.refused)
    for layer, module in net.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if not own or not layer or any(True for child in module.children() for _ in child.parameters()):
            continue  # a module around other layers is a block: it can be stacked, or there is nothing to say
        around = layer.rpartition(".")[0]
        assert layer in told or around in told, layer  # attention has its projection inside


# ---------------------------------------------------------------- growth


@pytest.mark.parametrize("grown", [p.values for p in GROWTHS], indirect=True, ids=[p.id for p in GROWTHS])
def test_growth_preserves_the_function_is_seen_in_evaluation_and_keeps_samples_apart(grown: Any) -> None:
    case, net, seed, before = grown
    inputs = case.example()
    for stage, alpha in (("germinated", 0.0), ("training", 0.0), ("blending", 0.5), ("fossilized", 1.0)):
        seed.enter(stage, alpha)
        for mode, expected in zip((True, False), before, strict=True):
            assert gap(outputs(net, inputs, train=mode), expected) <= EXACT, (stage, mode)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in seed.branch.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    felt = outputs(net, inputs)
    assert gap(felt, before[1]) > EXACT
    if case.name != "cnn":  # whose BatchNorm tells the modes apart by itself
        assert gap(outputs(net, inputs, train=True), felt) <= 10 * EXPORT
    if not case.mixes:
        samples = len(pytree.tree_leaves(inputs)[0])
        changed = outputs(net, other_first(inputs))
        assert changes_of_others(changed, felt, samples) <= EXPORT


@pytest.mark.parametrize("grown", [p.values for p in GROWTHS], indirect=True, ids=[p.id for p in GROWTHS])
def test_export_is_equal_and_of_the_kind_that_the_table_says(grown: Any) -> None:
    case, net, seed, _ = grown
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in seed.branch.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    seed.enter("fossilized", 1.0)
    with preserved(net):
        net.eval()
        plain = esper.export(net, case.example())
    assert gap(outputs(plain, case.example(), train=None), outputs(net, case.example())) <= EXPORT
    if seed.blueprint in case.as_graph:
        assert isinstance(plain, torch.fx.GraphModule)
    else:
        assert type(plain).__qualname__ == type(case.net(case.build())).__qualname__
    assert not any(type(module).__module__.startswith("esper.") for module in plain.modules())


# ---------------------------------------------------------------- training


class Losses(L.Callback):
    """Gathers the training loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"].detach()))


class Run:
    """A Lightning fit of a host in which one seed grows; checkpoints lie in the run's folder."""

    def __init__(self, case: HostCase, folder: Path, checkpoint: Path | None = None) -> None:
        where, blueprint = case.fit
        inside = f"{case.network}." if case.network else ""
        kind, _, layers = where.partition(":")
        self.site = f"{kind}:" + "->".join(f"{inside}{layer}" for layer in layers.split("->"))
        self.case, self.folder = case, folder
        self.module = case.build()
        size = 1 if blueprint == "stack" else 4
        lifecycle = QUICK | {"mode": "isolated", "blend_steps": 6}
        self.callback = growing(folder, (0.06, self.site, blueprint, size), lifecycle=lifecycle)
        self.losses = Losses()
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=STOP)
        self.trainer = trainer(
            folder, self.callback, self.losses, saver, epochs=EPOCHS, enable_checkpointing=True
        )
        torch.manual_seed(1)
        with warnings.catch_warnings():
            # What Lightning has to say about tiny runs: few workers, few batches, another folder.
            warnings.filterwarnings("ignore", module="lightning")
            self.trainer.fit(self.module, case.loader(), case.loader(2), ckpt_path=checkpoint)

    @property
    def seed(self) -> Seed:
        return self.callback.body.seeds[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run a host, made when it is first asked for."""
    return functools.cache(lambda name: Run(host(name), tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", host_names())
def test_a_fit_grows_trains_and_fossilises(name: str, runs: Any) -> None:
    run = runs(name)
    assert stages(run.folder, "s1") == [
        "dormant",
        "germinated",
        "training",
        "blending",
        "holding",
        "fossilized",
    ]
    assert run.seed.site.name == run.site
    assert run.seed.record.non_finite == 0
    topology = run.callback.body.topology
    assert topology.layout_measured
    assert bool(topology.layout_problem) == run.case.mixes
    assert_registered(run.trainer, run.module)
    losses = run.losses.values
    assert len(losses) == EPOCHS * 6
    assert all(map(math.isfinite, losses))
    assert sum(losses[-6:]) < sum(losses[:6])
    born = plant_again(run)
    still = [key for key, value in run.seed.branch.named_parameters() if torch.equal(value, born[key])]
    assert still == []


def plant_again(run: Run) -> dict[str, Tensor]:
    """The weights that the run's seed was born with."""
    fresh = run.case.build()
    body = Body(fresh, run.callback.body.topology, seed=run.callback.config.seed)
    return dict(body.germinate(run.site, run.seed.blueprint, run.seed.size).branch.state_dict())


@pytest.mark.parametrize("name", host_names())
def test_a_run_resumes_bit_for_bit_in_the_middle_of_an_epoch_and_of_growth(
    name: str, runs: Any, tmp_path: Path
) -> None:
    whole = runs(name)
    resumed = Run(whole.case, tmp_path, whole.folder / f"step={STOP}.ckpt")
    assert differing(weights(whole.module), weights(resumed.module)) == []
    assert resumed.losses.values == whole.losses.values[STOP:]
    assert resumed.seed.stage == "fossilized"


@pytest.mark.parametrize("name", host_names())
def test_a_trained_host_loads_without_a_trainer_and_exports(name: str, runs: Any) -> None:
    run = runs(name)
    case, example = run.case, run.case.example(seed=2)
    fresh = esper.load(case.build(seed=5), run.folder / f"step={2 * STOP}.ckpt")
    assert [seed.seed_id for seed in esper.kasmina.structure.all_seeds(fresh)] == ["s1"]
    with preserved(run.module):
        net = case.net(run.module).eval()
        plain = esper.export(net, example)
        assert gap(outputs(plain, example, train=None), outputs(net, example)) <= EXPORT


# ---------------------------------------------------------------- generation


GENERATIONS = [
    pytest.param(case.name, kind, id=f"{case.name}-{kind}")
    for case in HOSTS
    if case.generates
    for kind in case.grows
]


@pytest.mark.parametrize(("name", "kind"), GENERATIONS)
def test_generation_with_and_without_a_cache_agrees_after_growth(name: str, kind: str) -> None:
    case, net, body = attached(name)
    prompt = {key: value for key, value in case.example().items() if key != "labels"}
    where, blueprint = case.fit if case.fit[0].startswith(kind) else (kind, case.grows[kind][-1])
    seeds = [body.germinate(place(body, where, blueprint), blueprint) for _ in range(2)]
    for number, seed in enumerate(seeds):
        seed.enter("fossilized", 1.0)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in seed.branch.parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    with preserved(net):
        net.eval()
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
        cached, plain = (net.generate(**prompt, **settings, use_cache=cache) for cache in (True, False))
        beams, plain_beams = (
            net.generate(**prompt, **settings | {"num_beams": 2}, use_cache=cache) for cache in (True, False)
        )
    for seed in seeds:
        body.cull(seed)
    assert torch.equal(cached, plain)
    assert torch.equal(beams, plain_beams)
