"""Every way to feed, resume and repeat a loop, with growth happening in it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import random
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from runs import (
    Every,
    assert_registered,
    decisions,
    differing,
    fit,
    growing,
    journal,
    mlp,
    plain_lines,
    trainer,
    weights,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import esper
from esper.hosts import ClassifierModule, DigitsData, MLPConfig, OptimConfig
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord
from esper.report.journal import last_run

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
ENTRIES = ((0.1, WIDE, "widen", 4), (0.3, LONG, "shortcut", 3), (0.6, "parallel:host.layers.0", "lowrank", 2))

X = torch.randn(320, 64, generator=torch.Generator().manual_seed(0))
Y = X[:, :10].argmax(1)
DATA = TensorDataset(X, Y)
BATCHES = 10
"""Of an epoch, 32 samples each."""


class Place(DataLoader[Any]):
    """Shuffles, and keeps its place, as torchdata's StatefulDataLoader does: an epoch's order and a position."""

    epoch_seed, position = 0, 0
    restored: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # DataLoader draws for its workers, too, whether it resumes or not.
        drawn = int(torch.randint(1 << 30, (1,), generator=self.generator))
        self.epoch_seed, self.position = self.restored or (drawn, 0)
        if self.restored is not None and self.generator is not None:
            self.generator.set_state(self.restored_generator)
        self.restored = None
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        order = torch.randperm(len(X), generator=torch.Generator().manual_seed(self.epoch_seed)).split(32)
        for batch in order[self.position :]:
            self.position += 1
            yield [X[batch], Y[batch]]

    def state_dict(self) -> dict[str, Any]:
        drawn_from = None if self.generator is None else self.generator.get_state()
        return {"epoch_seed": self.epoch_seed, "position": self.position, "generator": drawn_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        inside = state["position"] < BATCHES
        self.restored = (state["epoch_seed"], state["position"]) if inside else None
        self.restored_generator = state["generator"]


class Random(Dataset[Any]):
    """Samples with noise from every generator that a transform may draw from."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index] + 0.1 * (torch.rand(1) + random.random() + float(np.random.rand())), Y[index]


class Stream(IterableDataset[Any]):
    """Does not say how long it is."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(X[i], Y[i]) for i in range(300)])


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(DATA, 32, shuffle=True, **options)


def by_itself(data: Dataset[Any] = DATA) -> DataLoader[Any]:
    return DataLoader(data, 32, shuffle=True, generator=torch.Generator().manual_seed(5))


class Data(L.LightningDataModule):
    def __init__(self, train: Callable[[], Any], val: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.made, self.train, self.val = 0, train, val

    def train_dataloader(self) -> Any:
        self.made += 1
        return self.train()

    def val_dataloader(self) -> Any:
        return [] if self.val is None else self.val()


class Pairs(ClassifierModule):
    """Takes a batch from each of two loaders; one of one loader alone it does not take."""

    def training_step(self, batch: Any, number: int) -> Tensor:
        x, y = (torch.cat(parts) for parts in zip(batch["a"], batch["b"], strict=True))
        return cross_entropy(self.host(x), y)


class PairsThatDoNotTell(Pairs):
    def validation_step(self, batch: Any, number: int) -> None:
        super().validation_step(batch, number)


class PairsThatTell(Pairs):
    def validation_step(self, batch: Any, number: int, dataloader_idx: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.host(x), y)


class SeveralSets(ClassifierModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class Noisy(ClassifierModule):
    """Draws in every training step, and has the trainer say how long the run is before the loops are restored."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return super().training_step((torch.dropout(x, 0.1, True), y), batch_idx)


class NoisyAtOneRate(Noisy):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def make(kind: type[ClassifierModule] = ClassifierModule) -> ClassifierModule:
    torch.manual_seed(0)
    return kind(MLPConfig(hidden=(16, 4, 12)), OptimConfig(schedule="constant"))


# ---------------------------------------------------------------- loaders of every form

Loop = tuple[type[ClassifierModule], Callable[[], Any], Callable[[], Any] | None, dict[str, Any], str]
OF_VALIDATION, NO_LOSS = "validation batches", "no step gave a loss"
LOOPS: dict[str, Loop] = {
    "a dict of loaders, a step that takes both, validation that returns its loss": (
        PairsThatTell, lambda: {"a": shuffled(), "b": shuffled()}, lambda: [shuffled(), shuffled()], {}, OF_VALIDATION,
    ),
    "a dict of loaders": (PairsThatDoNotTell, lambda: {"a": shuffled(), "b": shuffled()}, shuffled, {}, NO_LOSS),
    "a CombinedLoader, no validation": (
        Pairs, lambda: CombinedLoader({"a": shuffled(), "b": by_itself()}, "min_size"), None, {}, "does not validate",
    ),
    "a list of validation loaders": (SeveralSets, shuffled, lambda: [shuffled(), by_itself()], {}, OF_VALIDATION),
    "a dict of validation loaders": (SeveralSets, shuffled, lambda: {"x": shuffled(), "y": by_itself()}, {},
                                     OF_VALIDATION),
    "loaders made anew every epoch": (
        ClassifierModule, shuffled, shuffled, {"reload_dataloaders_every_n_epochs": 1}, OF_VALIDATION,
    ),
    "streams of unknown length": (
        ClassifierModule, lambda: DataLoader(Stream(), 32), lambda: DataLoader(Stream(), 32), {}, OF_VALIDATION,
    ),
    "a part of each epoch": (
        ClassifierModule, shuffled, shuffled, {"limit_train_batches": 0.5, "limit_val_batches": 3}, OF_VALIDATION,
    ),
    "validation within epochs": (ClassifierModule, shuffled, shuffled, {"val_check_interval": 3}, OF_VALIDATION),
    "transforms that draw": (
        ClassifierModule, lambda: DataLoader(Random(), 32), lambda: DataLoader(Random(), 32), {}, OF_VALIDATION,
    ),
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_a_run_grows_whatever_its_loaders_are(loop: Loop, tmp_path: Path) -> None:
    kind, train, val, options, source = loop
    callback = growing(tmp_path, *ENTRIES, horizon_steps=20)
    module, data = make(kind), Data(train, val)
    with contextlib.ExitStack() as expected:
        if source == NO_LOSS:
            expected.enter_context(pytest.warns(UserWarning, match="return the loss from validation_step"))
        fit(trainer(tmp_path, callback, Every(assert_registered), **options), module, data)
    assert [record.applied for record in decisions(tmp_path, "germinate")] == [True] * 3
    assert callback._run is not None
    assert source in callback._run.held_out_source()
    assert data.made == (2 if "reload_dataloaders_every_n_epochs" in options else 1)


@pytest.mark.parametrize(
    "loader", [shuffled, by_itself, lambda: by_itself(Random())], ids=["global", "own", "all"]
)
def test_looking_at_held_out_batches_moves_no_generator(loader: Any, tmp_path: Path) -> None:
    def run(*callbacks: L.Callback) -> dict[str, Tensor]:
        random.seed(3)
        np.random.seed(3)
        loaders = [loader(), loader()]
        fit(
            trainer(tmp_path, *callbacks), module := make(Noisy), Data(lambda: loaders[0], lambda: loaders[1])
        )
        return weights(module)

    watching = growing(tmp_path)
    assert differing(run(), run(watching)) == []
    assert watching._run is not None
    assert OF_VALIDATION in watching._run.held_out_source()


def test_validation_testing_and_prediction_around_a_fit_see_the_model_as_it_is(tmp_path: Path) -> None:
    callback, module, data = growing(tmp_path, *ENTRIES), mlp(), DigitsData()
    runner = trainer(tmp_path, callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = runner.validate(module, data, verbose=False)[0]["val_loss"]
        fit(runner, module)
        last = float(runner.callback_metrics["val_loss"])
        after = runner.validate(module, data, verbose=False)[0]["val_loss"]
        outputs = runner.predict(module, DataLoader(X, 320))
        runner.test(module, data, verbose=False)
    assert len(all_seeds(module)) == 3
    assert after == last < before
    with torch.no_grad():
        assert torch.equal(torch.cat(outputs), module.host(X))  # type: ignore[arg-type]


@pytest.mark.parametrize(("method", "persistent"), [("fork", True), ("forkserver", True)])
def test_workers_that_stay_serve_training_beside_the_open_bus(
    method: str, persistent: bool, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "num_workers": 1, "persistent_workers": persistent, 
        "multiprocessing_context": multiprocessing.get_context(method),
    }  # fmt: skip
    callback = growing(tmp_path, *ENTRIES, bus={"transport": "ipc"})
    data = Data(lambda: shuffled(**options), lambda: shuffled(**options))
    module = make()
    fit(trainer(tmp_path, callback, num_sanity_val_steps=0), module, data)
    assert len(all_seeds(module)) == 3
    assert callback._run is not None
    assert OF_VALIDATION in callback._run.held_out_source()


# ---------------------------------------------------------------- resumed from every place

WITHIN = {"every_n_train_steps": 7}
AT_VALIDATION = {"save_on_train_epoch_end": False, "every_n_epochs": 1}
AT_END = {"save_on_train_epoch_end": True}
Resumed = tuple[
    type[ClassifierModule], Callable[[], Any], Callable[[], Any] | None, dict[str, Any], dict[str, Any]
]
RESUMED: dict[str, Resumed] = {
    "within an epoch, a loader that keeps its place": (Noisy, lambda: Place(DATA, 32), shuffled, WITHIN, {}),
    "the same, which Lightning restores itself": (
        NoisyAtOneRate, lambda: Place(DATA, 32, generator=torch.Generator()), shuffled, WITHIN, {},
    ),
    "within an epoch, no validation": (NoisyAtOneRate, lambda: Place(DATA, 32), None, WITHIN, {}),
    "within an epoch, accumulating": (
        Noisy, lambda: Place(DATA, 32), by_itself, WITHIN, {"accumulate_grad_batches": 3},
    ),
    "after validation within an epoch": (
        Noisy, lambda: Place(DATA, 32), shuffled, AT_VALIDATION, {"val_check_interval": 4},
    ),
    "at the end of an epoch, a loader that keeps its place": (
        NoisyAtOneRate, lambda: Place(DATA, 32, generator=torch.Generator()), shuffled, AT_END, {},
    ),
    "at the end of an epoch, shuffled": (Noisy, shuffled, shuffled, AT_END, {}),
    "at the end of an epoch, a loader with a generator of its own": (Noisy, by_itself, by_itself, AT_END, {}),
    "at the end of an epoch, transforms that draw": (
        Noisy, lambda: DataLoader(Random(), 32, shuffle=True), lambda: by_itself(Random()), AT_END, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED.values(), ids=RESUMED.keys())
def test_a_run_resumes_bit_for_bit(case: Resumed, tmp_path: Path) -> None:
    kind, train, val, save, options = case

    def run(folder: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
        random.seed(4)
        np.random.seed(4)
        # Gates measure on held-out batches, so what the journal says hangs on which ones they are.
        callback = growing(folder, *ENTRIES, probes={"held_out_batches": 2})
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, **save)
        runner = trainer(folder, callback, saver, epochs=3, enable_checkpointing=True, **options)
        fit(runner, module := make(kind), Data(train, val), ckpt_path=checkpoint)
        return weights(module)

    expected = run(tmp_path / "whole")
    assert decisions(tmp_path / "whole", "germinate")
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    for checkpoint in dict.fromkeys((checkpoints[0], checkpoints[-1])):
        folder = tmp_path / checkpoint.stem
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "growth.jsonl", folder)
        assert differing(expected, run(folder, checkpoint)) == []
        assert plain_lines(folder) == plain_lines(tmp_path / "whole")


def test_checkpoints_that_would_lose_their_place_are_told_of_before_training(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=7)
    for loader, told in ((shuffled(), True), (Place(DATA, 32), False)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runner = trainer(tmp_path, growing(tmp_path), saver, epochs=1, enable_checkpointing=True)
            runner.fit(make(), loader)
        texts = [
            str(warning.message) for warning in caught if "cannot tell its place" in str(warning.message)
        ]
        assert len(texts) == told
        assert all("use a loader with state_dict and load_state_dict" in text for text in texts)


# ---------------------------------------------------------------- what a checkpoint also holds


class NotGrowable(L.LightningModule):
    """Keeps hyperparameters and things of its own in checkpoints."""

    def __init__(self, width: int = 8, note: str = "default") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen += 1
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen
        checkpoint["average"] = {name: value.clone() for name, value in self.state_dict().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen = checkpoint["seen"]


class Storing(esper.GrowableMixin, NotGrowable):
    """The same, which its own ``load_from_checkpoint`` regrows."""


def test_a_grown_module_with_things_of_its_own_loads_by_its_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = ((0.2, "bypass:net.0->net.2", "widen", 4), (0.5, "parallel:net.0", "lowrank", 2))
    callback = growing(tmp_path, *entries)
    saver = ModelCheckpoint(
        tmp_path, "{step}", save_top_k=2, monitor="step", mode="max", every_n_train_steps=5
    )
    module = Storing(width=6, note="mine")
    runner = trainer(tmp_path, callback, saver, enable_checkpointing=True)
    fit(runner, module, Data(lambda: Place(DATA, 32)))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=15.ckpt", "step=20.ckpt"]
    loaded = Storing.load_from_checkpoint(tmp_path / "step=20.ckpt")
    assert (loaded.hparams["width"], loaded.hparams["note"], loaded.seen) == (6, "mine", 20)
    assert differing(weights(loaded), weights(module)) == []
    assert [seed.stage for seed in all_seeds(loaded)] == [seed.stage for seed in all_seeds(module)]
    assert all_seeds(module)
    again = Storing(width=6)
    fit(
        trainer(tmp_path, growing(tmp_path / "again")),
        again,
        Data(lambda: Place(DATA, 32)),
        ckpt_path=tmp_path / "step=15.ckpt",
    )
    assert again.seen == 20
    caplog.clear()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger.name):
        fit(
            trainer(tmp_path / "bare", growing(tmp_path / "bare", *entries)),
            NotGrowable(),
            Data(lambda: Place(DATA, 32)),
        )
        fit(
            trainer(tmp_path / "mixed", growing(tmp_path / "mixed", *entries)),
            Storing(),
            Data(lambda: Place(DATA, 32)),
        )
    logger.removeHandler(caplog.handler)
    (told,) = {record.getMessage() for record in caplog.records if "has grown" in record.getMessage()}
    assert (
        "NotGrowable has grown: load its checkpoints by esper.load(model, path), or let the class inherit"
        in told
    )
    with pytest.raises(RuntimeError, match="esper_seeds"):
        NotGrowable.load_from_checkpoint(tmp_path / "step=20.ckpt")
    esper.load(plain := NotGrowable(width=6), tmp_path / "step=20.ckpt")
    assert differing(weights(plain), weights(module)) == []


# ---------------------------------------------------------------- notebooks: a cell is run again


def _seen(folder: Path) -> list[tuple[str, bool]]:
    return [(record.seed_id, record.applied) for record in decisions(folder, "germinate")]


def test_a_cell_that_makes_everything_anew_gives_the_same_again(tmp_path: Path) -> None:
    results = []
    for _ in range(2):
        module = mlp()
        fit(trainer(tmp_path, growing(tmp_path, *ENTRIES)), module)
        results.append(weights(module))
    assert differing(*results) == []
    assert [r.seed_id for r in last_run(journal(tmp_path)) if getattr(r, "seed_id", "")]
    assert len({event.run_id for event in journal(tmp_path)}) == 2


def test_a_cell_with_a_new_model_and_the_old_callback_begins_a_run_of_its_own(tmp_path: Path) -> None:
    callback, results = growing(tmp_path, *ENTRIES), []
    for _ in range(2):
        module = mlp()
        fit(trainer(tmp_path, callback, Every(assert_registered)), module)
        results.append(weights(module))
    assert differing(*results) == []
    assert _seen(tmp_path) == [("s1", True), ("s2", True), ("s3", True)] * 2
    assert len({event.run_id for event in journal(tmp_path)}) == 2


@pytest.mark.parametrize("again", ["trainer", "callback"])
def test_a_cell_with_the_old_model_goes_on_growing_it(again: str, tmp_path: Path) -> None:
    module, callback = mlp(), growing(tmp_path, *ENTRIES)
    for _ in range(2):
        callback = growing(tmp_path, *ENTRIES) if again == "callback" else callback
        fit(trainer(tmp_path, callback, Every(assert_registered)), module)
    assert _seen(tmp_path) == [(f"s{n}", True) for n in range(1, 7)]
    assert {seed.seed_id for seed in all_seeds(module)} == {f"s{n}" for n in range(1, 7)}


def test_a_cell_with_the_old_trainer_finds_nothing_left_to_do(tmp_path: Path) -> None:
    module, callback = mlp(), growing(tmp_path, *ENTRIES)
    runner = trainer(tmp_path, callback)
    fit(runner, module)
    before = weights(module)
    fit(runner, module)
    assert differing(before, weights(module)) == []
    assert [e.event for e in journal(tmp_path) if isinstance(e, RunRecord)] == ["start", "note", "end"]


class _Interrupt(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 9:
            raise KeyboardInterrupt


def test_an_interrupted_cell_runs_again_within_a_running_event_loop(tmp_path: Path) -> None:
    async def cell(*callbacks: L.Callback) -> L.LightningModule:
        module = mlp()
        fit(trainer(tmp_path, *callbacks), module)
        return module

    async def kernel() -> L.LightningModule:
        callback = growing(tmp_path, *ENTRIES, bus={})
        with pytest.raises(SystemExit):  # what Lightning makes of an interrupt
            await cell(callback, _Interrupt())
        return await cell(callback)

    before = signal.getsignal(signal.SIGINT)
    try:
        module = asyncio.run(kernel())
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from the first one on
    alone = mlp()
    fit(trainer(tmp_path / "alone", growing(tmp_path / "alone", *ENTRIES)), alone)
    assert differing(weights(alone), weights(module)) == []


def test_a_fit_that_failed_to_start_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    class Wrong(L.Callback):
        def on_train_start(self, *args: Any) -> None:
            raise RuntimeError("before training")

    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12)
    fit(trainer(tmp_path, growing(tmp_path, *ENTRIES), saver, epochs=1, enable_checkpointing=True), mlp())
    callback = growing(tmp_path, *ENTRIES)
    with pytest.raises(RuntimeError, match="before training"):
        fit(trainer(tmp_path, Wrong(), callback), mlp(), ckpt_path=tmp_path / "step=12.ckpt")
    module = mlp()
    fit(trainer(tmp_path / "new", callback), module)
    alone = mlp()
    fit(trainer(tmp_path / "alone", growing(tmp_path / "alone", *ENTRIES)), alone)
    assert differing(weights(alone), weights(module)) == []
