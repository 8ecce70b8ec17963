"""Every layer at which nothing can grow says why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.errors import GrowthError

MASK = torch.ones(1)


class Block(nn.Module):
    """``x + down(relu(up(x)))``, with a table of its own or without."""

    def __init__(self, *, table: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.table = nn.Embedding(2, 4) if table else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shift = self.table(torch.zeros((), dtype=torch.long)) if self.table is not None else 0.0
        return x + self.down(torch.relu(self.up(x + shift)))


class Wide(Block):
    """Another kind of block."""


class Host(nn.Module):
    def __init__(self, *blocks: nn.Module, mask: Tensor | None = MASK) -> None:
        super().__init__()
        self.mask = mask
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head, self.spare = nn.LayerNorm(4), nn.Linear(4, 3), nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(self.norm(x))


def test_layers_for_which_there_is_no_blueprint_and_layers_that_do_not_run() -> None:
    body = esper.attach(Host(Block(), Block()), torch.randn(5, 4))
    assert body.refused == {
        "norm": "of type nn.LayerNorm, for which there is no blueprint",
        "spare": "never called as a module in training: its parameters are used elsewhere, or not at all",
    }
    with pytest.raises(GrowthError, match=r"layer 'norm' was refused, because it is of type nn.LayerNorm"):
        body.germinate("parallel:norm", "norm")
    assert [s.name for s in body.sites if s.kind == "stack"] == ["stack:blocks.0", "stack:blocks.1"]


def test_a_block_that_holds_more_than_its_neighbours_is_not_copied() -> None:
    body = esper.attach(Host(Block(table=True), Block(), Block()), torch.randn(5, 4))
    assert [s.name for s in body.sites if s.kind == "stack"] == ["stack:blocks.1", "stack:blocks.2"]
    assert "it alone holds table.weight" in body.refused["blocks.0"]
    alike = esper.attach(Host(Block(table=True), Block(table=True)), torch.randn(5, 4))
    assert len([s for s in alike.sites if s.kind == "stack"]) == 2


def test_different_layers_in_one_list_are_not_copied() -> None:
    body = esper.attach(Host(Block(), Wide()), torch.randn(5, 4))
    assert not any(s.kind == "stack" for s in body.sites)
    assert "one of several different layers in the list 'blocks'" in body.refused["blocks.1"]
    plain = esper.attach(Host(Block(table=True), Wide(), mask=None), torch.randn(5, 4))
    assert (
        len([s for s in plain.sites if s.kind == "stack"]) == 2
    )  # one value in, one out: nothing to hand on
