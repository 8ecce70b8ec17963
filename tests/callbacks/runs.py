"""Short real runs that the tests of the callback share."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import msgspec
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from esper.callbacks import TamiyoCallback
from esper.hosts import (
    ClassifierModule,
    CNNConfig,
    DigitsData,
    GPTConfig,
    LanguageModule,
    MLPConfig,
    OptimConfig,
)
from esper.messages import DecisionRecord, Event, GovernorRecord, RunRecord, TransitionRecord
from esper.report import read_journal

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

STEPS_AN_EPOCH = 17
"""Of the digits in batches of 64."""

QUICK = {
    "min_training_steps": 6,
    "max_training_steps": 60,
    "min_gradient_snr": 0.0,
    "max_output_ratio": 1e9,
    "blend_steps": 8,
    "min_holding_steps": 6,
    "max_holding_steps": 1000,
    "min_contribution": 0.0,
    "contribution_stderrs": 0.0,
    "max_spread": 1e9,
    "num_measurements": 2,
    "embargo_steps": 12,
    "gate_interval_steps": 2,
}
"""Gates that open within a few steps."""


class Tokens(L.LightningDataModule):
    """Random token sequences from a shuffling DataLoader, whose order hangs on the global random state."""

    def __init__(self, *, workers: int = 0, context: Any = None) -> None:
        super().__init__()
        self.options: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": context}
        x = torch.randint(0, 17, (320, 9), generator=torch.Generator().manual_seed(3))
        self.data = TensorDataset(x[:, :-1].contiguous(), x[:, 1:].contiguous())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=32, shuffle=True, **self.options)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=160)


class Script(L.Callback):
    """Does something before the batch that follows a given number of optimizer steps."""

    def __init__(self, acts: Mapping[int, Callable[[L.Trainer, L.LightningModule], object]]) -> None:
        self.acts = acts

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        act = self.acts.get(trainer.global_step)
        if act is not None:
            act(trainer, pl_module)


class Every(L.Callback):
    """Looks at the run after every batch; list it behind the growing callback."""

    def __init__(self, look: Callable[[L.Trainer, L.LightningModule], object]) -> None:
        self.look = look

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.look(trainer, pl_module)


def mlp(hidden: tuple[int, ...] = (16, 4, 12), seed: int = 0, **optim: Any) -> ClassifierModule:
    torch.manual_seed(seed)
    return ClassifierModule(MLPConfig(hidden=hidden), OptimConfig(**optim))


def cnn(seed: int = 0, **optim: Any) -> ClassifierModule:
    torch.manual_seed(seed)
    return ClassifierModule(CNNConfig(widths=(8, 4, 8), norm="batch"), OptimConfig(**optim))


def gpt(seed: int = 0, **optim: Any) -> LanguageModule:
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=17, context=8, d_model=16, depth=2, num_heads=2, dropout=0.1)
    return LanguageModule(config, OptimConfig(**optim))


def trainer(folder: Path, *callbacks: L.Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": epochs,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**(settings | options))


def fit(
    runner: L.Trainer, module: L.LightningModule, data: L.LightningDataModule | None = None, **options: Any
) -> None:
    """Train on the digits (or ``data``) from a fixed random state."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # What Lightning has to say about tiny runs: few workers, few batches, no logger.
        warnings.filterwarnings("ignore", module="lightning")
        runner.fit(module, datamodule=data or DigitsData(), **options)


def test(runner: L.Trainer, module: L.LightningModule, checkpoint: Path | str) -> dict[str, float]:
    """Test on the digits from a checkpoint."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        return dict(runner.test(module, DigitsData(), ckpt_path=checkpoint, verbose=False)[0])


test.__test__ = False  # type: ignore[attr-defined]


def growing(folder: Path, *entries: tuple[Any, ...], **settings: Any) -> TamiyoCallback:
    """A callback that grows by a fixed list, is quick about it, and stays off the bus."""
    given: dict[str, Any] = {
        "policy": "schedule",
        "policy_options": {"entries": [list(e) for e in entries]} if entries else {"num_events": 0},
        "window": (0.0, 1.0),
        "bus": None,
        "journal": str(folder / "growth.jsonl"),
        "lifecycle": QUICK,
        "budget": {"max_parameters_ratio": 20.0, "site_cooldown_steps": 0},
    }
    return TamiyoCallback(**(given | settings))


def weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names that stand in one of two state dicts only, or whose values differ in a bit (NaN equals NaN)."""
    return [
        name
        for name in a.keys() | b.keys()
        if name not in a or name not in b or not torch.equal(_bits(a[name]), _bits(b[name]))
    ]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def journal(folder: Path) -> list[Event]:
    return read_journal(folder / "growth.jsonl")


def plain_lines(folder: Path) -> list[dict[str, Any]]:
    """The journal without times, run ids and marks of the run itself."""
    lines = []
    for event in journal(folder):
        if not isinstance(event, RunRecord):
            line = msgspec.to_builtins(event)
            del line["timestamp"], line["run_id"]
            lines.append(line)
    return lines


def decisions(folder: Path, action: str = "") -> list[DecisionRecord]:
    found = [e for e in journal(folder) if isinstance(e, DecisionRecord)]
    return [e for e in found if not action or e.decision.action == action]


def transitions(folder: Path, seed_id: str = "") -> list[TransitionRecord]:
    found = [e for e in journal(folder) if isinstance(e, TransitionRecord)]
    return [e for e in found if not seed_id or e.seed_id == seed_id]


def interventions(folder: Path) -> list[GovernorRecord]:
    return [e for e in journal(folder) if isinstance(e, GovernorRecord)]


def stages(folder: Path, seed_id: str) -> list[str]:
    """The stages a seed went through, first to last; each transition starts where the one before ended."""
    path = transitions(folder, seed_id)
    for before, after in itertools.pairwise(path):
        assert before.target == after.source, (before, after)
    return [path[0].source, *(t.target for t in path)] if path else []


def assert_registered(runner: L.Trainer, module: torch.nn.Module) -> None:
    """Every trainable parameter is in exactly one optimizer group, by identity, and nothing else is."""
    held = [id(p) for o in runner.optimizers for group in o.param_groups for p in group["params"]]
    wanted = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert set(held) == set(wanted), [name for i, name in wanted.items() if i not in held]
    stale = [p for o in runner.optimizers for p in o.state if id(p) not in wanted]
    assert not stale, f"{len(stale)} parameters outside the model have optimizer state"
