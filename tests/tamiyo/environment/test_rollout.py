"""Rollouts: the same seeds give the same trajectories whoever plays them; arms that policies are compared with."""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec
import pytest
import torch
from short_hosts import short

from esper.errors import ConfigError, MissingExtraError
from esper.tamiyo.environment.arms import run_double_rate, run_from_scratch, run_rule
from esper.tamiyo.environment.assignments import AssignmentConfig, numbered_assignments
from esper.tamiyo.environment.choosers import NetworkChooser, RandomChooser, WaitChooser
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.game import GameConfig
from esper.tamiyo.environment.plain import train_plain
from esper.tamiyo.environment.rollout import Played, Rollouts
from esper.tamiyo.environment.workers import WorkerError
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork

GAME = GameConfig(episode=EpisodeConfig(fractions=(0.2, 0.6)))
RUNS = numbered_assignments(AssignmentConfig(families=("digits_mlp", "teacher_mlp"), max_steps=40), 0, 3)


def chooser() -> NetworkChooser:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NetworkChooser.of(TamiyoNetwork(PolicyConfig(hidden_dim=16, num_gnn_layers=1)))


def facts(played: list[Played]) -> list[Any]:
    """All of it but wall times, in comparable form."""
    return [
        (
            p.assignment,
            [(s.action, s.logprob, s.reward, repr((s.value, s.urgency, s.risk))) for s in p.trajectory.steps],
            [s.graph.unpack().candidate_attr.tolist() for s in p.trajectory.steps],
            msgspec.structs.replace(p.outcome, wall_seconds=0.0),
            p.utility,
            p.components,
        )
        for p in played
    ]


def test_any_number_of_workers_plays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    here = facts(Rollouts(0).play(RUNS, chooser(), config=GAME, seed=5))
    assert here == facts(Rollouts(0).play(RUNS, chooser(), config=GAME, seed=5))
    assert here != facts(Rollouts(0).play(RUNS, chooser(), config=GAME, seed=6))
    with Rollouts(2) as rollouts:
        assert here == facts(rollouts.play(RUNS, chooser(), config=GAME, seed=5))
        with pytest.raises(WorkerError, match="ESPER_DATA_DIR is not set"):
            rollouts.play([_sealed()], WaitChooser(), config=GAME)


def _sealed() -> Any:
    os.environ.pop("ESPER_DATA_DIR", None)
    return numbered_assignments(AssignmentConfig(families=("fashion_mlp",), split="sealed"), 0, 1)[0]


@pytest.mark.skipif(
    os.environ.get("ESPER_TEST_RAY") != "1", reason="Ray takes 20 s to start; ESPER_TEST_RAY=1"
)
def test_ray_plays_the_same() -> None:
    pytest.importorskip("ray")
    here = facts(Rollouts(0).play(RUNS, chooser(), config=GAME, seed=5))
    with Rollouts(1, where="ray") as rollouts:
        assert here == facts(rollouts.play(RUNS, chooser(), config=GAME, seed=5))
        with pytest.raises(WorkerError, match="a rollout failed on the Ray cluster"):
            rollouts.play([_sealed()], WaitChooser(), config=GAME)


def test_places_are_checked_and_a_missing_ray_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="rollout must be 'local' or 'ray', got 'cloud'"):
        Rollouts(1, where="cloud")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs at least one worker"):
        Rollouts(0, where="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'esper\[ray\]'"):
        Rollouts(1, where="ray")


def test_simple_choosers() -> None:
    waited = Rollouts(0).play(RUNS[:1], WaitChooser(), config=GAME)[0]
    assert [(s.action, s.logprob) for s in waited.trajectory.steps] == [(0, 0.0), (0, 0.0)]
    drawn = Rollouts(0).play(RUNS, RandomChooser(), config=GAME)
    assert any(s.action for p in drawn for s in p.trajectory.steps)
    greedy = NetworkChooser(chooser().config, chooser().weights, greedy=True)
    first, second = (Rollouts(0).play(RUNS[:1], greedy, config=GAME, seed=seed)[0] for seed in (1, 2))
    assert [s.action for s in first.trajectory.steps] == [s.action for s in second.trajectory.steps]


def test_arms_are_the_same_run_but_for_what_they_are_named_after() -> None:
    spec = short("digits_mlp", 1, 80)
    plain = train_plain(spec)
    faster = run_double_rate(spec)
    assert faster.train_losses[0] == plain.train_losses[0]
    assert faster.train_losses[-1] != plain.train_losses[-1]
    episode = Episode(spec, fractions=(0.1,), budget=3.0)
    point = episode.advance()
    assert point is not None
    episode.act(next(i for i, c in enumerate(point.candidates) if c.action == "grow" and not c.unavailable))
    grown = episode.finish()
    scratch = run_from_scratch(episode)
    assert scratch.num_parameters == grown.num_parameters > plain.num_parameters
    assert scratch.training_flops > grown.host_parameters
    assert scratch.train_losses != plain.train_losses
    rule = run_rule(spec, "narrowest", EpisodeConfig(budget=2.0))
    assert rule.germinated >= 1
    assert run_rule(spec, "off").train_losses == plain.train_losses
