"""The Gymnasium environment: its own checks, masks, truncation and termination, and the missing package."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from short_hosts import short

from esper.errors import ConfigError, MissingExtraError
from esper.tamiyo.environment.assignments import AssignmentConfig
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.env import EnvConfig, GrowthEnv
from esper.tamiyo.environment.game import Assignment, GameConfig

GAME = GameConfig(episode=EpisodeConfig(fractions=(0.2, 0.6)))
CONFIG = EnvConfig(AssignmentConfig(families=("digits_mlp", "teacher_mlp"), max_steps=40), GAME)


def test_gymnasium_finds_nothing_wrong() -> None:
    check_env(GrowthEnv(CONFIG), skip_render_check=True)


def test_an_episode_goes_from_decision_to_decision_to_its_end() -> None:
    env = GrowthEnv(CONFIG)
    observation, info = env.reset(options={"assignment": Assignment(spec=short("digits_mlp"), price=0.1)})
    assert env.state.point == info["point"]
    assert env.observation_space.contains(observation)
    count = len(info["point"].candidates)
    assert info["action_mask"].sum() == sum(not c.unavailable for c in info["point"].candidates)
    assert not info["action_mask"][count:].any()
    assert observation["node_mask"].sum() == len(env.state.node_names)
    graph = env.state.graph_data
    assert np.array_equal(observation["candidate_attr"][:count], graph.candidate_attr.numpy())
    assert np.array_equal(observation["edge_index"][:, : graph.edge_index.shape[1]], graph.edge_index.numpy())
    grow = int(np.flatnonzero(info["action_mask"])[1])
    _, first, terminated, truncated, info = env.step(grow)
    assert (terminated, truncated) == (False, False)
    assert info["risk"] in (0.0, 1.0)
    last, second, terminated, truncated, info = env.step(0)
    assert (second, terminated, truncated) == (0.0, True, False)
    assert env.observation_space.contains(last)
    assert first == pytest.approx(info["utility"])
    assert info["outcome"].germinated >= 1
    with pytest.raises(ConfigError, match="the episode is over"):
        env.step(0)


def test_truncation_is_no_end_and_what_is_forbidden_waits() -> None:
    env = GrowthEnv(EnvConfig(CONFIG.assignments, GAME, max_decisions=1))
    _, info = env.reset(options={"assignment": Assignment(spec=short("digits_mlp"), budget=1.0)})
    forbidden = int(np.flatnonzero(info["action_mask"] == 0)[0])
    _, reward, terminated, truncated, info = env.step(forbidden)
    assert (reward, terminated, truncated) == (0.0, False, True)
    assert info["forbidden"]
    assert "outcome" not in info
    with pytest.raises(ConfigError, match="call reset"):
        env.step(0)


def test_options_and_limits_are_checked() -> None:
    env = GrowthEnv(EnvConfig(CONFIG.assignments, GAME, max_nodes=2))
    with pytest.raises(ConfigError, match="no episode was begun"):
        _ = env.state
    with pytest.raises(
        ConfigError, match=r"a decision point needs max_nodes=\d+, more than EnvConfig allows"
    ):
        env.reset(seed=0)
    with pytest.raises(ConfigError, match="reset takes options"):
        env.reset(options={"host": 3})
    with pytest.raises(ConfigError, match="max_edges must be at least 1"):
        EnvConfig(max_edges=0)


def test_without_gymnasium_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "esper.tamiyo.environment.env")
    with pytest.raises(MissingExtraError, match=r"pip install 'esper\[learn\]'"):
        import esper.tamiyo.environment.env  # noqa: F401
