"""What leaves a run over the bus, and what comes back into it."""

from __future__ import annotations

import threading
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from runs import QUICK, Every, Script, decisions, fit, growing, mlp, trainer

from esper.errors import GrowthError
from esper.kasmina.structure import all_seeds
from esper.messages import (
    TOPICS,
    Decision,
    DecisionRecord,
    KernelPerformance,
    Message,
    ModelPerformance,
    SignalBatch,
    TransitionRecord,
)
from esper.oona import Subscriber, send_command
from esper.oona.endpoint import inproc_address

WIDE = "bypass:host.layers.0->host.layers.1"


class Listening(L.Callback):
    """Subscribes when the run has opened its bus, and reads after every batch."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.heard: list[Message] = []
        self.subscriber: Subscriber | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.subscriber = Subscriber(inproc_address(self.callback.run_id, "telemetry"))
        assert self.callback._records._publisher.wait_for_subscriber(TOPICS["growth"], timeout_s=5)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.subscriber is not None
        self.heard += [message for _, message in self.subscriber.poll(50, max_messages=100)]

    def on_train_end(self, *args: Any) -> None:
        assert self.subscriber is not None
        self.heard += [message for _, message in self.subscriber.poll(50, max_messages=100)]
        self.subscriber.close()


def test_one_batch_of_signals_a_sampled_step_and_every_event(tmp_path):
    callback = growing(tmp_path, (0.2, WIDE, "widen", 4), bus={}, probes={"interval_steps": 5})
    listening = Listening(callback)
    fit(trainer(tmp_path, callback, listening), mlp())
    of: dict[type, list[Any]] = {}
    for message in listening.heard:
        of.setdefault(type(message), []).append(message)
    assert [m.step for m in of[SignalBatch]] == [5, 10, 15, 20, 25, 30]
    assert [m.step for m in of[KernelPerformance]] == [5, 10, 15, 20, 25, 30]
    assert all(m.step_latency_ms > 0 for m in of[KernelPerformance])
    assert [s.layer_id for s in of[SignalBatch][0].signals] == [
        "host.layers.0", "host.layers.1", "host.layers.2", "host.head",
    ]  # fmt: skip
    assert len(of[DecisionRecord]) == len(decisions(tmp_path))
    assert {m.target for m in of[TransitionRecord]} >= {"germinated", "holding", "fossilized"}
    assert all(0 < m.train_loss < 10 for m in of[ModelPerformance])
    assert of[ModelPerformance][-1].num_parameters == callback.body.num_parameters


def test_a_command_germinates_in_a_running_fit(tmp_path):
    callback = growing(tmp_path, bus={})
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            decision = Decision(
                action="germinate", site=WIDE, blueprint="widen", size=5, reason="a wish", policy="remote"
            )
            send_command(callback.run_id, decision)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=ask)
    started = Script({3: lambda *_: thread.start()})
    wait = Every(lambda runner, _: runner.global_step == 30 and thread.join(10))
    module = mlp()
    fit(trainer(tmp_path, callback, started, wait, epochs=3), module)
    thread.join(10)
    assert failures == []
    (seed,) = all_seeds(module)
    assert (seed.site.name, seed.size) == (WIDE, 5)
    (record,) = decisions(tmp_path, "germinate")
    assert record.decision.policy == "remote"
    assert record.applied


def test_by_hand_before_and_during_training(tmp_path):
    callback = growing(tmp_path, lifecycle=QUICK | {"min_holding_steps": 400})
    with pytest.raises(GrowthError, match="traced on its first training batch"):
        _ = callback.body
    callback.germinate(WIDE, "widen", 3)
    module = mlp()
    acts = {
        4: lambda *_: callback.germinate(callback.body.sites[0], callback.body.sites[0].blueprints[0]),
        9: lambda *_: callback.cull("s1"),
    }
    fit(trainer(tmp_path, callback, Script(acts)), module)
    assert [seed.seed_id for seed in all_seeds(module)] == ["s2"]
    assert callback.summary()["seeds_culled"] == 1


def test_recycling_by_hand_keeps_the_function_and_revives_the_units(tmp_path):
    callback = growing(tmp_path, probes={"interval_steps": 1})
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))
    outputs: list[torch.Tensor] = []
    dormancy: dict[int, float] = {}

    def plant(runner: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            module.host.layers[2].bias[:6] = -50.0

    def ask(runner: L.Trainer, module: L.LightningModule) -> None:
        callback.recycle("host.layers.2")
        callback.recycle("host.head")

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        for signal in callback.health():
            if signal.layer_id == "host.layers.2" and not signal.seed_id:
                dormancy[runner.global_step] = signal.dormancy

    class Before(L.Callback):
        """Listed in front of the growing callback: sees the model right before its safe point."""

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 8:
                outputs.append(pl_module.host(x).detach())

    def after(runner: L.Trainer, module: L.LightningModule) -> None:
        if runner.global_step == 8:
            outputs.append(module.host(x).detach())

    module = mlp(hidden=(16, 12, 12), lr=0.01)
    runner = trainer(
        tmp_path, Before(), callback, Script({2: plant, 7: ask}), Every(look), Every(after), epochs=4
    )
    fit(runner, module)
    done, refused = decisions(tmp_path, "recycle")
    assert done.applied
    assert done.decision.numbers["units_recycled"] >= 6
    assert "output layer: its units are the answer" in refused.refused
    change = float((outputs[1] - outputs[0]).abs().max())
    assert change <= done.decision.numbers["max_output_change"] + 1e-5
    assert change < 1e-2
    assert dormancy[5] >= 0.5
    assert dormancy[max(dormancy)] < 0.3
    assert callback.summary()["layers_recycled"] == 1


def test_a_listener_that_fails_is_dropped_and_training_goes_on(tmp_path, caplog):
    events: list[Any] = []

    def broken(event: Any) -> None:
        raise ValueError("no display")

    callback = growing(tmp_path, listeners=[broken, events.append])
    fit(trainer(tmp_path, callback), mlp())
    assert len([r for r in caplog.records if "a listener of growth events failed" in r.message]) == 1
    assert len(events) > 3
