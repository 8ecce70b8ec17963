"""Hooks that have nothing to do are passed over, and are there again when they have."""

import lightning.pytorch as L
from runs import Every, Script, fit, mlp, trainer

from esper.callbacks import TamiyoCallback
from esper.callbacks.hooks import HookSwitch
from esper.kasmina.lifecycle import LifecycleConfig

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)


def on(callback):
    return {name for name in BATCH_HOOKS if callable(getattr(callback, name))}


def watched(callback, tmp_path, *others, epochs=2):
    """Which hooks were on after each batch: optimizer step -> names."""
    seen = {}
    look = Every(lambda runner, module: seen.__setitem__(runner.global_step, on(callback)))
    fit(trainer(tmp_path, *others, callback, look, epochs=epochs), mlp())
    return seen


def test_while_nothing_is_due_only_the_end_of_a_batch_is_called(tmp_path):
    callback = TamiyoCallback(policy="off", probes={"interval_steps": 10})
    seen = watched(callback, tmp_path)
    for step, hooks in seen.items():
        before_a_sample = step % 10 == 9
        assert hooks == ({"on_train_batch_start", "on_before_optimizer_step"} if before_a_sample else set())
    assert callback.health()


def test_gradients_are_asked_for_when_the_governor_wants_them(tmp_path):
    settings = {"check_interval_steps": 3, "idle_gradient_checks": 2}
    callback = TamiyoCallback(
        policy_options={"num_events": 0}, governor=settings, probes={"interval_steps": 0}
    )
    seen = watched(callback, tmp_path)
    assert {step for step, hooks in seen.items() if "on_before_optimizer_step" in hooks} == {
        step for step in seen if step % 6 == 5
    }


def test_a_seed_put_there_by_hand_wakes_everything_within_the_same_step(tmp_path):
    callback = TamiyoCallback(policy="off", lifecycle=LifecycleConfig(mode="isolated"))
    hooks_then = []

    def germinate(runner, module):
        before = on(callback)
        callback.body.germinate("parallel:host.layers.0", "bottleneck", 2)
        hooks_then.append((before, on(callback)))

    seen = watched(callback, tmp_path, Script({5: germinate}), epochs=1)
    assert hooks_then == [(set(), {"on_before_optimizer_step"})]
    assert all("on_before_optimizer_step" in seen[step] for step in range(6, 17))


def test_a_hook_of_a_subclass_is_never_passed_over(tmp_path):
    class Counting(TamiyoCallback):
        calls = 0

        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.calls += 1

    callback = Counting(policy="off")
    fit(trainer(tmp_path, callback, epochs=1), mlp())
    assert callback.calls == 17


def test_a_second_run_begins_with_every_hook_that_does_something():
    callback = TamiyoCallback(policy="off")
    HookSwitch(callback, TamiyoCallback).set("on_before_backward", False)
    assert "on_before_backward" not in on(callback)
    HookSwitch(callback, TamiyoCallback).all_on()
    assert on(callback) == {"on_train_batch_start", "on_before_backward", "on_before_optimizer_step"}
