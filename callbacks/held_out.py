"""A look at the first validation batches that nothing else in the run notices."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from esper.callbacks.loaders import generators_of
from esper.callbacks.random_state import drawn_apart

__all__ = ["first_batches"]


def first_batches(loaders: Any, count: int, *, seed: int) -> list[Any]:
    """Return the first batches of a loader (of several: of the first), the same ones in a resumed run.

    Neither the global random generators nor the loader's own are moved, and its workers are not the ones
    that validation uses: a run draws what it would have drawn without this look. Shuffling and random
    transforms hang on ``seed`` alone, because a run that is resumed looks again, at another time.

    Args:
        loaders: What a ``val_dataloader`` may return: a loader, or several in lists and dicts.
        count: Batches wanted; a shorter loader gives fewer.
        seed: Of what the loader draws.
    """
    loader = _first(loaders)
    if loader is None:
        return []
    with drawn_apart(seed, generators_of(loader)):
        iterator = iter(_twin(loader))
        return list(itertools.islice(iterator, count))


def _first(loaders: Any) -> Any:
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return _first(loaders[0]) if loaders else None
    return loaders


def _twin(loader: Any) -> Any:
    """A shallow copy, so that a place in the data which the loader keeps stays where it is."""
    try:
        twin = copy.copy(loader)
    except TypeError:  # a generator, say; it can be read once anyway
        return loader
    if isinstance(twin, DataLoader):
        # Past DataLoader's guard against a change of settings: this one has its own, short-lived workers.
        twin.__dict__.update(persistent_workers=False, _iterator=None)
    return twin
