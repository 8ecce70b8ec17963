"""Time several training runs of one process side by side, a block of steps at a time.

A machine's speed wanders by more than the few per cent that are to be measured, over seconds and minutes.
So each run trains in a thread of its own, only one is ever awake, and they take turns every few hundred
steps: what is compared lies a moment apart.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning.pytorch as L
import torch

__all__ = ["BlockTimes", "Fit", "Turn", "time_in_turns"]

BlockTimes = dict[str, list[list[float]]]
"""Arm -> its blocks -> seconds of each step; the i-th blocks of all arms lie side by side."""

_PATIENCE_S = 600.0


class Fit(Protocol):
    """Starts one training run that ends itself."""

    def __call__(self, turn: Turn) -> None:
        """Train, with ``turn`` as the first callback."""


class Turn(L.Callback):
    """Stops the clock at the end of every block and waits to be called on again; ends the run at last.

    Args:
        block_steps: Steps a block.
        num_blocks: Blocks; the first is for warming up, and not returned.
    """

    def __init__(self, block_steps: int, num_blocks: int) -> None:
        self.blocks: list[list[float]] = []
        self.error: BaseException | None = None
        self._block_steps, self._num_blocks = block_steps, num_blocks
        self._go = threading.Semaphore(0)
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._abandoned = False
        self._steps: list[float] = []
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Time the step that has ended; hand over to the next run when a block is complete."""
        now = time.thread_time()
        if batch_idx:
            self._steps.append(now - self._started)
        if batch_idx % self._block_steps == 0:
            if batch_idx:
                self.blocks.append(self._steps)
                self._steps = []
            if self._abandoned or len(self.blocks) == self._num_blocks:
                trainer.should_stop = True  # after this one step
                return
            self._done.put(None)
            self._go.acquire()
            now = time.thread_time()
        self._started = now

    def run(self, fit: Fit) -> None:
        """Body of the thread."""
        self._go.acquire()
        torch.set_num_threads(1)
        try:
            fit(self)
        except BaseException as error:  # handed to the thread that waits for the result
            self.error = error
        self._done.put(None)

    def call_on(self) -> None:
        """Let the run train a block, and wait for it.

        Raises:
            TimeoutError: It did not answer.
        """
        self._go.release()
        try:
            self._done.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise TimeoutError(f"expected a block of steps within {_PATIENCE_S:g} s") from None
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Let the run end as soon as it wakes up."""
        self._abandoned = True
        self._go.release()


def time_in_turns(fits: Mapping[str, Fit], *, block_steps: int, num_blocks: int) -> BlockTimes:
    """Run all ``fits`` in turns, in an order that moves on by one every round.

    Args:
        fits: Arm -> what starts it.
        block_steps: Steps a block.
        num_blocks: Blocks an arm that count; one more comes first.

    Raises:
        Exception: Whatever an arm raised; the others are stopped.
    """
    turns = {name: Turn(block_steps, num_blocks + 1) for name in fits}
    threads = [
        threading.Thread(target=turns[name].run, args=(fit,), name=f"bench-{name}", daemon=True)
        for name, fit in fits.items()
    ]
    for thread in threads:
        thread.start()
    try:
        for turn in turns.values():
            turn.call_on()  # up to the first step
        for block in range(num_blocks + 1):
            for name in _rotated(list(fits), block):
                turns[name].call_on()
    finally:
        for turn in turns.values():
            turn.abandon()
        for thread in threads:
            thread.join(_PATIENCE_S)
    return {name: turn.blocks[1:] for name, turn in turns.items()}


def _rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]
