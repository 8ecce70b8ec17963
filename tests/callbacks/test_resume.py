"""A grown run that is taken up again from a checkpoint continues bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from msgspec import structs
from runs import (
    QUICK,
    STEPS_AN_EPOCH,
    Script,
    Tokens,
    decisions,
    differing,
    fit,
    gpt,
    growing,
    journal,
    mlp,
    plain_lines,
    stages,
    test,
    trainer,
    transitions,
    weights,
)

from esper.callbacks import TamiyoCallback
from esper.errors import CheckpointError
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord

WIDE = "bypass:host.layers.0->host.layers.1"
NEXT = "bypass:host.layers.1->host.layers.2"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
HEAD = "parallel:host.head"

EVENTS = (
    (0.06, WIDE, "widen", 6),
    (0.15, LONG, "shortcut", 4),
    (0.3, RANK, "lowrank", 2),
    (0.5, NEXT, "widen", 4),
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.01},
}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested plain types by its path, without times."""
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), v) for i, v in enumerate(value)]
    else:
        return {path: value}
    leaves: dict[str, Any] = {path: type(value).__name__ if not isinstance(value, (list, tuple)) else "list"}
    for key, item in items:
        if key not in ("timestamp", "execution_latency"):
            leaves |= flat(item, f"{path}/{key}")
    return leaves


def same(a: Any, b: Any) -> list[str]:
    """Paths at which two nested states differ in a bit."""
    x, y = flat(a), flat(b)
    tensors = {p for p, v in (*x.items(), *y.items()) if isinstance(v, torch.Tensor)}
    rest = [p for p in (x.keys() | y.keys()) - tensors if repr(x.get(p)) != repr(y.get(p))]
    return rest + differing(
        {p: v for p, v in x.items() if p in tensors}, {p: v for p, v in y.items() if p in tensors}
    )


class Case:
    """One way to grow; :meth:`run` starts it or takes it up."""

    def __init__(
        self,
        folder: Path,
        *,
        make: Callable[[], L.LightningModule],
        data: Callable[[], L.LightningDataModule] | None = None,
        events: tuple[Any, ...] = EVENTS,
        acts: Mapping[int, Callable[[TamiyoCallback], object]] | None = None,
        epochs: int = 4,
        save: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.folder, self.make, self.data = folder, make, data
        self.events, self.settings, self.epochs = events, settings, epochs
        self.acts, self.save = acts or {}, save or {"every_n_train_steps": 1}

    def run(self, name: str, checkpoint: Path | None = None, *, keep: bool = False, **options: Any) -> Path:
        folder = self.folder / name
        self.callback = growing(folder, *self.events, **self.settings)
        script = Script({step: lambda *_, act=act: act(self.callback) for step, act in self.acts.items()})
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, **self.save)
        self.module = self.make()
        callbacks = [self.callback, script, *([saver] if keep else [])]
        self.trainer = trainer(folder, *callbacks, epochs=self.epochs, enable_checkpointing=keep, **options)
        fit(self.trainer, self.module, self.data() if self.data else None, ckpt_path=checkpoint)
        return folder

    def state(self) -> dict[str, Any]:
        """Everything that has to be equal in the end."""
        # Read off before training ends would be the same: nothing moves after the last step.
        return {
            "model": weights(self.module),
            "optimizers": [o.state_dict() for o in self.trainer.optimizers],
            "schedulers": [c.scheduler.state_dict() for c in self.trainer.lr_scheduler_configs],
            "controller": self.callback._controller.state_dict() | {"health": self.health()},
            "requests": list(self.callback._requests),
        }

    def health(self) -> list[Any]:
        return [structs.replace(s, timestamp=0.0, execution_latency=0.0) for s in self.callback.health()]

    def assert_resumes(self, steps: list[int], **options: Any) -> None:
        whole = self.run("whole", keep=True)
        expected, lines = self.state(), plain_lines(whole)
        for step in steps:
            folder = self.folder / f"from{step}"
            folder.mkdir()
            shutil.copy(whole / "growth.jsonl", folder)
            self.run(folder.name, whole / f"step={step}.ckpt", **options)
            assert same(expected, self.state()) == []
            assert plain_lines(folder) == lines
            marks = [e.event for e in journal(folder) if isinstance(e, RunRecord)]
            assert marks == ["start", "note", "resume", "end"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_direct_growth_resumes_bit_for_bit_at_any_step(optimizer, tmp_path):
    acts = {
        9: lambda c: c.recycle("host.layers.0"),
        13: lambda c: c.cull("s2"),
        40: lambda c: c.germinate(LONG, "shortcut", 3),
    }
    case = Case(tmp_path, make=lambda: mlp(hidden=(16, 4, 12), **OPTIMIZERS[optimizer]), acts=acts)
    case.assert_resumes([5, 12, STEPS_AN_EPOCH, 19, 2 * STEPS_AN_EPOCH, 45])
    whole = tmp_path / "whole"
    assert stages(whole, "s1")[-1] == "fossilized"
    assert stages(whole, "s2")[-3:] == ["culled", "embargoed", "dormant"]
    assert [r.applied for r in decisions(whole, "germinate")] == [True] * 5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_isolated_growth_resumes_with_seeds_in_training_and_blending(optimizer, tmp_path):
    case = Case(
        tmp_path,
        make=lambda: mlp(**OPTIMIZERS[optimizer]),
        lifecycle=QUICK | {"mode": "isolated"},
        birth_lr_multiplier=2.0,
        probes={"interval_steps": 3},
    )
    case.assert_resumes([8, 16, 22, 37])
    moves = {(t.seed_id, t.target): t.step for t in transitions(tmp_path / "whole")}
    assert moves["s1", "training"] < 8 < moves["s1", "blending"] < 16 < moves["s1", "holding"] <= 22 + 4
    assert any(moves[s, "training"] < 22 < moves[s, "blending"] for s in ("s2", "s3"))


def test_a_host_with_dropout_and_a_shuffling_loader_resumes_at_the_end_of_an_epoch(tmp_path):
    case = Case(
        tmp_path,
        make=lambda: gpt(weight_decay=0.1),
        data=Tokens,
        events=((0.1, "stack:host.blocks.0", "stack"), (0.4, "parallel:host.head", "lowrank", 2)),
        save={"save_on_train_epoch_end": True},  # validation's loader draws from the random state, too
    )
    case.assert_resumes([20])


def test_policies_that_draw_and_score_resume_too(tmp_path):
    for policy, options in (("random", {"num_events": 4, "min_size": 2}), ("expressivity", {})):
        case = Case(
            tmp_path / policy,
            make=lambda: mlp(hidden=(16, 3, 16)),
            policy=policy,
            policy_options=options,
            probes={"decision_interval": 0.04, "held_out_batches": 1, "max_samples": 64},
            budget={"max_parameters_ratio": 4.0, "site_cooldown_steps": 0, "max_scoring_fraction": 1.0},
        )
        case.assert_resumes([6, 21])
        assert decisions(tmp_path / policy / "whole", "germinate")


def test_a_request_that_waits_for_its_safe_point_is_in_the_checkpoint(tmp_path):
    class AskAtTheEnd(L.Callback):
        """Asks between the last safe point of an epoch and its checkpoint."""

        def __init__(self, callback: TamiyoCallback) -> None:
            self.callback = callback

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                self.callback.germinate(WIDE, "widen", 5)

    def run(name: str, checkpoint: Path | None = None) -> Any:
        callback = growing(tmp_path / name)
        saver = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        module = mlp()
        runner = trainer(tmp_path, callback, AskAtTheEnd(callback), saver, enable_checkpointing=True)
        fit(runner, module, ckpt_path=checkpoint)
        return module

    whole = run("whole")
    again = run("again", tmp_path / "whole" / f"step={STEPS_AN_EPOCH}.ckpt")
    assert [seed.site.name for seed in all_seeds(whole)] == [WIDE]
    assert differing(weights(whole), weights(again)) == []
    assert plain_lines(tmp_path / "whole")[-5:] == plain_lines(tmp_path / "again")[-5:]


def test_a_snapshot_of_the_governor_survives_and_can_be_rolled_back_to(tmp_path):
    def ruin(callback: TamiyoCallback) -> None:
        with torch.no_grad():
            for p in callback.body.model.parameters():
                p.fill_(float("nan"))

    case = Case(
        tmp_path,
        make=mlp,
        events=((0.1, WIDE, "widen", 4),),
        acts={20: ruin},
        governor={"check_interval_steps": 2, "min_checks": 2},
    )
    case.assert_resumes([12])
    assert torch.isfinite(torch.cat([p.flatten() for p in case.module.parameters()])).all()


def test_checkpoints_hold_plain_types_only_and_weights_alone_regrow(tmp_path):
    case = Case(tmp_path, make=mlp, lifecycle=QUICK | {"mode": "isolated"})
    whole = case.run("whole", keep=True)
    loaded = torch.load(whole / "step=30.ckpt", weights_only=True)
    assert "TamiyoCallback" in loaded["callbacks"]
    bare = ModelCheckpoint(tmp_path / "bare", "{step}", save_weights_only=True, every_n_train_steps=34)
    module = mlp()
    callback = growing(tmp_path / "bare", *EVENTS)
    fit(trainer(tmp_path, callback, bare, epochs=4, enable_checkpointing=True), module)
    slim = torch.load(bare.best_model_path or tmp_path / "bare" / "step=68.ckpt", weights_only=True)
    assert "callbacks" not in slim
    fresh = mlp(seed=5)
    tester = trainer(tmp_path, growing(tmp_path / "test"))
    test(tester, fresh, tmp_path / "bare" / "step=68.ckpt")
    assert [s.seed_id for s in all_seeds(fresh)] == [s.seed_id for s in all_seeds(module)]
    assert differing(weights(fresh), weights(module)) == []


def test_an_older_smaller_checkpoint_loads_into_the_grown_model_and_the_best_one_is_tested(tmp_path):
    callback = growing(tmp_path, (0.5, WIDE, "widen", 6))
    early = ModelCheckpoint(tmp_path, "{step}", save_top_k=1, monitor="val_loss", mode="max")
    module = mlp(lr=0.02)
    runner = trainer(tmp_path, callback, early, epochs=4, enable_checkpointing=True)
    fit(runner, module)
    assert len(all_seeds(module)) == 1
    best = test(runner, module, "best")
    assert early.best_model_path.endswith(f"step={STEPS_AN_EPOCH}.ckpt")
    assert all_seeds(module) == []
    fresh = mlp(seed=3)
    assert best == test(trainer(tmp_path), fresh, early.best_model_path)
    runner.fit_loop.max_epochs = 5
    fit(runner, module)  # what was tested in between is not taken up
    assert [e.event for e in journal(tmp_path) if isinstance(e, RunRecord)] == [
        "start",
        "note",
        "end",
        "start",
        "end",
    ]


def test_a_second_fit_goes_on_with_the_grown_model(tmp_path):
    callback = growing(tmp_path, (0.2, WIDE, "widen", 6), (0.4, LONG, "shortcut", 4))
    module = mlp()
    fit(trainer(tmp_path, callback), module)
    before = weights(module)
    size = callback.body.num_parameters
    fit(trainer(tmp_path, callback), module)
    assert [s.seed_id for s in all_seeds(module)] == ["s1", "s3", "s2", "s4"]
    assert callback.body.num_parameters == size + 6 * (64 + 1 + 4) + 4 * (64 + 10)
    assert before.keys() < weights(module).keys()
    firsts = [r.step for r in decisions(tmp_path) if "falls at" in r.decision.reason]
    assert firsts.count(1) == 2  # the second run is planned from its own beginning
    starts = [e for e in journal(tmp_path) if isinstance(e, RunRecord) and e.event == "start"]
    assert len(starts) == 2


def test_more_epochs_on_the_same_trainer_count_on(tmp_path):
    callback = growing(tmp_path, (0.25, WIDE, "widen", 6))
    module = mlp(schedule="constant")
    runner = trainer(tmp_path, callback)
    fit(runner, module)
    runner.fit_loop.max_epochs = 4
    fit(runner, module)
    assert runner.global_step == 4 * STEPS_AN_EPOCH
    assert len(decisions(tmp_path, "germinate")) == 1
    steps = [r.step for r in decisions(tmp_path)]
    assert steps == sorted(steps)


def test_a_state_of_another_version_is_refused(tmp_path):
    callback = growing(tmp_path)
    with pytest.raises(CheckpointError, match="version 99, this esper reads 2"):
        callback.load_state_dict({"version": 99})


def test_the_same_run_twice_is_the_same(tmp_path):
    results = []
    for name in ("one", "two"):
        case = Case(tmp_path, make=mlp, policy="random", policy_options={"num_events": 3, "min_size": 2})
        folder = case.run(name)
        results.append((case.state(), plain_lines(folder)))
    assert same(results[0][0], results[1][0]) == []
    assert results[0][1] == results[1][1]
    assert decisions(tmp_path / "one", "germinate")
