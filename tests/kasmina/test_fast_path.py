"""Seeds inside torch's transformer layers are heard in evaluation, where a fused kernel would pass them by."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import GrowthError
from esper.kasmina.fast_path import fused_layer_around, without_fast_path

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

WIDE = "bypass:encoder.layers.0.linear1->encoder.layers.0.linear2"


class Encoder(nn.Module):
    """Two transformer layers; padding is masked, and averaged out or not."""

    def __init__(self, *, pool: bool = True, pad: bool = True, nested: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)
        self.pool, self.pad = pool, pad

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 3:] = self.pad
        h = self.encoder(x, src_key_padding_mask=padding if self.pad else None)
        if not self.pool:
            return self.head(h)
        kept = (~padding).unsqueeze(-1)
        return self.head((h * kept).sum(1) / kept.sum(1))


def batch() -> Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def calls(model: nn.Module, layer: str, x: Tensor) -> int:
    """How often a layer runs in one evaluation pass, counted by its seeds, which a hook would wake as well."""
    counted = 0
    seed = model.get_submodule(f"{layer}.esper_seeds.s1")
    forward = seed.branch.fan_in.forward

    def count(*args: Tensor) -> Tensor:
        nonlocal counted
        counted += 1
        return forward(*args)

    seed.branch.fan_in.forward = count
    with torch.no_grad():
        model.eval()(x)
    return counted


@pytest.mark.parametrize(("pad", "nested"), [(False, False), (False, True), (True, True), (True, False)])
def test_evaluation_calls_a_seed_inside_a_fused_layer(pad: bool, nested: bool) -> None:
    model, x = Encoder(pad=pad, nested=nested), batch()
    body = esper.attach(model, x)
    with torch.no_grad():
        before = model.eval()(x)
    seed = body.germinate(WIDE, "widen", 4)
    seed.enter("fossilized", 1.0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    nn.init.normal_(seed.branch.fan_out.weight)
    with torch.no_grad():
        felt = model(x)
        assert not torch.allclose(felt, before, atol=1e-3)
        torch.testing.assert_close(copy.deepcopy(model)(x), felt)
        torch.testing.assert_close(model.train()(x), felt, rtol=1e-5, atol=1e-5)
    assert calls(model, "encoder.layers.0.linear2", x) == 1


def test_the_fused_path_is_taken_again_when_the_last_seed_is_gone() -> None:
    model, x = Encoder(), batch()
    body = esper.attach(model, x)
    seeds = [body.germinate(WIDE, "widen", 4) for _ in range(2)]
    assert not model.encoder.use_nested_tensor
    body.cull(seeds[0])
    assert not model.encoder.use_nested_tensor
    body.cull(seeds[1])
    assert model.encoder.use_nested_tensor
    with torch.no_grad():
        model.eval()(x)


def test_a_host_that_reads_what_packing_leaves_behind_is_refused() -> None:
    body = esper.attach(Encoder(pool=False), batch())
    assert not any(site.target.startswith("encoder.layers.0.linear") for site in body.sites)
    with pytest.raises(GrowthError, match="build it with enable_nested_tensor=False"):
        body.germinate(WIDE, "widen")
    assert WIDE in {site.name for site in esper.attach(Encoder(pool=False, nested=False), batch()).sites}


def test_a_seed_is_heard_after_loading() -> None:
    grown, x = Encoder(), batch()
    seed = esper.attach(grown, x).germinate(WIDE, "widen", 4)
    seed.enter("fossilized", 1.0)
    nn.init.normal_(seed.branch.fan_out.weight)
    fresh = Encoder()
    esper.attach(fresh, x)
    fresh.load_state_dict(grown.state_dict())
    with torch.no_grad():
        felt = fresh.eval()(x)
        assert torch.equal(felt, grown.eval()(x))
        torch.testing.assert_close(fresh.train()(x), felt, rtol=1e-5, atol=1e-5)


def test_layers_around() -> None:
    model = Encoder()
    assert fused_layer_around(model, "encoder.layers.1.linear1") is model.encoder.layers[1]
    assert fused_layer_around(model, "encoder.layers.1") is None
    assert fused_layer_around(model, "head") is None
    before = torch.backends.mha.get_fastpath_enabled()
    with without_fast_path():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before
