"""A training run as the bus sees it, a sampled step every decision cycle, for days on end.

Signals are synthetic; everything that they meet is not. Seeds come and go, runs end and others begin, errors are
reported: what changes over a day is what could pile up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from esper.bench._signal_stream import signal_tables
from esper.kasmina.topology import Edge, LayerInfo, ModelTopology
from esper.messages import (
    CacheHitRates,
    ErrorRecoveryEvent,
    KernelPerformance,
    Message,
    ModelPerformance,
    SignalBatch,
)
from esper.signal_table import SignalTable
from esper.tamiyo.graph.facts import RunFacts

__all__ = ["SoakHost"]

_WIDTH = 64
_BANK = 256
_SEED_LIFE = 5
_RUN_LIFE = 1000
_ERROR_EVERY = 997
_TELL_EVERY = 10


class SoakHost:
    """Makes the messages of one cycle after another.

    Args:
        layers: Of the host; as many seeds beside them.
        name: Its runs are called ``name-0``, ``name-1`` and so on.

    Attributes:
        topology: A chain of dense layers.
        cycle: Cycles so far.
        num_seeds: Seeds that have lived so far, in all runs.
    """

    def __init__(self, layers: int, name: str) -> None:
        infos = tuple(
            LayerInfo(
                name=f"blocks.{index}.linear", type="Linear", input_shape=(_WIDTH,), output_shape=(_WIDTH,),
                num_parameters=(_WIDTH + 1) * _WIDTH, flops=2 * _WIDTH * _WIDTH, num_calls=1,
                is_output=index == layers - 1, reads_input=index == 0,
            )
            for index in range(layers)
        )  # fmt: skip
        edges = tuple(
            Edge(infos[index].name, infos[index + 1].name, ("relu",)) for index in range(layers - 1)
        )
        self.topology = ModelTopology(infos, edges, {}, sum(info.num_parameters for info in infos))
        self.cycle = 0
        self.num_seeds = 0
        self._name = name
        self._ids = tuple(info.name for info in infos for _ in range(2))
        self._tables = signal_tables(_BANK, self._ids)
        self._seed_ids: tuple[str, ...] = ()
        self._losses: list[float] = []

    @property
    def run_id(self) -> str:
        """Of the present run."""
        return f"{self._name}-{self.cycle // _RUN_LIFE}"

    @property
    def step(self) -> int:
        """Of the present run."""
        return self.cycle % _RUN_LIFE

    def messages(self) -> Iterator[Message]:
        """What the run publishes in the next cycle."""
        self.cycle += 1
        now, run_id, step = time.time(), self.run_id, self.step
        if step % _SEED_LIFE == 0 or not self._seed_ids:
            self._replace_seeds()
        yield self._batch(run_id, step)
        if step % _TELL_EVERY == 0:
            loss = 2.0 / (1.0 + 1e-3 * step)
            self._losses = [*self._losses, loss][-100:] if step else [loss]
            yield ModelPerformance(
                run_id,
                step,
                step // 500,
                _RUN_LIFE,
                loss,
                loss,
                self.topology.num_parameters,
                1e9 * step,
                1,
                now,
            )
            yield KernelPerformance(run_id, step, 1.0, 0.1, now)
            yield CacheHitRates(run_id, step, 9, 1, now)
        if self.cycle % _ERROR_EVERY == 0:
            yield ErrorRecoveryEvent(run_id, step, self._seed_ids[1], "cull", "non-finite output", now)

    def newborn(self, run_id: str) -> SignalBatch:
        """The first step of a run with seeds that nobody has heard of."""
        self._replace_seeds()
        return self._batch(run_id, 0)

    def _replace_seeds(self) -> None:
        first = self.num_seeds
        self._seed_ids = tuple(
            f"s{first + index // 2}" if index % 2 else "" for index in range(len(self._ids))
        )
        self.num_seeds += len(self._ids) // 2

    def _batch(self, run_id: str, step: int) -> SignalBatch:
        columns = self._tables[step % _BANK].columns
        named = SignalTable(self._ids, self._seed_ids, columns)
        return SignalBatch(run_id, step, step // 500, named.ids, columns, time.time())

    def facts(self) -> RunFacts:
        """The present run, for a decision point."""
        size = self.topology.num_parameters
        return RunFacts(
            run_id=self.run_id, step=self.step, total_steps=_RUN_LIFE, epoch=self.step // 500, host_parameters=size,
            num_parameters=size, parameters_left=size, flops_left=float("inf"), germinations_left=4,
            tokens_per_parameter=50.0, transformer=False, window_open=True,
            steps=tuple(range(len(self._losses))), train_losses=tuple(self._losses),
            held_out_loss=self._losses[-1] if self._losses else None,
        )  # fmt: skip
