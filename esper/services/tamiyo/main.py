"""The document's service: all parts together, in charge of one live run over the bus.

For many runs at once, and for runs on other machines, there is ``esper serve`` with ``policy=remote``.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from esper.errors import ConfigError
from esper.oona import RunInfo
from esper.services.tamiyo.health_collector import ProductionHealthCollector
from esper.services.tamiyo.policy import EnhancedTamiyoPolicyGNN, PolicyConfig
from esper.services.tamiyo.policy_trainer import ProductionPolicyTrainer, ProductionTrainingConfig
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.network.decision import AdaptationDecision
from esper.tamiyo.service.autonomy import Cycle
from esper.tamiyo.service.run_link import AdaptationResult, RunClient, RunLink

__all__ = ["TamiyoService"]


class TamiyoService:
    """Collector, graph builder, policy and trainer around one run.

    ``async with`` starts the collection and ends it; :meth:`run` is the loop of the document's integration example
    with its gates.

    Args:
        run: The run's id, or what :func:`esper.oona.find_runs` found.
        keys: Folder of CURVE keys, for a run that wants them.
        policy_config: Of the policy network.
        training_config: Of the trainer.
        weights: Of the policy network; see :class:`EnhancedTamiyoPolicyGNN`.
        buffer_size: Signals that may wait to be processed.
        cycle_s: Seconds from one decision to the next.
        cooldown_s: After an adaptation, nothing is decided within this time.
        **link: Further settings of :class:`~esper.tamiyo.service.run_link.RunLink`.

    Raises:
        ConfigError: There is no such run, or a setting is out of range.

    Example::

        async with TamiyoService("my-run") as service:
            await service.run()
    """

    def __init__(
        self,
        run: str | RunInfo,
        *,
        keys: str = "",
        policy_config: PolicyConfig | None = None,
        training_config: ProductionTrainingConfig | None = None,
        weights: str | Path | None = None,
        buffer_size: int = 50_000,
        cycle_s: float = 0.1,
        cooldown_s: float = 30.0,
        **link: Any,
    ) -> None:
        if not cycle_s > 0 or cooldown_s < 0:
            raise ConfigError(
                f"TamiyoService: expected cycle_s > 0 and cooldown_s >= 0, got {cycle_s} and {cooldown_s}"
            )
        self.cycle_s, self.cooldown_s = cycle_s, cooldown_s
        self.policy = EnhancedTamiyoPolicyGNN(policy_config, weights)
        self.trainer = ProductionPolicyTrainer(self.policy, training_config=training_config)
        self.graph_builder = ModelGraphBuilder()
        self.link = RunLink(run, keys=keys, **link)
        self.health_collector = ProductionHealthCollector(self.link.oona_client, buffer_size)

    @property
    def oona_client(self) -> RunClient:
        """The subscription to the run's telemetry."""
        return self.link.oona_client

    async def execute_adaptation(self, decision: AdaptationDecision) -> AdaptationResult:
        """Have the run carry a decision out; see :meth:`RunLink.execute_adaptation`."""
        return await self.link.execute_adaptation(decision)

    def compute_reward(self, result: AdaptationResult) -> float:
        """What it has earned; see :meth:`RunLink.compute_reward`."""
        return self.link.compute_reward(result)

    async def run(self, num_cycles: int | None = None) -> Cycle:
        """Decide until the run ends, or for so many cycles.

        Returns:
            What was done.

        Raises:
            EsperError: The collection has failed.
        """
        cycle = Cycle(
            self.link,
            self.health_collector,
            self.graph_builder,
            self.policy,
            self.trainer.replay_buffer,
            cooldown_s=self.cooldown_s,
        )
        await cycle.turn_until(num_cycles, self.cycle_s)
        return cycle

    async def __aenter__(self) -> Self:
        await self.health_collector.start_intelligent_collection()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.health_collector.stop()
        finally:
            self.link.close()
