"""A training that grows is killed at the worst moments, and restarted: nothing is lost, half-written or done twice."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from runs import assert_registered, differing, fit, growing, journal, mlp, plain_lines, trainer, transitions
from survivor import EVENTS, Survivors
from torch import Tensor, nn

from esper import blueprint
from esper.callbacks.checkpoint_io import AtomicCheckpointIO
from esper.errors import CheckpointError
from esper.kasmina.blueprints.registry import _REGISTRY
from esper.kasmina.loading import read_checkpoint
from esper.kasmina.sites import BuildContext
from esper.kasmina.structure import all_seeds
from esper.messages import RunRecord
from esper.report.journal import read_journal
from esper.report.metrics import read_metrics
from esper.report.summary import read_summary
from esper.resuming import find_checkpoint

DEAD = (-signal.SIGKILL, -signal.SIGXFSZ)

# What a training dies of, one start of the script after another; then it is started once more and lives.
DEATHS: dict[str, list[dict[str, Any]]] = {
    "before the first checkpoint, in it, and beside it": [
        {"seconds": 0.0, "signal": signal.SIGKILL},
        {"bytes": 20_000},
        {"before": ["os.rename", "checkpoints/step=5.ckpt"], "nth": 1},
    ],
    "when the step's file is there and the last one is not": [
        {"before": ["os.rename", "checkpoints/last.ckpt"], "nth": 3},
        {"before": ["open", "checkpoints/.step=25.tmp.ckpt"], "nth": 1},
        {"before": ["os.rename", "checkpoints/step=40.ckpt"], "nth": 1},
    ],
    "while a seed is planted, registered, written down and fossilised": [
        {"call": "register_parameters", "nth": 2},
        {"call": "plant", "nth": 3},
        {"call": "write", "nth": 12},
        {"call": "_apply", "nth": 3},
    ],
    "while the journal goes back, twice": [
        {"before": ["open", "checkpoints/.step=35.tmp.ckpt"], "nth": 1},
        {"before": ["os.rename", "growth.jsonl"], "nth": 1},
        {"call": "truncate_after", "nth": 1},
    ],
    "at any moment": [{"seconds": None, "signal": signal.SIGKILL}] * 4,
}


@pytest.fixture(scope="module")
def survivors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivors]:
    server = Survivors(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(survivors: Survivors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert survivors.run("fit", folder) == 0, survivors.errors.read_text()
    return folder


def final(folder: Path) -> dict[str, Tensor]:
    content = torch.load(folder / "final.ckpt", weights_only=True)
    return {name: value for name, value in content["state_dict"].items() if isinstance(value, Tensor)}


def lines(folder: Path) -> list[dict[str, Any]]:
    """What the journal says of the run that was written to last, without times."""
    run_id = journal(folder)[-1].run_id
    (folder / "last").mkdir(exist_ok=True)
    raw = [line for line in (folder / "growth.jsonl").read_text().splitlines() if run_id in line]
    (folder / "last" / "growth.jsonl").write_text("\n".join(raw) + "\n")
    return plain_lines(folder / "last")


def marks(folder: Path) -> list[RunRecord]:
    return [event for event in journal(folder) if isinstance(event, RunRecord)]


def assert_whole(folder: Path) -> None:
    """Whatever stands there under its own name is complete."""
    for path in folder.rglob("*.ckpt"):
        if not path.name.startswith("."):
            assert "global_step" in read_checkpoint(path)
    if (folder / "growth.jsonl").exists():
        read_journal(folder / "growth.jsonl")


@pytest.mark.parametrize("deaths", DEATHS.values(), ids=DEATHS.keys())
def test_a_killed_run_ends_as_if_nothing_had_happened(
    deaths: list[dict[str, Any]], survivors: Survivors, whole: Path, tmp_path: Path
) -> None:
    moments = random.Random(len(DEATHS))
    folder = tmp_path / "run"
    for death in deaths:
        by_time = "seconds" in death
        stop = (
            {**death, "seconds": moments.uniform(0, 0.4)} if by_time and death["seconds"] is None else death
        )
        status = survivors.run("fit", folder, stop=stop)
        assert status in DEAD or (status == 0 and by_time), survivors.errors.read_text()
        assert_whole(folder)
    assert survivors.run("fit", folder) == 0, survivors.errors.read_text()
    assert differing(final(folder), final(whole)) == []
    assert lines(folder) == lines(whole)
    assert all(mark.info["events_undone"] >= 0 for mark in marks(folder) if mark.event == "resume")
    assert [path.name for path in folder.rglob(".*")] == []


def test_the_run_that_all_others_are_compared_with_grows_to_its_end(whole: Path) -> None:
    moves = {(move.seed_id, move.target): move.step for move in transitions(whole)}
    assert [moves[f"s{n}", "germinated"] for n in range(1, 5)] == [3, 11, 26, 36]
    assert [moves[f"s{n}", "fossilized"] for n in range(1, 5)] == [10, 18, 32, 42]


def test_ctrl_c_in_a_script_leaves_a_run_that_continues(
    survivors: Survivors, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop = {"seconds": 0.15, "signal": signal.SIGINT}
    assert survivors.run("fit", folder, "bus", "guarded", stop=stop) == 1  # Lightning's exit status
    assert_whole(folder)
    assert marks(folder)[-1].info == {"exception": "KeyboardInterrupt"}
    assert list(survivors.runtime.glob("*")) == []
    exception = folder / "checkpoints" / "exception.ckpt"
    at = read_checkpoint(exception)["global_step"]
    assert survivors.run("fit", folder, f"from={exception}") == 0, survivors.errors.read_text()
    assert {move.seed_id for move in transitions(folder)} == {"s1", "s2", "s3", "s4"}
    resumed = [mark for mark in marks(folder) if mark.event == "resume"]
    assert [mark.step for mark in resumed] == [at]
    # What was interrupted in the middle of a step is not repeated to the bit, what a checkpoint holds is.
    assert survivors.run("fit", folder) == 0, survivors.errors.read_text()


class _Interrupting(nn.Linear):
    """A branch that somebody presses Ctrl-C on, between its planting and its registration."""

    armed = False

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        if _Interrupting.armed and sys._getframe(1).f_code.co_name == "register":
            _Interrupting.armed = False
            os.kill(os.getpid(), signal.SIGINT)
        return super().named_parameters(*args, **kwargs)


@pytest.fixture
def interrupting() -> Iterator[None]:
    """The blueprint ``interrupting``, for one test: every other would meet it at its sites."""
    before = dict(_REGISTRY)
    blueprint("interrupting", kinds=("bypass",))(_interrupting)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


def _interrupting(context: BuildContext, size: int) -> nn.Module:
    source, target = context.source_layer, context.target_layer
    assert isinstance(source, nn.Linear)
    assert isinstance(target, nn.Linear)
    branch = _Interrupting(source.in_features, target.out_features, bias=False)
    nn.init.zeros_(branch.weight)
    return branch


class _Arm(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        _Interrupting.armed = trainer.global_step < 12


def test_ctrl_c_waits_until_a_seed_is_registered(interrupting: None, tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: L.Callback, checkpoint: Path | None = None) -> L.LightningModule:
        module = mlp()
        grower = growing(folder, (0.3, EVENTS[0][1], "interrupting"))
        runner = trainer(folder, grower, *callbacks, enable_checkpointing=True)
        try:
            fit(runner, module, ckpt_path=checkpoint)
        finally:
            assert_registered(runner, module)
        return module

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "one", _Arm(), OnExceptionCheckpoint(tmp_path, "exception"))
    finally:
        signal.signal(signal.SIGINT, before)
    (seed,) = all_seeds(run(tmp_path / "two", checkpoint=tmp_path / "exception.ckpt"))
    assert seed.blueprint == "interrupting"
    assert [m.info for m in marks(tmp_path / "one")][-1] == {"exception": "KeyboardInterrupt"}


# ---------------------------------------------------------------- esper train

SMALL = (
    "trainer.max_epochs=3", "host.hidden=[12,4,8]", "kasmina.lifecycle.gate_interval_steps=2",
    "kasmina.lifecycle.min_holding_steps=4", "kasmina.budget.max_scoring_fraction=1", "policy=random",
    "kasmina.probes.interval_steps=5", "trainer.log_every_n_steps=1", "controls=none", "bus=off",
)  # fmt: skip


def test_esper_train_survives_a_kill_before_each_file_takes_its_place(
    survivors: Survivors, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    assert survivors.run("train", expected, *SMALL) == 0, survivors.errors.read_text()
    folder = tmp_path / "run"
    arguments: tuple[str, ...] = SMALL
    files = ("checkpoints/.last.tmp.ckpt", "checkpoints/previous.ckpt", "metrics.csv", "grown.pt", "summary.json",
             "growth.png")  # fmt: skip
    for file in files:
        stop = {
            "before": ["open" if ".tmp" in file else "os.rename", file],
            "nth": 2 if ".tmp" in file else 1,
        }
        assert survivors.run("train", folder, *arguments, stop=stop) == -signal.SIGKILL, (
            file, survivors.errors.read_text(),
        )  # fmt: skip
        assert_whole(folder)
        arguments = ("resume",)
        if file == "checkpoints/previous.ckpt":
            continue
        read_metrics(folder / "metrics.csv")
        if file == "grown.pt":  # and a disk that fails
            last = folder / "checkpoints/last.ckpt"
            last.write_bytes(last.read_bytes()[:-5000])
            (folder / "checkpoints/previous.ckpt").write_bytes((tmp_path / "kept").read_bytes())
        elif file == "metrics.csv":
            (tmp_path / "kept").write_bytes((folder / "checkpoints/last.ckpt").read_bytes())
    assert survivors.run("train", folder, "resume") == 0, survivors.errors.read_text()
    errors = survivors.errors.read_text()
    assert "last.ckpt, but it does not load" in errors
    assert "previous.ckpt instead, which holds step 17" in errors
    one, two = (read_summary(f / "summary.json").arms[0] for f in (folder, expected))
    assert (one.loss, one.accuracy, one.parameters) == (two.loss, two.accuracy, two.parameters)
    assert plain_lines(folder) == plain_lines(expected)
    for name in ("metrics.csv", "growth.png", "summary.json", "grown.pt"):
        assert (folder / name).stat().st_size > 0
    figures = [read_metrics(f / "metrics.csv")["train_loss"] for f in (folder, expected)]
    assert list(figures[0].values) == list(figures[1].values)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["last.ckpt"]
    assert [p.name for p in folder.rglob(".*") if p.name != ".hydra"] == []


# ---------------------------------------------------------------- which checkpoint a run continues from


def _checkpoint(path: Path, step: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {"global_step": step, "state_dict": {"w": torch.arange(1000.0)}, "pytorch-lightning_version": "2"},
        path,
    )
    return path


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_the_newest_whole_checkpoint_is_taken_and_named(damage: Any, tmp_path: Path, caplog: Any) -> None:
    folder = tmp_path / "checkpoints"
    last, previous = _checkpoint(folder / "last.ckpt", 30), _checkpoint(folder / "previous.ckpt", 20)
    _checkpoint(folder / "epoch=0.ckpt", 10)
    torch.save({"w": torch.ones(2)}, folder / "weights.ckpt")
    assert find_checkpoint(str(tmp_path), tmp_path) == last
    damage(last)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(str(tmp_path), tmp_path) == previous
    assert "continuing from" in caplog.text
    assert "previous.ckpt instead, which holds step 20" in caplog.text
    if last.exists():
        with pytest.raises(CheckpointError, match=r"damaged.*beside it lie epoch=0.ckpt, previous.ckpt"):
            find_checkpoint(str(last), tmp_path)


def test_a_run_without_a_whole_checkpoint_says_why(tmp_path: Path) -> None:
    (tmp_path / "growth.jsonl").touch()
    with pytest.raises(CheckpointError, match="stopped before it wrote its first checkpoint; start it again"):
        find_checkpoint(str(tmp_path), tmp_path)
    _cut(_checkpoint(tmp_path / "checkpoints/last.ckpt", 3))
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*start the run again"):
        find_checkpoint(str(tmp_path), tmp_path)


def test_a_write_that_fails_leaves_the_checkpoint_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"global_step": 2, "bad": lambda: None}, path)
    assert read_checkpoint(path) == {"global_step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
