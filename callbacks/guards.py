"""Guards on the optimizers' steps: what young seeds may not do to their host, and how far they step."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as L
from torch import nn
from torch.optim import Optimizer

from esper.kasmina.optimizer import unwrap
from esper.kasmina.seed import Seed
from esper.kasmina.step_guard import StepGuard

__all__ = ["Guards"]


class Guards:
    """One :class:`~esper.kasmina.step_guard.StepGuard` an optimizer, there once there is a seed.

    Args:
        birth_lr_multiplier: Factor on the updates of parameters that are not fossilised yet.
        seed_lr_multiplier: Factor on the updates of all parameters of seeds, for good.
    """

    def __init__(self, birth_lr_multiplier: float, seed_lr_multiplier: float = 1.0) -> None:
        self._birth, self._lifelong = birth_lr_multiplier, seed_lr_multiplier
        self._guards: dict[int, StepGuard] = {}
        self._scaled: dict[str, list[nn.Parameter]] = {}

    @property
    def mounted(self) -> bool:
        """Whether the optimizers' steps are hooked."""
        return bool(self._guards)

    def follow(self, optimizers: Sequence[Optimizer], seeds: Sequence[Seed], *, scaled: bool = False) -> None:
        """Hook the optimizers when the first seed is there, and scale the steps of seeds.

        Args:
            optimizers: All of the run, unwrapped.
            seeds: All of the model.
            scaled: Whether a gradient scaler judges the gradients before we see them.
        """
        if not self._guards and seeds:
            self._guards = {id(optimizer): StepGuard(optimizer) for optimizer in optimizers}
        if self._birth == self._lifelong == 1.0 and not scaled:
            return
        young = [seed for seed in seeds if seed.stage != "fossilized"]
        slowed = seeds if self._lifelong != 1.0 else young
        wanted = {seed.seed_id: list(seed.parameters()) for seed in slowed}
        factors = {seed.seed_id: self._lifelong for seed in slowed}
        factors |= {seed.seed_id: self._lifelong * self._birth for seed in young}
        for guard in self._guards.values():
            for seed_id, parameters in self._scaled.items():
                if seed_id not in wanted:
                    guard.forget(parameters)
            for seed_id, parameters in wanted.items():
                guard.scale_updates(parameters, factors[seed_id])
        if scaled and self._guards:
            one = next(iter(self._guards.values()))  # whose optimizer it is does not matter to a gradient
            for seed in young:
                one.keep_finite(wanted[seed.seed_id])
        self._scaled = wanted

    def protect(self, trainer: L.Trainer, optimizer: Optimizer, seeds: Sequence[Seed]) -> None:
        """Keep the gradients of young seeds from reaching the host through clipping by total norm."""
        guard = self._guards[id(unwrap(optimizer))]
        young = [seed for seed in seeds if seed.stage != "fossilized"]
        isolated = [list(seed.parameters()) for seed in young if seed.stage == "training"]
        felt = [p for seed in young if seed.stage != "training" for p in seed.parameters()]
        if isolated:
            by_value = trainer.gradient_clip_algorithm == "value"
            guard.stash(isolated, clip=trainer.gradient_clip_val, algorithm="value" if by_value else "norm")
        if felt:
            guard.shield(felt)

    def remove(self) -> None:
        """Take the hooks off again."""
        for guard in self._guards.values():
            guard.remove()
        self._guards, self._scaled = {}, {}
