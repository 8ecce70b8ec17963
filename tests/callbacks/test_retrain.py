"""``finish="retrain"``: the found shape starts afresh, and the run goes on to its end."""

from __future__ import annotations

import shutil
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from runs import (
    Every,
    assert_registered,
    decisions,
    differing,
    fit,
    growing,
    interventions,
    mlp,
    plain_lines,
    trainer,
    weights,
)

from esper.kasmina.structure import all_seeds

ENTRIES = (
    (0.03, "bypass:host.layers.0->host.layers.1", "widen", 6),
    (0.05, "parallel:host.layers.2", "norm", 1),
    (0.1, "bypass:host.layers.0->host.head", "shortcut", 4),
)
WINDOW = (0.0, 0.2)


def search(folder: Any, **settings: Any) -> Any:
    return growing(
        folder, *ENTRIES, window=WINDOW, finish="retrain", probes={"decision_interval": 0.02},
        governor={"check_interval_steps": 2, "min_checks": 2, "patience": 2}, **settings,
    )  # fmt: skip


class Watch(Every):
    """Keeps the weights before and after the restart, and the optimizer's state at it."""

    def __init__(self, callback: Any) -> None:
        super().__init__(self.note)
        self.callback = callback
        self.start: dict[str, torch.Tensor] = {}
        self.restart: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.num_states = -1
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = weights(pl_module)

    def note(self, runner: L.Trainer, module: L.LightningModule) -> None:
        assert_registered(runner, module)
        self.losses.append(float(runner.callback_metrics["train_loss"]))
        controller = self.callback._controller
        if controller is not None and controller.retrained:
            if not self.restart:
                self.restart = weights(module)
                self.num_states = len(runner.optimizers[0].state)
        else:
            self.before = weights(module)


def test_the_found_shape_starts_from_fresh_weights_and_trains_to_the_end(tmp_path):
    callback = search(tmp_path)
    watch = Watch(callback)
    module = mlp(lr=0.02)
    fit(trainer(tmp_path, callback, watch, epochs=8), module)
    assert [s.stage for s in all_seeds(module)] == ["fossilized"] * 3
    mark = next(r for r in decisions(tmp_path) if r.decision.policy == "finish=retrain")
    assert "starts afresh" in mark.decision.reason
    assert mark.step > 0.2 * 136
    assert watch.restart.keys() == watch.before.keys()
    assert watch.num_states == 0
    host = {name for name in watch.restart if "esper_seeds" not in name and name in watch.start}
    assert differing({n: watch.start[n] for n in host}, {n: watch.restart[n] for n in host}) == []
    for name in watch.restart.keys() - host:
        if not name.endswith("_extra_state"):
            assert not torch.equal(watch.before[name], watch.restart[name]), name
    assert watch.losses[-1] < 0.5 * watch.losses[0]
    assert interventions(tmp_path) == []  # the loss of fresh weights is no divergence
    assert len(decisions(tmp_path, "germinate")) == 3


def test_a_run_that_retrains_resumes_before_and_after_the_restart(tmp_path):
    results = []
    for name, step in (("whole", 0), ("early", 20), ("late", 60)):
        folder = tmp_path / name
        callback = search(folder)
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt" if step else None
        if checkpoint:
            folder.mkdir()
            shutil.copy(tmp_path / "whole" / "growth.jsonl", folder)
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=20)
        module = mlp(lr=0.02)
        runner = trainer(folder, callback, saver, epochs=5, enable_checkpointing=True)
        fit(runner, module, ckpt_path=checkpoint)
        results.append((weights(module), plain_lines(folder)))
    for state, lines in results[1:]:
        assert differing(state, results[0][0]) == []
        assert lines == results[0][1]
