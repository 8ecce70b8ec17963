"""Which of Lightning's strategies growth works under, and why not under the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from esper.callbacks.sharding import shards, untried
from esper.kasmina.loading import GrowableMixin
from esper.kasmina.structure import follows_state_dict
from esper.tamiyo.config import TamiyoConfig

__all__ = ["sharding_conflicts", "strategy_conflicts"]

_WAY_OUT = "use strategy='ddp' or one device"
_OPT_IN = (
    ", or TamiyoCallback(policy='schedule', sharded='experimental') to let each seed be sharded by itself "
    "(esper/docs/sharding.md: what works and what does not)"
)
_SHARDED = "it shards the parameters when training starts, and a seed that comes later would not be sharded with them"
_REFUSED: dict[type, str] = {
    FSDPStrategy: _SHARDED,
    ModelParallelStrategy: _SHARDED,
    DeepSpeedStrategy: "its engine takes the model's parameters over when training starts, and takes no further ones",
}


def strategy_conflicts(
    trainer: L.Trainer, module: L.LightningModule, config: TamiyoConfig | None = None
) -> Iterator[tuple[str, str, str]]:
    """What about a trainer's strategy does not go together with growth.

    Args:
        trainer: As the user configured it.
        module: The module to train.
        config: Of the callback that is to grow it; the default settings when None.

    Yields:
        What, why, and the way out.
    """
    strategy: Any = trainer.strategy
    name = f"the strategy {type(strategy).__name__}"
    if isinstance(strategy, DDPStrategy):
        yield from _ddp_conflicts(strategy, module)
    elif shards(trainer) and config is not None and config.sharded == "experimental":
        yield from untried(trainer, module, config)
    elif not isinstance(strategy, SingleDeviceStrategy):
        why = next((why for kind, why in _REFUSED.items() if isinstance(strategy, kind)), "")
        other = _OPT_IN if shards(trainer) else "" if why else ", or policy='off' to watch only"
        yield name, why or "nobody has tried whether seeds stay the same on all its devices", _WAY_OUT + other
    elif strategy.root_device.type == "xla":
        yield (
            name,
            "a growing model would be compiled anew at every change, and nobody has tried it",
            _WAY_OUT,
        )


def sharding_conflicts(trainer: L.Trainer) -> Iterator[tuple[str, str, str]]:
    """What about a trainer's strategy does not even go together with watching.

    Tried with ModelParallelStrategy (torch 2.13, gloo): a process holds a part of each weight and gradient,
    and health figures are made of whole ones.

    Yields:
        What, why, and the way out.
    """
    if isinstance(trainer.strategy, tuple(_REFUSED)):
        why = (
            "it gives each process a part of every weight and gradient, and health is measured on whole ones"
        )
        yield f"the strategy {type(trainer.strategy).__name__}", why, "leave the callback out, or " + _WAY_OUT


def _ddp_conflicts(strategy: DDPStrategy, module: L.LightningModule) -> Iterator[tuple[str, str, str]]:
    if strategy._ddp_comm_state is not None:
        yield (
            f"DDPStrategy(ddp_comm_state={type(strategy._ddp_comm_state).__name__}(...))",
            "its hook remembers gradients by their place in DDP's buckets, which growth rearranges",
            "leave ddp_comm_state out; a hook without a state, such as fp16_compress_hook, may stay",
        )
    remembers = isinstance(module, GrowableMixin) or follows_state_dict(module)
    if isinstance(strategy.launcher, _MultiProcessingLauncher) and not remembers:
        yield (
            f"DDPStrategy(start_method={strategy._start_method!r})",
            "the weights come back to a module in this process that would drop its seeds without a word",
            f"class {type(module).__name__}(esper.GrowableMixin, ...), which regrows it, or strategy='ddp'",
        )
