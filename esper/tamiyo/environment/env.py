"""Growth as a Gymnasium environment: ``GrowthEnv`` for anybody's reinforcement learning (extra ``learn``).

    env = GrowthEnv(EnvConfig(families=("digits_mlp",)))
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(0)      # 0 is WAIT

An observation holds the padded tensors of a :class:`~esper.tamiyo.graph.data.CandidateGraph`. ``info["action_mask"]``
says what may be chosen, ``info["point"]`` holds the facts that it all was made from (they compare by value, as
Gymnasium's checks want; ``env.unwrapped.state`` is the graph itself).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from esper.errors import ConfigError, MissingExtraError
from esper.tamiyo.environment.assignments import AssignmentConfig, draw_assignment
from esper.tamiyo.environment.game import Assignment, Game, GameConfig
from esper.tamiyo.graph.builder import ModelGraphBuilder
from esper.tamiyo.graph.data import CandidateGraph, ModelGraphState
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.graph.features import (
    CANDIDATE_FEATURES,
    EDGE_FEATURES,
    GLOBAL_FEATURES,
    LIMIT,
    NODE_FEATURES,
)

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise MissingExtraError(
        "esper.tamiyo.environment.env needs gymnasium, which is not installed; pip install 'esper[learn]'"
    ) from error

__all__ = ["EnvConfig", "GrowthEnv"]

Observation = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EnvConfig:
    """Settings of :class:`GrowthEnv`.

    Attributes:
        assignments: Which hosts, prices and budgets are drawn from.
        game: How an episode is rewarded.
        max_decisions: An episode is truncated after so many decisions; None plays each to its end.
        max_nodes, max_edges, max_candidates, max_placements: Rows that observations are padded to.
    """

    assignments: AssignmentConfig = field(default_factory=AssignmentConfig)
    game: GameConfig = field(default_factory=GameConfig)
    max_decisions: int | None = None
    max_nodes: int = 24
    max_edges: int = 64
    max_candidates: int = 64
    max_placements: int = 256

    def __post_init__(self) -> None:
        for name in ("max_decisions", "max_nodes", "max_edges", "max_candidates", "max_placements"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"EnvConfig.{name} must be at least 1, got {value}")


class GrowthEnv(gymnasium.Env[Observation, np.int64]):
    """One host training an episode, with several decision points.

    The price λ and the budget of an episode are drawn with its host and stand among the observed features.
    ``terminated`` says that nothing follows, ``truncated`` that ``max_decisions`` cut the episode off.

    Action:
        Index of a candidate. One that ``action_mask`` forbids waits, and ``info["forbidden"]`` says so.

    Args:
        config: Settings.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own name for it)

    def __init__(self, config: EnvConfig | None = None) -> None:
        self.config = config or EnvConfig()
        limits = self.config
        n, e, c, m = (
            limits.max_nodes,
            limits.max_edges,
            limits.max_candidates,
            limits.max_placements,
        )
        space = spaces.Dict(
            {
                "x": _features(n, len(NODE_FEATURES)),
                "node_mask": spaces.MultiBinary(n),
                "edge_index": spaces.Box(0, n - 1, (2, e), np.int64),
                "edge_attr": _features(e, len(EDGE_FEATURES)),
                "edge_mask": spaces.MultiBinary(e),
                "global_features": _features(1, len(GLOBAL_FEATURES)),
                "candidate_attr": _features(c, len(CANDIDATE_FEATURES)),
                "action_mask": spaces.MultiBinary(c),
                "placement_index": spaces.Box(0, n - 1, (2, m), np.int64),
                "placement_candidate": spaces.Box(0, c - 1, (m,), np.int64),
                "placement_mask": spaces.MultiBinary(m),
            }
        )
        self.observation_space = cast("spaces.Space[Observation]", space)
        self.action_space = spaces.Discrete(c)
        self._builder = ModelGraphBuilder()
        self._game: Game | None = None
        self._state: ModelGraphState | None = None
        self._num_decisions = 0
        self._truncated = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: Of this and the following episodes.
            options: ``{"assignment": Assignment}`` plays a given run in place of a drawn one.

        Raises:
            ConfigError: An unknown option, or a graph that is larger than observations are.
        """
        super().reset(seed=seed)
        given = dict(options or {})
        assignment = given.pop("assignment", None)
        if given or not (assignment is None or isinstance(assignment, Assignment)):
            raise ConfigError(f"reset takes options={{'assignment': Assignment}}, got {options!r}")
        if assignment is None:
            random = Random(int(self.np_random.integers(2**31)))
            assignment = draw_assignment(random, self.config.assignments)
        self._game, self._num_decisions, self._truncated = Game(assignment, self.config.game), 0, False
        assert self._game.point is not None
        return self._observe(self._game.point), self._info()

    def step(self, action: np.int64 | int) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Carry a candidate out and train to the next decision point.

        After the last decision the observation is the one that was decided on, as there is no later one.

        Raises:
            ConfigError: The episode is over.
        """
        game = self._game
        if game is None or game.point is None or self._truncated:
            raise ConfigError("the episode is over, or none was begun; call reset()")
        candidates = game.point.candidates
        forbidden = not 0 <= action < len(candidates) or bool(candidates[int(action)].unavailable)
        move = game.play(0 if forbidden else int(action))
        self._num_decisions += 1
        if game.point is not None:
            observation = self._observe(game.point)
        else:
            assert self._state is not None
            observation = self._pad(self._state.graph_data)
        self._truncated = not move.over and self._num_decisions == self.config.max_decisions
        info = self._info() | {"forbidden": forbidden, "risk": None if math.isnan(move.risk) else move.risk}
        if move.over:
            info |= {"outcome": game.outcome, "utility": game.utility, "components": game.components}
        return observation, move.reward, move.over, self._truncated, info

    @property
    def state(self) -> ModelGraphState:
        """The last decision point as a graph.

        Raises:
            ConfigError: No episode was begun.
        """
        if self._state is None:
            raise ConfigError("no episode was begun; call reset()")
        return self._state

    def _observe(self, point: DecisionPoint) -> Observation:
        self._state = self._builder.build(point)
        return self._pad(self._state.graph_data)

    def _info(self) -> dict[str, Any]:
        assert self._game is not None
        assert self._state is not None
        mask = _padded(self._state.graph_data.candidate_mask.numpy(), self.config.max_candidates, np.int8)
        return {"point": self._state.point, "action_mask": mask, "assignment": self._game.assignment}

    def _pad(self, graph: CandidateGraph) -> Observation:
        limits = self.config
        sizes = {
            "max_nodes": int(graph.num_nodes or 0),
            "max_edges": graph.edge_index.shape[1],
            "max_candidates": len(graph.candidate_attr),
            "max_placements": graph.placement_index.shape[1],
        }
        if larger := [f"{name}={n}" for name, n in sizes.items() if n > getattr(limits, name)]:
            raise ConfigError(
                f"a decision point needs {', '.join(larger)}, more than EnvConfig allows; raise these limits"
            )
        n, e = limits.max_nodes, limits.max_edges
        c, m = limits.max_candidates, limits.max_placements
        return {
            "x": _padded(graph.x.numpy(), n, np.float32),
            "node_mask": _padded(np.ones(sizes["max_nodes"]), n, np.int8),
            "edge_index": _padded(graph.edge_index.numpy().T, e, np.int64).T.copy(),
            "edge_attr": _padded(graph.edge_attr.numpy(), e, np.float32),
            "edge_mask": _padded(np.ones(sizes["max_edges"]), e, np.int8),
            "global_features": graph.global_features.numpy().astype(np.float32),
            "candidate_attr": _padded(graph.candidate_attr.numpy(), c, np.float32),
            "action_mask": _padded(graph.candidate_mask.numpy(), c, np.int8),
            "placement_index": _padded(graph.placement_index.numpy().T, m, np.int64).T.copy(),
            "placement_candidate": _padded(graph.placement_candidate.numpy(), m, np.int64),
            "placement_mask": _padded(np.ones(sizes["max_placements"]), m, np.int8),
        }


def _features(rows: int, columns: int) -> spaces.Box:
    return spaces.Box(-LIMIT, LIMIT, (rows, columns), np.float32)


def _padded(array: NDArray[Any], rows: int, dtype: type[np.generic]) -> NDArray[Any]:
    """``array`` with zero rows appended, as a copy."""
    padded = np.zeros((rows, *array.shape[1:]), dtype)
    padded[: len(array)] = array
    return padded
