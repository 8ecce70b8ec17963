"""torch.compile, in every way in which users give it, crossed with growth during the run."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from fits import F_IN, B, Classifies, fit, loader, mlp
from hosts import host
from runs import Every, differing, journal, weights
from torch import Tensor, nn
from torch._dynamo.utils import counters

import esper
from esper.callbacks import TamiyoCallback
from esper.errors import CheckpointError
from esper.kasmina.probes import ProbeRunner
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord

WIDTHS = (6, 6)
SEEDS = (
    (0.1, "bypass:{}0->{}2", "widen", 4),
    (0.1, "parallel:{}2", "lowrank", 2),
    (0.6, "bypass:{}0->{}4", "shortcut", 3),
)
SHORT = {"min_training_steps": 2, "blend_steps": 2, "min_holding_steps": 2, "gate_interval_steps": 1}


class Counting:
    """A backend that runs what dynamo captured as it is, and counts graphs and runs of them."""

    def __init__(self) -> None:
        self.graphs = self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@dataclass(frozen=True)
class Way:
    """How a model is compiled.

    Attributes:
        name: What the user writes.
        apply: Compiles (parts of) the module; returns what is given to ``fit``.
        name_of: Name of the network's layer ``0``, ``2`` or ``4`` afterwards.
    """

    name: str
    apply: Callable[[Classifies, Any], Any]
    name_of: Callable[[str], str] = "net.{}".format

    def entries(self) -> list[tuple[Any, ...]]:
        """The schedule of growth with this way's names."""
        found = []
        for fraction, site, blueprint, size in SEEDS:
            kind, _, layers = site.partition(":")
            names = [self.name_of(layer) for layer in layers.replace("{}", "").split("->")]
            found.append((fraction, f"{kind}:{'->'.join(names)}", blueprint, size))
        return found


def compiled_net(module: Classifies, backend: Any) -> Classifies:
    module.net = torch.compile(module.net, backend=backend)  # type: ignore[assignment]
    return module


def compiled_in_place(module: Classifies, backend: Any) -> Classifies:
    module.compile(backend=backend)
    return module


def net_compiled_in_place(module: Classifies, backend: Any) -> Classifies:
    module.net.compile(backend=backend)
    return module


def compiled_layers(module: Classifies, backend: Any) -> Classifies:
    for i in (0, 2, 4):
        module.net[i] = torch.compile(module.net[i], backend=backend)  # type: ignore[index]
    return module


def compiled_function(module: Classifies, backend: Any) -> Classifies:
    run = torch.compile(lambda net, x: net(x), backend=backend)
    forward: Any = lambda x: run(module.net, x)  # noqa: E731
    module.forward = forward  # type: ignore[method-assign]
    return module


WAYS = (
    Way("trainer.fit(torch.compile(module))", lambda module, backend: torch.compile(module, backend=backend)),
    Way("module.compile()", compiled_in_place),
    Way("self.net = torch.compile(self.net)", compiled_net, "net._orig_mod.{}".format),
    Way("self.net.compile()", net_compiled_in_place),
    Way("each layer by torch.compile", compiled_layers, "net.{}._orig_mod".format),
    Way("a compiled function that calls self.net", compiled_function),
)
by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # Hundreds of records a compilation, which pytest would keep: half of the time of these tests.
    trace_log = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace_log, "disabled", True)
    with warnings.catch_warnings():
        # torch 2.13's own import of its compiler warns under Python 3.11
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        # dynamo looks at .grad of whatever tensor it meets between two graphs
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
    torch._dynamo.reset()


def plainly_named(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.replace("_orig_mod.", ""): value
        for key, value in state.items()
        if not key.endswith("_extra_state")  # the record of a seed names its site
    }


def assert_same_health(callback: TamiyoCallback, usual: TamiyoCallback) -> None:
    """What the probes saw last is what they see in a plain run."""
    expected = {(s.layer_id, s.seed_id): s for s in usual.health()}
    found = {
        (s.layer_id.replace("_orig_mod.", "").removesuffix("._orig_mod"), s.seed_id): s
        for s in callback.health()
    }
    assert found.keys() == expected.keys()
    for key, signal in found.items():
        for figure in ("activation_variance", "gradient_norm", "effective_rank", "update_ratio"):
            assert getattr(signal, figure) == getattr(expected[key], figure), (key, figure)


@by_way
def test_growth_in_a_compiled_run_is_growth_in_a_plain_one_bit_for_bit(way: Way, tmp_path: Path) -> None:
    lifecycle = SHORT | {"mode": "isolated" if way is WAYS[3] else "direct"}
    plain, compiled = Classifies(mlp(*WIDTHS)), Classifies(mlp(*WIDTHS))
    usual = fit(plain, tmp_path / "plain", *Way("", fit).entries(), lifecycle=lifecycle, epochs=3)
    backend = Counting()
    runs: list[int] = []
    watch = Every(lambda *_: runs.append(backend.runs))
    callback = fit(
        way.apply(compiled, backend), tmp_path / "compiled", *way.entries(), lifecycle=lifecycle, epochs=3,
        callbacks=[watch],
    )  # fmt: skip
    assert differing(plainly_named(weights(plain)), plainly_named(weights(compiled))) == []
    assert [seed.stage for seed in all_seeds(compiled)] == ["fossilized"] * 3
    assert len(callback.body.sites) == len(usual.body.sites)
    assert callback.summary()["compilations"] > 3
    assert_same_health(callback, usual)
    ran = [b > a for a, b in itertools.pairwise(runs)]
    assert ran.count(False) < len(ran) / 2, "most steps are not watched, so they run compiled"
    assert all(ran[-3:])


@pytest.mark.parametrize("way", [WAYS[0], WAYS[4]], ids=lambda way: way.name)
def test_a_dormant_body_adds_no_graph_and_no_break(way: Way, tmp_path: Path) -> None:
    found = []
    for settings in (None, {"governor": {"check_interval_steps": 2}}):
        torch._dynamo.reset()
        counters.clear()
        backend = Counting()
        given = way.apply(Classifies(mlp(*WIDTHS)), backend)
        # The sanity check runs before the first batch is traced: it would be compiled once more.
        options: dict[str, Any] = {"num_sanity_val_steps": 0}
        if settings is None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="lightning")
                runner = L.Trainer(
                    max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, **options,
                )  # fmt: skip
                runner.fit(given, loader(), loader())
        else:
            fit(given, tmp_path, trainer=options, epochs=1, **settings)
        found.append((backend.graphs, dict(counters["graph_break"])))
    assert found[0] == found[1]


def test_a_seed_is_one_compilation(
    tmp_path: Path,
) -> None:
    module, backend = Classifies(mlp(*WIDTHS)), Counting()
    module.net.compile(backend=backend)
    callback = fit(
        module, tmp_path, (0.3, "bypass:net.0->net.2", "widen", 4), epochs=3,
        trainer={"limit_val_batches": 0},
    )  # fmt: skip
    assert [seed.stage for seed in all_seeds(module)] == ["fossilized"]
    summary = callback.summary()
    assert (summary["compilations"], summary["recompilations"], backend.graphs) == (2, 1, 2)
    notes = [e.info for e in journal(tmp_path) if isinstance(e, RunRecord) and "recompilations" in e.info]
    assert [note["recompilations"] for note in notes] == [1, 1]  # the last is the end of the run
    assert notes[0]["versions_of_one_function"] == 2
    assert notes[0]["recompile_limit"] == torch._dynamo.config.recompile_limit


def test_dynamos_limit_is_kept_clear_of_with_a_warning_and_put_back(tmp_path: Path) -> None:
    module, backend = Classifies(mlp(*WIDTHS)), Counting()
    module.net.compile(backend=backend)
    entries = [(0.1 + 0.1 * i, "bypass:net.0->net.2", "widen", 1) for i in range(6)]
    told = r"recompile_limit = 4 dynamo would run it uncompiled .* raises the limit to 8"
    with torch._dynamo.config.patch(recompile_limit=4):
        with pytest.warns(UserWarning, match=told):
            callback = fit(module, tmp_path, *entries, epochs=3, lifecycle=SHORT)
        assert torch._dynamo.config.recompile_limit == 4
    assert callback.summary()["recompilations"] > 4
    assert backend.graphs > 6, "dynamo would have stopped at 4"


@pytest.mark.parametrize("way", [WAYS[0], WAYS[2]], ids=lambda way: way.name)
def test_a_compiled_run_resumes_bit_for_bit_between_two_growths(way: Way, tmp_path: Path) -> None:
    whole = Classifies(mlp(*WIDTHS))
    fit(way.apply(whole, Counting()), tmp_path, *way.entries(), epochs=2, lifecycle=SHORT)
    resumed = Classifies(mlp(*WIDTHS, seed=7))
    fit(
        way.apply(resumed, Counting()), tmp_path, *way.entries(), epochs=2, lifecycle=SHORT,
        ckpt_path=tmp_path / "epoch=0.ckpt",
    )  # fmt: skip
    assert len(all_seeds(resumed)) == 3
    assert differing(weights(whole), weights(resumed)) == []
    held = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    seeds = [key for key in held if "esper_seeds" in key]
    assert seeds
    assert all(("_orig_mod" in key) == ("_orig_mod" in way.name_of("0")) for key in seeds)


def test_a_compiled_checkpoint_loads_into_a_plain_model_and_the_other_way_round(tmp_path: Path) -> None:
    way = WAYS[2]
    trained = Classifies(mlp(*WIDTHS))
    fit(way.apply(trained, "eager"), tmp_path, *way.entries(), epochs=1, lifecycle=SHORT)
    plain = esper.load(Classifies(mlp(*WIDTHS, seed=7)), tmp_path / "epoch=0.ckpt")
    assert [seed.site.name for seed in all_seeds(plain)] == [
        "bypass:net.0->net.2", "parallel:net.2", "bypass:net.0->net.4",
    ]  # fmt: skip
    assert differing(plainly_named(weights(trained)), plainly_named(weights(plain))) == []
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    again = esper.load(way.apply(Classifies(mlp(*WIDTHS, seed=8)), "eager"), tmp_path / "plain.pt")
    assert differing(weights(trained), weights(again)) == []
    x = torch.randn(B, F_IN)
    assert torch.equal(plain.eval()(x), again.eval()(x))
    resumed = Classifies(mlp(*WIDTHS))
    with pytest.raises(CheckpointError, match="compile the same parts before the checkpoint is loaded"):
        fit(resumed, tmp_path, *way.entries(), epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not all_seeds(resumed)


@pytest.mark.parametrize("stage", ["training", "blending", "fossilized"])
@pytest.mark.parametrize("order", ["attach, then compile", "compile, then attach"])
def test_attach_before_or_after_compile_gives_the_plain_models_outputs_and_gradients(
    order: str, stage: str
) -> None:
    model, x = mlp(*WIDTHS), torch.randn(B, F_IN)
    backend = Counting()
    if order.startswith("compile"):
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        compiled(x)
        body = esper.attach(model, x)
    else:
        body = esper.attach(model, x)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
    for site, blueprint in (("bypass:0->2", "widen"), ("parallel:2", "lowrank"), ("bypass:0->4", "shortcut")):
        seed = body.germinate(site, blueprint)
        for p in seed.branch.parameters():
            nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
        while seed.stage != stage:
            seed.advance()

    def outcome(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        y = run(x)
        y.square().sum().backward()
        return [y.detach(), *(torch.zeros(1) if p.grad is None else p.grad for p in model.parameters())]

    before = backend.runs
    for a, b in zip(outcome(compiled), outcome(model), strict=True):
        assert torch.equal(a, b)
    assert backend.runs == before + 1


@pytest.mark.skipif(
    shutil.which("g++") is None or not os.environ.get("ESPER_TEST_INDUCTOR"),
    reason="inductor needs a C++ compiler, and a minute: set ESPER_TEST_INDUCTOR=1",
)
def test_inductor_runs_a_grown_model() -> None:
    model, x = mlp(4), torch.randn(B, F_IN)
    body = esper.attach(model, x)
    compiled = torch.compile(model)
    seed = body.germinate("bypass:0->2", "widen", 2)
    nn.init.ones_(next(iter(seed.branch.parameters())))
    seed.advance()
    seed.advance()
    torch.testing.assert_close(compiled(x), model(x))


def test_a_copied_block_of_gpt2_is_compiled_without_a_break() -> None:
    case = host("gpt2")
    net, example, backend = case.net(case.build()), case.example(), Counting()
    seed = esper.attach(net, example).germinate("stack:transformer.h.0", "stack")
    while seed.stage != "blending":
        seed.advance()
    for p in seed.branch.parameters():
        nn.init.normal_(p, std=0.02)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    assert torch.equal(compiled(**example).logits, net(**example).logits)
    assert backend.graphs == backend.runs == 1


def test_a_watched_layer_is_not_compiled_anew_afterwards() -> None:
    model, x, backend = mlp(*WIDTHS), torch.randn(B, F_IN), Counting()
    body = esper.attach(model, x)
    compiled = torch.compile(model, backend=backend)
    compiled(x).sum().backward()
    probes = ProbeRunner(body)
    probes.begin()
    compiled(x).sum().backward()
    probes.note_gradients()
    signals = probes.end(step=1, epoch=0)
    compiled(x).sum().backward()
    assert len(signals) == 3
    assert (backend.graphs, backend.runs) == (1, 2)


def test_a_block_whose_forward_was_compiled_on_the_instance_is_refused_and_its_layers_are_not(
    tmp_path: Path,
) -> None:
    module = Classifies(mlp(*WIDTHS))
    layer = module.net[2]  # type: ignore[index]
    layer.forward = torch.compile(layer.forward, backend="eager")
    callback = fit(module, tmp_path, (0.3, "bypass:net.0->net.4", "shortcut", 3))
    assert "a forward that was put on the instance" in callback.body.refused["net.2"]
    assert "module.compile()" in callback.body.refused["net.2"]
    assert not [site for site in callback.body.sites if "net.2" in (site.source, site.target)]
    assert len(all_seeds(module)) == 1


def test_the_stance_that_the_user_chose_is_put_back(tmp_path: Path) -> None:
    backend = Counting()
    module = Classifies(mlp(*WIDTHS))
    module.net.compile(backend=backend)
    with torch.compiler.set_stance("force_eager"):
        fit(module, tmp_path, (0.3, "bypass:net.0->net.2", "widen", 4))
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert backend.graphs == 0
