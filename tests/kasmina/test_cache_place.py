"""A stacked block keeps its keys and values apart from those of the block that it copies."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import UnsupportedError
from esper.kasmina.cache_place import cache_among, first_free_number, own_place


class Layer:
    """What one block remembers: the sum of what it was given so far."""

    def __init__(self, decay: float) -> None:
        self.decay, self.total = decay, 0.0

    def add(self, x: Tensor) -> Tensor:
        self.total = self.decay * self.total + x
        return self.total


class Secretive(Layer):
    """Keeps its setting under another name, so that no second one can be made from the first."""

    def __init__(self, rate: float) -> None:
        super().__init__(rate)


class Cache:
    """As transformers has them: a fixed list of layers, or one that grows when it is written to."""

    def __init__(self, count: int, kind: type[Layer] = Layer) -> None:
        self.layers = [kind(0.5) for _ in range(count)]
        self.layer_class_to_replicate = kind if count == 0 else None

    def update(self, x: Tensor, number: int) -> Tensor:
        while self.layer_class_to_replicate is not None and len(self.layers) <= number:
            self.layers.append(self.layer_class_to_replicate(0.5))
        return self.layers[number].add(x)


class Both:
    """The cache of an encoder-decoder."""

    def __init__(self) -> None:
        self.self_attention_cache, self.cross_attention_cache = Cache(2), Cache(2)

    def update(self, x: Tensor, number: int) -> Tensor:
        return self.self_attention_cache.update(x, number) + self.cross_attention_cache.update(x, number)


class Block(nn.Module):
    """Adds what it remembers of its input."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        h = torch.tanh(self.inner(x))
        return x + self.outer(h if cache is None else cache.update(h, self.layer_idx))


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(number) for number in range(2))
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, cache)
        return self.out(x)


def grown() -> tuple[Host, Host]:
    """A host with a stacked block behind its first, and the three blocks as a host of their own."""
    model = Host()
    seed = esper.attach(model, torch.randn(2, 4)).germinate("stack:blocks.0", "stack")
    with torch.no_grad():
        for parameter in seed.branch.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain = Host()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "esper" not in k})
    plain.blocks.insert(1, deepcopy(seed.branch))
    for number, block in enumerate(plain.blocks):
        block.layer_idx = number
    seed.enter("fossilized", 1.0)
    return model.eval(), plain.eval()


@pytest.mark.parametrize("make", [lambda n: Cache(n), lambda n: Cache(0), lambda n: Both()])
def test_a_stacked_block_has_its_own_place_in_the_cache(make: Any) -> None:
    model, plain = grown()
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(2))
    cache, other = make(2), make(3)
    if isinstance(other, Both):
        other.self_attention_cache, other.cross_attention_cache = Cache(3), Cache(3)
    with torch.no_grad():
        for step in x:  # the second and third step read what the first one left
            torch.testing.assert_close(model(step, cache), plain(step, other))
            cache = deepcopy(cache)  # as assisted decoding does
    assert [block.layer_idx for block in model.blocks] == [0, 1]  # and nothing keeps the borrowed number


def test_an_isolated_copy_leaves_the_hosts_cache_alone() -> None:
    model = Host()
    seed = esper.attach(model, torch.randn(2, 4)).germinate("stack:blocks.0", "stack")
    seed.enter("training", 0.0)
    x = torch.randn(2, 4, requires_grad=True)
    cache, alone = Cache(2), Cache(2)
    model(x, cache)
    Host()(x, alone)
    for mine, other in zip(cache.layers[:2], alone.layers, strict=True):
        assert torch.equal(mine.total, other.total)


def test_two_copies_of_one_block_have_two_places() -> None:
    model = Host()
    body = esper.attach(model, torch.randn(2, 4))
    for _ in range(2):
        body.germinate("stack:blocks.0", "stack").enter("fossilized", 1.0)
    cache = Cache(2)
    model(torch.randn(2, 4), cache)
    assert len(cache.layers) == 4
    assert len({id(layer) for layer in cache.layers}) == 4


def test_a_cache_whose_layers_hide_their_settings_is_refused() -> None:
    with (
        pytest.raises(UnsupportedError, match=r"Secretive does not keep the setting 'rate'.*use_cache=False"),
        own_place(Cache(1, Secretive), Block(0), "s1", 1),
    ):
        pass


def test_what_is_no_cache_is_none() -> None:
    assert cache_among((torch.zeros(2), None, (1,)), {"flag": True, "model": nn.Linear(2, 2)}) is None
    cache = Cache(1)
    assert cache_among((None,), {"past_key_values": cache}) is cache
    assert first_free_number(nn.Linear(2, 2)) == 0
    with own_place(cache, nn.Linear(2, 2), "s1", 0):  # a block without a number asks for no place
        pass
    assert len(cache.layers) == 1
