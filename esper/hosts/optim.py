"""Optimizers and learning-rate schedules by name, as the reference modules use them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from esper.errors import ConfigError

__all__ = ["OptimConfig", "build_optimizer", "build_schedule", "warmup_cosine"]

OptimizerName = Literal["adamw", "adam", "sgd"]
ScheduleName = Literal["constant", "warmup_cosine"]


@dataclass(frozen=True)
class OptimConfig:
    """How a reference module is optimised.

    Attributes:
        optimizer: "adamw", "adam" or "sgd".
        lr: Peak learning rate.
        weight_decay: On parameters with two or more dimensions; biases and norms have none.
        betas: Of adamw and adam.
        momentum: Of sgd.
        schedule: "constant", or "warmup_cosine" stepped every optimizer step over the whole run.
        warmup_fraction: Share of the run's steps in which warmup_cosine rises linearly.
        final_lr_fraction: Where warmup_cosine ends, over ``lr``.
    """

    optimizer: OptimizerName = "adamw"
    lr: float = 1e-2
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    schedule: ScheduleName = "warmup_cosine"
    warmup_fraction: float = 0.05
    final_lr_fraction: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.optimizer not in get_args(OptimizerName):
            raise ConfigError(f"optimizer must be one of {get_args(OptimizerName)}, got {self.optimizer!r}")
        if self.schedule not in get_args(ScheduleName):
            raise ConfigError(f"schedule must be one of {get_args(ScheduleName)}, got {self.schedule!r}")
        if not self.lr > 0.0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        if not self.weight_decay >= 0.0:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay}")
        for name in ("warmup_fraction", "final_lr_fraction"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name} must lie in [0, 1], got {value}")


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Return the optimizer over ``model``'s trainable parameters in a decay and a no-decay group.

    A group that would be empty is left out.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    decay = {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay}
    plain = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (decay, plain) if group["params"]]
    if config.optimizer == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum)
    cls = AdamW if config.optimizer == "adamw" else Adam
    return cls(groups, lr=config.lr, betas=config.betas)


def warmup_cosine(step: int, *, num_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Return the learning rate's factor at ``step``.

    Linear from 1 / (warmup_steps + 1) up to 1, then half a cosine down to ``final_fraction`` at
    ``num_steps``, where it stays.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_schedule(optimizer: Optimizer, config: OptimConfig, num_steps: float) -> LambdaLR | None:
    """Return the scheduler to step once an optimizer step, or None for a constant rate.

    Args:
        optimizer: Whose groups it sets.
        config: Names the schedule.
        num_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: If the run has no known end and the schedule needs one.
    """
    if config.schedule == "constant":
        return None
    if not math.isfinite(num_steps):
        raise ConfigError(
            "schedule='warmup_cosine' needs a run of known length, but the trainer has neither max_epochs "
            "nor max_steps; set one of them or use schedule='constant'"
        )
    # A partial of a module-level function: it pickles, and LambdaLR keeps its numbers out of the checkpoint,
    # so that a run resumed with a longer horizon follows the trainer's horizon and not the old one.
    factor = partial(
        warmup_cosine,
        num_steps=int(num_steps),
        warmup_steps=round(config.warmup_fraction * num_steps),
        final_fraction=config.final_lr_fraction,
    )
    return LambdaLR(optimizer, factor)
