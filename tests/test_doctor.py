"""The doctor tells what can grow and what conflicts, and leaves the model as it was."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper import TamiyoCallback, attach
from esper.cli import main
from esper.doctor import parse_inputs
from esper.errors import AttachError, ConfigError
from esper.hosts import ClassifierModule, MLPConfig, OptimConfig

BATCH = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))


class Net(L.LightningModule):
    """Has what a look could disturb: batch norm, dropout, a frozen part, a log, a list, the trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.rest = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.unused = nn.LayerNorm(5)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.norm(self.first(x)).relu())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        assert self.trainer.current_epoch == 0
        self.losses.append(float(loss.detach()) + random.random() + float(np.random.rand()))
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return {"optimizer": torch.optim.AdamW(self.parameters())}


class Careless(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        batch[0].zero_()
        return loss


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("a training step would train")


class NeedsTheRun(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)]


class Other(TamiyoCallback):
    """Lightning itself refuses two of the very same class."""


def everything(module: nn.Module) -> list[Any]:
    """All that a look could change, bit for bit."""
    state = [(name, _bytes(value)) for name, value in module.state_dict().items()]
    grads = [None if p.grad is None else _bytes(p.grad) for p in module.parameters()]
    parts = [
        (name, id(part), type(part), part.training, sorted(vars(part)), part._forward_pre_hooks.copy())
        for name, part in module.named_modules()
    ]
    generators = (_bytes(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    return [state, grads, [id(p) for p in module.parameters()], parts, generators]


def _bytes(value: Tensor) -> bytes:
    return value.detach().numpy().tobytes()


@pytest.mark.parametrize("cls", [Careless, Manual])
def test_nothing_is_changed(cls: type[Net], capsys: pytest.CaptureFixture[str]) -> None:
    module = cls()
    module.norm.eval()
    module(BATCH[0]).sum().backward()
    batch = (BATCH[0].clone(), BATCH[1])
    before = everything(module)
    found = TamiyoCallback().doctor(module, batch)
    assert everything(module) == before
    assert torch.equal(batch[0], BATCH[0])
    assert module.losses == []
    assert module._trainer is None
    assert found.healthy
    attach(module, BATCH[0])  # it was not attached


def test_sites_prices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    found = TamiyoCallback(budget={"max_parameters_ratio": 1.5}).doctor(module, BATCH)
    shown = capsys.readouterr().out
    body = attach(module, BATCH[0])
    assert [entry.site for entry in found.diagnosis.sites] == body.sites
    for entry in found.diagnosis.sites:
        size = body.default_size(entry.site, entry.usual.blueprint)
        assert entry.usual == (
            entry.usual.blueprint, size, *body.cost(entry.site, entry.usual.blueprint, size)
        )  # fmt: skip
        least = min(
            body.cost(entry.site, name, body.default_size(entry.site, name)).parameters
            for name in entry.site.blueprints
        )
        assert entry.cheapest.parameters == least
    usual = {entry.site.name: entry.usual.blueprint for entry in found.diagnosis.sites}
    assert usual["bypass:rest.1->rest.3"] == "widen"
    assert usual["parallel:first"] == "lowrank"
    assert set(found.diagnosis.refused) == {"norm", "unused"}
    assert "no blueprint" in found.diagnosis.refused["norm"]
    assert "never called" in found.diagnosis.refused["unused"]
    host = sum(p.numel() for p in module.parameters())
    assert found.parameters_allowed == int(1.5 * host) - host
    low, high = found.flops_allowed
    assert 0 < low <= high
    for text in (
        "rest.1->rest.3",
        "widen 16",
        "never called",
        "max_parameters_ratio=1.5",
        "Can grow: 3 layers",
    ):
        assert text in shown


def test_settings_and_optimizers_that_conflict_are_told_together(capsys: pytest.CaptureFixture[str]) -> None:
    module = ClassifierModule(MLPConfig(in_features=6, hidden=(8, 4), num_classes=3), OptimConfig())
    callback = TamiyoCallback(bus=None)
    trainer = L.Trainer(accelerator="cpu", logger=False, callbacks=[callback, Other(bus=None)])
    assert callback.doctor(module, BATCH).healthy
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    found = callback.doctor(module, BATCH, trainer=trainer)
    assert [conflict.what for conflict in found.conflicts] == [
        "more than one TamiyoCallback",
        "the optimizer LBFGS",
    ]
    assert not found.healthy
    shown = capsys.readouterr().out
    assert "Conflict: the optimizer LBFGS" in shown
    assert "use AdamW or SGD" in shown
    assert module._trainer is None


def test_what_could_not_be_looked_at_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    found = TamiyoCallback().doctor(NeedsTheRun(), BATCH)
    (note,) = found.notes
    assert note.startswith("the optimizers were not looked at: configure_optimizers failed outside of a run")
    assert found.healthy


def test_a_model_that_is_attached_or_has_grown_is_looked_at_too(capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    names = [entry.site.name for entry in TamiyoCallback().doctor(module, BATCH).diagnosis.sites]
    body = attach(module, BATCH[0])
    assert [e.site.name for e in TamiyoCallback().doctor(module, BATCH).diagnosis.sites] == names
    body.germinate("bypass:rest.1->rest.3", "widen", 4)
    found = TamiyoCallback().doctor(module, BATCH)
    assert [entry.site.name for entry in found.diagnosis.sites] == names
    assert found.diagnosis.num_parameters == body.topology.num_parameters
    assert len(body.seeds) == 1


def test_the_budget_of_a_frozen_host_is_that_of_its_trained_part(capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    module.first.requires_grad_(False)
    found = TamiyoCallback().doctor(module, BATCH)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert found.parameters_allowed == trained
    assert f"({trained} of them trained)" in capsys.readouterr().out
    attach(module, BATCH[0]).germinate("bypass:rest.1->rest.3", "widen", 4)
    grown = 4 * (8 + 1) + 4 * 3
    assert TamiyoCallback().doctor(module, BATCH).parameters_allowed == trained - grown


def test_failures_say_what_to_do() -> None:
    class Locked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    class Silent(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None: ...

    callback = TamiyoCallback()
    with pytest.raises(AttachError, match=r"Locked cannot be copied .*lock.*keep what cannot be copied"):
        callback.doctor(Locked(), BATCH)
    with pytest.raises(AttachError, match=r"Net failed on the batch.*RuntimeError.*give a batch"):
        callback.doctor(Net(), (torch.randn(4, 7), BATCH[1]))
    with pytest.raises(AttachError, match=r"Silent.training_step should return the loss.*NoneType"):
        callback.doctor(Silent(), BATCH)
    with pytest.raises(
        AttachError, match=r"taken from LightningModule.training_step, which it does not have"
    ):
        callback.doctor(L.LightningModule(), BATCH)


# ---------------------------------------------------------------- the command line

SOURCE = """
import lightning.pytorch as L
import torch
from torch import nn

class Plain(nn.Sequential):
    def __init__(self, width=8):
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)
    def forward(self, ids, *, mask):
        return self.b(self.a(self.embed(ids)).relu()) * mask.unsqueeze(-1)

class Rigid(nn.LSTM):
    def __init__(self):
        super().__init__(6, 3)

class Module(L.LightningModule):
    def __init__(self, kind="adam"):
        super().__init__()
        self.net, self.kind = Plain(), kind
        self.example_input_array = torch.randn(2, 6)
    def forward(self, x):
        return self.net(x)
    def configure_optimizers(self):
        cls = torch.optim.LBFGS if self.kind == "lbfgs" else torch.optim.Adam
        return cls(self.parameters())

class WithData(Module):
    def __init__(self, empty=False):
        super().__init__()
        self.example_input_array, self.empty, self.ready = None, empty, False
    def setup(self, stage):
        self.ready = stage == "fit"
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def train_dataloader(self):
        assert self.ready
        return [] if self.empty else [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))]

def make():
    return Plain(width=5)

number = 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a user's module, as the working directory."""
    (tmp_path / "my_doctored_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def doctor(name: str, *options: str) -> int:
    return main(["doctor", f"my_doctored_models:{name}", *options])


@pytest.mark.parametrize(
    ("name", "options", "status", "parameters"),
    [
        ("Module", [], 0, 83),
        ("WithData", [], 0, 83),
        ("Plain", ["--input", "2,6"], 0, 83),
        ("Plain", ["--input", "2,6", "--set", "width=4"], 0, 43),
        ("make", ["--input", "2,6"], 0, 53),
        ("Tokens", ["--input", "ids=2,5:int64", "--input", "mask=2,5:bool"], 0, 66),
        ("Module", ["--set", "kind=lbfgs"], 1, 83),
        ("Rigid", ["--input", "5,2,6"], 1, 132),
        ("Module", ["--trainer", "accelerator=cpu", "--trainer", "gradient_clip_val=0.5"], 0, 83),
        ("Module", ["--trainer", "strategy=fsdp", "--trainer", "accelerator=cpu"], 1, 83),
    ],
)  # fmt: skip
def test_the_command_reports_as_json_and_by_its_exit_status(
    name: str, options: list[str], status: int, parameters: int, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert doctor(name, *options, "--json") == status
    found = json.loads(capsys.readouterr().out)
    assert found["healthy"] == (status == 0)
    assert found["host"]["parameters"] == parameters
    assert bool(found["sites"]) == (name != "Rigid")
    assert bool(found["conflicts"]) == (status == 1 and name == "Module")
    if "strategy=fsdp" in options:
        assert "Lightning refuses them on this machine" in found["conflicts"][0]["why"]


def test_the_command_shows_tables(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("Module") == 0
    shown = capsys.readouterr().out
    assert "Beside a layer (parallel)" in shown
    assert "Can grow: 2 layers" in shown
    assert doctor("Rigid", "--input", "5,2,6") == 1
    assert "Nothing can grow in this model." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Plain", [], "neither example_input_array nor train_dataloader; give the shape of an input"),
        ("WithData", ["--set", "empty=true"], "train_dataloader of my_doctored_models:WithData gave no batch"),
        ("Plain", ["--input", "2,7"], "failed on the batch that the doctor gave it: RuntimeError"),
        ("Plain", ["--input", "2,six"], "--input expects [NAME=]N,N,...[:DTYPE]"),
        ("Plain", ["--input", "2,6", "--set", "depth=3"], "cannot be built with the arguments that were given (depth)"),
        ("Plain", ["--input", "2,6", "--set", "depth"], "--set expects KEY=VALUE"),
        ("Plain", ["--input", "2,6", "--trainer", "devices=2"], "--trainer looks at how a LightningModule"),
        ("Absent", [], "cannot be imported"),
        ("number", [], "should be a module class, or a function that makes a module"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(
    name: str, options: list[str], said: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(name, *options) == 2
    assert said in capsys.readouterr().err


def test_inputs_are_read_by_position_and_by_name() -> None:
    found = parse_inputs(["2,3", "mask=1:bool", "ids=2,2:int64", "2:bfloat16"])
    assert [(tuple(x.shape), x.dtype) for x in found.args] == [
        ((2, 3), torch.float32),
        ((2,), torch.bfloat16),
    ]
    assert {k: (tuple(x.shape), x.dtype) for k, x in found.kwargs.items()} == {
        "mask": ((1,), torch.bool),
        "ids": ((2, 2), torch.int64),
    }
    assert int(found.kwargs["ids"].max()) <= 1
    for wrong in ("", "2,-1", "2,2:float33", "ids="):
        with pytest.raises(ConfigError, match="--input expects"):
            parse_inputs([wrong])
