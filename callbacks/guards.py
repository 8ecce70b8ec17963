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
    """

    def __init__(self, birth_lr_multiplier: float) -> None:
        self._multiplier = birth_lr_multiplier
        self._guards: dict[int, StepGuard] = {}
        self._newborn: dict[str, list[nn.Parameter]] = {}

    @property
    def mounted(self) -> bool:
        """Whether the optimizers' steps are hooked."""
        return bool(self._guards)

    def follow(self, optimizers: Sequence[Optimizer], seeds: Sequence[Seed], *, scaled: bool = False) -> None:
        """Hook the optimizers when the first seed is there, and scale the steps of newborn parameters.

        Args:
            optimizers: All of the run, unwrapped.
            seeds: All of the model.
            scaled: Whether a gradient scaler judges the gradients before we see them.
        """
        if not self._guards and seeds:
            self._guards = {id(optimizer): StepGuard(optimizer) for optimizer in optimizers}
        if self._multiplier == 1.0 and not scaled:
            return
        young = {seed.seed_id: list(seed.parameters()) for seed in seeds if seed.stage != "fossilized"}
        for guard in self._guards.values():
            for seed_id, parameters in self._newborn.items():
                if seed_id not in young:
                    guard.forget(parameters)
            for parameters in young.values():
                guard.scale_updates(parameters, self._multiplier)
        if scaled and self._guards:
            one = next(iter(self._guards.values()))  # whose optimizer it is does not matter to a gradient
            for parameters in young.values():
                one.keep_finite(parameters)
        self._newborn = young

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
        self._guards, self._newborn = {}, {}
