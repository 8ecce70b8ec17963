"""Averages of weights beside a growing run: right by name, whatever grows, is culled, or is resumed."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from runs import (
    QUICK,
    Every,
    Script,
    cnn,
    decisions,
    differing,
    fit,
    growing,
    interventions,
    mlp,
    test,
    trainer,
    weights,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from esper import load
from esper.callbacks.averaging import averaged_copy
from esper.errors import UnsupportedError
from esper.hosts import DigitsData
from esper.kasmina.layer import SEEDS
from esper.kasmina.structure import all_seeds

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
EVENTS = ((0.06, WIDE, "widen", 6), (0.15, LONG, "shortcut", 4), (0.3, RANK, "lowrank", 2))
DECAY = 0.8
SLOW = QUICK | {"mode": "isolated", "blend_steps": 30, "min_training_steps": 2, "embargo_steps": 4}
"""Seeds are trained apart, then blended in over most of the run."""

IMAGES = DigitsData(images=True)


class ByName(L.Callback):
    """The average as one would write it down: a dict of tensors, each begun when its name first appears."""

    def __init__(self, *, buffers: bool) -> None:
        self.average: dict[str, Tensor] = {}
        self.step, self.buffers = 0, buffers

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        live = tensors(module)
        for name in self.average.keys() - live.keys():
            del self.average[name]
        for name, value in live.items():
            averaged = value.is_floating_point() and (self.buffers or name in dict(module.named_parameters()))
            if averaged and name in self.average:
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value
            else:
                self.average[name] = value.clone()


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Floating parameters and buffers that stand in checkpoints, seeds' strengths left out."""
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {n: x.detach() for n, x in found.items() if x.is_floating_point() and not n.endswith(".alpha")}


def averaged(callback: L.Callback) -> nn.Module:
    module = averaged_copy(callback)
    assert module is not None
    return module


def names(module: nn.Module) -> list[str]:
    return [n for n, _ in (*module.named_parameters(), *module.named_buffers())]


class Congruent(Every):
    """Looks, after each batch, whether the average has the module's tensors in the module's order."""

    def __init__(self, *callbacks: L.Callback) -> None:
        self.seen: set[int] = set()

        def look(runner: L.Trainer, module: L.LightningModule) -> None:
            for callback in callbacks:
                assert names(averaged(callback)) == names(module)
            self.seen.add(len(all_seeds(module)))

        super().__init__(look)


@pytest.mark.parametrize("buffers", [True, False], ids=["buffers", "parameters"])
@pytest.mark.parametrize("order", ["grower first", "average first"])
def test_each_average_belongs_to_its_own_tensor(order, buffers, tmp_path):
    """Growth amid the layers, a cull and a second seed at one layer: all of it by name, as written down."""
    grower = growing(
        tmp_path,
        (0.05, "bypass:host.layers.0->host.layers.1", "conv_widen", 4),
        (0.1, "parallel:host.layers.1", "depthwise", 2),
        (0.4, "bypass:host.layers.1->host.layers.2", "conv_widen", 2),
        lifecycle=SLOW,
        probes={"interval_steps": 1},
    )
    ema = EMAWeightAveraging(decay=DECAY, use_buffers=buffers)
    oracle = ByName(buffers=buffers)
    pair = [grower, ema] if order == "grower first" else [ema, grower]
    look = Congruent(ema)
    cull = Script({10: lambda *_: grower.cull("s2")})
    module = cnn()
    final: dict[str, Tensor] = {}

    class Before(L.Callback):
        """Keeps the average before it takes the module's place."""

        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            final.update({n: x.clone() for n, x in tensors(averaged(ema)).items()})

    fit(trainer(tmp_path, *pair, look, oracle, cull, Before()), module, IMAGES)
    assert [d.applied for d in decisions(tmp_path, "germinate")] == [True] * 3
    assert look.seen == {0, 1, 2}
    assert {s.seed_id for s in all_seeds(module)} == {"s1", "s3"}
    assert final.keys() == oracle.average.keys()
    for name, value in oracle.average.items():
        torch.testing.assert_close(
            final[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    # In the end the module holds the average; an average that trails far behind says that it is one.
    assert any(SEEDS in name for name in final)
    for name, value in tensors(module).items():
        assert torch.equal(value, final[name]), name


class DuringValidation(L.Callback):
    """Looks at module and copy while the average stands in for the module; list it behind the averaging callback."""

    def __init__(self, ema: L.Callback) -> None:
        self.ema = ema
        self.losses: list[tuple[float, float]] = []
        self.alphas: list[float] = []

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        kept = averaged(self.ema)  # it holds the module's own values now
        shown, live = all_seeds(pl_module), all_seeds(kept)
        assert [(s.stage, float(s.alpha)) for s in shown] == [(s.stage, float(s.alpha)) for s in live]
        self.alphas += [float(s.alpha) for s in shown]
        self.losses.append((held_out_loss(copy.deepcopy(pl_module)), held_out_loss(copy.deepcopy(kept))))


def held_out_loss(module: nn.Module) -> float:
    data = DigitsData().splits.val
    x, y = data[torch.arange(len(data))]
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module.eval()(x), y))


@pytest.mark.parametrize("order", ["grower first", "average first"])
def test_validation_and_checkpoints_have_the_grown_average(order, tmp_path):
    """Stage and strength of a blending seed are facts of the run: they are exchanged as they are."""
    grower = growing(tmp_path, *EVENTS, lifecycle=SLOW, probes={"interval_steps": 1})
    ema = EMAWeightAveraging(decay=DECAY)
    pair = [grower, ema] if order == "grower first" else [ema, grower]
    during = DuringValidation(ema)
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=False)
    runner = trainer(tmp_path, *pair, during, saver, epochs=3, enable_checkpointing=True)
    fit(runner, mlp())
    assert any(0.0 < alpha < 1.0 for alpha in during.alphas)
    for epoch, (average, live) in enumerate(during.losses):
        assert abs(average - live) > 1e-4
        saved = load(mlp(seed=9), tmp_path / f"epoch={epoch}.ckpt")
        assert all_seeds(saved)
        assert held_out_loss(saved) == pytest.approx(average, abs=1e-6)
    tested = test(runner, mlp(seed=9), tmp_path / "epoch=2.ckpt")
    assert tested["test_acc"] > 0.3


@pytest.mark.parametrize("kind", ["grower first", "average first", "swa", "by epoch"])
def test_a_run_with_an_average_resumes_bit_for_bit(kind, tmp_path):
    acts = {12: lambda c: c.cull("s2"), 30: lambda c: c.germinate(LONG, "shortcut", 3)}

    def run(name: str, checkpoint: Path | None = None, *, keep: bool = False) -> list[dict[str, Tensor]]:
        folder = tmp_path / name
        grower = growing(folder, *EVENTS, lifecycle=SLOW, probes={"interval_steps": 2})
        average: L.Callback
        if kind == "swa":
            average = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=2)
        else:
            epochs = {"update_every_n_steps": 0, "update_starting_at_epoch": 0} if kind == "by epoch" else {}
            average = EMAWeightAveraging(decay=DECAY, **epochs)
        pair = [average, grower] if kind == "average first" else [grower, average]
        script = Script({step: lambda *_, act=act: act(grower) for step, act in acts.items()})
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=4)
        module = mlp(schedule="constant")
        runner = trainer(
            folder,
            *pair,
            script,
            Congruent(average),
            *([saver] if keep else []),
            enable_checkpointing=keep,
            epochs=3,
        )
        with pytest.MonkeyPatch.context() as patch:
            # So that the averages can be compared apart from the weights: neither is what training left otherwise.
            patch.setattr(type(average), "on_train_end", L.Callback.on_train_end)
            fit(runner, module, ckpt_path=checkpoint)
        assert {s.seed_id for s in all_seeds(module)} == {"s1", "s3", "s4"}
        states = [dict(runner.optimizers[0].state[p]) for p in module.parameters()]
        return [weights(module), weights(averaged(average)), *states]

    whole = run("whole", keep=True)
    assert differing(whole[0], whole[1]) != []
    # Not from the last step of an epoch: an average by epochs loses that one then, without growth as well
    # (lightning 2.6.6 does not end or begin the epoch again).
    for step in (8, 12, 28):
        (tmp_path / f"from{step}").mkdir()
        shutil.copy(tmp_path / "whole" / "growth.jsonl", tmp_path / f"from{step}")
        again = run(f"from{step}", tmp_path / "whole" / f"step={step}.ckpt")
        for a, b in zip(whole, again, strict=True):
            assert differing(a, b) == []


def test_a_stochastic_average_counts_a_seed_from_its_first_value(tmp_path):
    """One average over the epochs from the third on, BatchNorm host; the seed grows in the fourth."""
    grower = growing(tmp_path, (0.7, "bypass:host.layers.0->host.layers.1", "conv_widen", 4))
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)
    module = cnn(schedule="constant")
    first: dict[str, Tensor] = {}
    epochs: list[dict[str, Tensor]] = []

    class Note(L.Callback):
        """Notes what each epoch begins with, and with what values the seed was born."""

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if 1 <= trainer.current_epoch <= 5:
                epochs.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            for name, value in pl_module.named_parameters():
                first.setdefault(name, value.detach().clone())

    runner = trainer(tmp_path, Note(), grower, swa, Note(), epochs=6, limit_train_batches=6)
    fit(runner, module, IMAGES)
    assert len(all_seeds(module)) == 1
    assert [SEEDS in "".join(e) for e in epochs].count(False) == 2 * 4
    for name, value in module.named_parameters():
        expected = torch.stack([epoch.get(name, first[name]) for epoch in epochs[::2]]).mean(0)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-4, atol=1e-6, msg=name)
    assert runner.max_epochs == 6
    assert torch.isfinite(runner.callback_metrics["val_loss"])


def test_after_a_rollback_the_average_begins_again(tmp_path):
    """What was averaged while the run diverged would stay in the average for good."""
    ema = EMAWeightAveraging(decay=0.99)
    grower = growing(tmp_path, (0.1, WIDE, "widen", 4))

    def explode(runner: L.Trainer, module: L.LightningModule) -> None:
        with torch.no_grad():
            module.host.head.weight.fill_(float("nan"))

    back: list[bool] = []

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        back.append(all(bool(torch.isfinite(x).all()) for x in tensors(averaged(ema)).values()))

    module = mlp()
    fit(trainer(tmp_path, ema, grower, Script({14: explode}), Every(look)), module)
    assert [e.action for e in interventions(tmp_path)][:1] == ["rollback"]
    assert False in back
    assert back[-1]
    assert all(bool(torch.isfinite(x).all()) for x in tensors(module).values())


def test_an_average_inside_the_module_is_refused_before_training(tmp_path):
    module = mlp()
    module.mean = AveragedModel(module.host)
    with pytest.raises(
        UnsupportedError, match=r"averaged model 'mean' inside ClassifierModule.*EMAWeightAveraging"
    ):
        fit(trainer(tmp_path, growing(tmp_path)), module)
    assert not list(tmp_path.rglob("growth.jsonl"))


def test_an_average_of_a_part_of_the_module_is_refused_before_training(tmp_path):
    class OfTheHost(WeightAveraging):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            self._average_model = AveragedModel(pl_module.host)

    with pytest.raises(UnsupportedError, match=r"average of OfTheHost to be a copy.*average the whole"):
        fit(trainer(tmp_path, growing(tmp_path), OfTheHost()), mlp())


def test_the_average_of_a_fitted_seed_begins_with_the_fit(tmp_path):
    """A closed-form start is computed after the seed was planted, within the same safe point."""
    grower = growing(tmp_path, (0.1, WIDE, "widen", 4), widen_start="closed_form")
    ema = EMAWeightAveraging(decay=1.0)  # stays where it begins
    born: dict[str, Tensor] = {}

    def look(runner: L.Trainer, module: L.LightningModule) -> None:
        for seed in all_seeds(module):
            for name, value in seed.branch.named_parameters():
                born.setdefault(name, value.detach().clone())

    fit(trainer(tmp_path, grower, ema, Every(look), max_steps=20), mlp())
    (seed,) = all_seeds(averaged(ema))
    for name, value in seed.branch.named_parameters():
        assert torch.equal(value, born[name])


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_may_begin_in_the_middle_of_a_grown_run(kind, tmp_path):
    """Its copy is made before the checkpoint of a run without it is loaded, and is not in there."""
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=15)
    fit(trainer(tmp_path, growing(tmp_path, *EVENTS), saver, enable_checkpointing=True, max_steps=15), mlp())
    average: L.Callback = EMAWeightAveraging(decay=DECAY)
    if kind == "swa":
        average = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    module = mlp()
    look = Congruent(average)
    fit(trainer(tmp_path, average, growing(tmp_path), look), module, ckpt_path=saver.best_model_path)
    assert look.seen == {3}
    assert all(bool(torch.isfinite(x).all()) for x in tensors(module).values())
