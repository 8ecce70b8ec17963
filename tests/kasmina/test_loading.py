"""Loading grows and ungrows, or changes nothing and says what is wrong."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.errors import CheckpointError, ConfigError
from esper.export_command import export_checkpoint, import_class
from esper.kasmina.body import attach
from esper.kasmina.export import save
from esper.kasmina.loading import GrowableMixin, load, read_checkpoint
from esper.kasmina.structure import all_seeds, follow_state_dict

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

pytestmark = [
    # The runs are tiny, so Lightning's advice on loaders and loggers does not apply.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no logger configured"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    # The branch of an isolated seed stays in evaluation on purpose.
    pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training"),
]


class Net(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


class Module(L.LightningModule):
    """As a user has it."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(width)
        self.example_input_array = X[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Growable(GrowableMixin, Module):
    """The same with the mixin."""


def grow(model: nn.Module, prefix: str = "") -> nn.Module:
    body = attach(model, X)
    for site, blueprint, stage in (
        (f"bypass:{prefix}fc1->{prefix}fc2", "widen", "fossilized"),
        (f"parallel:{prefix}fc2", "lowrank", "blending"),
        (f"parallel:{prefix}fc1", "bottleneck", "training"),
    ):
        seed = body.germinate(site, blueprint)
        with torch.no_grad():
            for parameter in seed.branch.parameters():
                parameter.add_(0.2)
        seed.enter(stage, {"blending": 0.3, "training": 0.0}.get(stage, 1.0))  # type: ignore[arg-type]
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(X)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def lightning_checkpoint(
    path: Path, *, weights_only: bool = False, cls: type[L.LightningModule] = Module
) -> L.LightningModule:
    """A real checkpoint of a real, short run."""
    torch.manual_seed(3)
    module = cls()
    grow(module, "net.")
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(X), batch_size=4))
    trainer.save_checkpoint(path, weights_only=weights_only)
    return module


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_lightning_checkpoint_loads_into_a_fresh_module(tmp_path: Path, weights_only: bool) -> None:
    module = lightning_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only)
    fresh = Module()
    assert esper.load(fresh, tmp_path / "last.ckpt") is fresh
    assert torch.equal(outputs(fresh), outputs(module))
    seeds = {seed.seed_id: seed for seed in all_seeds(fresh)}
    assert [seeds[i].stage for i in ("s1", "s2", "s3")] == ["fossilized", "blending", "training"]
    assert float(seeds["s2"].alpha) == pytest.approx(0.3)


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_mixin_makes_load_from_checkpoint_work(tmp_path: Path, weights_only: bool) -> None:
    module = lightning_checkpoint(tmp_path / "last.ckpt", weights_only=weights_only, cls=Growable)
    fresh = Growable.load_from_checkpoint(tmp_path / "last.ckpt", strict=True, weights_only=True)
    assert torch.equal(outputs(fresh), outputs(module))
    with pytest.raises(RuntimeError, match="Unexpected key"):  # what happens without
        Module.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)


def test_the_mixin_refuses_what_does_not_fit(tmp_path: Path) -> None:
    lightning_checkpoint(tmp_path / "last.ckpt", cls=Growable)
    with pytest.raises(
        CheckpointError, match=r"'net.fc1.weight' has shape \(5, 6\), the model's is \(4, 6\)"
    ):
        Growable.load_from_checkpoint(tmp_path / "last.ckpt", width=4, weights_only=True)


def write_torch(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def write_safetensors(state: dict[str, Any], path: Path) -> None:
    save_file(state, path)


@pytest.mark.parametrize(("write", "name"), [(write_torch, "net.pt"), (write_safetensors, "net.safetensors")])
def test_plain_state_dicts_load(tmp_path: Path, write: Callable[..., None], name: str) -> None:
    model = grow(Net())
    write(dict(model.state_dict()), tmp_path / name)
    fresh = load(Net(), tmp_path / name)
    assert torch.equal(outputs(fresh), outputs(model))
    again = attach(fresh, X)  # and growth goes on, with ids that are new
    assert again.germinate("parallel:fc1", "lowrank").seed_id == "s4"


def test_an_older_checkpoint_removes_seeds(tmp_path: Path) -> None:
    model = Net()
    torch.save(model.state_dict(), tmp_path / "old.pt")
    expected = outputs(model)
    grow(model)
    follow_state_dict(model)
    load(model, tmp_path / "old.pt")
    assert all_seeds(model) == []
    assert torch.equal(outputs(model), expected)


def test_not_strict_passes_over_keys_of_the_host_only(tmp_path: Path) -> None:
    state = grow(Net()).state_dict()
    del state["fc1.bias"]
    state["extra.weight"] = torch.ones(2)
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"it lacks 'fc1.bias'; the model has no 'extra.weight'"):
        load(Net(), tmp_path / "net.pt")
    assert len(all_seeds(load(Net(), tmp_path / "net.pt", strict=False))) == 3
    key = next(k for k in state if k.endswith("s1.branch.fan_out.weight"))
    del state[key]
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=r"it lacks 'fc2.esper_seeds.s1.branch.fan_out.weight'"):
        load(Net(), tmp_path / "net.pt", strict=False)


@pytest.mark.parametrize("kind", ["lightning", "torch", "safetensors export"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.999])
def test_flipped_bytes_are_noticed_and_change_nothing(tmp_path: Path, kind: str, part: float) -> None:
    path = tmp_path / ("net.safetensors" if "safetensors" in kind else "net.ckpt")
    host, source = Net(), Net()
    if kind == "lightning":
        torch.save({"pytorch-lightning_version": "2.6", "state_dict": grow(source).state_dict()}, path)
    elif kind == "torch":
        torch.save(grow(source).state_dict(), path)
    else:
        save(source, path, X)
    data = bytearray(path.read_bytes())
    at = int(part * len(data))
    data[at : at + 64] = bytes(byte ^ 0xFF for byte in data[at : at + 64])
    path.write_bytes(data)
    before = snapshot(host)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile's, on names that occur twice
        refused = False
        try:
            load(host, path)
        except CheckpointError:
            refused = True
    if refused:
        assert_unchanged(host, before)
    else:  # an archive has parts that say nothing, and its index is there twice
        assert kind != "safetensors export"
        assert_unchanged(host, snapshot(source))


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 200, -40])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, kept: int) -> None:
    state = dict(grow(Net()).state_dict())
    (write_safetensors if "safe" in name else write_torch)(state, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:kept])
    host = grow(Net())
    before = snapshot(host)
    with pytest.raises(CheckpointError, match=name):
        load(host, tmp_path / name)
    assert_unchanged(host, before)
    assert len(all_seeds(host)) == 3


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)


def renamed(state: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return OrderedDict((key.replace(old, new), value) for key, value in state.items())


def without(state: dict[str, Any], end: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(end)}


def changed(state: dict[str, Any], end: str, value: Any) -> dict[str, Any]:
    return {key: value if key.endswith(end) else old for key, old in state.items()}


RECORD = "s1._extra_state"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: Other().state_dict(), r"it lacks .*; the model has no 'body.weight', 'body.bias'"),
        (lambda s: grow(Net(width=4)).state_dict(), r"does not fit this model|has shape"),
        (lambda s: without(s, RECORD), "weights of a seed at 'fc2.esper_seeds.s1.*but no record"),
        (lambda s: renamed(s, "fc2.esper", "fc9.esper"), r"says it is 's\d' at 'fc2'.*renamed or damaged"),
        (lambda s: renamed(s, "fc1", "first"), r"says it is 's3' at 'fc1'"),
        (
            lambda s: renamed(s, "fc1.weight", "fc1.kernel"),
            "it lacks 'fc1.weight'; the model has no 'fc1.kernel'",
        ),
        (lambda s: {f"net.{key}": value for key, value in s.items()}, "says it is"),
        (lambda s: changed(s, RECORD, torch.zeros(9, dtype=torch.uint8)), "seed record at .* cannot be read"),
        (lambda s: changed(s, RECORD, torch.zeros(9)), "expected a 1-d uint8 tensor"),
        (lambda s: changed(s, "fc1.weight", torch.zeros(5, 7)), r"'fc1.weight' has shape \(5, 7\)"),
        (
            lambda s: changed(s, "fc1.weight", torch.zeros(5, 6, dtype=torch.int64)),
            "'fc1.weight' has type torch.int64",
        ),
        (
            lambda s: changed(s, "s1.branch.fan_in.weight", torch.zeros(2, 2)),
            "s1.branch.fan_in.weight' has shape",
        ),
        (lambda s: changed(s, "fc1.weight", [1, 2]), "hold something else"),
        (lambda s: {"epoch": 3, "weights": s}, "'epoch', 'weights' hold something else"),
        (lambda s: [s], "it holds a list"),
        (lambda s: {}, "it holds no weights"),
        (lambda s: {"pytorch-lightning_version": "2.6", "state_dict": {}}, "it holds no weights"),
    ],
)
@pytest.mark.parametrize("grown", [False, True])
def test_a_foreign_or_damaged_state_dict_changes_nothing(
    tmp_path: Path, make, message: str, grown: bool
) -> None:  # type: ignore[no-untyped-def]
    torch.save(make(dict(grow(Net()).state_dict())), tmp_path / "net.pt")
    host = grow(Net()) if grown else Net()
    before = snapshot(host)
    with pytest.raises(CheckpointError, match=message):
        load(host, tmp_path / "net.pt")
    assert_unchanged(host, before)


def test_load_state_dict_of_an_attached_model_checks_first_too() -> None:
    host = grow(Net())
    before = snapshot(host)
    with pytest.raises(CheckpointError, match="it lacks"):
        host.load_state_dict(Other().state_dict())
    assert_unchanged(host, before)


def test_a_checkpoint_of_the_surrounding_module_is_explained(tmp_path: Path) -> None:
    torch.save(Module().state_dict(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="Its keys under 'net' look like this model's"):
        load(Net(), tmp_path / "module.pt")


class Translating(nn.Module):
    """Renames an old key by itself, as modules with a history do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("weight", "bias"):
            if (old := f"{prefix}linear.{name}") in state_dict:
                state_dict[f"{prefix}fc.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_modules_that_translate_keys_may_do_so(tmp_path: Path) -> None:
    old = {f"inner.linear.{k}": v for k, v in nn.Linear(6, 3).state_dict().items()}
    torch.save(old, tmp_path / "old.pt")
    model = nn.ModuleDict({"inner": Translating()})
    load(model, tmp_path / "old.pt")
    assert torch.equal(model["inner"].fc.weight, old["inner.linear.weight"])


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="objects other than tensors"):
        load(Net(), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_export_checkpoint_of_a_user_s_module(tmp_path: Path) -> None:
    module = lightning_checkpoint(tmp_path / "last.ckpt")
    said = export_checkpoint(tmp_path / "last.ckpt", tmp_path / "new" / "net.pt", model=f"{__name__}:Module")
    assert "folded" in said
    with (tmp_path / "new" / "net.pt").open("rb") as file:
        program = torch.export.load(file).module()
    torch.testing.assert_close(program(X), outputs(module), rtol=1e-5, atol=1e-5)
    export_checkpoint(tmp_path / "last.ckpt", tmp_path / "b.pt", model=f"{__name__}:Module", input_shape=(6,))
    with pytest.raises(CheckpointError, match=r"was not written by `esper train`.*--model"):
        export_checkpoint(tmp_path / "last.ckpt", tmp_path / "c.pt")


def test_what_a_model_s_name_may_be() -> None:
    assert import_class(f"{__name__}:Module") is Module
    for name, message in (
        ("Module", "package.module:Class"),
        ("no.such:Thing", "cannot be imported"),
        (f"{__name__}:Nothing", "cannot be imported"),
        (f"{__name__}:grow", "should be a subclass of nn.Module"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_class(name)


def test_a_module_that_needs_more_than_its_hyperparameters(tmp_path: Path) -> None:
    content = {"pytorch-lightning_version": "2.6", "state_dict": Net().state_dict()}
    torch.save(content | {"hyper_parameters": {"depth": 3}}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"cannot be built from the checkpoint's hyperparameters \(depth\)"):
        export_checkpoint(tmp_path / "a.ckpt", tmp_path / "a.pt", model=f"{__name__}:Module")
