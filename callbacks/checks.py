"""What growth cannot work with, refused before training starts.

Each subject is one function that looks at a :class:`Setup` and yields its conflicts; :data:`SUBJECTS` lists
them. A new one is added there, and is then raised before training and shown by ``esper doctor`` alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelPruning
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from esper.callbacks.strategies import sharding_conflicts, strategy_conflicts
from esper.errors import UnsupportedError
from esper.kasmina.optimizer import refusal, unwrap
from esper.tamiyo.config import TamiyoConfig

__all__ = [
    "Conflict",
    "Setup",
    "check_optimizers",
    "check_resume",
    "check_trainer",
    "check_watching",
    "conflicts",
    "optimizer_conflicts",
]


@dataclass(frozen=True)
class Conflict:
    """One thing that does not go together with growth.

    Attributes:
        what: The setting, named as the user wrote it.
        why: What would go wrong.
        way_out: What to do instead.
        kind: ``"refused"`` stops the run before it starts; ``"warning"`` is only told.
    """

    what: str
    why: str
    way_out: str
    kind: Literal["refused", "warning"] = "refused"

    def __str__(self) -> str:
        return f"{self.what}: {self.why}; {self.way_out}"


@dataclass(frozen=True)
class Setup:
    """What a subject looks at: a trainer, the module that it will train, and the class of our callback."""

    trainer: L.Trainer
    module: L.LightningModule
    callback_type: type[L.Callback]

    @property
    def callbacks(self) -> list[L.Callback]:
        """The trainer's callbacks."""
        return list(self.trainer.callbacks)  # type: ignore[attr-defined]


def conflicts(
    trainer: L.Trainer, callback_type: type[L.Callback], module: L.LightningModule | None = None
) -> list[Conflict]:
    """Collect everything about a trainer's settings that does not go together with growth.

    Args:
        trainer: As the user configured it.
        callback_type: The class of our callback.
        module: The module to train; by default the one that the trainer holds.

    Returns:
        Refusals and warnings in the order of :data:`SUBJECTS`; empty if all goes together.
    """
    setup = Setup(trainer, module if module is not None else trainer.lightning_module, callback_type)
    return [conflict for subject in SUBJECTS for conflict in subject(setup)]


def optimizer_conflicts(optimizers: Iterable[Optimizer]) -> list[Conflict]:
    """The optimizers that cannot take new parameters."""
    found = []
    for optimizer in optimizers:
        if (refused := refusal(optimizer)) is not None:
            why, way_out = refused
            found.append(Conflict(f"the optimizer {type(unwrap(optimizer)).__name__}", f"it {why}", way_out))
    return found


def check_trainer(trainer: L.Trainer, callback_type: type[L.Callback]) -> None:
    """Refuse a trainer whose settings cannot go together with growth, and tell the warnings.

    Raises:
        UnsupportedError: All conflicts together, each with the way out.
    """
    found = conflicts(trainer, callback_type)
    _refuse([conflict for conflict in found if conflict.kind == "refused"])
    for conflict in found:
        rank_zero_warn(str(conflict))


def check_watching(trainer: L.Trainer) -> None:
    """Refuse a trainer whose layers cannot even be watched.

    Raises:
        UnsupportedError: With the way out.
    """
    if refused := [Conflict(*conflict) for conflict in sharding_conflicts(trainer)]:
        raise UnsupportedError("watching cannot work with " + "; and with ".join(map(str, refused)))


def check_optimizers(trainer: L.Trainer) -> None:
    """Refuse optimizers that cannot take new parameters.

    Raises:
        UnsupportedError: All of them together.
    """
    _refuse(optimizer_conflicts(trainer.optimizers))


def check_resume(trainer: L.Trainer) -> None:
    """Refuse callbacks that would lose the state of a run that is being resumed; call it while that is loaded.

    Raises:
        UnsupportedError: A finder of batch size or learning rate would try before everything is restored. One
            that begins later, in a subclass, may stay.
    """
    at_once = (BatchSizeFinder.on_fit_start, LearningRateFinder.on_fit_start)
    _refuse(
        [
            Conflict(
                f"resuming with {type(callback).__name__}",
                "Lightning restores neither the optimizers nor the progress of the run then, so that grown layers "
                "would stand in a run at its first step",
                "remove the finder to continue where the checkpoint ends, or begin a new run from its weights by "
                "esper.load",
            )
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if type(callback).on_fit_start in at_once
        ]
    )


def _refuse(refused: list[Conflict]) -> None:
    if refused:
        raise UnsupportedError("growth cannot work with " + "; and with ".join(map(str, refused)))


# ---------------------------------------------------------------- one function a subject


def _strategy(setup: Setup) -> Iterator[Conflict]:
    config = next((c.config for c in setup.callbacks if isinstance(c, setup.callback_type)), None)  # type: ignore[attr-defined]
    for what, why, way_out in strategy_conflicts(setup.trainer, setup.module, config):
        yield Conflict(what, why, way_out)


def _averaging(setup: Setup) -> Iterator[Conflict]:
    for name, child in setup.module.named_modules():
        if isinstance(child, AveragedModel):
            yield Conflict(
                f"the averaged model {name!r} inside {type(setup.module).__name__}",
                "it pairs parameters by position, and would average a seed with another layer",
                "average by Lightning's callbacks (EMAWeightAveraging, WeightAveraging), whose copy grows along",
            )


def _one_grower(setup: Setup) -> Iterator[Conflict]:
    if sum(isinstance(callback, setup.callback_type) for callback in setup.callbacks) > 1:
        yield Conflict(
            f"more than one {setup.callback_type.__name__}",
            "each would take the other's seeds for layers of the host",
            "keep one",
        )


def _manual_optimization(setup: Setup) -> Iterator[Conflict]:
    if not setup.module.automatic_optimization and not is_overridden("validation_step", setup.module):
        yield Conflict(
            "manual optimization without a validation_step",
            "a training step would train while it is measured",
            "return the loss from validation_step",
        )
    growers = [c for c in setup.callbacks if isinstance(c, setup.callback_type)]
    if not setup.module.automatic_optimization and any(_isolates(grower) for grower in growers):
        yield Conflict(
            "isolated seeds under manual optimization",
            "self.clip_gradients by norm counts their gradients with the host's",
            "clip by value, or leave lifecycle.mode at 'direct'",
            kind="warning",
        )


def _pruning(setup: Setup) -> Iterator[Conflict]:
    for callback in setup.callbacks:
        if isinstance(callback, ModelPruning):
            yield Conflict(
                f"the callback {type(callback).__name__}",
                "it replaces weights by products with masks that neither a rollback, a copy of a block nor its own "
                "checkpoints know",
                "grow first, then prune the exported network (esper.export) in a fit without growth",
            )


def _isolates(grower: L.Callback) -> bool:
    config: TamiyoConfig = grower.config  # type: ignore[attr-defined]
    return config.lifecycle.mode == "isolated"


SUBJECTS: tuple[Callable[[Setup], Iterable[Conflict]], ...] = (
    _strategy,
    _averaging,
    _one_grower,
    _manual_optimization,
    _pruning,
)
"""Every subject that is looked at, in the order in which conflicts are told."""
