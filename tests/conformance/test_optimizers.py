"""Optimizers, schedulers and loops of every kind in a run that grows: each goes on as it would without growth."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from runs import (
    QUICK,
    Every,
    Script,
    assert_registered,
    decisions,
    differing,
    fit,
    growing,
    mlp,
    stages,
    trainer,
    weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from esper.callbacks import TamiyoCallback
from esper.callbacks.checks import conflicts
from esper.hosts import ClassifierModule, MLPConfig, OptimConfig
from esper.kasmina.structure import all_seeds

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
ENTRIES = ((0.15, WIDE, "widen", 6), (0.35, LONG, "shortcut", 4), (0.6, RANK, "lowrank", 2))
BATCHES, EPOCHS = 6, 2

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda s: 0.9**s] * 2),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, [lambda s: 0.9] * 2),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 6)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, [0.001, 0.002], [0.01, 0.02], step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.01, 0.02], total_steps=BATCHES * EPOCHS),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, [0.001, 0.002], anneal_epochs=5),
}


class Scheduled(ClassifierModule):
    """A classifier with named groups of two learning rates and a scheduler stepped after every batch."""

    def __init__(self, make: Callable[[Optimizer], Any]) -> None:
        torch.manual_seed(0)
        super().__init__(MLPConfig(hidden=(16, 4, 12)), OptimConfig())
        self.make = make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("flat", 1.0)  # what the scheduler that waits for a plateau sees, grown or not
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        matrices = [(n, p) for n, p in named if p.ndim > 1]
        vectors = [(n, p) for n, p in named if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.1, "lr": 0.01},
            {"params": vectors, "weight_decay": 0.0, "lr": 0.02},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        schedule = {"scheduler": self.make(optimizer), "interval": "step", "monitor": "flat"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def series(name: str, folder: Path, *, grow: bool, checkpoint: Path | None = None) -> list[list[float]]:
    """The rates of every group after each batch."""
    module = Scheduled(SCHEDULERS[name])
    rates: list[list[float]] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        assert_registered(runner, module)
        assert_named(runner, module)
        groups = runner.optimizers[0].param_groups
        rates.append([group[key] for group in groups for key in ("lr", "momentum", "weight_decay")])

    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=7)
    grower = [growing(folder, *ENTRIES)] if grow else []
    options = {
        "limit_train_batches": BATCHES,
        "epochs": EPOCHS,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
    }
    runner = trainer(folder, *grower, Every(look), saver, enable_checkpointing=True, **options)
    fit(runner, module, ckpt_path=checkpoint)
    assert len(all_seeds(module)) == (3 if grow else 0)
    return rates


def assert_named(runner: L.Trainer, module: L.LightningModule) -> None:
    """``param_names`` name the group's parameters, one by one."""
    names = {id(p): name for name, p in module.named_parameters()}
    for optimizer in runner.optimizers:
        for group in optimizer.param_groups:
            assert group["param_names"] == [names[id(p)] for p in group["params"]]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_goes_on_as_without_growth(name, tmp_path):
    with_growth = series(name, tmp_path / "grown", grow=True)
    assert with_growth == series(name, tmp_path / "plain", grow=False)
    assert len(with_growth) == BATCHES * EPOCHS
    assert [d.step for d in decisions(tmp_path / "grown", "germinate")] == [2, 5, 8]


@pytest.mark.parametrize("name", ["ReduceLROnPlateau", "CyclicLR", "SequentialLR", "OneCycleLR"])
def test_a_schedule_of_a_grown_run_resumes_as_that_of_a_plain_one(name, tmp_path):
    rates = []
    for kind in ("grown", "plain"):
        series(name, tmp_path / kind, grow=kind == "grown")
        checkpoint = tmp_path / kind / "step=7.ckpt"
        rates.append(series(name, tmp_path / f"{kind} again", grow=kind == "grown", checkpoint=checkpoint))
    assert rates[0] == rates[1]
    assert len(rates[0]) == BATCHES * EPOCHS - 7


def test_every_scheduler_of_torch_is_in_the_table():
    public = {
        name
        for module in (lr_scheduler, torch.optim.swa_utils)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert public - {"LRScheduler"} == set(SCHEDULERS)


# ---------------------------------------------------------------- several networks, stepped by hand


class Adversaries(L.LightningModule):
    """A generator and a judge, toggled so that each step gives gradients to one of them only."""

    def __init__(self, *, schedule: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.schedule = schedule
        self.generator = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 64)
        )
        self.judge = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))
        self.toggled: list[dict[str, bool]] = []

    def judged(self, x: Tensor, sign: float) -> Tensor:
        return nn.functional.softplus(sign * self.judge(x)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, noise = batch[0], torch.randn(len(batch[0]), 8)
        for optimizer, own in zip(self.optimizers(), ("generator", "judge"), strict=True):
            self.toggle_optimizer(optimizer)
            fake = self.generator(noise)
            if own == "generator":
                loss = self.judged(fake, -1.0)
            else:
                loss = self.judged(x, -1.0) + self.judged(fake.detach(), 1.0)
            self.look(own)
            kept = {n: p.grad for n, p in self.named_parameters() if not n.startswith(own)}
            optimizer.zero_grad()
            self.manual_backward(loss)
            assert all(p.grad is kept[n] for n, p in self.named_parameters() if n in kept)
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        assert all(p.requires_grad for p in self.parameters())
        if self.schedule:
            for scheduler in self.lr_schedulers():
                scheduler.step()
        return loss.detach()

    def look(self, own: str) -> None:
        """While toggled, exactly the parameters of the network that is being trained want gradients."""
        assert {n.split(".")[0] for n, p in self.named_parameters() if p.requires_grad} == {own}
        assert all(p.requires_grad for n, p in self.named_parameters() if n.startswith(own))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(len(batch[0]), 8, generator=torch.Generator().manual_seed(0))
        return self.judged(self.generator(noise), -1.0) + self.judged(batch[0], -1.0)

    def configure_optimizers(self) -> Any:
        optimizers = [
            torch.optim.Adam([(n, p) for n, p in self.named_parameters() if n.startswith(own)], lr=lr)
            for own, lr in (("generator", 1e-3), ("judge", 2e-3))
        ]
        schedules = [lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers] if self.schedule else []
        return optimizers, schedules


def test_toggled_networks_grow_each_in_its_own_optimizer(tmp_path):
    grower = growing(
        tmp_path,
        (0.1, "bypass:judge.0->judge.2", "widen", 4),
        (0.2, "bypass:generator.0->generator.2", "widen", 4),
        (0.3, "parallel:judge.2", "lowrank", 2),
    )
    module = Adversaries(schedule=True)
    rates: list[list[float]] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        assert_registered(runner, module)
        assert_named(runner, module)
        rates.append([group["lr"] for o in runner.optimizers for group in o.param_groups])

    runner = trainer(tmp_path, grower, Every(look), epochs=2)
    fit(runner, module)
    assert sorted(s.site.target for s in all_seeds(module)) == ["generator.2", "judge.2", "judge.2"]
    assert [d.applied for d in decisions(tmp_path, "germinate")] == [True] * 3
    # 34 batches of two steps: a tenth of the run is over after the fourth batch.
    assert [d.step for d in decisions(tmp_path, "germinate")] == [8, 14, 22]
    for optimizer, own in zip(runner.optimizers, ("generator", "judge"), strict=True):
        (group,) = optimizer.param_groups
        assert {name.split(".")[0] for name in group["param_names"]} == {own}
        assert all(optimizer.state[p] for p in group["params"])
    for earlier, later in itertools.pairwise(rates):
        assert later == pytest.approx([0.9 * rate for rate in earlier])
    between = [s.name for s in grower.body.sites if s.source.split(".")[0] != s.target.split(".")[0]]
    assert between == []  # the judge sees real samples, when nothing has run in the generator


def test_isolated_seeds_under_manual_optimization_come_with_a_warning(tmp_path):
    module = Adversaries()
    told = {}
    for mode in ("direct", "isolated"):
        runner = trainer(tmp_path, growing(tmp_path, lifecycle=QUICK | {"mode": mode}))
        told[mode] = conflicts(runner, TamiyoCallback, module)
    assert told["direct"] == []
    (warning,) = told["isolated"]
    assert warning.kind == "warning"
    assert "clip by value, or leave lifecycle.mode" in str(warning)


# ---------------------------------------------------------------- float16 with a gradient scaler


def half(folder: Path, *callbacks: L.Callback) -> tuple[dict[str, Tensor], float]:
    """Fit in 16-mixed on the CPU; Lightning itself turns that into bf16 there, but takes the plugin."""
    module = mlp(lr=0.01)
    runner = trainer(folder, *callbacks, plugins=[MixedPrecision("16-mixed", "cpu")], gradient_clip_val=0.5)
    fit(runner, module)
    return weights(module), runner.precision_plugin.scaler.get_scale()


def test_float16_grows(tmp_path):
    look = Every(assert_registered)
    found, _ = half(tmp_path, growing(tmp_path, *ENTRIES), look)
    assert all(torch.isfinite(value).all() for value in found.values() if value.is_floating_point())
    assert stages(tmp_path, "s1")[-1] == "fossilized"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_a_young_seed_does_not_make_the_scaler_skip_the_hosts_step(value, tmp_path):
    """The scaler looks at the gradients of the whole optimizer, and skips its step for one that is not finite."""

    def spoil(runner: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            for seed in all_seeds(module):
                for p in seed.branch.parameters():
                    p.fill_(value)

    lifecycle = QUICK | {"mode": "isolated", "min_training_steps": 1000, "max_training_steps": 1000}
    grower = growing(tmp_path, (0.1, WIDE, "widen", 6), lifecycle=lifecycle)
    found, scale = half(tmp_path, grower, Script({12: spoil}))
    expected, scale_without = half(tmp_path / "plain")
    assert scale == scale_without
    host = {name: x for name, x in found.items() if "esper_seeds" not in name}
    assert differing(host, expected) == []
