"""The topology is the data flow of one step, whatever Python did in it, and tracing leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import AttachError
from esper.hosts import CNN, GPT, MLP, CNNConfig, GPTConfig, MLPConfig
from esper.kasmina.body import attach, mean_output
from esper.kasmina.find_sites import find_sites
from esper.kasmina.topology import ModelTopology
from esper.kasmina.trace import trace


def topology_of(model: nn.Module, x: Tensor) -> ModelTopology:
    return trace(model, lambda: mean_output(model(x)))


def edges_of(topology: ModelTopology) -> list[tuple[str, str, tuple[str, ...]]]:
    return sorted((edge.source, edge.target, edge.ops) for edge in topology.edges)


def test_topology_of_the_mlp() -> None:
    model = MLP(MLPConfig(in_features=6, hidden=(5, 4), num_classes=3))
    found = topology_of(model, torch.randn(7, 6))
    assert found.layer_names == ["layers.0", "layers.1", "head"]
    assert edges_of(found) == [("layers.0", "layers.1", ("relu",)), ("layers.1", "head", ("relu",))]
    first, head = found.layer("layers.0"), found.layer("head")
    assert (first.input_shape, first.output_shape, first.num_parameters, first.flops) == ((6,), (5,), 35, 60)
    assert (first.reads_input, first.is_output, head.reads_input, head.is_output) == (
        True,
        False,
        False,
        True,
    )
    assert found.num_parameters == model.num_parameters
    assert (found.transformer, found.positions, found.refused) == (False, 1, {})


def test_topology_of_the_cnn() -> None:
    model = CNN(CNNConfig(widths=(8, 4), strides=(2, 1), norm="group"))
    found = topology_of(model, torch.randn(2, 1, 12, 12))
    assert edges_of(found) == [
        ("layers.0", "norms.0", ()),
        ("layers.1", "norms.1", ()),
        ("norms.0", "layers.1", ("relu",)),
        ("norms.1", "head", found.consumers("norms.1")[0].ops),
    ]
    conv = found.layer("layers.0")
    assert (conv.image, conv.input_shape, conv.output_shape) == (True, (1, 12, 12), (8, 6, 6))
    assert conv.flops == 2 * 8 * 9 * 36
    widen = {site.name: site for site in find_sites(model, found)}["bypass:layers.0->layers.1"]
    assert (widen.ops, widen.through, widen.blueprints) == (("relu",), ("norms.0",), ("conv_widen",))


def test_topology_of_the_gpt() -> None:
    model = GPT(GPTConfig(vocab_size=11, context=8, d_model=16, depth=2, num_heads=2))
    found = topology_of(model, torch.randint(11, (2, 8)))
    assert found.transformer
    assert found.positions == 8
    blocks = [layer for layer in found.layers if layer.output_projections]
    assert [(b.name, b.output_projections) for b in blocks] == [
        ("blocks.0", ("attn.out", "mlp.proj")),
        ("blocks.1", ("attn.out", "mlp.proj")),
    ]
    assert blocks[0].flops == sum(
        layer.flops for layer in found.layers if layer.name.startswith("blocks.0.") and not layer.block
    )
    assert [edge.source for edge in found.producers("blocks.0.mlp.proj")] == ["blocks.0.mlp.fc"]
    names = [site.name for site in find_sites(model, found)]
    assert "stack:blocks.1" in names
    assert "bypass:blocks.0.mlp.fc->blocks.0.mlp.proj" in names


class Winding(nn.Module):
    """Control flow, a skip, a dict of layers, a loop and an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Sequential(nn.Linear(6, 6), nn.GELU())})
        self.tail = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), nn.Linear(6, 3)])

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        h = x
        for name in sorted(self.parts):
            y = self.parts[name](h)
            h = h + y if float(y.detach().abs().max()) > -1.0 else y
        for layer in self.tail:
            h = layer(h) * scale
        return {"logits": h}


def test_control_flow_skips_and_containers() -> None:
    found = topology_of(Winding(), torch.randn(4, 6))
    flow = {(edge.source, edge.target) for edge in found.edges}
    assert flow == {
        ("parts.a", "parts.b.0"), ("parts.a", "tail.0.0"), ("parts.b.0", "tail.0.0"), ("tail.0.0", "tail.1"),
    }  # fmt: skip
    assert [layer.name for layer in found.layers if layer.is_output] == ["tail.1"]
    names = [site.name for site in find_sites(Winding(), found)]
    assert "bypass:parts.a->parts.b.0" not in names  # its input is not parts.a's units alone


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.unused, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(torch.relu(self.shared(x)))
        return self.out(F.linear(x, self.unused.weight))


def test_a_layer_that_runs_twice_or_never_is_refused_with_the_reason() -> None:
    body = attach(Twice(), torch.randn(4, 6))
    assert body.refused["shared"].startswith("called 2 times in one forward pass")
    assert body.refused["unused"].startswith("never called as a module in training")
    assert not any("shared" in site.name or "unused" in site.name for site in body.sites)
    assert any(site.name == "parallel:out" for site in body.sites)


def test_parametrised_layers_and_containers_are_refused_and_lazy_ones_are_not() -> None:
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)),
        nn.Sequential(nn.Linear(5, 4), nn.ReLU()),
        nn.Linear(4, 3),
    )
    body = attach(model, torch.randn(4, 6))
    assert body.refused["0"].startswith("parametrised")
    assert body.refused["1"].startswith("an nn.Sequential iterates over its children")
    lazy = nn.Sequential(nn.LazyLinear(5), nn.Linear(5, 3))
    body = attach(lazy, torch.randn(4, 6))
    assert [site.name for site in body.sites if site.kind == "parallel"] == ["parallel:0", "parallel:1"]


def test_a_projection_that_is_never_called_is_a_functional_site() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    x = torch.randn(3, 5, 8)
    body = attach(model, x)
    assert [site.name for site in body.sites if site.functional] == ["parallel:layers.0.self_attn.out_proj"]
    seed = body.germinate("parallel:layers.0.self_attn.out_proj", "lowrank", 2)
    with torch.no_grad():
        before = model.eval()(x)
        seed.branch.B.weight.normal_()
        assert torch.equal(model(x), before)
        seed.enter("holding", 1.0)
        felt = model(x)
        assert not torch.allclose(felt, before)  # in evaluation, through the fast path
        torch.testing.assert_close(model.train()(x), felt, rtol=1e-5, atol=1e-5)  # and without it


def test_a_frozen_host_is_traced_too() -> None:
    model = MLP(MLPConfig(in_features=6, hidden=(5, 4), num_classes=3)).requires_grad_(False)
    found = topology_of(model, torch.randn(7, 6))
    assert edges_of(found) == [("layers.0", "layers.1", ("relu",)), ("layers.1", "head", ("relu",))]


def test_tracing_leaves_buffers_modes_gradients_and_random_state_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)
    )
    model.eval()
    model[0].train()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    topology_of(model, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_go_when_the_step_fails() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        topology_of(model, torch.randn(2, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_without_a_graph_is_refused() -> None:
    model = nn.Linear(6, 3)
    with pytest.raises(AttachError, match="the loss has no grad_fn"):
        trace(model, lambda: model(torch.randn(2, 6)).detach().mean())
    with pytest.raises(AttachError, match="without any float tensor"):
        attach(nn.Sequential(nn.Identity()), torch.ones(2, dtype=torch.int64))


def test_inputs_by_keyword_and_tuples_of_outputs() -> None:
    class Keyworded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc, self.out = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor) -> Tensor:
            h, _ = self.lstm(x)
            return self.out(torch.tanh(self.fc(input=h)))

    model = Keyworded()
    body = attach(model, {"x": torch.randn(2, 5, 6)})
    flow = {(edge.source, edge.target) for edge in body.topology.edges}
    assert flow == {("lstm", "fc"), ("fc", "out")}
    assert any(site.name == "bypass:fc->out" and site.ops == ("tanh",) for site in body.sites)
