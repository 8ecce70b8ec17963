"""Episodes: a run that waits is the plain run, a branch is the run itself, decisions are carried out."""

from __future__ import annotations

import io
from collections.abc import Iterator

import msgspec
import pytest
import torch
from short_hosts import short

from esper.errors import CheckpointError, ConfigError, GrowthError
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.families import KNOWN
from esper.tamiyo.environment.plain import Outcome, train_plain
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.policies import make_policy


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def first(point: DecisionPoint | None, action: str = "grow") -> int:
    assert point is not None
    return next(i for i, c in enumerate(point.candidates) if c.action == action and not c.unavailable)


def timeless(outcome: Outcome) -> Outcome:
    return msgspec.structs.replace(outcome, wall_seconds=0.0)


@pytest.mark.parametrize("family", KNOWN)
def test_every_family_grows_in_a_real_run(family: str) -> None:
    episode = Episode(short(family), fractions=(0.2, 0.5), budget=3.0)
    point = episode.advance()
    assert point is not None
    assert point.candidates[0].action == "wait"
    assert point.run.step < point.run.total_steps
    episode.act(first(point))
    outcome = episode.finish()
    assert outcome.refused == ()
    assert outcome.germinated >= 1
    assert outcome.held_out_loss == outcome.held_out_loss  # not NaN
    assert len(outcome.train_losses) == 60
    assert outcome.num_parameters > outcome.host_parameters or outcome.culled


@pytest.mark.parametrize("family", ["digits_mlp", "digits_cnn", "text_gpt", "shift_mlp"])
def test_a_run_that_waits_is_the_plain_run(family: str) -> None:
    spec = short(family)
    plain = train_plain(spec)
    episode = Episode(spec)
    points = 0
    while episode.advance() is not None:
        points += 1
        episode.act(0)
    outcome = episode.finish()
    assert points >= 4
    assert outcome.train_losses == plain.train_losses
    assert (outcome.held_out_loss, outcome.test_loss) == (plain.held_out_loss, plain.test_loss)
    assert outcome.num_parameters == plain.num_parameters
    assert outcome.training_flops > plain.training_flops  # what was measured is charged


def test_the_same_run_twice_is_the_same_and_a_repeat_is_another() -> None:
    spec = short("digits_mlp")
    runs = [Episode(spec, repeat=repeat).finish() for repeat in (0, 0, 1)]
    assert timeless(runs[0]) == timeless(runs[1])
    assert runs[0].train_losses[0] != runs[2].train_losses[0]


@pytest.mark.parametrize("family", ["digits_mlp", "digits_cnn", "text_gpt", "shift_mlp"])
def test_a_branch_with_the_same_answers_is_bit_equal_also_through_a_file(family: str) -> None:
    episode = Episode(short(family), fractions=(0.2, 0.4, 0.6), budget=3.0)
    point = episode.advance()
    buffer = io.BytesIO()
    torch.save(episode.state_dict(), buffer)
    buffer.seek(0)
    runs = [episode, episode.branch(), Episode.from_state_dict(torch.load(buffer, weights_only=True))]
    assert runs[1].point == runs[2].point == point
    for run in runs:
        run.act(first(point))  # still to be carried out when the next branch is made
    runs.append(runs[1].branch())
    points = [run.advance() for run in runs]
    assert len({str(p and (p.candidates, p.run)) for p in points}) == 1
    runs.append(runs[0].branch())  # with a grown seed in it
    for run in runs:
        run.act(first(run.point))
    outcomes = [timeless(run.finish()) for run in runs]
    assert outcomes[0].germinated >= 2
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_what_a_branch_does_stays_in_it() -> None:
    spec = short("digits_mlp")
    episode = Episode(spec, fractions=(0.3,))
    point = episode.advance()
    branch = episode.branch()
    branch.act(first(point))
    assert branch.finish().germinated >= 1
    assert episode.finish().train_losses == train_plain(spec).train_losses


def test_a_branch_may_go_on_in_another_order() -> None:
    episode = Episode(short("teacher_mlp"), fractions=(0.3,))
    episode.advance()
    steps = episode.step
    other = episode.branch(repeat=5).finish().train_losses
    own = episode.finish().train_losses
    assert own[:steps] == other[:steps]
    assert own[steps] != other[steps]


def test_a_policy_of_its_own_decides_without_questions() -> None:
    policy = make_policy("random", num_events=1, start=0.2)
    episode = Episode(short("digits_mlp"), policy=policy)
    assert episode.advance() is None
    assert episode.finish().germinated >= 1
    with pytest.raises(GrowthError, match="only a run that is asked"):
        episode.branch()


def test_answers_are_checked_and_a_refused_one_leaves_the_question_open() -> None:
    episode = Episode(short("digits_mlp"), fractions=(0.3,), budget=1.0)
    with pytest.raises(GrowthError, match="stands at no decision point"):
        episode.act(0)
    point = episode.advance()
    assert point is not None
    with pytest.raises(GrowthError, match="waits for an answer"):
        episode.advance()
    with pytest.raises(ConfigError, match="must be one of 0 to"):
        episode.act(len(point.candidates))
    closed = next(i for i, c in enumerate(point.candidates) if c.unavailable)
    with pytest.raises(ConfigError, match=r"may not be chosen .* the parameter budget is used up"):
        episode.act(closed)
    assert episode.point is point
    episode.act(0)
    assert episode.advance() is None


def test_settings_and_states_are_checked() -> None:
    spec = short("digits_mlp")
    with pytest.raises(ConfigError, match="has no setting prise"):
        Episode(spec, prise=0.1)
    with pytest.raises(ConfigError, match="fractions should ascend"):
        Episode(spec, fractions=(0.5, 0.2))
    with pytest.raises(CheckpointError, match="state of an Episode of version 1"):
        Episode.from_state_dict({"version": 7})
