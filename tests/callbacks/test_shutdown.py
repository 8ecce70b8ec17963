"""However a run ends, it leaves no hook, socket, thread or file behind; workers may fork or spawn beside it."""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import zmq
from runs import Script, Tokens, fit, gpt, growing, journal, mlp, trainer
from torch import nn

from esper.callbacks import TamiyoCallback
from esper.kasmina.layer import SeedLayer
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord
from esper.oona import find_runs

WIDE = "bypass:host.layers.0->host.layers.1"


def hooks(module: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, name)) for m in module.modules() for name in names)


def open_sockets() -> int:
    gc.collect()
    # By type: asking for __class__ makes some of torch's objects warn.
    return sum(issubclass(type(o), zmq.Socket) and not o.closed for o in gc.get_objects())


def assert_clean(callback: TamiyoCallback, runner: L.Trainer, module: nn.Module, folder: Path) -> None:
    assert hooks(module) == 0
    for layer in module.modules():
        if isinstance(layer, SeedLayer) and not all_seeds(module):
            assert layer._esper_slot is None
    for optimizer in runner.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    assert callback.run_id not in {run.run_id for run in find_runs()}
    kept = {path.name for path in folder.rglob("*") if path.is_file()}
    assert kept <= {"growth.jsonl"}


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C off once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


class Failing(L.Callback):
    def __init__(self, batch: int, error: type[BaseException]) -> None:
        self.batch, self.error = batch, error
        self.handle: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.batch:

            def fail(*_: Any) -> None:
                self.handle.remove()
                raise self.error("inside the host's step")

            self.handle = pl_module.host.head.register_forward_pre_hook(fail)


@pytest.mark.parametrize("batch", [0, 9])
@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, SystemExit), (RuntimeError, RuntimeError)])
def test_an_error_inside_a_step_leaves_nothing_behind(error, seen, batch, tmp_path):
    sockets = open_sockets()
    callback = growing(
        tmp_path, (0.0, WIDE, "widen", 4), probes={"interval_steps": 5},
        bus={"transport": "ipc"}, birth_lr_multiplier=0.5,
    )  # fmt: skip
    module = mlp()
    runner = trainer(tmp_path, callback, Failing(batch, error))
    with pytest.raises(seen):
        fit(runner, module)
    assert_clean(callback, runner, module, tmp_path)
    assert open_sockets() == sockets
    marks = [e for e in journal(tmp_path) if isinstance(e, RunRecord)]
    assert [m.event for m in marks if "sites" not in m.info] == ["start", "note"]
    assert marks[-1].info == {"exception": error.__name__}
    fit(trainer(tmp_path, callback), module)  # the same objects serve again
    assert_clean(callback, runner, module, tmp_path)


def test_an_error_before_training_is_the_one_that_is_seen(tmp_path):
    class Wrong(L.Callback):
        def on_sanity_check_start(self, *args: Any) -> None:
            raise RuntimeError("before training")

    callback = growing(tmp_path)
    module = mlp()
    for callbacks in ((callback, Wrong()), (callback,), (callback, Wrong())):
        if len(callbacks) == 2:
            with pytest.raises(RuntimeError, match="before training"):
                fit(trainer(tmp_path, *callbacks), module)
        else:
            fit(trainer(tmp_path, *callbacks), module)


def test_a_run_that_ends_well_leaves_nothing_either(tmp_path):
    sockets = open_sockets()
    callback = TamiyoCallback(policy="off", bus={"transport": "tcp"}, probes={"interval_steps": 3})
    module = mlp()
    runner = trainer(tmp_path, callback)
    fit(runner, module)
    assert_clean(callback, runner, module, tmp_path)
    assert open_sockets() == sockets


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_workers_start_beside_the_open_bus(method, tmp_path):
    callback = growing(
        tmp_path, (0.2, "parallel:host.head", "lowrank", 2), bus={}, probes={"interval_steps": 2}
    )
    module = gpt()
    data = Tokens(workers=1, context=multiprocessing.get_context(method))
    asked = Script({3: lambda *_: callback.germinate("stack:host.blocks.0", "stack")})
    runner = trainer(tmp_path, callback, asked, epochs=1, limit_train_batches=6, num_sanity_val_steps=0)
    fit(runner, module, data)
    assert {seed.blueprint for seed in all_seeds(module)} == {"lowrank", "stack"}
    assert_clean(callback, runner, module, tmp_path)
