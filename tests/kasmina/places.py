"""One host and site for each kind of place that a built-in blueprint grows at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.hosts.gpt import Block, GPTConfig
from esper.kasmina.blueprints import get_blueprint
from esper.kasmina.layer import primary
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sites import BuildContext, Site, SiteKind, site_name
from esper.kasmina.structure import plant


class MLP(nn.Module):
    """fc1, relu, fc2, relu, fc3 on [B, 6] or [B, T, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class CNN(nn.Module):
    """Two strided convolutions with batch norm and pooling on [B, 2, 16, 16], and a dense output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular")
        self.conv3 = nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2)
        self.out = nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        x = self.conv2(F.max_pool2d(F.gelu(self.norm(self.conv1(x))), 2))
        return self.conv3(F.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.features(x)).mean(dim=(2, 3)))


class ConvHost(CNN):
    """The convolutions alone: the last one is the output layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.out

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class Tokens(nn.Module):
    """A sequence in, one vector out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embed(x)).mean(dim=1))


class Attention(nn.Module):
    """torch's own attention, whose ``out_proj`` is used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class Residual(nn.Module):
    """A pre-norm residual block of dense layers or convolutions; a seedless nested pair of children."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4) if conv else nn.LayerNorm(8)
        self.inner = nn.Conv2d(4, 4, 3, padding=1) if conv else nn.Linear(8, 12)
        self.outer = nn.Conv2d(4, 4, 1) if conv else nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.gelu(self.inner(self.norm(x))))


class Blocks(nn.Module):
    """``in_``, one block, ``out``."""

    def __init__(self, in_: nn.Module, block: nn.Module, out: nn.Module) -> None:
        super().__init__()
        self.in_, self.block, self.out = in_, block, out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(self.in_(x)))


def gpt_block(dropout: float = 0.0) -> Blocks:
    config = GPTConfig(d_model=8, num_heads=2, mlp_ratio=2.0, dropout=dropout)
    return Blocks(nn.Linear(6, 8), Block(config), nn.Linear(8, 3))


def torch_block() -> Blocks:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=True, batch_first=True)
    return Blocks(nn.Linear(6, 8), layer, nn.Linear(8, 3))


def dense_block() -> Blocks:
    return Blocks(nn.Linear(6, 8), Residual(conv=False), nn.Linear(8, 3))


def conv_block() -> Blocks:
    return Blocks(nn.Conv2d(2, 4, 3), Residual(conv=True), nn.Conv2d(4, 2, 1))


VECTOR, SEQUENCE, IMAGE = (6,), (5, 6), (2, 16, 16)


@dataclass(frozen=True)
class Place:
    """A blueprint, a host and where in it."""

    blueprint: str
    host: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: SiteKind
    source: str
    target: str
    ops: tuple[str, ...] = ()
    through: tuple[str, ...] = ()
    long: bool = False
    functional: bool = False
    projections: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.blueprint}-{self.host.__name__}-{self.source}-{self.target}-{len(self.shape)}d"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.host().train()

    def batch(self, size: int = 4) -> Tensor:
        return torch.randn(size, *self.shape, generator=torch.Generator().manual_seed(1))

    def context(self, model: nn.Module) -> BuildContext:
        source, target = model.get_submodule(self.source), model.get_submodule(self.target)
        shapes: dict[str, tuple[int, ...]] = {}
        if self.functional:
            shapes = {"in": (self.shape[0], 8), "out": (self.shape[0], 8)}
        handles = [
            source.register_forward_pre_hook(lambda m, a: shapes.update({"in": tuple(a[0].shape[1:])})),
            target.register_forward_hook(lambda m, a, y: shapes.update({"out": tuple(primary(y).shape[1:])})),
        ]
        mode = model.training
        with torch.no_grad():
            model.eval()(self.batch())
        model.train(mode)
        for handle in handles:
            handle.remove()
        site = Site(
            name=site_name(self.kind, self.source, self.target),
            kind=self.kind,
            source=self.source,
            target=self.target,
            source_shape=shapes["in"],
            target_shape=shapes["out"],
            ops=self.ops,
            through=self.through,
            long=self.long,
            functional=self.functional,
            image=isinstance(target, nn.Conv2d),
        )
        return BuildContext(site, source, target, self.projections)

    def size(self, context: BuildContext) -> int:
        return get_blueprint(self.blueprint).default_size(context)

    def plant(self, model: nn.Module, *, seed_id: str = "s1", size: int | None = None) -> Seed:
        context = self.context(model)
        state = SeedState(
            seed_id=seed_id,
            site=context.site,
            blueprint=self.blueprint,
            size=self.size(context) if size is None else size,
            output_projections=self.projections,
        )
        return plant(model, state, init_seed=7)


POOL = "max_pool2d:2x2:2x2:0x0:1x1:0"
PLACES = [
    Place("widen", MLP, VECTOR, "bypass", "fc1", "fc2", ops=("relu", "dropout")),
    Place("widen", MLP, SEQUENCE, "bypass", "fc1", "fc2", ops=("relu",)),
    Place("bottleneck", MLP, VECTOR, "parallel", "fc2", "fc2"),
    Place("bottleneck", MLP, SEQUENCE, "parallel", "fc2", "fc2"),
    Place("lowrank", MLP, VECTOR, "parallel", "fc2", "fc2"),
    Place("lowrank", Attention, (5, 8), "parallel", "attn.out_proj", "attn.out_proj", functional=True),
    Place("conv_widen", CNN, IMAGE, "bypass", "conv1", "conv2", ops=("gelu", POOL), through=("norm",)),
    Place("conv_widen", CNN, IMAGE, "bypass", "conv2", "conv3", ops=("relu",)),
    Place("depthwise", CNN, IMAGE, "parallel", "conv1", "conv1"),
    Place("depthwise", CNN, IMAGE, "parallel", "conv2", "conv2"),
    Place("shortcut", MLP, VECTOR, "bypass", "fc1", "fc3", ops=("long",), long=True),
    Place("shortcut", MLP, SEQUENCE, "bypass", "fc1", "fc3", ops=("long",), long=True),
    Place("shortcut", CNN, IMAGE, "bypass", "conv1", "out", ops=("long",), long=True),
    Place("shortcut", ConvHost, IMAGE, "bypass", "conv1", "conv3", ops=("long",), long=True),
    Place("shortcut", Tokens, SEQUENCE, "bypass", "embed", "out", ops=("long",), long=True),
    Place("attention", CNN, IMAGE, "parallel", "conv2", "conv2"),
    Place("attention", MLP, SEQUENCE, "parallel", "fc2", "fc2"),
    Place("norm", MLP, VECTOR, "parallel", "fc2", "fc2"),
    Place("norm", MLP, SEQUENCE, "parallel", "fc2", "fc2"),
    Place("norm", CNN, IMAGE, "parallel", "conv2", "conv2"),
    Place("stack", gpt_block, SEQUENCE, "stack", "block", "block", projections=("attn.out", "mlp.proj")),
    Place("stack", torch_block, SEQUENCE, "stack", "block", "block", projections=("linear2", "self_attn")),
    Place("stack", dense_block, VECTOR, "stack", "block", "block", projections=("outer",)),
    Place("stack", conv_block, IMAGE, "stack", "block", "block", projections=("outer",)),
]


def place(blueprint: str, host: str = "", dims: int = 0) -> Place:
    """The first place of that blueprint, host and number of input dimensions."""
    return next(
        p
        for p in PLACES
        if p.blueprint == blueprint and host in ("", p.host.__name__) and dims in (0, len(p.shape))
    )
