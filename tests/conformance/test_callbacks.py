"""Lightning's own callbacks beside a run that grows: each does its work, and growth does its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    RichModelSummary,
    RichProgressBar,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from runs import (
    STEPS_AN_EPOCH,
    Every,
    Script,
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
from torch import nn

from esper import load
from esper.callbacks import TamiyoCallback
from esper.errors import UnsupportedError
from esper.hosts import ClassifierModule, MLPConfig, OptimConfig
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord
from esper.report.metrics import read_metrics

WIDE = "bypass:host.layers.0->host.layers.1"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"
ENTRIES = ((0.1, WIDE, "widen", 6), (0.3, LONG, "shortcut", 4), (0.5, RANK, "lowrank", 2))


@dataclass
class Run:
    """What a row's check looks at."""

    folder: Path
    runner: L.Trainer
    module: L.LightningModule
    callbacks: list[L.Callback]
    plain: Callable[[], Run] = field(repr=False)
    """The same run without growth."""

    @property
    def callback(self) -> Any:
        """The callback of the row."""
        return self.callbacks[0]


@dataclass(frozen=True)
class Row:
    """One of Lightning's callbacks.

    Attributes:
        name: Of the callback.
        make: Builds it, from the run's folder.
        check: Looks at the run afterwards.
        options: Of the trainer.
        entries: What grows, and when.
    """

    name: str
    make: Callable[[Path], Sequence[L.Callback]]
    check: Callable[[Run], object]
    options: dict[str, Any] = field(default_factory=dict)
    entries: tuple[tuple[Any, ...], ...] = ENTRIES


def stopped_early(run: Run) -> None:
    assert run.callback.stopped_epoch == 2
    assert run.runner.global_step == 3 * STEPS_AN_EPOCH
    assert [e.event for e in journal(run.folder) if isinstance(e, RunRecord)][-1] == "end"


def same_rates(run: Run) -> None:
    """Growth neither renames a series nor changes its values."""
    plain = run.plain()
    assert sorted(run.callback.lrs) == sorted(plain.callback.lrs)
    for name, rates in plain.callback.lrs.items():
        assert run.callback.lrs[name] == rates
    series = [
        {n: list(s.values) for n, s in read_metrics(r.folder / "metrics.csv").items() if n.startswith("lr-")}
        for r in (run, plain)
    ]
    assert series[0] == series[1]
    assert sorted(series[0]) == [
        f"lr-AdamW/pg{group}{suffix}" for group in (1, 2) for suffix in ("", "-momentum", "-weight_decay")
    ]


def kept_the_best(run: Run) -> None:
    saver = run.callback
    assert len(saver.best_k_models) == 2
    for path in map(Path, saver.best_k_models):
        grown = load(mlp(seed=5), path)
        assert differing(weights(grown), torch.load(path, weights_only=True)["state_dict"]) == []
    assert {path.name for path in run.folder.glob("*.ckpt")} == {Path(p).name for p in saver.best_k_models}
    losses = sorted(float(value) for value in saver.best_k_models.values())
    assert float(saver.best_model_score) == losses[0]


def accumulated(run: Run) -> None:
    """17 steps in the first epoch, then 5 in each: growth is planned over these, not over 17 in each."""
    assert run.runner.global_step == STEPS_AN_EPOCH + 3 * 5
    assert [d.step for d in decisions(run.folder, "germinate")] == [4, 10, 16]
    assert all(d.applied for d in decisions(run.folder, "germinate"))


def wrote(name: str) -> Callable[[Run], None]:
    def check(run: Run) -> None:
        found = read_metrics(run.folder / "metrics.csv")
        assert any(name in series for series in found), sorted(found)

    return check


def grew(run: Run) -> None:
    """Nothing further to look at."""


def timer(folder: Path) -> list[L.Callback]:
    return [Timer("00:01:00:00", interval="step")]


ROWS = (
    Row(
        "EarlyStopping",
        lambda folder: [EarlyStopping("val_loss", min_delta=100.0, patience=2)],
        stopped_early,
        {"epochs": 8},
        tuple((fraction / 3, *what) for fraction, *what in ENTRIES),
    ),
    Row(
        "LearningRateMonitor",
        lambda folder: [LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)],
        same_rates,
    ),
    Row(
        "ModelCheckpoint(save_top_k)",
        lambda folder: [ModelCheckpoint(folder, "{epoch}", monitor="val_loss", save_top_k=2)],
        kept_the_best,
        {"enable_checkpointing": True, "epochs": 4},
    ),
    Row(
        "ModelCheckpoint(every_n_train_steps)",
        lambda folder: [
            ModelCheckpoint(folder, "{step}", monitor="train_loss", save_top_k=2, every_n_train_steps=5)
        ],
        kept_the_best,
        {"enable_checkpointing": True, "epochs": 3},
    ),
    Row(
        "GradientAccumulationScheduler",
        lambda folder: [GradientAccumulationScheduler({1: 4})],
        accumulated,
        {"epochs": 4},
    ),
    Row("Timer", timer, lambda run: run.callback.time_elapsed("train") > 0),
    Row(
        "ThroughputMonitor",
        lambda folder: [ThroughputMonitor(lambda batch: len(batch[0]), window_size=5)],
        wrote("train/device/samples_per_sec"),
    ),
    Row("DeviceStatsMonitor", lambda folder: [DeviceStatsMonitor(cpu_stats=True)], wrote("cpu_percent")),
    Row("RichProgressBar", lambda folder: [RichProgressBar()], grew, {"enable_progress_bar": True}),
    Row("TQDMProgressBar", lambda folder: [TQDMProgressBar()], grew, {"enable_progress_bar": True}),
    Row(
        "LambdaCallback",
        lambda folder: [
            LambdaCallback(on_train_batch_end=lambda runner, module, *_: assert_registered(runner, module))
        ],
        grew,
    ),
)


def run_row(row: Row, folder: Path, *, grow: bool = True) -> Run:
    callbacks = list(row.make(folder))
    module = mlp(weight_decay=0.1)
    grower = [growing(folder, *row.entries), Every(assert_registered)] if grow else []
    logger = CSVLogger(folder, name="", version="")
    options = {"epochs": 2, "logger": logger, "log_every_n_steps": 1} | row.options
    runner = trainer(folder, *grower, *callbacks, **options)
    fit(runner, module)
    return Run(folder, runner, module, callbacks, lambda: run_row(row, folder / "plain", grow=False))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_callback_works_beside_growth(row, tmp_path):
    run = run_row(row, tmp_path)
    assert [d.applied for d in decisions(tmp_path, "germinate")] == [True] * 3
    assert len(all_seeds(run.module)) == 3
    row.check(run)


# ---------------------------------------------------------------- summaries


@pytest.mark.parametrize("summary", [ModelSummary, RichModelSummary, None])
def test_each_change_of_structure_is_told_beside_a_model_summary(summary, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    module = mlp()
    module.host.head.bias.requires_grad_(False)
    sizes = [sum(p.numel() for p in module.parameters())]
    grower = growing(tmp_path, (0.1, WIDE, "widen", 6), lifecycle={"min_holding_steps": 500})
    look = Every(lambda runner, module: sizes.append(sum(p.numel() for p in module.parameters())))
    script = Script({10: lambda *_: grower.cull("s1")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "160")
        patch.setattr("rich._console", None)  # the one that an earlier test made has its own width
        fit(trainer(tmp_path, grower, look, script, *([summary()] if summary else []), epochs=1), module)
    before, grown, after = sizes[0], max(sizes), sizes[-1]
    assert before == after < grown
    told = caplog.text + capsys.readouterr().out
    if summary is None:
        assert "Growth at step" not in told
        return
    assert told.count("Growth at step") == 2
    first, second = told.split("Growth at step")[1:]
    for text, sign, old, new in ((first, "+", before, grown), (second, "-", grown, before)):
        row = next(line for line in text.splitlines() if "s1" in line)
        assert sign in row
        assert WIDE in row
        assert "widen(6)" in row
        assert f"{grown - before:,}" in row
        assert f"{old:,} -> {new:,} Total params" in text
        assert f"{old - 10:,} -> {new - 10:,} Trainable params" in text


# ---------------------------------------------------------------- finders: trial steps, then everything as before


class Tunable(ClassifierModule):
    """A classifier with the attribute that a learning-rate finder changes."""

    lr = 0.01


def tunable() -> Tunable:
    torch.manual_seed(0)
    return Tunable(MLPConfig(hidden=(16, 4, 12)), OptimConfig())


FINDERS: dict[str, Callable[[], L.Callback]] = {
    "LearningRateFinder": lambda: LearningRateFinder(num_training_steps=12, update_attr=False),
    "BatchSizeFinder": lambda: BatchSizeFinder(init_val=32, max_trials=2, steps_per_trial=3),
}


def found(folder: Path, finder: L.Callback | None) -> dict[str, torch.Tensor]:
    module = tunable()
    grower = growing(folder, *ENTRIES, governor={"check_interval_steps": 5})
    sizes: list[int] = []
    look = Every(lambda runner, module: sizes.append(len(all_seeds(module))))
    fit(trainer(folder, grower, look, *([finder] if finder else [])), module)
    assert marks(folder) == ["start", "end"]
    assert sizes[0] == 0
    assert len(sizes) == 2 * STEPS_AN_EPOCH
    return weights(module)


def marks(folder: Path) -> list[str]:
    return [e.event for e in journal(folder) if isinstance(e, RunRecord) and e.event != "note"]


@pytest.mark.parametrize("name", FINDERS)
def test_a_finders_trial_leaves_no_trace_in_a_growing_run(name, tmp_path):
    """It trains without any callback, then loads what it saved: the run is bit for bit what it is without it."""
    finder = FINDERS[name]()
    tried = found(tmp_path / "with", finder)
    assert differing(tried, found(tmp_path / "without", None)) == []
    assert plain_lines(tmp_path / "with") == plain_lines(tmp_path / "without")
    if isinstance(finder, LearningRateFinder):
        assert len(finder.optimal_lr.results["loss"]) == 12


class LaterRates(LearningRateFinder):
    """Looks for a rate at the start of the second epoch, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
        """Not yet."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            before, states = weights(pl_module), [copy.deepcopy(s.state) for s in all_seeds(pl_module)]
            self.lr_find(trainer, pl_module)
            assert differing(before, weights(pl_module)) == []
            assert states == [s.state for s in all_seeds(pl_module)]
            self.num_seeds = len(states)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_trial_between_two_growths_neither_ages_nor_grows_a_seed(resumed, tmp_path):
    """Lightning loses the place in the data by such a trial, with growth or without; what grows stays as it is."""
    finder, folder = LaterRates(num_training_steps=12, update_attr=False), tmp_path / "run"
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    module, entries = tunable(), (*ENTRIES[:2], (0.6, *ENTRIES[2][1:]))
    first = trainer(folder, growing(folder, *entries), finder, saver, enable_checkpointing=True)
    fit(first, module)
    if resumed:  # from before the trial
        module = tunable()
        callbacks = growing(folder, *entries), finder, Every(assert_registered)
        fit(trainer(folder, *callbacks), module, ckpt_path=tmp_path / "step=15.ckpt")
    assert finder.num_seeds == 2
    steps = [d.step for d in decisions(folder, "germinate") if d.applied]
    assert steps == [4, 11, 21]
    assert marks(folder) == (["start", "resume", "end"] if resumed else ["start", "end"])
    assert [s.seed_id for s in sorted(all_seeds(module), key=lambda s: s.seed_id)] == ["s1", "s2", "s3"]


def test_a_found_rate_is_used_by_host_and_seeds(tmp_path):
    module = tunable()
    runner = trainer(tmp_path, growing(tmp_path, *ENTRIES), LearningRateFinder(num_training_steps=30))
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters(), lr=module.lr)
    fit(runner, module)
    assert module.lr != 0.01
    assert {group["lr"] for group in runner.optimizers[0].param_groups} == {module.lr}
    assert_registered(runner, module)
    assert len(all_seeds(module)) == 3


def test_a_second_fit_with_a_finder_is_a_run_of_its_own(tmp_path):
    """The finder saves and loads the first run's state; that does not make the second fit its continuation."""
    module, grower = tunable(), growing(tmp_path, *ENTRIES)
    fit(trainer(tmp_path, grower), module)
    lines = len(journal(tmp_path))
    fit(trainer(tmp_path, grower, LearningRateFinder(num_training_steps=12, update_attr=False)), module)
    events = journal(tmp_path)
    assert len(events) > lines
    assert marks(tmp_path) == ["start", "end"] * 2
    assert len({e.run_id for e in events}) == 2


@pytest.mark.parametrize("finder", ["LearningRateFinder", "BatchSizeFinder"])
def test_resuming_with_a_finder_is_refused(finder, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=20)
    fit(trainer(tmp_path, growing(tmp_path, *ENTRIES), saver, enable_checkpointing=True), tunable())
    module, before = tunable(), (tmp_path / "growth.jsonl").read_bytes()
    runner = trainer(tmp_path, growing(tmp_path), FINDERS[finder]())
    with pytest.raises(
        UnsupportedError, match=rf"resuming with {finder}: .*; remove the finder.*esper\.load"
    ):
        fit(runner, module, ckpt_path=saver.best_model_path)
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    assert differing(weights(module), saved) == []  # loaded, and not trained
    assert (tmp_path / "growth.jsonl").read_bytes() == before


# ---------------------------------------------------------------- pruning, fine-tuning, exceptions


def test_pruning_is_refused_before_training(tmp_path):
    module = mlp()
    before = weights(module)
    with pytest.raises(
        UnsupportedError, match=r"ModelPruning: it replaces weights.*prune the exported network"
    ):
        fit(trainer(tmp_path, growing(tmp_path), ModelPruning("l1_unstructured", amount=0.2)), module)
    assert differing(before, weights(module)) == []
    fit(
        trainer(
            tmp_path, TamiyoCallback(policy="off", bus=None), ModelPruning("l1_unstructured", amount=0.2)
        ),
        module,
    )


class Backbone(L.LightningModule):
    """What BackboneFinetuning wants: a ``backbone`` that the optimizer learns of when it is unfrozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
@pytest.mark.parametrize("order", ["grower first", "fine-tuning first"])
def test_a_backbone_grows_while_frozen_and_after_and_resumes(order, tmp_path):
    """The callback rebuilds the optimizers' groups from their names, and compares tensors by value."""
    entries = (
        (0.1, "parallel:backbone.0", "lowrank", 2),
        (0.3, "bypass:head.1->head.3", "widen", 4),
        (0.7, "bypass:backbone.0->backbone.2", "widen", 5),
    )

    def run(name: str, checkpoint: Path | None = None) -> tuple[L.Trainer, L.LightningModule]:
        folder = tmp_path / name
        grower, tuner = growing(folder, *entries), BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        pair = [grower, tuner] if order == "grower first" else [tuner, grower]
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
        module = Backbone()
        runner = trainer(
            folder, *pair, Every(every_parameter_once), saver, epochs=3, enable_checkpointing=True
        )
        fit(runner, module, ckpt_path=checkpoint)
        assert [d.refused for d in decisions(folder, "germinate")] in ([""] * 3, [""])
        return runner, module

    runner, module = run("whole")
    assert {s.site.target for s in all_seeds(module)} == {"backbone.0", "head.3", "backbone.2"}
    assert len(runner.optimizers[0].param_groups) == 2
    head, backbone = ({id(p) for p in group["params"]} for group in runner.optimizers[0].param_groups)
    late = next(s for s in all_seeds(module) if s.site.target == "backbone.2")
    assert {id(p) for p in late.parameters()} <= backbone
    assert not head & backbone
    resumed, again = run("again", tmp_path / "whole" / "step=30.ckpt")
    assert [[len(g["params"]) for g in o.param_groups] for o in resumed.optimizers] == [
        [len(head), len(backbone)]
    ]
    assert names_by_group(resumed, again) == names_by_group(runner, module)


def every_parameter_once(runner: L.Trainer, module: L.LightningModule) -> None:
    held = [id(p) for group in runner.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for seed in all_seeds(module) for p in seed.parameters()} <= set(held)


def names_by_group(runner: L.Trainer, module: L.LightningModule) -> list[list[str]]:
    names = {id(p): name for name, p in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in runner.optimizers[0].param_groups]


class StopError(Exception):
    """What the test raises."""


def stop(runner: L.Trainer, module: L.LightningModule) -> None:
    if runner.global_step == 15:
        raise StopError


@pytest.mark.parametrize("when", ["between steps", "within a step"])
def test_a_run_goes_on_from_the_checkpoint_of_an_exception(when, tmp_path):
    saver = OnExceptionCheckpoint(tmp_path, "last")
    stopper = Every(stop) if when == "between steps" else Script({15: stop})
    with pytest.raises(StopError):
        fit(trainer(tmp_path, growing(tmp_path, *ENTRIES), stopper, saver, enable_checkpointing=True), mlp())
    module = mlp()
    callbacks = growing(tmp_path, *ENTRIES), Every(assert_registered)
    fit(trainer(tmp_path, *callbacks), module, ckpt_path=tmp_path / "last.ckpt")
    whole = mlp()
    fit(trainer(tmp_path / "whole", growing(tmp_path / "whole", *ENTRIES)), whole)
    if when == "between steps":
        assert differing(weights(module), weights(whole)) == []
        assert plain_lines(tmp_path) == plain_lines(tmp_path / "whole")
    else:  # the batch that was being trained on counts as seen
        assert weights(module).keys() == weights(whole).keys()
        assert [d.step for d in decisions(tmp_path, "germinate")] == [4, 11, 17]


def test_a_table_of_many_seeds_is_cut(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    at_once = [(0.1, f"parallel:host.layers.{i}", "lowrank", 1) for i in range(30)]
    module = mlp(hidden=(6,) * 30)
    budget = {"max_parameters_ratio": 20.0, "max_seeds_alive": 30, "max_germinations_per_epoch": 30}
    grower = growing(tmp_path, *at_once, budget=budget)
    fit(trainer(tmp_path, grower, ModelSummary(), epochs=1, max_steps=4), module)
    assert len(all_seeds(module)) == 30
    (text,) = caplog.text.split("Growth at step")[1:]
    assert text.count("lowrank(1)") == 24
    assert "... and 6 more" in text
