"""Components by hand-computed values, their bounds, and how horizons make a total."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError
from esper.tamiyo.graph.facts import WAIT, Candidate, Placement
from esper.tamiyo.rewards import Branch, Outcome, Reward, RewardComputer, RewardConfig
from esper.tamiyo.rewards import components as parts
from esper.tamiyo.rewards.branch import kind_of
from esper.tamiyo.rewards.config import COMPONENTS

CONFIG = RewardConfig()
PLACE = Placement(site="bypass:a->b", source="a", target="b", kind="bypass", blueprint="widen", size=8)
GROW = Candidate(action="grow", placements=(PLACE,))


def branch(
    *losses: float, flops: float = 10.0, parameters: int = 100, every: int = 10, **events: int
) -> Branch:
    n = range(len(losses))
    return Branch(
        steps=tuple(every * i for i in n), losses=losses, training_flops=tuple(flops * i for i in n),
        num_parameters=parameters, **events,
    )  # fmt: skip


def outcome(taken: Branch, control: Branch | None, **facts: object) -> Outcome:
    given = {"candidate": GROW, "total_steps": 40, "taken": taken, "control": control}
    return Outcome(**(given | facts))  # type: ignore[arg-type]


def test_the_weights_are_the_documents_and_sum_to_one():
    assert [CONFIG.weight(name) for name in COMPONENTS] == [0.25, 0.20, 0.15, 0.20, 0.15, 0.05]
    assert sum(map(CONFIG.weight, COMPONENTS)) == pytest.approx(1.0)


def test_accuracy_and_utility_are_loss_saved_against_the_control():
    taken, control = branch(1.0, 0.4, parameters=200), branch(1.0, 0.5)
    assert parts.accuracy(taken, control, CONFIG) == pytest.approx(math.tanh(1.0))
    assert parts.utility(taken, control, 0.1) == pytest.approx(0.1 - 0.1 * math.log(2))
    assert parts.memory(taken, control, CONFIG, 0.1) == pytest.approx(-math.tanh(math.log(2)))
    assert parts.memory(taken, control, CONFIG, 0.0) == pytest.approx(-math.tanh(0.1 * math.log(2)))


def test_speed_is_doublings_of_cost_to_the_worse_of_the_final_losses():
    control = branch(1.0, 0.8, 0.6)  # reaches 0.6 at 20 FLOPs
    assert parts.speed(branch(1.0, 0.6, 0.4), control, CONFIG) == pytest.approx(1.0)  # at 10
    assert parts.speed(branch(1.0, 0.7, 0.5), control, CONFIG) == pytest.approx(math.log2(20 / 15))
    assert parts.speed(control, branch(1.0, 0.6, 0.4), CONFIG) == pytest.approx(-1.0)
    assert parts.speed(branch(1.0, 0.8, 0.6, flops=15.0), control, CONFIG) == pytest.approx(-math.log2(1.5))
    dips = branch(1.0, 0.1, 0.6)
    assert parts.speed(dips, branch(1.0, 0.9, 0.6), CONFIG) > 0
    assert (
        parts.speed(branch(1.0, 0.1, 0.9, 0.55), branch(1.0, 0.8, 0.7, 0.6), CONFIG) < 0.1
    )  # it does not stay


def test_speed_can_be_counted_in_seconds():
    config = RewardConfig(speed_cost="seconds")
    slow = msgspec.structs.replace(branch(1.0, 0.5), seconds=(0.0, 3.0))
    fast = msgspec.structs.replace(branch(1.0, 0.5), seconds=(0.0, 2.0))
    assert parts.speed(slow, fast, config) == pytest.approx(-math.log2(1.5))
    with pytest.raises(ConfigError, match="has no seconds"):
        RewardComputer(config).compute(outcome(branch(1.0, 0.5), branch(1.0, 0.5)))


def test_stability_compares_the_unrest_of_the_loss():
    calm, restless = branch(1.0, 0.9, 0.8, 0.7), branch(1.0, 1.1, 0.5, 0.7)
    changes = (0.1, -0.6, 0.2)
    mean = sum(changes) / 3
    sd = math.sqrt(sum((c - mean) ** 2 for c in changes) / 2)
    assert parts.stability(restless, calm, CONFIG) == pytest.approx(-math.tanh(sd / 0.1))
    assert parts.stability(calm, calm, CONFIG) == pytest.approx(0.0)
    # what a fitted control lacks is not the adaptation's doing
    assert parts.stability(restless, calm, CONFIG, sd / math.sqrt(2)) == pytest.approx(0.0)


def test_safety_counts_what_went_wrong_beyond_the_control():
    control = branch(1.0, 0.5, rollbacks=1)
    assert parts.safety(branch(1.0, 0.5, rollbacks=1), control, CONFIG) == 0.0
    assert parts.safety(branch(1.0, 0.5, rollbacks=1, culls=1), control, CONFIG) == -0.25
    assert parts.safety(branch(1.0, 0.5, rollbacks=2, culls=1), control, CONFIG) == -0.75
    assert parts.safety(branch(1.0, 0.5, non_finite=7), control, CONFIG) == -1.0


def test_innovation_is_for_the_first_success_of_a_kind_and_is_worth_at_most_two():
    won = outcome(branch(1.0, 0.5, 0.2), branch(1.0, 0.6, 0.5))
    assert parts.innovation(won, CONFIG, ()) == 1.0
    assert parts.innovation(won, CONFIG, {kind_of(GROW)}) == 0.0
    known: set[str] = set()
    earned = 0.0
    for kind in range(50):
        candidate = Candidate(
            action="grow", placements=(msgspec.structs.replace(PLACE, blueprint=f"b{kind}"),)
        )
        reward = RewardComputer().compute(msgspec.structs.replace(won, candidate=candidate), known=known)
        assert reward is not None
        earned += reward.components["innovation"]
        known.add(reward.new_kind)
    assert earned == pytest.approx(2.0)


def test_other_names_and_sizes_are_no_new_kind():
    moved = msgspec.structs.replace(PLACE, site="bypass:c->d", source="c", target="d", size=64)
    assert kind_of(Candidate(action="grow", placements=(moved, PLACE))) == kind_of(GROW)


@pytest.mark.parametrize(
    ("taken", "stderr"),
    [
        (branch(1.0, 0.5, 0.6), ()),  # lost
        (branch(1.0, 0.5, 0.45), (0.0, 0.03, 0.03)),  # within two errors of the control
        (branch(1.0, 0.5, 0.2, culls=1), ()),  # won, but not cleanly
    ],
)
def test_only_a_sure_and_clean_success_is_new(taken: Branch, stderr: tuple[float, ...]):
    made = outcome(taken, branch(1.0, 0.6, 0.5), control_stderr=stderr)
    assert parts.innovation(made, CONFIG, ()) == 0.0


def test_waiting_earns_nothing_and_needs_no_control():
    reward = RewardComputer().compute(outcome(branch(1.0, 0.2, rollbacks=1), None, candidate=WAIT))
    assert reward is not None
    assert (reward.total, reward.utility, reward.provenance) == (0.0, 0.0, "itself")


def test_without_a_control_there_is_no_reward():
    assert RewardComputer().compute(outcome(branch(1.0, 0.2), None)) is None


def test_a_diverged_run_is_as_bad_as_can_be_and_breaks_nothing():
    reward = RewardComputer().compute(
        outcome(branch(1.0, math.nan, math.nan, non_finite=1), branch(1.0, 0.9, 0.8))
    )
    assert reward is not None
    assert reward.components == {
        "accuracy": -1.0, "speed": -1.0, "memory": 0.0, "stability": -1.0, "safety": -1.0, "innovation": 0.0,
    }  # fmt: skip
    assert reward.utility == -math.inf
    saved = RewardComputer().compute(outcome(branch(1.0, 0.9, 0.8), branch(1.0, math.nan, math.inf)))
    assert saved is not None
    assert (saved.components["accuracy"], saved.components["speed"]) == (1.0, 1.0)


def test_horizons_are_shares_of_the_run_from_the_decision():
    config = RewardConfig(short=0.25, medium=0.5, short_weight=1.0, medium_weight=1.0, long_weight=2.0)
    taken, control = branch(1.0, 0.5, 0.7, 0.6, 0.7), branch(1.0, 0.6, 0.6, 0.6, 0.6)
    reward = RewardComputer(config).compute(outcome(taken, control))
    assert reward is not None
    at = reward.horizons
    assert {name: h.step for name, h in at.items()} == {"short": 10, "medium": 20, "long": 40}
    assert at["short"].components["accuracy"] > 0 > at["medium"].components["accuracy"]
    assert reward.total == pytest.approx((at["short"].total + at["medium"].total + 2 * at["long"].total) / 4)
    assert reward.final


def test_a_run_that_goes_on_is_rewarded_by_the_furthest_horizon_that_is_over():
    config = RewardConfig(short=0.25, medium=0.5)
    taken, control = branch(1.0, 0.5, 0.7), branch(1.0, 0.6, 0.6)
    reward = RewardComputer(config).compute(outcome(taken, control), over=False)
    assert reward is not None
    assert sorted(reward.horizons) == ["medium", "short"]
    assert not reward.final
    assert reward.total == reward.horizons["medium"].total
    assert reward.new_kind == ""
    assert RewardComputer().compute(outcome(branch(1.0), branch(1.0), total_steps=400), over=False) is None


def test_what_is_not_known_well_counts_little():
    taken, control = branch(1.0, 0.6, 0.4), branch(1.0, 0.8, 0.6)
    sure = RewardComputer().compute(outcome(taken, control))
    vague = RewardComputer().compute(outcome(taken, control, control_stderr=(0.0, 0.2, 0.4)))
    assert sure is not None
    assert vague is not None
    share = 0.1 / math.hypot(0.1, 0.4)
    assert vague.components["accuracy"] == pytest.approx(math.tanh(0.2 / math.hypot(0.1, 0.4)))
    assert vague.components["speed"] == pytest.approx(share * sure.components["speed"])
    assert vague.utility == sure.utility


def test_the_provenance_names_the_error_of_a_fitted_control():
    made = outcome(branch(1.0, 0.5), branch(1.0, 0.5), control_stderr=(0.0, 0.0123))
    assert made.provenance == "fitted ± 0.0123"
    assert outcome(branch(1.0, 0.5), branch(1.0, 0.5)).provenance == "control"


losses = st.lists(st.one_of(st.floats(0, 1e6), st.just(math.nan), st.just(math.inf)), min_size=3, max_size=3)


@given(losses, losses, st.integers(1, 10**9), st.integers(0, 3), st.floats(0, 10))
def test_every_component_is_bounded(a, b, parameters, events, price):
    taken = branch(*a, parameters=parameters, rollbacks=events, culls=events)
    reward = RewardComputer().compute(outcome(taken, branch(*b), price=price))
    assert reward is not None
    assert all(-1.0 <= value <= 1.0 for value in reward.components.values())
    assert -1.0 <= reward.total <= 1.0
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(reward), type=Reward).total == reward.total


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"steps": (0, 10), "losses": (1.0,)}, "1 losses"),
        ({"steps": (), "losses": (), "training_flops": ()}, "at least one"),
        ({"steps": (10, 10)}, "steps should ascend"),
        ({"training_flops": (5.0, 1.0)}, "training_flops should ascend"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(facts, message):
    sound = {"steps": (0, 10), "losses": (1.0, 0.5), "training_flops": (0.0, 1.0), "num_parameters": 3}
    with pytest.raises(ConfigError, match=message):
        Branch(**(sound | facts))


def test_a_control_of_another_decision_is_refused():
    with pytest.raises(ConfigError, match="should start at the decision"):
        outcome(branch(1.0, 0.5), msgspec.structs.replace(branch(1.0, 0.5), steps=(5, 10)))
    with pytest.raises(ConfigError, match="one standard error for each"):
        outcome(branch(1.0, 0.5), branch(1.0, 0.5), control_stderr=(0.1,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accuracy": -1.0}, "accuracy should be"),
        ({"loss_scale": 0.0}, "loss_scale"),
        ({"short": 0.5, "medium": 0.25}, "short < medium < long"),
        ({"long_weight": 0.0}, "one horizon at least"),
        (dict.fromkeys(COMPONENTS, 0.0), "one component at least"),
        ({"innovation_decay": 1.0}, "innovation_decay"),
        ({"speed_cost": "joules"}, "speed_cost"),
        ({"min_fit_points": 2}, "min_fit_points"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**settings)
