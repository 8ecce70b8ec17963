"""The document's name for :class:`esper.tamiyo.learning.trainer.PolicyTrainer`, with its live training loop."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from esper.errors import ConfigError
from esper.tamiyo.collection import HealthCollector
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.learning.config import TrainingConfig as ProductionTrainingConfig
from esper.tamiyo.learning.trainer import PolicyTrainer
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.service.autonomy import Cycle
from esper.tamiyo.service.run_link import RunClient

__all__ = ["ProductionPolicyTrainer", "ProductionTrainingConfig"]


class ProductionPolicyTrainer(PolicyTrainer):
    """Trains a policy network on what it lives through.

    Args:
        policy: The network.
        policy_config: Its config, which it has itself; another one is refused.
        training_config: Settings of the training.
        device: Where to train; default where the policy is.

    Raises:
        ConfigError: ``policy_config`` is not the policy's.
    """

    def __init__(
        self,
        policy: TamiyoNetwork,
        policy_config: PolicyConfig | None = None,
        training_config: ProductionTrainingConfig | None = None,
        device: torch.device | None = None,
    ) -> None:
        if policy_config is not None and policy_config != policy.config:
            raise ConfigError(
                f"expected the policy's own config, got another: {policy_config} instead of {policy.config}; "
                "make the policy with the config that it is to have"
            )
        super().__init__(policy if device is None else policy.to(device), training_config)
        self._network = policy

    async def train_with_experience_collection(
        self,
        health_collector: HealthCollector,
        graph_builder: ModelGraphBuilder,
        num_episodes: int = 1000,
        *,
        cycle_s: float = 0.1,
        cooldown_s: float = 30.0,
    ) -> dict[str, Any]:
        """Decide about a live run, and learn from every decision that was carried out.

        An episode is one decision cycle. After each adaptation one step is taken on the replay buffer, once there is
        as much in it as a minibatch holds.

        Args:
            health_collector: Running, on a client of :class:`~esper.tamiyo.service.run_link.RunLink`: it knows the
                way back into the run.
            graph_builder: Of graphs.
            num_episodes: Decision cycles at most; fewer when the run ends before.
            cycle_s: Seconds from one cycle to the next.
            cooldown_s: After an adaptation, nothing is decided within this time.

        Returns:
            :meth:`get_training_statistics`.

        Raises:
            ConfigError: The collector's client knows no run to send decisions to.
            LearningError: A loss or gradient is not finite.
        """
        client = health_collector.client
        if not isinstance(client, RunClient):
            raise ConfigError(
                f"expected a collector that reads from a RunLink's oona_client, got one on {client!r}: decisions have "
                "to get back to the run"
            )
        cycle = Cycle(
            client.link,
            health_collector,
            graph_builder,
            self._network,
            self.replay_buffer,
            cooldown_s=cooldown_s,
        )
        while cycle.num_cycles < num_episodes and not client.link.ended:
            before = cycle.num_adaptations
            await cycle.turn_until(1, cycle_s)
            if cycle.num_adaptations > before and self.replay_buffer.num_ready >= self.config.batch_size:
                await asyncio.to_thread(self.train_on_replay, 1)
        return self.get_training_statistics()
