"""The design document's loop: look at a live run, decide, have it carried out, keep what came of it."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from esper.messages import HealthSignal
from esper.tamiyo.collection import HealthCollector
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.data import ModelGraphState
from esper.tamiyo.learning.replay import ReplayBuffer
from esper.tamiyo.network.decision import AdaptationDecision
from esper.tamiyo.service.run_link import AdaptationResult, RunLink

__all__ = ["Cycle", "DecisionMaker"]

_SIGNALS = 500


class DecisionMaker(Protocol):
    """A policy over graphs; :class:`~esper.tamiyo.network.network.TamiyoNetwork` is one."""

    def make_decision(
        self, state: ModelGraphState, adaptations_this_epoch: int = 0
    ) -> AdaptationDecision | None:
        """What to do, or None."""


class Cycle:
    """One decision after another about one live run.

    Args:
        link: To the run.
        collector: Of its health signals; running.
        builder: Of graphs.
        policy: Decides.
        replay_buffer: Gets every decision that was carried out, with its reward.
        cooldown_s: After an adaptation, nothing is decided within this time.

    Attributes:
        num_cycles: So far.
        num_adaptations: Carried out.
        last: What became of the last decision that was sent.
    """

    def __init__(
        self,
        link: RunLink,
        collector: HealthCollector,
        builder: ModelGraphBuilder,
        policy: DecisionMaker,
        replay_buffer: ReplayBuffer,
        *,
        cooldown_s: float = 30.0,
    ) -> None:
        self._link, self._collector, self._builder = link, collector, builder
        self._policy, self._buffer = policy, replay_buffer
        self._cooldown_s = cooldown_s
        self._rests_until_s = float("-inf")
        self._epoch, self._this_epoch = -1, 0
        self.num_cycles = self.num_adaptations = 0
        self.last: AdaptationResult | None = None

    async def turn(self) -> AdaptationResult | None:
        """Decide once; None where nothing was to be done.

        Raises:
            EsperError: The collection has failed.
        """
        self.num_cycles += 1
        signals = await self._collector.get_recent_signals(count=_SIGNALS)
        if time.monotonic() < self._rests_until_s or not signals:
            return None
        self._follow_epoch(signals[-1])
        state = self._builder.build_model_graph(signals)
        decision = self._policy.make_decision(state, self._this_epoch)
        if decision is None:
            return None
        result = self.last = await self._link.execute_adaptation(decision)
        if result.applied:
            self._rests_until_s = time.monotonic() + self._cooldown_s
            self._this_epoch += 1
            self.num_adaptations += 1
            reward = self._link.compute_reward(result)
            self._buffer.add_experience(
                state=state, action=decision, reward=reward, next_state=None, td_error=abs(reward)
            )
        return result

    async def turn_until(self, num_cycles: int | None, cycle_s: float) -> None:
        """Decide every ``cycle_s`` seconds until so many cycles are done, or the run has ended."""
        until = None if num_cycles is None else self.num_cycles + num_cycles
        while not self._link.ended and (until is None or self.num_cycles < until):
            begun = time.monotonic()
            await self.turn()
            await asyncio.sleep(max(0.0, begun + cycle_s - time.monotonic()))
        if self._link.ended:
            self._buffer.close()

    def _follow_epoch(self, signal: HealthSignal) -> None:
        if signal.epoch != self._epoch:
            self._epoch, self._this_epoch = signal.epoch, 0
