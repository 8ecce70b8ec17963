"""Processed signals, kept until newer ones push them out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError
from esper.messages import HealthSignal
from esper.signal_table import SignalTable
from esper.tamiyo.collection.keys import KeyTable
from esper.tamiyo.collection.ring import SignalBlock, SignalRing

__all__ = ["SignalWindow"]


class SignalWindow:
    """The last ``size`` signals of all runs together, to be asked for by run, layer and seed.

    Args:
        size: Signals at most.
        keys: Table of the series; it is told which ones are kept here.
    """

    def __init__(self, size: int, keys: KeyTable) -> None:
        self._keys = keys
        self._ring = SignalRing(size)
        keys.hold(lambda: self._ring.tags()[0])

    def add(self, block: SignalBlock) -> None:
        """Keep some more."""
        self._ring.keep_newest(block)

    def recent(self, count: int, run_id: str | None) -> SignalTable:
        """The last signals of a run; see :meth:`HealthCollector.get_recent_signals`.

        Raises:
            ConfigError: ``count`` is negative, or several runs send and none was named.
        """
        keys = self._ring.tags()[0]
        if run_id is not None:
            return self._newest(self._keys.mask(self._keys.of_run(run_id).values())[keys], count)
        senders = sorted({self._keys.named(key).run_id for key in np.unique(keys).tolist()})
        if len(senders) > 1:
            raise ConfigError(
                f"expected a run_id, because signals of {len(senders)} runs are kept here, and layers of "
                f"different runs must not be mixed: {', '.join(senders[:8])}"
            )
        return self._newest(np.ones(len(keys), dtype=np.bool_), count)

    def of_layer(self, layer_id: str, count: int, seed_id: str | None, run_id: str | None) -> SignalTable:
        """The last signals of a layer; see :meth:`HealthCollector.get_signals_for_layer`.

        Raises:
            ConfigError: ``count`` is negative, or several runs have such a layer and none was named.
        """
        found = {
            run: keys
            for run in (self._keys.run_ids if run_id is None else [run_id])
            if (
                keys := [
                    key for owner, key in self._keys.of_run(run).items() if _is(owner, layer_id, seed_id)
                ]
            )
        }
        if len(found) > 1:
            raise ConfigError(
                f"expected a run_id, because {len(found)} runs have a layer {layer_id!r}: "
                f"{', '.join(sorted(found)[:8])}"
            )
        mask = self._keys.mask(key for keys in found.values() for key in keys)
        return self._newest(mask[self._ring.tags()[0]], count)

    def last(self, run_id: str, layer_id: str, seed_id: str) -> HealthSignal | None:
        """The newest signal of one layer or seed, or None."""
        key = self._keys.of_run(run_id).get((layer_id, seed_id))
        if key is None:
            return None
        newest = self._newest(self._ring.tags()[0] == key, 1)
        return newest.row(0) if len(newest) else None

    def __len__(self) -> int:
        return len(self._ring)

    def _newest(self, mask: NDArray[np.bool_], count: int) -> SignalTable:
        """Of the signals where ``mask`` is true, the ``count`` that arrived last, by arrival."""
        if count < 0:
            raise ConfigError(f"expected a count of at least 0 signals, got {count}")
        places = np.flatnonzero(mask)
        # batches are processed with high priority first, so the ring is not quite in order of arrival
        order = np.argsort(self._ring.tags()[2][places], kind="stable")[max(0, len(places) - count) :]
        return self._ring.at(places[order]).table(self._keys)


def _is(owner: tuple[str, str], layer_id: str, seed_id: str | None) -> bool:
    return owner[0] == layer_id and (seed_id is None or owner[1] == seed_id)
