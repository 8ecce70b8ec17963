"""An export computes what the grown model computes, in plain torch, or is refused."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from places import PLACES, Place
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.nn import functional as F

import esper
from esper.errors import ExportError, MissingExtraError
from esper.hosts import CNN, GPT, MLP, CNNConfig, GPTConfig, MLPConfig
from esper.kasmina.body import Body, attach
from esper.kasmina.example import kept_example
from esper.kasmina.export import export, export_with_report, save
from esper.kasmina.export.verify import difference, outputs_of, tolerance
from esper.kasmina.layer import SeedLayer, primary
from esper.kasmina.seed import Seed
from esper.kasmina.structure import all_seeds

ROOT = Path(__file__).parents[2]


def perturb(seed: Seed, stage: str = "fossilized", alpha: float = 1.0) -> None:
    """Give a seed weights that matter, and a stage."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    seed.enter(stage, alpha)  # type: ignore[arg-type]


def grown(model: nn.Module, x: Tensor, seeds: Sequence[tuple[str, str]]) -> Body:
    body = attach(model, x)
    for site, blueprint in seeds:
        perturb(body.germinate(site, blueprint, 3 if blueprint != "stack" else 1))
    return body


def evaluate(model: nn.Module, x: Tensor) -> Tensor:
    """What the model returns in evaluation, leaving its mode."""
    copy = deepcopy(model).eval()
    with torch.no_grad():
        return primary(copy(x))


def assert_plain(model: nn.Module) -> None:
    for module in model.modules():
        assert not type(module).__module__.startswith("esper"), type(module)
        assert not isinstance(module, SeedLayer)
        assert not any("esper" in str(hook) for hook in module._load_state_dict_pre_hooks.values())


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP(MLPConfig(in_features=6, hidden=(5, 4, 7), num_classes=3))


def cnn(norm: str = "none") -> CNN:
    torch.manual_seed(0)
    model = CNN(CNNConfig(widths=(8, 4, 8), norm=norm))  # type: ignore[arg-type]
    model(images(16))  # batch norm gets statistics that are not the identity
    return model


def gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    config = {"vocab_size": 11, "context": 8, "d_model": 16, "depth": 2, "num_heads": 2} | changes
    return GPT(GPTConfig(**config))  # type: ignore[arg-type]


def vectors(size: int = 4) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(1))


def images(size: int = 3) -> Tensor:
    return torch.randn(size, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def tokens(size: int = 3) -> Tensor:
    return torch.randint(11, (size, 8), generator=torch.Generator().manual_seed(1))


class Plain(nn.Module):
    """A host of a user: its class has nothing to do with esper."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Watched(Plain):
    """Reads the units of fc1 elsewhere as well, so that fc1 cannot become wider."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        return self.fc3(torch.relu(self.fc2(h))) + h.mean(dim=-1, keepdim=True)


class Branching(Plain):
    """Control flow on values: no symbolic trace and no program can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.fc1(x))
        if float(h.detach().sum()) > 4:
            h = 2 * h
        return self.fc3(torch.relu(self.fc2(h)))


class Peculiar(Plain):
    """Python that torch.fx cannot trace, but torch.export can."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([*torch.unbind(x[:, None], dim=1)], dim=1))


class Indexed(nn.Module):
    """Reaches its blocks by number: one more would not run where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(2))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks[1](self.blocks[0](x)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.relu(self.inner(self.norm(x))))


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_every_blueprint_exports_with_equal_outputs(place: Place) -> None:
    model = place.model()
    seed = place.plant(model)
    perturb(seed)
    x = place.batch()
    plain, report = export_with_report(model, x)
    expected = evaluate(model, x)
    assert report.max_difference is not None
    assert report.max_difference <= 1e-5 * max(1.0, float(expected.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(primary(plain(x)), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, evaluate(place.model(), x), atol=1e-4)  # the seed counted
    assert (report.folded, report.branches) in ((("s1",), ()), ((), ("s1",)))


CONV = ("bypass:layers.0->layers.1", "conv_widen")
WIDEN = [("bypass:layers.0->layers.1", "widen"), ("bypass:layers.1->layers.2", "widen")]


@pytest.mark.parametrize(
    ("make", "x", "seeds", "folded"),
    [
        (mlp, vectors(), [*WIDEN, ("parallel:layers.1", "lowrank")], "s3 s1 s2"),
        (mlp, vectors(), [("bypass:layers.1->layers.2", "widen")] * 2, "s1 s2"),
        (mlp, vectors(), [*WIDEN, ("bypass:layers.0->head", "shortcut")], "s1 s2"),
        # a branch that reads or writes a layer keeps it as wide as it is, and its neighbour too
        (mlp, vectors(), [*WIDEN, ("parallel:layers.1", "bottleneck")], ""),
        (mlp, vectors(), [("parallel:layers.1", "norm"), WIDEN[0]], ""),
        (mlp, vectors(), [WIDEN[0], ("parallel:layers.1", "norm")], "s1"),
        (
            cnn,
            images(),
            [("bypass:layers.0->layers.1", "conv_widen"), ("parallel:layers.1", "depthwise")],
            "",
        ),
        (cnn, images(), [("bypass:layers.0->layers.1", "conv_widen")], "s1"),
        (lambda: cnn("batch"), images(), [("bypass:layers.0->layers.1", "conv_widen")], "s1"),
        (lambda: cnn("group"), images(), [("bypass:layers.0->layers.1", "conv_widen")], ""),
        (gpt, tokens(), [("stack:blocks.0", "stack"), ("parallel:blocks.1.attn.qkv", "lowrank")], "s2 s1"),
        (gpt, tokens(), [("stack:blocks.0", "stack"), ("stack:blocks.0", "stack")], "s2 s1"),
        (gpt, tokens(), [("bypass:blocks.0.mlp.fc->blocks.0.mlp.proj", "widen")], "s1"),
        (gpt, tokens(), [("parallel:blocks.0.mlp.fc", "attention"), ("stack:blocks.0", "stack")], "s2"),
        (lambda: gpt(tied=True), tokens(), [("parallel:head", "lowrank")], ""),
    ],
)
def test_what_folds_and_what_stays_a_branch(make, x, seeds, folded) -> None:  # type: ignore[no-untyped-def]
    model = make()
    grown(model, x, seeds)
    plain, report = export_with_report(model)  # the example is the one that attach kept
    assert " ".join(report.folded) == folded, str(report)
    assert {*report.folded, *report.branches} == {f"s{n + 1}" for n in range(len(seeds))}
    torch.testing.assert_close(evaluate(plain, x), evaluate(model, x), rtol=1e-5, atol=1e-5)
    assert_plain(plain)


def test_widening_makes_really_wider_layers_of_a_users_own_class() -> None:
    model = Plain()
    grown(model, vectors(), [("bypass:fc1->fc2", "widen"), ("bypass:fc2->fc3", "widen")])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, report = export_with_report(model)
    assert report.route == "modules"
    assert type(plain) is Plain
    assert [plain.get_submodule(n).weight.shape for n in ("fc1", "fc2", "fc3")] == [(8, 6), (7, 8), (3, 7)]
    assert (plain.fc2.in_features, plain.fc2.out_features) == (8, 7)
    assert "s1, s2" in str(report)
    assert list(plain.state_dict()) == [
        "fc1.weight",
        "fc1.bias",
        "fc2.weight",
        "fc2.bias",
        "fc3.weight",
        "fc3.bias",
    ]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # untouched


def test_an_exported_mlp_is_the_wider_mlp_state_dict_and_all() -> None:
    model = mlp()
    grown(model, vectors(), WIDEN)
    wider = MLP(MLPConfig(in_features=6, hidden=(8, 7, 7), num_classes=3))
    wider.load_state_dict(export(model).state_dict())
    torch.testing.assert_close(evaluate(wider, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


def test_new_units_have_a_bias_where_the_hosts_have_one() -> None:
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    grown(model, vectors(), [("bypass:0->2", "widen")])
    assert export(model).state_dict().keys() == {"0.weight", "2.weight"}


def test_layers_without_bias_get_one_when_the_new_units_have_one() -> None:
    # The norm shifts the host's units, and not the new ones: these have a bias of their own.
    model = nn.Sequential(
        nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3, bias=False)
    )
    grown(model, vectors(), [("bypass:0->3", "widen")])
    plain = export(model)
    assert plain[0].bias is not None
    assert plain[3].bias is None


def test_without_an_example_a_symbolic_trace_proves_the_chain() -> None:
    model = Plain()
    body = grown(model, vectors(), [("bypass:fc1->fc2", "widen")])
    del body
    model.__dict__.pop("_esper_example")
    plain, report = export_with_report(model)
    assert (report.folded, report.max_difference) == (("s1",), None)
    torch.testing.assert_close(evaluate(plain, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_example", [True, False])
def test_units_that_something_else_reads_are_not_folded(with_example: bool) -> None:
    model = Watched()
    grown(model, vectors(), [("bypass:fc1->fc2", "widen")])
    if not with_example:
        model.__dict__.pop("_esper_example")
    plain, report = export_with_report(model)
    assert (report.folded, report.branches, report.route) == ((), ("s1",), "graph")
    torch.testing.assert_close(evaluate(plain, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


def test_a_fold_that_does_not_hold_is_undone() -> None:
    model = Indexed()
    grown(model, vectors(), [("stack:blocks.0", "stack")])
    plain, report = export_with_report(model)
    assert (report.folded, report.branches) == ((), ("s1",))
    assert "calls the inserted block 1 times" not in str(report)
    assert "not folded" in str(report)
    assert isinstance(plain.blocks[0], nn.Sequential)  # the block and its copy, where the block stood
    torch.testing.assert_close(evaluate(plain, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


def test_control_flow_stays_where_branches_stand_at_their_layers() -> None:
    model = Branching()
    grown(model, vectors(), [("parallel:fc1", "bottleneck"), ("parallel:fc1", "norm")])
    plain, report = export_with_report(model)
    assert report.route == "modules"
    assert isinstance(plain, Branching)
    assert isinstance(plain.fc1, fx.GraphModule)
    for sign in (1.0, -3.0):
        torch.testing.assert_close(
            evaluate(plain, sign * vectors()), evaluate(model, sign * vectors()), rtol=1e-5, atol=1e-5
        )


def test_what_no_route_can_hold_is_refused_with_all_reasons() -> None:
    model = Branching()
    grown(model, vectors(), [("bypass:fc1->fc3", "shortcut")])
    with pytest.raises(ExportError, match=r"(?s)cannot be exported.*torch.fx cannot.*torch.export cannot"):
        export(model)


def test_a_program_is_the_last_resort() -> None:
    model = Peculiar()
    grown(model, vectors(), [("bypass:fc1->fc3", "shortcut")])
    plain, report = export_with_report(model)
    assert report.route == "program"
    assert "not exported as graph" in str(report)
    for size in (1, 2, 7):  # the batch size is free
        torch.testing.assert_close(plain(vectors(size)), evaluate(model, vectors(size)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "x", "seeds"),
    [
        (mlp, vectors, [*WIDEN, ("bypass:layers.0->head", "shortcut")]),
        (gpt, tokens, [("stack:blocks.0", "stack"), ("parallel:blocks.0.mlp.fc", "attention")]),
    ],
)
def test_a_graph_takes_other_batch_sizes_and_trains(make, x, seeds) -> None:  # type: ignore[no-untyped-def]
    model = make()
    grown(model, x(), seeds)
    plain, report = export_with_report(model)
    assert report.route == "graph"
    for size in (1, 5):
        torch.testing.assert_close(evaluate(plain, x(size)), evaluate(model, x(size)), rtol=1e-5, atol=1e-5)
    plain.train()(x()).square().mean().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_seeds_that_do_not_act_are_left_out_and_blending_ones_come_at_alpha(caplog) -> None:  # type: ignore[no-untyped-def]
    model = Plain()
    body = attach(model, vectors())
    for site, stage, alpha in (
        ("bypass:fc1->fc2", "germinated", 0.0),
        ("parallel:fc3", "training", 0.0),
        ("bypass:fc2->fc3", "blending", 0.3),
        ("parallel:fc1", "holding", 1.0),
    ):
        perturb(body.germinate(site, "widen" if site.startswith("bypass") else "bottleneck"), stage, alpha)
    with caplog.at_level(logging.WARNING):
        plain, report = export_with_report(model)
    assert report.left_out == ("s1", "s2")
    assert (report.folded, report.branches) == (("s3",), ("s4",))
    assert "s3 at bypass:fc2->fc3 is still blending: exported at alpha = 0.3" in caplog.text
    torch.testing.assert_close(evaluate(plain, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


def test_a_blending_block_is_mixed_and_not_inserted() -> None:
    model = gpt()
    body = attach(model, tokens())
    perturb(body.germinate("stack:blocks.0", "stack"), "blending", 0.4)
    plain, report = export_with_report(model)
    assert report.branches == ("s1",)
    torch.testing.assert_close(evaluate(plain, tokens()), evaluate(model, tokens()), rtol=1e-5, atol=1e-5)


def test_a_functional_projection_is_merged_even_when_tied() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model.layers[1].self_attn.out_proj.weight = model.layers[0].self_attn.out_proj.weight
    x = torch.randn(2, 5, 8)
    grown(model, x, [("parallel:layers.0.self_attn.out_proj", "lowrank")])
    plain, report = export_with_report(model)
    assert report.folded == ("s1",)
    assert "now its own" in str(report)
    projections = [plain.layers[n].self_attn.out_proj.weight for n in (0, 1)]
    assert not torch.equal(*projections)
    torch.testing.assert_close(evaluate(plain, x), evaluate(model, x), rtol=1e-5, atol=1e-5)


def test_an_export_runs_where_esper_cannot_be_imported(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['esper'] = None\n"
        "for name in ('mlp', 'gpt', 'cnn'):\n"
        "    plain = torch.load(f'{name}.pickle', weights_only=False)\n"
        "    program = torch.export.load(f'{name}.pt').module()\n"
        "    x, y = torch.load(f'{name}.xy')\n"
        "    assert torch.allclose(plain(x), y, atol=1e-5) and torch.allclose(program(x), y, atol=1e-5), name\n"
    )
    cases = (
        ("mlp", mlp(), vectors(), [*WIDEN, ("parallel:layers.2", "bottleneck")]),
        ("gpt", gpt(), tokens(), [("stack:blocks.1", "stack"), ("parallel:blocks.0.mlp.fc", "attention")]),
        ("cnn", cnn("batch"), images(), [CONV, ("parallel:layers.2", "attention")]),
    )
    for name, model, x, seeds in cases:
        grown(model, x, seeds)
        torch.save(export(model), tmp_path / f"{name}.pickle")  # a file of our own: whole modules need pickle
        save(model, tmp_path / f"{name}.pt", x)
        torch.save((x, evaluate(model, x)), tmp_path / f"{name}.xy")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, check=True)


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.host = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x)


def test_a_lightning_module_exports_without_its_trainer_and_in_part() -> None:
    module = Module()
    grown(
        module, vectors(), [("bypass:host.fc1->host.fc2", "widen"), ("bypass:host.fc1->host.fc3", "shortcut")]
    )
    module._trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = module._trainer
    plain = export(module.host)
    assert module._trainer is trainer
    torch.testing.assert_close(
        evaluate(plain, vectors()), module.eval()(vectors()).detach(), rtol=1e-5, atol=1e-5
    )
    whole, report = export_with_report(module)
    assert isinstance(whole, fx.GraphModule)
    assert report.max_difference is not None
    assert not hasattr(whole, "_trainer")
    module._trainer = None


def test_a_part_whose_seeds_read_from_outside_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 3)))
    grown(model, vectors(), [("bypass:0->2.0", "widen")])
    with pytest.raises(ExportError, match=r"layer '0', which lies outside the module given to export"):
        export(model[2], torch.randn(2, 5))


def test_a_model_without_seeds_exports_too() -> None:
    plain, report = export_with_report(Plain(), vectors())
    assert (report.route, report.folded, report.branches, report.max_difference) == ("modules", (), (), 0.0)
    assert_plain(plain)


def test_what_cannot_be_copied_or_compared_is_refused() -> None:
    model = Plain()
    model.last = model(vectors())  # a tensor with a graph
    with pytest.raises(ExportError, match=r"this Plain cannot be copied \(RuntimeError"):
        export(model)

    class Silent(Plain):
        def forward(self, x: Tensor) -> None:  # type: ignore[override]
            super().forward(x)

    with pytest.raises(ExportError, match="returned no tensor"):
        export(Silent(), vectors())


def test_an_attached_model_keeps_two_samples_until_it_is_detached() -> None:
    model = Plain()
    attach(model, vectors(50))
    kept = kept_example(model)
    assert kept is not None
    assert torch.equal(kept.args[0], vectors(50)[:2])
    assert list(model.state_dict()) == list(Plain().state_dict())
    esper.detach(model)
    assert kept_example(model) is None


@pytest.mark.parametrize("kind", ["dormant", "grown"])
def test_torch_export_and_onnx_take_an_attached_model_as_it_is(kind: str) -> None:
    model = Plain().eval()
    seeds = [("bypass:fc1->fc2", "widen"), ("parallel:fc2", "norm")] if kind == "grown" else []
    grown(model, vectors(), seeds)
    program = torch.export.export(model, (vectors(),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(
        program.module()(vectors(7)), evaluate(model, vectors(7)), rtol=1e-5, atol=1e-5
    )
    onnx = torch.onnx.export(model, (vectors(),), dynamo=True, verbose=False)
    assert onnx is not None
    (y,) = onnx(vectors())
    torch.testing.assert_close(y, evaluate(model, vectors()), rtol=1e-5, atol=1e-5)


FILES = [
    (mlp, vectors, [*WIDEN, ("bypass:layers.0->head", "shortcut")]),
    (gpt, tokens, [("stack:blocks.0", "stack"), ("parallel:blocks.1.mlp.fc", "bottleneck")]),
    (
        lambda: cnn("batch"),
        images,
        [("bypass:layers.0->layers.1", "conv_widen"), ("parallel:layers.2", "norm")],
    ),
]


@pytest.mark.parametrize(("make", "x", "seeds"), FILES, ids=["mlp", "gpt", "cnn"])
def test_a_program_file_reads_back_with_a_free_batch_size(tmp_path: Path, make, x, seeds) -> None:  # type: ignore[no-untyped-def]
    model = make()
    grown(model, x(), seeds)
    save(model, tmp_path / "net.pt")
    with (tmp_path / "net.pt").open("rb") as file:
        program = torch.export.load(file).module()
    for size in (1, 6):
        torch.testing.assert_close(program(x(size)), evaluate(model, x(size)), rtol=1e-5, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


@pytest.mark.parametrize(("make", "x", "seeds"), FILES, ids=["mlp", "gpt", "cnn"])
def test_an_onnx_file_runs_in_onnxruntime(tmp_path: Path, make, x, seeds) -> None:  # type: ignore[no-untyped-def]
    runtime = pytest.importorskip("onnxruntime")
    model = make()
    grown(model, x(), seeds)
    save(model, tmp_path / "net.onnx")
    session = runtime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    for size in (2, 5):
        (y,) = session.run(None, {session.get_inputs()[0].name: x(size).numpy()})
        torch.testing.assert_close(torch.from_numpy(y), evaluate(model, x(size)), rtol=1e-4, atol=1e-5)


def test_a_safetensors_file_holds_weights_and_a_description(tmp_path: Path) -> None:
    model = gpt(tied=True)
    grown(model, tokens(), [("stack:blocks.0", "stack")])
    save(model, tmp_path / "net.safetensors")
    deeper = gpt(tied=True, depth=3)
    tensors = load_file(tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["esper"])
    ((alias, name),) = described["aliases"].items()
    assert {alias, name} == {"head.weight", "tokens.weight"}
    assert described["folded"] == ["s1"]
    assert described["layers"]["blocks.2.mlp.fc"] == "Linear(in_features=16, out_features=64, bias=True)"
    deeper.load_state_dict(tensors | {alias: tensors[name]})
    torch.testing.assert_close(evaluate(deeper, tokens()), evaluate(model, tokens()), rtol=1e-5, atol=1e-5)
    esper.load(gpt(tied=True, depth=3), tmp_path / "net.safetensors")


def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    model = Branching()
    grown(model, vectors(), [])
    for suffix in ("pt", "onnx"):
        (tmp_path / f"net.{suffix}").write_text("before")
        with pytest.raises(ExportError, match=r"torch\.(export|onnx) cannot"):
            save(model, tmp_path / f"net.{suffix}")
        assert (tmp_path / f"net.{suffix}").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 2
    save(model, tmp_path / "net.safetensors")  # weights need no capture


def test_what_save_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ExportError, match=r"suffix should be one of \.pt, \.onnx, \.safetensors, got 'net\.pkl'"
    ):
        save(Plain(), tmp_path / "net.pkl", vectors())
    with pytest.raises(ExportError, match=r"folder of .* does not exist"):
        save(Plain(), tmp_path / "nowhere" / "net.pt", vectors())
    with pytest.raises(ExportError, match="needs an example input"):
        save(Plain(), tmp_path / "net.pt")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'esper\[onnx\]'"):
        save(Plain(), tmp_path / "net.onnx", vectors())
    assert list(tmp_path.iterdir()) == []


def test_difference_and_tolerance() -> None:
    a = torch.tensor([1.0, float("nan"), float("inf")])
    assert difference([a], [a.clone()]) == 0.0
    assert difference([a], [torch.tensor([1.5, float("nan"), float("inf")])]) == 0.5
    for other in ([], [a[:2]], [a.double()], [torch.tensor([1.0, 0.0, float("inf")])]):
        assert difference([a], other) == float("inf")
    assert tolerance([torch.tensor([200.0])]) == pytest.approx(2e-3)
    assert tolerance([torch.tensor([0.1])]) == 1e-5
    assert len(outputs_of(nn.Identity(), esper.kasmina.example.Example.of((vectors(),)))) == 1


def test_the_model_keeps_its_mode_seeds_and_gradients() -> None:
    model = mlp().train()
    grown(model, vectors(), WIDEN)
    model(vectors()).sum().backward()
    grads = [p.grad for p in model.parameters()]
    export(model)
    assert model.training
    assert len(all_seeds(model)) == 2
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


class Counted(nn.Module):
    """Twelve layers, and a count of the runs of all copies."""

    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        Counted.runs += 1
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_many_adapters_cost_as_many_runs_as_two() -> None:
    runs = []
    for count in (2, 12):
        model = Counted()
        grown(model, vectors(), [(f"parallel:layers.{n}", "lowrank") for n in range(count)])
        Counted.runs = 0
        assert len(export_with_report(model)[1].folded) == count
        runs.append(Counted.runs)
    assert runs[0] == runs[1]


class HalfIndexed(Indexed):
    """Runs further blocks in a loop before those that it reaches by number."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.more:
            x = block(x)
        return super().forward(x)


def test_one_fold_that_does_not_hold_leaves_the_others() -> None:
    model = HalfIndexed()
    grown(
        model, vectors(), [("stack:more.0", "stack"), ("stack:blocks.1", "stack"), ("stack:more.1", "stack")]
    )
    plain, report = export_with_report(model)
    assert sorted(report.folded) == ["s1", "s3"]
    assert report.branches == ("s2",)
    assert len(plain.more) == 4
    assert "calls the inserted block 0 times" in str(report)
    torch.testing.assert_close(evaluate(plain, vectors()), evaluate(model, vectors()), rtol=1e-5, atol=1e-5)
