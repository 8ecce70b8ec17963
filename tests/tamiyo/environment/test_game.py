"""Rewards of decisions: they add up to the utility, waiting earns nothing, undone growth is a risk that happened."""

from __future__ import annotations

import math

import msgspec
import pytest
from short_hosts import short

from esper.errors import ConfigError, GrowthError
from esper.tamiyo.environment.assignments import AssignmentConfig, numbered_assignments
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.game import LEAST_UTILITY, Assignment, Game, GameConfig, Move
from esper.tamiyo.environment.plain import train_plain

FEW = EpisodeConfig(fractions=(0.2, 0.5, 0.7))


def play(game: Game, wanted: list[str]) -> list[Move]:
    """Choose the first available candidate of each wanted action."""
    moves = []
    for action in wanted:
        assert game.point is not None
        found = [i for i, c in enumerate(game.point.candidates) if c.action == action and not c.unavailable]
        moves.append(game.play(found[0]))
    return moves


def test_rewards_of_decisions_add_up_to_the_utility_of_the_run_whichever_way_credit_is_given() -> None:
    assignment = Assignment(spec=short("digits_mlp", 1, 100), price=0.1, budget=3.0)
    found = {}
    for credit in ("branch", "end"):
        game = Game(assignment, GameConfig(credit=credit, episode=FEW))
        moves = play(game, ["grow", "wait", "grow"])
        assert [move.over for move in moves] == [False, False, True]
        assert sum(move.reward for move in moves) == pytest.approx(game.utility, abs=1e-12)
        found[credit] = game
        if credit == "branch":
            assert moves[0].reward != 0.0
            assert moves[1].reward == 0.0
            assert moves[0].risk in (0.0, 1.0)
            assert math.isnan(moves[1].risk)
        else:
            assert [move.reward for move in moves[:2]] == [0.0, 0.0]
    branch, end = found["branch"], found["end"]
    timeless = [msgspec.structs.replace(game.outcome, wall_seconds=0.0) for game in (branch, end)]
    assert timeless[0] == timeless[1]
    outcome, control = branch.outcome, branch.control
    assert outcome.num_parameters > outcome.host_parameters
    expected = control.held_out_loss - outcome.held_out_loss
    expected -= 0.1 * math.log(outcome.num_parameters / outcome.host_parameters)
    assert branch.utility == pytest.approx(expected)
    components = branch.components
    assert components is not None
    assert components.utility == pytest.approx(expected)
    assert components.final
    with pytest.raises(GrowthError, match="the episode is over"):
        branch.play(0)


def test_waiting_to_the_end_is_the_control_and_earns_nothing() -> None:
    spec = short("teacher_mlp")
    game = Game(Assignment(spec=spec, price=0.3), GameConfig(episode=FEW))
    assert [move.reward for move in play(game, ["wait"] * 3)] == [0.0, 0.0, 0.0]
    assert game.utility == 0.0
    assert game.components is None
    assert game.outcome is game.control
    assert game.control.held_out_loss == train_plain(spec).held_out_loss


def test_the_objective_may_be_the_components() -> None:
    config = GameConfig(objective="components", episode=FEW)
    game = Game(Assignment(spec=short("digits_mlp", 1, 100)), config)
    moves = play(game, ["grow", "wait", "wait"])
    assert game.components is not None
    assert sum(move.reward for move in moves) == pytest.approx(game.components.total)


def test_a_run_that_diverges_is_bounded() -> None:
    spec = msgspec.structs.replace(short("teacher_mlp"), learning_rate=1e30)
    game = Game(Assignment(spec=spec), GameConfig(episode=FEW))
    assert math.isnan(game.control.held_out_loss)
    assert game.utility == 0.0
    game._outcome = msgspec.structs.replace(game.control)
    game.control = msgspec.structs.replace(game.control, held_out_loss=1.0)
    assert game.utility == LEAST_UTILITY


def test_assignments_depend_on_their_place_alone_and_are_checked() -> None:
    config = AssignmentConfig(max_steps=50)
    drawn = numbered_assignments(config, 3, 12)
    assert drawn[:5] == numbered_assignments(config, 3, 5)
    assert drawn[:5] != numbered_assignments(config, 4, 5)
    assert len({a.spec.family for a in drawn}) > 3
    assert len({a.price for a in drawn}) > 2
    assert all(a.spec.total_steps == 50 and a.spec.split == "train" for a in drawn)
    with pytest.raises(ConfigError, match="nothing may be trained or tuned on a sealed family"):
        AssignmentConfig(families=("digits_mlp", "fashion_mlp"))
    with pytest.raises(ConfigError, match="should not be empty"):
        AssignmentConfig(prices=())
    with pytest.raises(ConfigError, match="objective must be"):
        GameConfig(objective="fame")  # type: ignore[arg-type]
