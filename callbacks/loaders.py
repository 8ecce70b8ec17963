"""The training loaders' places in their data: what Lightning leaves undone when it resumes, done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from esper.callbacks.random_state import set_random_state

__all__ = ["generator_states", "generators_of", "resume_loaders", "warn_of_lost_places"]


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers hold, each once."""
    holders = [loader]
    for name in ("sampler", "batch_sampler"):
        part = getattr(loader, name, None)
        holders += [part, getattr(part, "sampler", None)]
    found = (value for part in holders for value in getattr(part, "__dict__", {}).values())
    return list({id(value): value for value in found if isinstance(value, torch.Generator)}.values())


def generator_states(trainer: L.Trainer) -> list[list[Tensor]]:
    """States of the training loaders' own generators, a list for each loader, for a checkpoint.

    A loader with ``generator=...`` shuffles by it, and no checkpoint of Lightning holds it. torchdata's
    StatefulDataLoader always has one, and Lightning gives it its state back within an epoch only.
    """
    return [[g.get_state() for g in generators_of(loader)] for loader in _loaders(trainer)]


def resume_loaders(trainer: L.Trainer, generators: list[list[Tensor]], random: Mapping[str, Any]) -> None:
    """Put the training loaders and the random generators where the checkpoint left them.

    To be called once the loaders are there and before the first batch. Lightning (2.6.6, ``FitLoop.setup_data``)
    does not restore the state of a loader that was made before its loops were restored, as it is where a schedule
    asks for ``trainer.estimated_stepping_batches``; and within an epoch it makes an iterator, which draws
    numbers, where the run that was not interrupted made none.

    Args:
        trainer: About to train.
        generators: What :func:`generator_states` returned.
        random: What :func:`~esper.callbacks.random_state.random_state` returned.
    """
    loop = trainer.fit_loop
    combined, fetcher = loop._combined_loader, loop._data_fetcher
    if combined is None or fetcher is None:
        return
    left_over = loop._combined_loader_states_to_load if loop.restarting else []
    if left_over:
        combined._load_state_dicts(left_over)
        loop._combined_loader_states_to_load = []
    epoch = loop.epoch_progress.current
    assert isinstance(epoch, _ProcessedTracker)
    within_epoch = epoch.ready > epoch.processed
    own = [generators_of(loader) for loader in _loaders(trainer)]
    drawing = any(own) and [len(found) for found in own] == [len(states) for states in generators]
    if within_epoch and any(isinstance(loader, _Stateful) for loader in _loaders(trainer)):
        drawing = (
            False  # it has taken up its place, generator and all, and would lose it if it were iterated anew
        )
    if drawing:
        for found, states in zip(own, generators, strict=True):
            for generator, state in zip(found, states, strict=True):
                generator.set_state(state.cpu())
    if left_over or drawing:
        set_random_state(random)
        iter(fetcher)  # the one that is there has begun at another place
    if within_epoch:
        set_random_state(random)


def warn_of_lost_places(trainer: L.Trainer) -> None:
    """Say before training that its checkpoints within an epoch will not continue where they were written."""
    lost = [type(loader).__name__ for loader in _loaders(trainer) if not isinstance(loader, _Stateful)]
    savers = [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        and (callback._every_n_train_steps or callback._train_time_interval is not None)
    ]
    if lost and savers:
        rank_zero_warn(
            f"checkpoints are written within epochs, but the training loader ({', '.join(sorted(set(lost)))}) cannot "
            "tell its place: a run that is resumed from one sees the epoch's first batches again, and grows by other "
            "numbers than the run would have; use a loader with state_dict and load_state_dict, such as torchdata's "
            "StatefulDataLoader, or resume from checkpoints that are written at the end of an epoch"
        )


def _loaders(trainer: L.Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)
