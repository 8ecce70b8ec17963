"""A large transformer on an accelerator: what the callback adds to a step, host synchronisations, and one growth.

The arms run one after the other, because what one leaves in the allocator would be the next one's speed; the
bare run comes first and last, and how far the two lie apart is what the method cannot see.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as L
import torch
from torch.profiler import ProfilerActivity, profile

from esper.bench._hosts_to_time import TimedModule, loaders
from esper.bench._overhead_arms import HORIZON_STEPS
from esper.callbacks import TamiyoCallback
from esper.hosts import GPTConfig

__all__ = ["LARGE", "SYNCHRONISING", "SyncCounter", "device_figures"]

LARGE = GPTConfig(vocab_size=16384, context=512, d_model=768, depth=12, num_heads=12, tied=True)
"""98 million parameters."""

SYNCHRONISING = (
    "aten::item",
    "aten::_local_scalar_dense",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
"""What the profiler calls an operation that makes the host wait for the device."""


class SyncCounter(L.Callback):
    """Counts synchronising operations over some training steps.

    Args:
        first: Batch at which the profiler starts.
        num_steps: Batches that it sees.

    Attributes:
        counts: Operation -> how often it ran within these batches.
    """

    def __init__(self, first: int, num_steps: int) -> None:
        self.counts: Counter[str] = Counter()
        self._first, self._num_steps = first, num_steps
        self._profile: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start at the first batch that counts, stop at the first that does not."""
        if batch_idx == self._first:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.__enter__()
        elif batch_idx == self._first + self._num_steps:
            found, self._profile = self._profile, None
            found.__exit__(None, None, None)
            self.counts.update(
                {event.key: event.count for event in found.key_averages() if event.key in SYNCHRONISING}
            )


class _Clock(L.Callback):
    """Takes the time of blocks of steps, waiting for the device only at their ends."""

    def __init__(self, block_steps: int) -> None:
        self.step_s: list[float] = []
        self._block_steps = block_steps
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Close a block and open the next."""
        if batch_idx % self._block_steps == 0:
            _wait(pl_module)
            now = time.perf_counter()
            if batch_idx:
                self.step_s.append((now - self._started) / self._block_steps)
            self._started = now


class _Grower(L.Callback):
    """Asks for one hidden-unit seed, and takes the time of every batch's end and of every step.

    It stands in front of the callback that it asks, and :class:`_After` behind it.
    """

    def __init__(self, asked: TamiyoCallback, at: int) -> None:
        self.end_s: list[float] = []
        self.step_s: list[float] = []
        self._asked, self._at = asked, at
        self._began = self._ending = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time."""
        _wait(pl_module)
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the time, and ask when it is time."""
        _wait(pl_module)
        self._ending = time.perf_counter()
        self.step_s.append(self._ending - self._began)
        if batch_idx == self._at:
            site = next(site for site in self._asked.body.sites if "widen" in site.blueprints)
            self._asked.germinate(site, "widen", 64)

    def finish(self, module: L.LightningModule) -> None:
        """Note what the callback between took."""
        _wait(module)
        self.end_s.append(time.perf_counter() - self._ending)


class _After(L.Callback):
    """The other end of :class:`_Grower`."""

    def __init__(self, grower: _Grower) -> None:
        self._grower = grower

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell it that the batch has ended."""
        self._grower.finish(pl_module)


def device_figures(
    *,
    device: str,
    host: GPTConfig = LARGE,
    batch_size: int = 16,
    compiled: bool = True,
    precision: Any = "bf16-mixed",
    block_steps: int = 20,
    num_blocks: int = 6,
) -> dict[str, float]:
    """Measure the callback on one device.

    Args:
        device: Lightning's name of the accelerator: ``cuda``, or ``cpu`` for a rehearsal.
        host: Shape of the transformer.
        batch_size: Sequences a batch.
        compiled: Whether the network is compiled by torch.
        precision: Lightning's.
        block_steps: Steps a block.
        num_blocks: Blocks an arm that count; one more comes first, in which everything is compiled.

    Returns:
        ``device_parameters``; ``device_step_ms``; ``device_ratio`` and ``device_again_ratio``;
        ``device_added_syncs`` a step; ``device_growth_s`` of one growth, and ``device_recompile_s`` that the first
        step after it takes longer than the others.
    """

    def fit(callbacks: Sequence[L.Callback], num_steps: int) -> int:
        return _fit(host, batch_size, callbacks, num_steps, device, compiled, precision)

    def step_s(callbacks: Callable[[], list[L.Callback]]) -> tuple[float, int]:
        clock = _Clock(block_steps)
        parameters = fit([*callbacks(), clock], (num_blocks + 1) * block_steps + 1)
        return statistics.median(clock.step_s[1:]), parameters

    def syncs(callbacks: Callable[[], list[L.Callback]]) -> float:
        counter = SyncCounter(block_steps, block_steps)
        fit([*callbacks(), counter], 2 * block_steps + 1)
        return sum(counter.counts.values()) / block_steps

    first, parameters = step_s(list)
    attached, _ = step_s(_dormant)
    again, _ = step_s(list)
    grower = _Grower(callback := _dormant()[0], at=2 * block_steps)
    fit([grower, callback, _After(grower)], 4 * block_steps)
    grown = 2 * block_steps
    return {
        "device_parameters": float(parameters),
        "device_step_ms": 1e3 * min(first, again),
        "device_ratio": attached / min(first, again),
        "device_again_ratio": max(first, again) / min(first, again),
        "device_added_syncs": syncs(_dormant) - syncs(list),
        "device_growth_s": grower.end_s[grown],
        "device_recompile_s": max(
            0.0, grower.step_s[grown + 1] - statistics.median(grower.step_s[grown + 2 :])
        ),
    }


def _dormant() -> list[TamiyoCallback]:
    return [TamiyoCallback(bus=None, policy_options={"num_events": 0})]


def _fit(
    host: GPTConfig, batch_size: int, callbacks: Sequence[L.Callback], num_steps: int, device: str, compiled: bool,
    precision: Any,
) -> int:  # fmt: skip
    """Train, and return the number of the host's parameters."""
    torch.manual_seed(0)
    module = TimedModule(host)
    parameters = sum(p.numel() for p in module.parameters())
    if compiled:
        torch.compiler.reset()
        module.host.compile()
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator=device, devices=1, precision=precision, max_epochs=1, limit_train_batches=num_steps,
            logger=False, callbacks=list(callbacks), default_root_dir=folder, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, **loaders(host, batch_size, HORIZON_STEPS))
    return parameters


def _wait(module: L.LightningModule) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
