"""What each process of the tests of several processes does; :mod:`launching` starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from runs import QUICK, Every, Script, assert_registered, fit, growing, mlp, trainer, weights
from torch.nn.parallel import DistributedDataParallel

from esper.callbacks import TamiyoCallback
from esper.hosts import DigitsData
from esper.kasmina.structure import all_seeds

WIDE = "bypass:host.layers.0->host.layers.1"
NEXT = "bypass:host.layers.1->host.layers.2"
LONG = "bypass:host.layers.0->host.head"
RANK = "parallel:host.layers.0"

EVENTS = ((0.06, WIDE, "widen", 6), (0.2, LONG, "shortcut", 4), (0.4, RANK, "lowrank", 2))


def ddp(folder: Path, *callbacks: L.Callback, strategy: Any = "ddp", **options: Any) -> L.Trainer:
    return trainer(folder, *callbacks, strategy=strategy, devices=2, **options)


def found(callback: TamiyoCallback, module: L.LightningModule, runner: L.Trainer) -> dict[str, Any]:
    """What all ranks have to have alike after training."""
    assert_registered(runner, module)
    seeds = all_seeds(module)
    return {
        "weights": weights(module),
        "counters": {s.seed_id: [float(s.alpha), int(s.non_finite)] for s in seeds},
        "stages": {s.seed_id: s.stage for s in seeds},
        "moments": [o.state_dict() for o in runner.optimizers],
        "summary": dict(callback.summary()),
    }


def grow(rank: int, folder: Path) -> dict[str, Any]:
    callback = growing(folder, *EVENTS)
    module = mlp()
    runner = ddp(folder, callback, epochs=3)
    fit(runner, module, DigitsData(batch_size=32))
    return found(callback, module, runner)
