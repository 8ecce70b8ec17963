"""Decoupled PPO over candidates of graphs, with prioritised replay."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from esper.errors import CheckpointError, DataFormatError, LearningError
from esper.tamiyo.learning import checkpoint
from esper.tamiyo.learning.config import TrainingConfig
from esper.tamiyo.learning.metrics import UpdateMetrics
from esper.tamiyo.learning.minibatch import Fresh, collate, fresh_experiences
from esper.tamiyo.learning.monitor import ReturnMonitor
from esper.tamiyo.learning.objective import Objective, objective
from esper.tamiyo.learning.proximal import ProximalPolicy
from esper.tamiyo.learning.replay import ReplayBuffer, Sample
from esper.tamiyo.learning.trajectory import Trajectory

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = ["PolicyTrainer"]

_MAY_DIFFER = {"num_training_steps", "early_stopping_patience"}
"""Settings that a resumed training may have otherwise than its checkpoint."""


class PolicyTrainer:
    """Trains a policy on trajectories, and on what is replayed of them.

    Everything runs in the precision of the weights; an autocast around it is switched off, so that rollout and
    update share it. Nothing here draws from torch's global random numbers.

    Args:
        policy: Maps a batch of graphs to a :class:`~esper.tamiyo.network.network.PolicyOutput`; put into eval mode.
        config: Settings.
        logger: Gets every update's metrics at the number of optimizer steps.

    Attributes:
        policy: In training.
        proximal: Its averaged weights: the middle of the trust region, and the target network of the value.
        replay_buffer: Older transitions.
        num_steps: Optimizer steps.
        num_updates: Calls of :meth:`update` and :meth:`train_on_replay`.
        num_experiences: Transitions given to :meth:`update`.
    """

    def __init__(
        self, policy: nn.Module, config: TrainingConfig | None = None, *, logger: Logger | None = None
    ) -> None:
        self.policy = policy.eval()
        self.config = config = config or TrainingConfig()
        self.logger = logger
        self.device = next(policy.parameters()).device
        self.proximal = ProximalPolicy(policy, config.proximal_decay)
        self.optimizer = AdamW(
            policy.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            eps=config.adam_epsilon,
        )
        self.scheduler = ReduceLROnPlateau(
            self.optimizer,
            mode="min",
            factor=config.lr_scheduler_factor,
            patience=config.lr_scheduler_patience,
            threshold=config.min_improvement,
            threshold_mode="abs",
        )
        self.replay_buffer = ReplayBuffer(
            config.replay_capacity, alpha=config.priority_exponent, epsilon=config.priority_epsilon
        )
        self.monitor = ReturnMonitor(config.return_smoothing, config.min_improvement)
        self.num_steps = self.num_updates = self.num_experiences = 0
        self._generator = np.random.default_rng(config.seed)
        self._best = copy.deepcopy(policy.state_dict())
        self._latest: dict[str, float] = {}

    @property
    def learning_rate(self) -> float:
        """Now."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def importance_exponent(self) -> float:
        """β of the importance weights now: it reaches 1 with the last of the training steps."""
        done = min(1.0, self.num_steps / self.config.num_training_steps)
        return self.config.importance_exponent + done * (1.0 - self.config.importance_exponent)

    @property
    def should_stop(self) -> bool:
        """Whether the steps are used up, or the return has not risen for long."""
        used_up = self.num_steps >= self.config.num_training_steps
        return used_up or self.monitor.since_best >= self.config.early_stopping_patience

    def update(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Learn from whole trajectories and from older transitions, then keep the fresh ones for later.

        Args:
            trajectories: Drawn with the policy as it is now, or as it was when each log-probability was stored.

        Returns:
            Metrics as :class:`UpdateMetrics` names them, and ``return/mean``, ``return/std``, ``advantage/mean``,
            ``learning_rate``, ``replay/size``, ``replay/beta``.

        Raises:
            DataFormatError: No trajectories, or NaN among rewards or values.
            LearningError: A loss or gradient is not finite; no weight has changed in that step.
        """
        config = self.config
        if not trajectories:
            raise DataFormatError("expected at least one trajectory to learn from, got none")
        fresh = fresh_experiences(
            trajectories,
            critic=self.policy,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            born=self.num_steps,
            device=self.device,
        )
        replays = round(config.batch_size * config.replay_fraction) if self.replay_buffer.can_sample else 0
        share = max(1, config.batch_size - replays)
        metrics = UpdateMetrics()
        errors = np.zeros(len(fresh))
        for _ in range(config.ppo_epochs):
            # near-equal parts: a last minibatch of one would have no advantages to normalise
            order = self._generator.permutation(len(fresh))
            for part in np.array_split(order, math.ceil(len(fresh) / share)):
                sample = self._draw(math.ceil(replays * len(part) / share))
                errors[part] = self._learn([fresh[i] for i in part], sample, metrics)[: len(part)]
        self.replay_buffer.add([transition.experience for transition in fresh], errors.tolist())
        self.num_experiences += len(fresh)
        returns = np.array([trajectory.total_reward for trajectory in trajectories])
        self.observe(float(returns.mean()))
        return self._finish(
            metrics,
            {
                "return/mean": float(returns.mean()),
                "return/std": float(returns.std()),
                "advantage/mean": float(np.mean([f.advantage for f in fresh])),
            },
        )

    def train_on_replay(self, num_steps: int) -> dict[str, float]:
        """Take ``num_steps`` optimizer steps on the replay buffer alone, for loops that only add experiences.

        The mean reward of what was added since the last call stands for the return.

        Returns:
            Metrics, as from :meth:`update`.

        Raises:
            DataFormatError: Nothing in the buffer can be drawn.
            LearningError: As in :meth:`update`.
        """
        if num_steps < 1:
            raise DataFormatError(f"expected at least one step on the replay buffer, got {num_steps}")
        metrics = UpdateMetrics()
        for _ in range(num_steps):
            self._learn([], self._draw(self.config.batch_size), metrics)
        reward = self.replay_buffer.new_mean_reward()
        if reward is not None:
            self.observe(reward)
        return self._finish(metrics, {} if reward is None else {"reward/mean": reward})

    def observe(self, measured: float) -> None:
        """Tell learning rate and stopping of a measured return; the best weights are kept."""
        if not math.isfinite(measured):
            raise DataFormatError(f"expected a finite return, got {measured}")
        if self.monitor.observe(measured):
            self._best = copy.deepcopy(self.policy.state_dict())
        self.scheduler.step(-self.monitor.smoothed)

    def restore_best(self) -> None:
        """Put back the weights that had the best smoothed return."""
        self.policy.load_state_dict(self._best)

    def train(
        self, collect: Callable[[nn.Module], Sequence[Trajectory]], *, progress: bool = False
    ) -> dict[str, Any]:
        """Collect and update until the steps are used up or the return stops rising; ends with the best weights.

        Args:
            collect: Makes trajectories with the policy it is given.
            progress: Show a bar.

        Returns:
            :meth:`get_training_statistics`.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if self.logger is not None:
            self.logger.log_hyperparams(asdict(self.config))
        columns = (
            TextColumn("learning"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("return {task.fields[smoothed]:.3f}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("", total=self.config.num_training_steps, smoothed=math.nan)
            while not self.should_stop:
                self.update(collect(self.policy))
                bar.update(task, completed=self.num_steps, smoothed=self.monitor.smoothed)
        if self.logger is not None:
            self.logger.save()
        self.restore_best()
        return self.get_training_statistics()

    def get_training_statistics(self) -> dict[str, Any]:
        """How far training is, and the metrics of the last update."""
        return {
            "num_steps": self.num_steps,
            "num_updates": self.num_updates,
            "num_experiences": self.num_experiences,
            "replay_size": len(self.replay_buffer),
            "learning_rate": self.learning_rate,
            "importance_exponent": self.importance_exponent,
            "smoothed_return": self.monitor.smoothed,
            "best_return": self.monitor.best,
            "since_best": self.monitor.since_best,
            "should_stop": self.should_stop,
            **self._latest,
        }

    def save_checkpoint(self, path: str | Path) -> None:
        """Write everything that training goes on from; atomic, without pickle."""
        state = {
            "config": asdict(self.config),
            "policy": self.policy.state_dict(),
            "best": self._best,
            "proximal": self.proximal.network.state_dict(),
            "proximal_weight": self.proximal.total_weight,
            "optimizer": checkpoint.optimizer_state(self.optimizer),
            "scheduler": self.scheduler.state_dict(),
            "monitor": self.monitor.state_dict(),
            "replay": self.replay_buffer.state_dict(),
            "generator": self._generator.bit_generator.state,
            "counts": [self.num_steps, self.num_updates, self.num_experiences],
            "latest": self._latest,
        }
        checkpoint.save(Path(path), state)

    def load_checkpoint(self, path: str | Path) -> None:
        """Go on from :meth:`save_checkpoint`: the next update gives the same weights, bit for bit.

        Raises:
            CheckpointError: The file is damaged, or of another policy or other settings.
        """
        state = checkpoint.load(Path(path))
        mine = asdict(self.config)
        other = {
            name: (value, state.get("config", {}).get(name, "nothing"))
            for name, value in mine.items()
            if name not in _MAY_DIFFER and state.get("config", {}).get(name) != value
        }
        if other:
            name, (here, there) = next(iter(other.items()))
            raise CheckpointError(
                f"expected a checkpoint of the same settings, but {', '.join(other)} differ: {name} is {here} here "
                f"and {there} in {path}; set them as they were, or start anew"
            )
        replay = ReplayBuffer(
            self.config.replay_capacity,
            alpha=self.config.priority_exponent,
            epsilon=self.config.priority_epsilon,
        )
        generator = np.random.default_rng()
        try:
            weights = [state[name] for name in ("policy", "best", "proximal")]
            optimizer, scheduler, latest = state["optimizer"], state["scheduler"], dict(state["latest"])
            proximal_weight = float(state["proximal_weight"])
            num_steps, num_updates, num_experiences = state["counts"]
            monitor = ReturnMonitor(**state["monitor"])
            generator.bit_generator.state = state["generator"]
            replay.load_state_dict(state["replay"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error!r}; go back to an earlier checkpoint"
            ) from error
        if not all(_fits(self.policy, w) for w in weights):
            raise CheckpointError(
                f"expected weights of this policy in {path}, got others; build the policy as it was"
            )
        checkpoint.load_optimizer_state(self.optimizer, optimizer)
        self.scheduler.load_state_dict(scheduler)
        self.policy.load_state_dict(weights[0])
        self._best = weights[1]
        self.proximal.network.load_state_dict(weights[2])
        self.proximal.total_weight = proximal_weight
        self.replay_buffer, self.monitor, self._generator = replay, monitor, generator
        self.num_steps, self.num_updates, self.num_experiences = num_steps, num_updates, num_experiences
        self._latest = latest

    def _draw(self, num: int) -> Sample:
        if num == 0:
            return Sample(np.empty(0, np.int64), [], np.empty(0))
        return self.replay_buffer.sample(num, self._generator, beta=self.importance_exponent)

    def _learn(self, fresh: Sequence[Fresh], sample: Sample, metrics: UpdateMetrics) -> np.ndarray:
        """One optimizer step; the TD errors of its transitions."""
        minibatch = collate(
            fresh,
            sample.experiences,
            sample.weights,
            target_network=self.proximal.network,
            gamma=self.config.gamma,
            step=self.num_steps,
            device=self.device,
        )
        seed = int(self._generator.integers(2**62))
        with torch.autocast(self.device.type, enabled=False):
            found = objective(self.policy, self.proximal.network, minibatch, self.config, dropout_seed=seed)
            grad_norm = self._descend(found)
        metrics.add(
            {
                **{f"loss/{name}": value.detach() for name, value in found.losses.items()},
                **found.metrics,
                "loss/total": found.total.detach(),
                "grad_norm": grad_norm,
            },
            values=found.values,
            targets=minibatch.targets,
        )
        errors = found.errors.double().cpu().numpy()
        if len(sample.index):
            self.replay_buffer.update_priorities(sample.index, errors[len(fresh) :])
        return errors

    def _descend(self, found: Objective) -> Tensor:
        """Step down the gradient, unless something is not finite; the norm before clipping."""
        if not bool(found.total.isfinite()):
            wrong = [name for name, value in found.losses.items() if not bool(value.isfinite())]
            raise LearningError(
                f"expected a finite loss at step {self.num_steps}, but {' and '.join(wrong) or 'the sum'} is not; no "
                "weight was changed: lower learning_rate, or look for weights or rewards that grew without bound"
            )
        self.optimizer.zero_grad()
        found.total.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.gradient_clip_norm)
        if not bool(norm.isfinite()):
            self.optimizer.zero_grad()
            raise LearningError(
                f"expected a finite gradient at step {self.num_steps}, but its norm is {float(norm)}; no weight was "
                "changed: lower learning_rate"
            )
        self.optimizer.step()
        self.num_steps += 1
        if self.num_steps % self.config.target_update_freq == 0:
            self.proximal.average(self.policy)
        return norm

    def _finish(self, metrics: UpdateMetrics, more: dict[str, float]) -> dict[str, float]:
        self.num_updates += 1
        self._latest = {
            **metrics.compute(),
            **more,
            "learning_rate": self.learning_rate,
            "replay/size": float(len(self.replay_buffer)),
            "replay/beta": self.importance_exponent,
        }
        if self.logger is not None:
            self.logger.log_metrics(self._latest, step=self.num_steps)
        return dict(self._latest)


def _fits(network: nn.Module, weights: dict[str, Tensor]) -> bool:
    mine = network.state_dict()
    return mine.keys() == weights.keys() and all(mine[n].shape == w.shape for n, w in weights.items())
