"""Why a rank has failed, told to the others through the store by which the ranks found each other.

A rank whose step raises simply goes away: in the others the next collective breaks, with a word about a
closed connection. The store may live in the very process that fails, so each rank keeps an eye on it by
a thread, and the one that fails waits a moment until the others have read its reason.
"""

from __future__ import annotations

import threading
import time

import torch.distributed as dist

__all__ = ["FailureWatch"]

_LOOK_EVERY_S = 0.5
_WAIT_FOR_READERS_S = 3.0


class FailureWatch:
    """One rank's eye on the failure of others.

    Args:
        prefix: Of the keys in the store; the same on every rank, another in every run.
        rank: This process.
        size: Processes.
    """

    def __init__(self, prefix: str, rank: int, size: int) -> None:
        self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self._rank = rank
        self._size = size
        self._heard = ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="esper-failure-watch", daemon=True)
        self._thread.start()

    def report(self, reason: str) -> str:
        """Give this rank's reason to the others, unless one of them was first.

        Args:
            reason: What happened here.

        Returns:
            The reason of the rank that was first; empty when this one is, or when it cannot be told.
        """
        self.stop()
        if self._heard:
            return self._heard
        try:
            first = self._store.compare_set("failed", "", reason).decode()
            if first == reason:
                self._wait_for_readers()
                return ""
            self._hear(first)
        except RuntimeError:  # the store went with the process that held it
            return ""
        return first

    def stop(self) -> None:
        """End the watch; safe to call twice."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            try:
                if self._store.check(["failed"]):
                    self._hear(self._store.get("failed").decode())
                    return
            except RuntimeError:  # the store went with the process that held it
                return

    def _hear(self, reason: str) -> None:
        self._heard = reason
        self._store.set(f"heard/{self._rank}", "1")

    def _wait_for_readers(self) -> None:
        others = [f"heard/{rank}" for rank in range(self._size) if rank != self._rank]
        deadline = time.monotonic() + _WAIT_FOR_READERS_S
        while time.monotonic() < deadline and not self._store.check(others):
            time.sleep(_LOOK_EVERY_S / 10)
