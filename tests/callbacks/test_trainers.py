"""Every kind of trainer and optimizer: growth works with it, or refuses before training and says what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from runs import QUICK, Every, assert_registered, decisions, fit, growing, journal, mlp, trainer, transitions
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, IterableDataset

from esper.callbacks import TamiyoCallback
from esper.errors import UnsupportedError
from esper.hosts import DigitsData
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
ENTRIES = ((0.1, WIDE, "widen", 6), (0.3, LONG, "shortcut", 4), (0.5, RANK, "lowrank", 2))


class NoTraining(L.Callback):
    """Fails the test when a batch is trained on."""

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")


class Stream(IterableDataset[Any]):
    """Digits without a length."""

    def __init__(self) -> None:
        self.data = DigitsData().splits.train

    def __iter__(self) -> Iterator[Any]:
        for i in range(len(self.data)):
            yield self.data[i]


class Streamed(DigitsData):
    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=64)


class Both(L.LightningModule):
    """Two halves with an optimizer each, stepped by hand."""

    def __init__(self, *, return_loss: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.first = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 10)
        self.return_loss = return_loss

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.first(batch[0])), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for optimizer in self.optimizers():
            loss = self.loss(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss.detach()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.log("val_loss", loss)
        return loss if self.return_loss else None

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.AdamW(self.first.parameters(), lr=0.01),
            torch.optim.SGD(self.head.parameters(), lr=0.05, momentum=0.9),
        ]


def test_manual_optimization_with_two_optimizers_grows_at_whole_batches(tmp_path):
    callback = growing(
        tmp_path,
        (0.1, "bypass:first.0->first.2", "widen", 4),
        (0.2, "parallel:head", "lowrank", 2),
        probes={"interval_steps": 8, "decision_interval": 0.05},
    )
    module = Both()
    runner = trainer(tmp_path, callback, Every(assert_registered), precision="bf16-mixed")
    fit(runner, module)
    assert {s.site.target: s.stage for s in all_seeds(module)} == {
        "first.2": "fossilized",
        "head": "fossilized",
    }
    groups = [{id(p) for g in o.param_groups for p in g["params"]} for o in runner.optimizers]
    for seed in all_seeds(module):
        at = 0 if seed.site.target == "first.2" else 1
        assert all(id(p) in groups[at] for p in seed.parameters())
    assert all(record.step % 2 == 0 for record in decisions(tmp_path))
    signals = callback.health()
    assert {s.layer_id for s in signals if not s.seed_id} == {"first.0", "first.2", "head"}
    assert {s.step % 8 for s in signals} == {0}


def test_manual_optimization_needs_a_validation_step_that_returns_a_loss(tmp_path):
    class Bare(Both):
        validation_step = L.LightningModule.validation_step

    with pytest.raises(
        UnsupportedError, match=r"manual optimization without a validation_step.*return the loss"
    ):
        fit(trainer(tmp_path, growing(tmp_path), NoTraining()), Bare())
    with pytest.raises(UnsupportedError, match=r"Both.validation_step.*returned NoneType; return the loss"):
        fit(trainer(tmp_path, growing(tmp_path)), Both(return_loss=False))


@pytest.mark.parametrize(
    "clip", [{}, {"gradient_clip_val": 0.5}, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}]
)
def test_accumulated_batches_grow_at_their_boundaries_only(clip, tmp_path):
    callback = growing(tmp_path, *ENTRIES)
    structure: list[tuple[int, int]] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        assert_registered(runner, module)
        structure.append((runner.fit_loop.batch_idx, len(all_seeds(module))))

    runner = trainer(
        tmp_path, callback, Every(look), accumulate_grad_batches=4, epochs=5, limit_train_batches=16, **clip
    )
    fit(runner, mlp())
    changes = [b for (a, (b, n)) in itertools.pairwise(structure) if a[1] != n]
    assert len(changes) == 3
    assert all(batch % 4 == 3 for batch in changes)
    assert max(record.step for record in decisions(tmp_path)) <= 20
    assert callback.summary()["num_samples"] == 5 * 16 * 64


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision(precision, tmp_path):
    callback = growing(
        tmp_path, *ENTRIES, lifecycle=QUICK | {"mode": "isolated"}, probes={"interval_steps": 4}
    )
    module = mlp()
    runner = trainer(tmp_path, callback, Every(assert_registered), precision=precision, epochs=4)
    fit(runner, module)
    assert len(decisions(tmp_path, "germinate")) == 3
    assert all(r.applied for r in decisions(tmp_path, "germinate"))
    moves = {(t.seed_id, t.target) for t in transitions(tmp_path)}
    assert ("s1", "fossilized") in moves, [
        (t.step, t.seed_id, t.target, t.reason) for t in transitions(tmp_path)
    ]
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert torch.isfinite(runner.callback_metrics["val_loss"])


def test_lbfgs_is_refused_before_training_with_the_cure(tmp_path):
    module = mlp()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    with pytest.raises(
        UnsupportedError, match=r"optimizer LBFGS: it keeps one flat history.*use AdamW or SGD"
    ):
        fit(trainer(tmp_path, growing(tmp_path), NoTraining()), module)


def test_conflicts_are_refused_together(tmp_path):
    class Another(TamiyoCallback):
        """Lightning itself refuses two of the very same class."""

    class Averaging(Both):
        """Averages by hand, and cannot be measured without being trained."""

        validation_step = L.LightningModule.validation_step

        def __init__(self) -> None:
            super().__init__()
            self.mean = AveragedModel(self.first)

    with pytest.raises(UnsupportedError) as caught:
        fit(trainer(tmp_path, growing(tmp_path), Another(bus=None), NoTraining()), Averaging())
    text = str(caught.value)
    assert "the averaged model 'mean' inside Averaging" in text
    assert "more than one TamiyoCallback" in text
    assert "manual optimization without a validation_step" in text


def test_a_run_of_unknown_length_needs_a_horizon(tmp_path):
    with pytest.raises(UnsupportedError, match=r"no known end.*TamiyoCallback\(horizon_steps=N\)"):
        fit(trainer(tmp_path, growing(tmp_path), NoTraining()), mlp(schedule="constant"), Streamed())
    callback = growing(tmp_path, *ENTRIES, horizon_steps=34)
    module = mlp(schedule="constant")
    fit(trainer(tmp_path, callback, Every(assert_registered)), module, Streamed())
    assert len(all_seeds(module)) == 3


def test_a_run_that_time_ends_needs_a_horizon_and_stops_in_time(tmp_path):
    options: dict[str, Any] = {"max_epochs": None, "max_time": {"seconds": 1}}
    with pytest.raises(UnsupportedError, match="horizon_steps"):
        fit(trainer(tmp_path, growing(tmp_path), NoTraining(), **options), mlp(schedule="constant"))
    fit(trainer(tmp_path, growing(tmp_path, *ENTRIES, horizon_steps=30), **options), mlp(schedule="constant"))
    assert len(decisions(tmp_path, "germinate")) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"overfit_batches": 2, "epochs": 20},
        {"limit_val_batches": 0},
        {"max_epochs": -1, "max_steps": 30},
        {"val_check_interval": 5},
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2},
    ],
    ids=lambda o: next(iter(o)),
)
def test_unusual_runs_grow(options, tmp_path):
    callback = growing(tmp_path, *ENTRIES)
    module = mlp()
    runner = trainer(tmp_path, callback, Every(assert_registered), **options)
    fit(runner, module)
    assert len(all_seeds(module)) == 3
    assert torch.isfinite(runner.callback_metrics["train_loss"])


def test_a_fast_dev_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for policy in ("schedule", "off"):
        callback = TamiyoCallback(policy=policy, bus=None)
        fit(trainer(tmp_path, callback, fast_dev_run=3), mlp())
        assert callback.summary()["num_samples"] == 3 * 64
    assert list(tmp_path.rglob("*")) == []


def test_learning_rates_stay_equal_and_their_series_keep_their_names(tmp_path):
    callback = growing(tmp_path, *ENTRIES)
    module = mlp(weight_decay=0.1)
    rates: list[list[float]] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        assert_registered(runner, module)
        rates.append([g["lr"] for g in runner.optimizers[0].param_groups])

    logger = CSVLogger(tmp_path, name="run")
    monitor = LearningRateMonitor("step")
    runner = trainer(tmp_path, callback, Every(look), monitor, logger=logger, log_every_n_steps=1)
    fit(runner, module)
    assert len(all_seeds(module)) == 3
    assert all(a == b for a, b in rates)
    assert len({a for a, _ in rates}) > 20
    assert sorted(monitor.lrs) == ["lr-AdamW/pg1", "lr-AdamW/pg2"]
    decay, plain = (g["params"] for g in runner.optimizers[0].param_groups)
    assert all(p.ndim > 1 for p in decay if not _grown(p, module))
    assert not any(_grown(p, module) for p in plain)  # new parameters follow their layer's weight


def _grown(parameter: nn.Parameter, module: nn.Module) -> bool:
    return any(p is parameter for seed in all_seeds(module) for p in seed.parameters())


def test_a_newborn_learning_rate_scales_the_seeds_steps_alone(tmp_path):
    moved = {}
    for factor in (1.0, 0.5):
        callback = growing(
            tmp_path / str(factor), (0.0, WIDE, "widen", 4), birth_lr_multiplier=factor,
            lifecycle=QUICK | {"mode": "isolated", "min_training_steps": 500, "max_training_steps": 500},
        )  # fmt: skip
        module = mlp(schedule="constant")
        fit(trainer(tmp_path, callback, max_steps=2), module)
        (seed,) = all_seeds(module)
        moved[factor] = dict(seed.branch.named_parameters())["fan_out.weight"].detach().clone()
    assert float(moved[1.0].abs().max()) > 0
    torch.testing.assert_close(moved[0.5], 0.5 * moved[1.0])


def test_the_journal_begins_and_ends_with_marks_of_the_run(tmp_path):
    callback = growing(tmp_path)
    fit(trainer(tmp_path, callback, epochs=1), mlp())
    first, *_, last = journal(tmp_path)
    assert (first.event, last.event) == ("start", "end")
    assert first.info["policy"] == "schedule"
    assert last.info["training_flops"] == callback.summary()["training_flops"]
    (told,) = [e.info for e in journal(tmp_path) if isinstance(e, RunRecord) and "sites" in e.info]
    assert told == {"sites": [site.name for site in callback.body.sites], "refused": {}}
