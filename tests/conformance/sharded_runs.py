"""What each of two processes does in the tests of growth under FSDP2; :mod:`launching` starts them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from runs import QUICK, Script, assert_registered, fit, growing, mlp, trainer
from runs import test as test_on_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from esper.callbacks import TamiyoCallback
from esper.callbacks.sharding import check_sharded
from esper.hosts import ClassifierModule, DigitsData, MLPConfig, OptimConfig
from esper.kasmina.body import attach
from esper.kasmina.renewal import recycle_layer
from esper.kasmina.sharded import is_sharded, own_part, put_at_rest, whole
from esper.kasmina.step_guard import StepGuard
from esper.kasmina.structure import all_seeds
from esper.tamiyo.snapshot import capture, restore

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
EVENTS = ((0.1, WIDE, "widen", 6), (0.25, LONG, "shortcut", 4), (0.4, RANK, "lowrank", 2))
OPTIONS = {"epochs": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
BORN = 1
"""Optimizer step after which the first seed is born, and has not been stepped."""
STEPS = (BORN, 6)


class Sharded(ClassifierModule):
    """Shards each hidden layer, and what is left of the host, in the place where Lightning's users do."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(MLPConfig(hidden=(16, 4, 12)), OptimConfig())

    def configure_model(self) -> None:
        if not is_sharded(self):
            mesh = self.device_mesh["data_parallel"]
            for layer in self.host.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.host, mesh=mesh)


def strategy(**options: Any) -> ModelParallelStrategy:
    given: dict[str, Any] = {
        "data_parallel_size": 2,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,
    }
    return ModelParallelStrategy(**(given | options))


def train(
    folder: Path,
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    sharded: bool = True,
    checkpoint: Path | None = None,
    options: Mapping[str, Any] = OPTIONS,
    **settings: Any,
) -> tuple[TamiyoCallback, L.LightningModule, L.Trainer]:
    callback = growing(folder, *EVENTS, **({"sharded": "experimental"} if sharded else {}), **settings)
    module = module or (Sharded() if sharded else mlp())
    runner = trainer(
        folder, callback, *callbacks, strategy=strategy() if sharded else "ddp", devices=2,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip
    fit(runner, module, DigitsData(batch_size=32), ckpt_path=checkpoint)
    put_at_rest(module)
    assert_registered(runner, module)
    return callback, module, runner


def found(callback: TamiyoCallback, module: L.LightningModule, runner: L.Trainer) -> dict[str, Any]:
    """What two runs have to have alike after training."""
    (optimizer,) = runner.optimizers
    names = {id(p): name for name, p in module.named_parameters()}
    return {
        "weights": values(module),
        "moments": {
            names[id(p)]: {key: whole(value).clone() for key, value in state.items()}
            for p, state in optimizer.state.items()
        },
        "stages": {seed.seed_id: seed.stage for seed in all_seeds(module)},
        "summary": dict(callback.summary()),
    }


def values(module: nn.Module) -> dict[str, Tensor]:
    """The whole weights, on every process."""
    put_at_rest(module)
    return {name: whole(value.detach()).clone() for name, value in module.state_dict().items()}


def grown(rank: int, folder: Path) -> dict[str, Any]:
    """Three seeds, with accumulated gradients and clipping; taken up again; and the same under DDP."""
    saver = ModelCheckpoint(folder / "whole", "{step}", save_top_k=-1, every_n_train_steps=1)
    run = train(folder / "whole", saver)
    parts = {name: own_part(p).numel() for name, p in run[1].named_parameters()}
    resumed = {
        f"from{step}": found(
            *train(folder / f"from{step}", checkpoint=folder / "whole" / f"step={step}.ckpt")
        )
        for step in STEPS
    }
    return {
        "whole": found(*run),
        "parts": parts,
        **resumed,
        "ddp": found(*train(folder / "ddp", sharded=False)),
        "not_regrown": _error(lambda: _test(folder, folder / "whole" / "step=6.ckpt")),
    }


def _test(folder: Path, checkpoint: Path) -> None:
    callback = growing(folder / "test", *EVENTS, sharded="experimental")
    runner = trainer(folder / "test", callback, strategy=strategy(), devices=2)
    test_on_digits(runner, Sharded(), checkpoint)


def undone(rank: int, folder: Path) -> dict[str, Any]:
    """A NaN loss on rank 1 alone has the newest seed culled; then everything is taken back to a snapshot."""
    module = Sharded()
    inner = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        loss = inner(batch, batch_idx)
        wrong = module.training and rank == 1 and module.trainer.global_step == 15
        return loss + float("nan") if wrong else loss

    kept: dict[str, Any] = {}

    def take_back(runner: L.Trainer, _: L.LightningModule) -> None:
        put_at_rest(module)
        callback = next(c for c in runner.callbacks if isinstance(c, TamiyoCallback))
        before, optimizers = found(callback, module, runner), list(runner.optimizers)
        snapshot = capture(module, optimizers, step=runner.global_step)
        with callback._run.ranks.together():
            callback.body.cull(callback.body.seeds[-1], optimizers)
        with torch.no_grad():
            for p in module.parameters():
                own_part(p).mul_(1.5)
                for value in optimizers[0].state[p].values():
                    own_part(value).add_(1.0)
        kept["seeds"] = [len(callback.body.seeds)]
        restore(module, optimizers, snapshot)
        kept["seeds"].append(len(callback.body.seeds))
        kept["before"], kept["after"] = before, found(callback, module, runner)

    module.training_step = training_step
    run = train(
        folder,
        Script({12: take_back}),
        module=module,
        options={"epochs": 1},
        lifecycle=QUICK | {"min_holding_steps": 30},
        governor={"check_interval_steps": 2, "min_checks": 2},
    )
    return {"kept": kept, "end": found(*run)}


def _error(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---------------------------------------------------------------- without a trainer


class Plain(nn.Module):
    """Convolutions, a normalisation and linear layers: a site for each kind of blueprint."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4 * 8 * 8)
        self.second = nn.Linear(4 * 8 * 8, 6)
        self.third = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.relu(self.first(x)).flatten(1))
        return self.third(torch.relu(self.second(h)))


def gradients(rank: int, folder: Path) -> dict[str, Any]:
    """Every blueprint at every site: outputs, and the mean of the processes' gradients, as without sharding."""
    torch.manual_seed(0)
    plain = Plain()
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (2,))
    for child in sharded.children():
        fully_shard(child, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(rank))
    bodies = [attach(model, x) for model in (plain, sharded)]
    told: dict[str, Any] = {"sites": [[site.name for site in body.sites] for body in bodies], "worst": {}}
    for site in bodies[1].sites:
        for blueprint in site.blueprints:
            before = sharded(x)
            seeds = [body.germinate(site.name, blueprint) for body in bodies]
            same = torch.allclose(before, sharded(x), atol=1e-6)
            for seed in seeds:
                seed.enter("blending", 0.5)
            told["worst"][f"{site.name} {blueprint}"] = [same, _furthest(plain, sharded, x)]
            for body, seed in zip(bodies, seeds, strict=True):
                body.cull(seed)
    return told


def _furthest(plain: nn.Module, sharded: nn.Module, x: Tensor) -> float:
    """Largest difference of a gradient, over the largest gradient."""
    for model in (plain, sharded):
        model.zero_grad()
        model(x).square().mean().backward()
    worst = scale = 0.0
    for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        dist.all_reduce(p.grad)
        mean = p.grad / 2
        worst = max(worst, float((mean - whole(q.grad)).abs().max()))
        scale = max(scale, float(mean.abs().max()))
    return worst / scale


def edges(rank: int, folder: Path) -> dict[str, Any]:
    """What is refused of a sharded model, and a NaN that stands in one process's part of a seed's gradient."""
    mesh = init_device_mesh("cpu", (2,))
    sharded, mixed, partly = Plain(), Plain(), Plain()
    fully_shard(sharded, mesh=mesh)
    fully_shard(mixed, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(partly.third, mesh=mesh)
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    body, other = attach(sharded, x), attach(partly, x)
    sgd, adam = torch.optim.SGD(sharded.parameters()), torch.optim.AdamW(sharded.parameters())
    seed = body.germinate("bypass:second->third", "widen", 4)
    grads = list(seed.parameters())
    for p in grads:
        p.grad = torch.ones_like(p)
    if rank == 1:
        own_part(grads[0].grad)[0] = float("nan")
    guard = StepGuard(adam)
    guard.shield(grads)
    return {
        "sgd": _error(lambda: check_sharded(sharded, [sgd])),
        "adam": _error(lambda: check_sharded(sharded, [adam])),
        "mixed": _error(lambda: check_sharded(mixed, [adam])),
        "replicated": _error(lambda: other.germinate("parallel:second", "lowrank", 2)),
        "recycled": _error(
            lambda: recycle_layer(
                body, "second", [lambda: sharded(x)], optimizers=[adam], generator=torch.Generator()
            )
        ),
        "shielded": [float(own_part(p.grad).sum()) for p in grads],
        "dropped": guard.num_dropped,
    }


def everything(rank: int, folder: Path) -> dict[str, Any]:
    return {act.__name__: act(rank, folder / act.__name__) for act in (grown, undone, gradients, edges)}
