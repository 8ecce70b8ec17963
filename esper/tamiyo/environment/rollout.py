"""Episodes played by many processes at once: the same seeds give the same trajectories, wherever they are played.

All chance of an episode follows from its assignment and the rollout's seed, and every worker computes with one
thread; so the number of workers, their order, and whether they belong to this machine (``rollout=local``) or to a
Ray cluster (``rollout=ray``, extra ``ray``) make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch

from esper.errors import ConfigError
from esper.tamiyo.environment.choosers import Chooser, MakeChooser
from esper.tamiyo.environment.game import Assignment, Game, GameConfig
from esper.tamiyo.environment.plain import Outcome
from esper.tamiyo.environment.specs import derived_seed
from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.learning.trajectory import Trajectory, Transition
from esper.tamiyo.rewards.reward import Reward

__all__ = ["Played", "Rollouts", "play_episode"]

_CHUNKS_A_WORKER = 4
"""Episodes differ in length; with several chunks a worker that is done early takes more of them."""


@dataclass(frozen=True)
class Played:
    """One episode.

    Attributes:
        assignment: What was played.
        trajectory: For the trainer.
        outcome: How the run ended.
        control: How it ends without growth.
        utility: U of the run, in nats.
        components: What the rewards say of it; None where nothing was done.
    """

    assignment: Assignment
    trajectory: Trajectory
    outcome: Outcome
    control: Outcome
    utility: float
    components: Reward | None


class _Workers(Protocol):
    def map(
        self, function: partial[list[Played]], tasks: Sequence[list[Assignment]]
    ) -> list[list[Played]]: ...

    def close(self) -> None: ...


class Rollouts:
    """Plays episodes in processes that stay alive between calls. ``with Rollouts(2) as rollouts: ...``.

    Args:
        num_workers: Processes, or Ray actors; with ``local``, 0 plays in this process.
        where: ``local``, or ``ray``: the cluster that ``ray.init`` has joined, or one started on this machine.

    Raises:
        ConfigError: An unknown place, or a number of workers that it cannot have.
        MissingExtraError: ``ray`` is not installed.
    """

    def __init__(self, num_workers: int = 0, *, where: Literal["local", "ray"] = "local") -> None:
        self.num_workers = num_workers
        self._workers: _Workers
        if where == "local":
            self._workers = LocalWorkers(num_workers)
        elif where == "ray":
            from esper.tamiyo.environment.ray_workers import RayWorkers

            self._workers = RayWorkers(num_workers)
        else:
            raise ConfigError(f"rollout must be 'local' or 'ray', got {where!r}")

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def play(
        self,
        assignments: Sequence[Assignment],
        make: MakeChooser,
        *,
        config: GameConfig | None = None,
        seed: int = 0,
    ) -> list[Played]:
        """Play every assignment once.

        Args:
            assignments: Each must differ from the others, or it is played in the same way.
            make: Makes who decides; a :class:`~esper.tamiyo.environment.choosers.NetworkChooser` for a network.
            config: How episodes are rewarded.
            seed: Of whatever who decides draws; another one for each round of learning.

        Returns:
            One result each, in the order of ``assignments``.

        Raises:
            WorkerError: An episode failed in a worker, or a worker died; the text says how.
        """
        size = max(1, math.ceil(len(assignments) / (_CHUNKS_A_WORKER * max(1, self.num_workers))))
        chunks = [list(assignments[i : i + size]) for i in range(0, len(assignments), size)]
        work = partial(_play_all, make=make, config=config or GameConfig(), seed=seed)
        return [played for chunk in self._workers.map(work, chunks) for played in chunk]

    def close(self) -> None:
        """End the processes."""
        self._workers.close()


def _play_all(
    assignments: list[Assignment], *, make: MakeChooser, config: GameConfig, seed: int
) -> list[Played]:
    chooser, builder = make(), ModelGraphBuilder()
    return [play_episode(assignment, chooser, builder, config, seed=seed) for assignment in assignments]


def play_episode(
    assignment: Assignment,
    chooser: Chooser,
    builder: ModelGraphBuilder,
    config: GameConfig,
    *,
    seed: int = 0,
) -> Played:
    """Play one episode to its end.

    The urgency of a decision that acted is what it earned, where that is positive: what waiting would have cost.
    """
    name = (assignment.spec.name, assignment.price, assignment.budget, assignment.repeat)
    generator = torch.Generator().manual_seed(derived_seed("chooser", seed, *name))
    game = Game(assignment, config)
    steps = []
    while game.point is not None:
        state = builder.build(game.point)
        choice = chooser.choose(state, generator)
        move = game.play(choice.candidate)
        acted = config.credit == "branch" and not math.isnan(move.risk)
        steps.append(
            Transition.of(
                state.graph_data,
                choice.candidate,
                choice.logprob,
                move.reward,
                value=choice.value,
                urgency=max(0.0, move.reward) if acted else math.nan,
                risk=move.risk,
            )
        )
    return Played(assignment, Trajectory(steps), game.outcome, game.control, game.utility, game.components)
