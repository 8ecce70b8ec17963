"""Small numbers for the series of signals: one for each (run, layer, seed).

Columns of strings cannot be compared or selected quickly; columns of numbers can. Numbers are given out
again once their series is neither waiting nor kept, so that seeds that come and go over days, or forged
names, do not fill the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from sys import intern
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError, EsperError

__all__ = ["KeyTable", "Keys", "Series", "TooManySeriesError"]

_MAX_CACHED = 256
_MAX_CACHED_LENGTH = 4096
_FIRST_SIZE = 1024
_GIVEN_UP = 64  # of so many keys one at a time: looking for them takes as long as giving out a thousand


class Series(NamedTuple):
    """Whose signals they are; ``seed_id`` is empty for a layer's own."""

    run_id: str
    layer_id: str
    seed_id: str


class Keys(NamedTuple):
    """Key of each signal of a table, and whether none comes twice."""

    keys: NDArray[np.int64]
    distinct: bool


class TooManySeriesError(EsperError, RuntimeError):
    """More layers and seeds at once than there are keys for."""


class KeyTable:
    """Gives every series a number in ``[0, max_keys)``.

    When all are taken, those heard of least recently are given up, some at a time; never
    one that a holder still refers to.

    Args:
        max_keys: Series at most.

    Raises:
        ConfigError: ``max_keys`` is not positive.
    """

    def __init__(self, max_keys: int = 65_536) -> None:
        if max_keys < 1:
            raise ConfigError(f"expected room for at least 1 series (max_keys), got {max_keys}")
        self.max_keys = max_keys
        self.series: list[Series | None] = []
        self._runs: dict[str, dict[tuple[str, str], int]] = {}
        self._free: list[int] = []
        self._last_seen = np.zeros(_FIRST_SIZE, dtype=np.int64)
        self._now = 0
        self._cache: dict[tuple[str, Sequence[str], Sequence[str]], Keys] = {}
        self._holders: list[Callable[[], NDArray[np.int64]]] = []
        self._followers: list[Callable[[NDArray[np.int64]], None]] = []

    def hold(self, keys_in_use: Callable[[], NDArray[np.int64]]) -> None:
        """Register somebody whose keys must keep their meaning; asked only when the table is full."""
        self._holders.append(keys_in_use)

    def follow(self, forget: Callable[[NDArray[np.int64]], None]) -> None:
        """Register somebody who is told which keys have been given up."""
        self._followers.append(forget)

    def of(self, run_id: str, layer_id: str, seed_id: str = "") -> int:
        """The key of one series, a new one where it has none.

        Raises:
            TooManySeriesError: every key is in use.
        """
        self._now += 1
        return self._of(run_id, (layer_id, seed_id))

    def of_table(self, run_id: str, layer_ids: Sequence[str], seed_ids: Sequence[str]) -> Keys:
        """The keys of a table of signals; the same ids as before cost one look-up.

        Args:
            run_id: Run of all.
            layer_ids: Layer of each signal.
            seed_ids: Seed of each.

        Raises:
            TooManySeriesError: every key is in use.
        """
        self._now += 1
        name = (run_id, tuple(layer_ids), tuple(seed_ids))
        known = self._cache.get(name)
        if known is None:
            keys = [self._of(run_id, owner) for owner in zip(layer_ids, seed_ids, strict=True)]
            known = Keys(np.array(keys, dtype=np.int64), len(set(keys)) == len(keys))
            if len(keys) <= _MAX_CACHED_LENGTH:
                if len(self._cache) >= _MAX_CACHED:
                    del self._cache[next(iter(self._cache))]
                self._cache[name] = known
        self._last_seen[known.keys] = self._now
        return known

    def of_run(self, run_id: str) -> Mapping[tuple[str, str], int]:
        """``(layer_id, seed_id)`` -> key, of one run; empty for an unknown one."""
        return self._runs.get(run_id, {})

    @property
    def run_ids(self) -> list[str]:
        """Runs that have keys."""
        return list(self._runs)

    def mask(self, keys: Iterable[int]) -> NDArray[np.bool_]:
        """bool ``[number of keys]`` that is true at ``keys``, to look a column of keys up in."""
        mask = np.zeros(len(self.series), dtype=np.bool_)
        mask[list(keys)] = True
        return mask

    def named(self, key: int) -> Series:
        """Whose key it is."""
        series = self.series[key]
        assert series is not None, f"key {key} was given up while in use"
        return series

    def __len__(self) -> int:
        return len(self.series) - len(self._free)

    def _of(self, run_id: str, owner: tuple[str, str]) -> int:
        key = self._runs.get(run_id, {}).get(owner)
        if key is None:
            if not self._free and len(self.series) == self.max_keys:
                self._give_up()
            if self._free:
                key = self._free.pop()
            else:
                key = len(self.series)
                self.series.append(None)
                if key == len(self._last_seen):
                    self._last_seen = np.concatenate([self._last_seen, np.zeros_like(self._last_seen)])
            # every message brings strings of its own; of those that are kept one of a kind is enough
            run_id, owner = intern(run_id), (intern(owner[0]), intern(owner[1]))
            self.series[key] = Series(run_id, *owner)
            self._runs.setdefault(run_id, {})[owner] = key
        self._last_seen[key] = self._now
        return key

    def _give_up(self) -> None:
        """Free keys that nobody refers to.

        Raises:
            TooManySeriesError: there is none.
        """
        last_seen = self._last_seen[: len(self.series)]
        idle = last_seen < self._now  # not one that this very table has just been given
        for keys_in_use in self._holders:
            idle[keys_in_use()] = False
        candidates = np.flatnonzero(idle)
        if not len(candidates):
            raise TooManySeriesError(
                f"expected signals of at most {self.max_keys} layers and seeds at once, got more; "
                "raise max_keys, or have fewer runs share a collector"
            )
        oldest = candidates[np.argsort(last_seen[candidates], kind="stable")]
        chosen = oldest[: max(1, self.max_keys // _GIVEN_UP)]
        for key in chosen.tolist():
            run_id, *owner = self.named(key)
            of_run = self._runs[run_id]
            del of_run[owner[0], owner[1]]
            if not of_run:
                del self._runs[run_id]
            self.series[key] = None
            self._free.append(key)
        self._cache.clear()
        for forget in self._followers:
            forget(chosen)
