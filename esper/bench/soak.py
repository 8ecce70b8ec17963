"""A day of health signals and decisions in a few minutes: does anything pile up?

Autonomous operation decides every 100 ms, 864,000 times a day. Here one cycle follows the other without that pause:
a run publishes a sampled step on a socket, the health collector takes it, a graph is built of the last 500 signals,
the policy network (10 dropout samples) decides, and every so often the same decision point goes to a Tamiyo
service over its socket, is stored on disk and answered. Before it is measured, the collector is filled to its limits
(50,000 kept signals, 65,536 series), so that what grows afterwards grows for ever. Seeds are born and culled all
the time, runs end and begin.

The default stops after five minutes, at about one per cent of the cycles of a day; ``--set cycles=864000`` runs
the whole day. Memory is therefore reported twice: as it changed while this ran, and the slope of what Python and NumPy
allocate, extrapolated to the day. That is measured by ``tracemalloc`` in a last part of its own, which goes through
the same code with 8 layers, a small network and a small collector: tracing slows everything down, and a slope needs
many cycles. A short run overstates it, because caches that are still filling up look like a leak.
"""

from __future__ import annotations

import asyncio
import gc
import math
import statistics
import tempfile
import time
import tracemalloc
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from esper.bench._drift import descriptors, drift, resident_mb, slope, threads
from esper.bench._soak_loop import SoakLoop, serving, soak_loop
from esper.errors import ConfigError
from esper.tamiyo.collection import CollectionConfig
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork

__all__ = ["TARGETS", "TITLE", "run"]

TITLE = "Soak: a day of signals and decisions, compressed"
TARGETS: dict[str, tuple[str, float]] = {
    "resident_drift_mb": ("<=", 50.0),
    "traced_mb_per_day": ("<=", 50.0),
    "descriptor_drift": ("<=", 0.0),
    "thread_drift": ("<=", 0.0),
    "task_drift": ("<=", 0.0),
    "latency_drift_ratio": ("<=", 1.25),
    "lost": ("<=", 0.0),
}

CYCLES_A_DAY = 864_000
_CYCLE_S = 0.1
_SAMPLES = 32
_TRACED = 0.4
"""Share of the cycles, or of the time, that the last part has."""
_WARM_UP = 0.4
"""Share of each part's, before anything is measured."""
_FEW_LAYERS = 8


def run(
    *,
    seconds: float = 300.0,
    cycles: int = 0,
    layers: int = 32,
    ask_every: int = 20,
    decider: str = "",
    quick: bool = False,
) -> dict[str, float]:
    """Run it.

    Args:
        seconds: How long, where ``cycles`` is 0.
        cycles: How many cycles instead; 864,000 are a day.
        layers: Of the host; as many seeds.
        ask_every: Cycles from one question to the service to the next.
        decider: Of the service, as ``esper serve`` takes it; empty: the network that decides each cycle.
        quick: A small network, and a collector of 2,048 signals and 4,096 series, throughout.

    Returns:
        ``cycles``, ``hours`` (that so many cycles stand for), ``compression`` (of time), ``signals``; the drifts
        that the targets name, ``resident_mb`` at the end, ``traced_drift_mb``; ``cycle_p50_ms`` and
        ``cycle_p99_ms`` from publishing to the decision, ``answer_p50_ms`` of the service, and ``lost``, messages
        missed and signals dropped.

    Raises:
        ConfigError: an option is out of range.
        EsperError: something did not happen in time.
        UnsupportedError: the system does not tell what a process holds.
    """
    if not (math.isfinite(seconds) and seconds > 0) or cycles < 0 or layers < 1 or ask_every < 1:
        raise ConfigError(
            "expected positive seconds, layers and ask_every, and cycles of at least 0, got "
            f"seconds={seconds}, layers={layers}, ask_every={ask_every}, cycles={cycles}"
        )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: further threads only wait, and drown what is to be seen
    try:
        return asyncio.run(_soak(_Options(seconds, cycles, layers, ask_every, decider, quick)))
    finally:
        torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class _Options:
    seconds: float
    cycles: int
    layers: int
    ask_every: int
    decider: str
    small: bool


async def _soak(options: _Options) -> dict[str, float]:
    num_traced = round(options.cycles * _TRACED)
    plain = await _part(options, options.seconds * (1 - _TRACED), options.cycles - num_traced)
    # of the same code with less in it: it sees more cycles, and what fills up is full sooner
    small = replace(options, layers=min(options.layers, _FEW_LAYERS), small=True)
    tracemalloc.start()  # before anything is made: what a cache replaces must be known, to be subtracted
    try:
        traced = await _part(small, options.seconds * _TRACED, num_traced)
    finally:
        tracemalloc.stop()
    cycles = plain.num_cycles + traced.num_cycles
    latencies_ms = statistics.quantiles(plain.latencies_ms, n=100, method="inclusive")
    return {
        "cycles": float(cycles),
        "hours": cycles * _CYCLE_S / 3600,
        "compression": plain.num_cycles * _CYCLE_S / plain.elapsed_s,
        "signals": float(2 * (plain.num_cycles * options.layers + traced.num_cycles * small.layers)),
        "resident_mb": plain.column("resident_mb")[-1],
        "resident_drift_mb": drift(plain.column("resident_mb")),
        "traced_drift_mb": drift(traced.column("traced_mb")),
        "traced_mb_per_day": CYCLES_A_DAY * slope(traced.column("cycle"), traced.column("traced_mb")),
        "descriptor_drift": drift(plain.column("descriptors")),
        "thread_drift": drift(plain.column("threads")),
        "task_drift": drift(plain.column("tasks")),
        "latency_drift_ratio": plain.latency_ratio(),
        "cycle_p50_ms": latencies_ms[49],
        "cycle_p99_ms": latencies_ms[98],
        "answer_p50_ms": plain.answer_ms,
        "lost": float(plain.lost + traced.lost),
    }


async def _part(options: _Options, seconds: float, cycles: int) -> _Samples:
    """One part, with everything made for it and ended after it."""
    torch.manual_seed(0)
    policy = PolicyConfig(hidden_dim=16, uncertainty_samples=2) if options.small else PolicyConfig()
    network = TamiyoNetwork(policy).eval()
    with (
        tempfile.TemporaryDirectory(prefix="esper-soak-") as folder,
        serving(Path(folder), options.decider, network) as address,
    ):
        config = CollectionConfig(max_keys=4096, window_size=2048) if options.small else CollectionConfig()
        async with soak_loop(options.layers, options.ask_every, address, network, config) as loop:
            await loop.warm_up()
            # a collection at each sample would otherwise go through all that importing torch has left
            gc.freeze()
            try:
                samples = await _measure(loop, seconds, cycles)
            finally:
                gc.unfreeze()
            stats = loop.collector.get_collection_stats()
            samples.lost = stats.missed + stats.dropped_normal + stats.dropped_high + stats.unidentified
            samples.answer_ms = statistics.median(loop.answers_ms)
    return samples


class _Samples:
    """What was seen at some cycles of one part; room is made beforehand, so as not to be measured itself."""

    def __init__(self) -> None:
        self._rows = np.zeros((6, 2 * _SAMPLES))
        self.num = 0
        self.latencies_ms: list[float] = []
        self.num_cycles = self.lost = 0
        self.elapsed_s = self.answer_ms = 0.0

    def take(self, cycle: int) -> None:
        self._rows[:, self.num] = (
            cycle,
            resident_mb(),  # collects garbage first, for the others too
            tracemalloc.get_traced_memory()[0] / 1e6,
            descriptors(),
            threads(),
            len(asyncio.all_tasks()),
        )
        self.num += 1

    def column(self, name: str) -> list[float]:
        """All samples of one figure."""
        names = ("cycle", "resident_mb", "traced_mb", "descriptors", "threads", "tasks")
        column: list[float] = self._rows[names.index(name), : self.num].tolist()
        return column

    def latency_ratio(self) -> float:
        """Median latency of the last quarter over that of the first."""
        quarter = max(1, len(self.latencies_ms) // 4)
        return statistics.median(self.latencies_ms[-quarter:]) / statistics.median(
            self.latencies_ms[:quarter]
        )


async def _measure(loop: SoakLoop, seconds: float, cycles: int) -> _Samples:
    """Run one part: for so many cycles where their number is given, else so long."""
    samples = _Samples()
    began, first, next_sample = time.perf_counter(), loop.host.cycle, _WARM_UP
    while True:
        done = (loop.host.cycle - first) / cycles if cycles else (time.perf_counter() - began) / seconds
        if done >= 1 and samples.num >= 4:
            samples.num_cycles = loop.host.cycle - first
            samples.elapsed_s = time.perf_counter() - began
            return samples
        latency_ms = await loop.turn()
        if done >= _WARM_UP and not tracemalloc.is_tracing():  # a list that grows would be traced too
            samples.latencies_ms.append(latency_ms)
        if done >= next_sample and samples.num < 2 * _SAMPLES:
            samples.take(loop.host.cycle)
            next_sample += (1 - _WARM_UP) / _SAMPLES
