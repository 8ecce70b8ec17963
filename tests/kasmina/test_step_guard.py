"""Isolated seeds and the host's clipping; newborn seeds and the learning rate."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper.errors import ConfigError
from esper.kasmina.layer import SEEDS, get_slot, swap_class
from esper.kasmina.optimizer import register_parameters
from esper.kasmina.seed import Seed, SeedState
from esper.kasmina.sites import Site
from esper.kasmina.step_guard import StepGuard

# The runs are tiny, so Lightning's advice on data loading does not apply.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*is smaller than the logging interval.*"),
]


class Host(L.LightningModule):
    def __init__(self, kind: str = "adamw") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.kind = kind

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return 50.0 * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.kind == "fused")
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 5)]


def plant(net: nn.Sequential) -> Seed:
    """Put a zero-output branch beside the middle layer."""
    layer = net[2]
    swap_class(layer)
    get_slot(layer)
    with torch.random.fork_rng():
        branch = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))
    nn.init.zeros_(branch[2].weight)
    nn.init.zeros_(branch[2].bias)
    site = Site("parallel:2", "parallel", "2", "2", (8,), (8,))
    seed = Seed(SeedState("s0", site, "bottleneck", 4), branch, "source", None)
    layer.add_module(SEEDS, nn.ModuleDict({"s0": seed}))
    return seed


class Grow(L.Callback):
    """Germinates an isolated seed after the third step and guards it, as the real callback does."""

    def __init__(self, shielded: bool = True, poison: bool = False) -> None:
        self.shielded, self.poison = shielded, poison
        self.seed: Seed | None = None
        self.guard: StepGuard | None = None
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Host, *args: Any) -> None:
        if trainer.global_step == 3 and self.seed is None:
            optimizer = pl_module.optimizers()
            self.guard = StepGuard(optimizer)
            self.seed = plant(pl_module.net)
            named = list(self.seed.branch.named_parameters(prefix="net.2.esper_seeds.s0.branch"))
            register_parameters(optimizer, named, [pl_module.net[2].weight] * len(named))
            self.seed.enter("training", 0.0)
        elif self.seed is not None:
            self.norms.append(float(sum(p.detach().norm() for p in self.seed.branch.parameters())))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Host, optimizer: Any) -> None:
        if self.seed is None or self.guard is None:
            return
        parameters = list(self.seed.branch.parameters())
        if self.poison:
            for p in parameters:
                assert p.grad is not None
                p.grad.fill_(torch.nan)
        if self.shielded:
            self.guard.stash(
                [parameters],
                clip=trainer.gradient_clip_val,
                algorithm=trainer.gradient_clip_algorithm or "norm",
            )


def fit(kind: str, callback: Grow | None, folder: Path, **options: Any) -> dict[str, Tensor]:
    model = Host(kind)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(48, 6, generator=generator)
    data = DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)
    trainer = L.Trainer(
        max_steps=10,
        accelerator="cpu",
        callbacks=[] if callback is None else [callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(model, data)
    return {name: p.detach().clone() for name, p in model.named_parameters() if "esper_seeds" not in name}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("adamw", {"gradient_clip_val": 0.5}),
        ("sgd", {"gradient_clip_val": 0.5}),
        ("sgd", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        ("fused", {}),
        ("sgd", {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 2}),
        ("sgd", {"gradient_clip_val": 0.5, "precision": "bf16-mixed"}),
    ],
)
def test_host_is_bit_identical_to_a_lightning_run_without_the_seed(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = dict(options)
    options.setdefault("max_epochs", 1)
    grow = Grow()
    grown = fit(kind, grow, tmp_path, **options)
    plain = fit(kind, None, tmp_path, **options)
    assert grown.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(grown[name], value), name
    assert len(set(grow.norms)) > 1, "the seed did not learn"


def test_without_the_guard_clipping_would_couple_them(tmp_path: Path) -> None:
    grown = fit("sgd", Grow(shielded=False), tmp_path, gradient_clip_val=0.5)
    plain = fit("sgd", None, tmp_path, gradient_clip_val=0.5)
    assert not all(torch.equal(grown[name], value) for name, value in plain.items())


def test_non_finite_gradients_are_dropped_and_counted(tmp_path: Path) -> None:
    grow = Grow(poison=True)
    grown = fit("adamw", grow, tmp_path, gradient_clip_val=0.5)
    plain = fit("adamw", None, tmp_path, gradient_clip_val=0.5)
    assert all(torch.equal(grown[name], value) for name, value in plain.items())
    assert grow.guard is not None
    assert grow.seed is not None
    assert grow.guard.num_dropped == 7 * len(list(grow.seed.branch.parameters()))
    assert len(set(grow.norms)) == 1, "a dropped gradient must not move the seed"


def pair() -> tuple[nn.Parameter, nn.Parameter, torch.optim.SGD]:
    host, seed = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([host], lr=1.0)
    register_parameters(optimizer, [("seed", seed)], [host])
    host.grad, seed.grad = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    return host, seed, optimizer


def test_each_seed_is_clipped_by_its_own_norm_when_the_step_has_no_closure() -> None:
    host, seed, optimizer = pair()
    other = nn.Parameter(torch.zeros(1))
    optimizer.param_groups[0]["params"].append(other)
    other.grad = torch.tensor([0.5])
    guard = StepGuard(optimizer)
    guard.stash([[seed], [other]], clip=5.0)
    assert seed.grad is None
    nn.utils.clip_grad_norm_([host, seed], 5.0)
    optimizer.step()
    assert host.tolist() == pytest.approx([-3.0, -4.0])
    assert seed.tolist() == pytest.approx([-3.0, -4.0])
    assert other.tolist() == [-0.5]


def test_a_blending_seed_with_non_finite_gradients_does_not_reach_the_host_by_clipping() -> None:
    host, seed, optimizer = pair()
    guard = StepGuard(optimizer)
    seed.grad = torch.tensor([1.0, torch.inf])
    guard.shield([seed, host])
    nn.utils.clip_grad_norm_([host, seed], 5.0)
    optimizer.step()
    assert host.tolist() == pytest.approx([-3.0, -4.0])
    assert seed.tolist() == [0.0, 0.0]
    assert guard.num_dropped == 1


@pytest.mark.parametrize("positional", [True, False])
def test_what_a_skipped_step_left_behind_is_forgotten(positional: bool) -> None:
    _, seed, optimizer = pair()
    guard = StepGuard(optimizer)
    guard.stash([[seed]])

    def closure() -> float:
        optimizer.zero_grad()
        return 1.0

    assert (optimizer.step(closure) if positional else optimizer.step(closure=closure)) == 1.0
    assert seed.tolist() == [0.0, 0.0]
    # Nor does a stale gradient replace one that is in use.
    seed.grad = torch.ones(2)
    guard.stash([[seed]])
    seed.grad = torch.full((2,), 2.0)
    optimizer.step()
    assert seed.tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "Adafactor"])
@pytest.mark.parametrize("multiplier", [0.1, 2.0])
def test_multiplier_scales_the_applied_update(name: str, multiplier: float) -> None:
    make = getattr(torch.optim, name)
    old = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    gradient = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))

    def step(scale: float | None) -> tuple[Tensor, Tensor]:
        host, seed = nn.Parameter(old.clone()), nn.Parameter(old.clone())
        optimizer = make([host, seed], lr=0.1)
        guard = StepGuard(optimizer)
        if scale is not None:
            guard.scale_updates([seed], scale)
        host.grad, seed.grad = gradient.clone(), gradient.clone()
        optimizer.step(lambda: torch.tensor(0.0))
        return host.detach(), seed.detach()

    host, seed = step(multiplier)
    plain_host, plain_seed = step(None)
    assert torch.equal(host, plain_host)
    torch.testing.assert_close(seed - old, multiplier * (plain_seed - old), atol=1e-6, rtol=1e-5)


def test_multiplier_ends_and_is_validated() -> None:
    _, seed, optimizer = pair()
    guard = StepGuard(optimizer)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive finite number"):
            guard.scale_updates([seed], bad)
    guard.scale_updates([seed], 0.5)
    guard.scale_updates([seed], 1.0)
    optimizer.step()
    assert seed.tolist() == [-6.0, -8.0]
    guard.scale_updates([seed], 0.5)
    guard.forget([seed])
    optimizer.step()
    assert seed.tolist() == [-12.0, -16.0]


def test_copies_pickles_and_checkpoints_of_the_optimizer_are_free_of_the_guard() -> None:
    _, seed, optimizer = pair()
    guard = StepGuard(optimizer)
    guard.scale_updates([seed], 0.5)
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(2)) for _ in range(2)], lr=1.0)
    assert optimizer.state_dict() == plain.state_dict()
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin_seed = twin.param_groups[0]["params"][1]
        twin_seed.grad = torch.tensor([6.0, 8.0])
        twin.step()
        assert twin_seed.tolist() == [-6.0, -8.0]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert seed.tolist() == [-3.0, -4.0]
    guard.remove()
    optimizer.step()
    assert seed.tolist() == [-9.0, -12.0]
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_gradient_scaler_steps_with_the_seed_apart() -> None:
    host, seed, optimizer = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    guard = StepGuard(optimizer)
    optimizer.zero_grad()
    scaler.scale(3.0 * host.sum() + 2.0 * seed.sum()).backward()
    scaler.unscale_(optimizer)
    guard.stash([[seed]], clip=1.0)
    scaler.step(optimizer)
    scaler.update()
    assert host.tolist() == [-3.0, -3.0]
    assert seed.norm().item() == pytest.approx(1.0, abs=1e-5)


def test_gradients_of_young_seeds_are_finite_before_a_scaler_looks() -> None:
    model = Host()
    seed = plant(model.net)
    with torch.no_grad():
        seed.branch[0].weight.fill_(float("nan"))
    seed.enter("blending", 0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    guard = StepGuard(optimizer)
    young = list(seed.parameters())
    dropped = []
    for _ in range(2):  # called at every step, hooked once
        guard.keep_finite(young)
        optimizer.zero_grad()
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(model.training_step([torch.randn(5, 6), torch.zeros(5, dtype=torch.long)], 0)).backward()
        scaler.unscale_(optimizer)
        found = scaler._found_inf_per_device(optimizer)
        assert [float(value) for value in found.values()] == [0.0]
        assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
        dropped.append(guard.num_dropped)
    assert dropped[1] == 2 * dropped[0] > 0
    guard.forget(young)
    young[0].grad = None
    (young[0].sum() * float("nan")).backward()
    assert not torch.isfinite(young[0].grad).all()
