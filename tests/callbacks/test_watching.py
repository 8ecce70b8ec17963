"""With nothing grown, a run is what it would have been without the callback, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from runs import Tokens, cnn, decisions, differing, fit, gpt, growing, mlp, trainer, weights
from torch import Tensor, nn
from torchmetrics import MeanMetric

from esper.callbacks import TamiyoCallback
from esper.hosts import DigitsData
from esper.kasmina.layer import SeedLayer
from esper.messages import DecisionRecord

HOSTS: dict[str, Any] = {
    "mlp": (mlp, DigitsData),
    "cnn": (cnn, lambda: DigitsData(images=True)),
    "gpt": (gpt, Tokens),
}


def watch(**settings: Any) -> TamiyoCallback:
    return TamiyoCallback(policy="off", bus=None, **settings)


class Gathering(L.LightningModule):
    """Gathers and logs in every way that a measurement by the side could disturb."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
        self.query, self.key, self.value = (nn.Linear(12, 8) for _ in range(3))
        self.head = nn.Linear(8, 10)
        self.mean = MeanMetric()
        self.losses: list[Tensor] = []
        self.epochs: list[float] = []
        self.num_calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        h = self.body(x)
        mixed = 0.5 * (self.query(h) * self.key(h)).tanh() + self.value(h)
        loss = nn.functional.cross_entropy(self.head(mixed), labels)
        self.mean.update(loss.detach())
        self.losses.append(loss.detach())
        self.num_calls += 1
        self.log("loss", loss, on_epoch=True, on_step=True)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs.append(float(torch.stack(self.losses).mean()))
        self.losses.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.head(self.value(self.body(batch[0]))), batch[1])
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("host", HOSTS)
def test_a_watched_run_is_the_unwatched_one_bit_for_bit(host, tmp_path):
    make, data = HOSTS[host]
    plain, watched = make(), make()
    runner = trainer(tmp_path)
    fit(runner, plain, data())
    beside = trainer(tmp_path, watch(probes={"interval_steps": 3}))
    fit(beside, watched, data())
    assert differing(weights(plain), weights(watched)) == []
    assert runner.callback_metrics.keys() == beside.callback_metrics.keys()
    assert differing(runner.callback_metrics, beside.callback_metrics) == []


@pytest.mark.parametrize("host", HOSTS)
def test_a_growing_policy_that_only_waits_changes_no_bit(host, tmp_path):
    make, data = HOSTS[host]
    plain, watched = make(), make()
    runner = trainer(tmp_path)
    fit(runner, plain, data())
    beside = trainer(tmp_path, growing(tmp_path, probes={"interval_steps": 4, "decision_interval": 0.1}))
    fit(beside, watched, data())
    assert differing(weights(plain), weights(watched)) == []
    assert differing(runner.callback_metrics, beside.callback_metrics) == []
    assert {record.decision.action for record in decisions(tmp_path)} == {"wait"}
    assert len(decisions(tmp_path)) >= 9


def test_measurements_by_the_side_reach_neither_logs_nor_metrics_nor_what_a_module_gathers(tmp_path):
    plain, watched = Gathering(), Gathering()
    runner = trainer(tmp_path)
    fit(runner, plain)
    waiting = growing(tmp_path, probes={"interval_steps": 2, "decision_interval": 0.05})
    asked = []
    beside = trainer(tmp_path, waiting)

    def measure(event: Any) -> None:
        if isinstance(event, DecisionRecord):
            asked.append(waiting._controller._held_out_loss())

    waiting.listeners.append(measure)
    fit(beside, watched)
    assert len(asked) > 10
    assert all(math.isfinite(value) for value in asked)
    assert differing(weights(plain), weights(watched)) == []
    assert differing(runner.callback_metrics, beside.callback_metrics) == []
    assert plain.epochs == watched.epochs
    assert plain.num_calls == watched.num_calls == 34


def test_health_reaches_the_loggers_and_dormant_layers_cost_nothing(tmp_path):
    callback = watch(probes={"interval_steps": 5})
    logger = CSVLogger(tmp_path, name="run")
    module = mlp()
    fit(trainer(tmp_path, callback, logger=logger, log_every_n_steps=1), module)
    names = {signal.layer_id for signal in callback.health()}
    assert names == {"host.layers.0", "host.layers.1", "host.layers.2", "host.head"}
    header = (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "health/host.layers.1/dormancy" in header
    assert "health/host.head/gradient_norm" in header
    assert not list(tmp_path.rglob("growth.jsonl"))
    slots = [m._esper_slot for m in module.modules() if isinstance(m, SeedLayer)]
    assert slots
    assert all(slot is None for slot in slots)


def test_watching_needs_no_known_end_and_no_special_optimizer(tmp_path):
    module = mlp()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=2)
    callback = watch(probes={"interval_steps": 2})
    fit(trainer(tmp_path, callback, max_epochs=-1, limit_train_batches=4, max_time={"seconds": 1}), module)
    assert callback.health()
