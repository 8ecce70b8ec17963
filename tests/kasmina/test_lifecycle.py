"""Stages, gates and blending."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.errors import CheckpointError, ConfigError, LifecycleError
from esper.kasmina.lifecycle import (
    BlendSchedule,
    Facts,
    Lifecycle,
    LifecycleConfig,
    Mode,
    Transition,
    blend_alpha,
    legal_targets,
    next_transition,
    stage_alpha,
)
from esper.messages import STAGES, Stage

CONFIG = LifecycleConfig(
    mode="isolated",
    min_training_steps=5,
    max_training_steps=20,
    min_gradient_snr=1.0,
    max_output_ratio=0.5,
    blend_steps=4,
    min_holding_steps=5,
    max_holding_steps=20,
    min_contribution=0.01,
    contribution_stderrs=2.0,
    num_measurements=3,
    max_spread=0.5,
    embargo_steps=10,
    gate_interval_steps=5,
)
DIRECT = dataclasses.replace(CONFIG, mode="direct")


def facts(**known: Any) -> Facts:
    return Facts(**{"age_steps": 30, "stage_age_steps": 10, **known})


READY: dict[Stage, dict[str, Any]] = {
    "germinated": {"preserved_error": 1e-6, "registered": True, "stage_age_steps": 0},
    "training": {"gradient_norm": 0.1, "gradient_snr": 2.0, "output_ratio": 0.2},
    "blending": {"alpha": 1.0},
    "holding": {"contributions": [0.04, 0.05, 0.045], "held_out_loss": 1.0, "alpha": 1.0},
    "embargoed": {},
}


# --- blending ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", get_args(BlendSchedule))
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 5000])
def test_alpha_rises_from_above_zero_to_exactly_one(schedule: BlendSchedule, steps: int) -> None:
    config = LifecycleConfig(blend_schedule=schedule, blend_steps=steps)
    alphas = [stage_alpha("blending", age, config) for age in range(steps + 3)]
    assert alphas[0] > 0
    assert all(a <= b for a, b in itertools.pairwise(alphas))
    assert alphas[steps - 1 :] == [1.0] * 4
    assert all(0 < alpha < 1 for alpha in alphas[: steps - 1])


@pytest.mark.parametrize("schedule", get_args(BlendSchedule))
def test_schedules_are_half_way_at_half_time(schedule: BlendSchedule) -> None:
    assert blend_alpha(schedule, 0.5) == pytest.approx(0.5)
    assert blend_alpha(schedule, -1.0) > 0
    assert blend_alpha(schedule, 2.0) == 1.0


def test_schedules_differ_and_unknown_ones_are_refused() -> None:
    assert blend_alpha("sigmoid", 0.25) < blend_alpha("cosine", 0.25) < blend_alpha("linear", 0.25)
    with pytest.raises(ConfigError, match="one of linear, cosine, sigmoid, got 'step'"):
        blend_alpha("step", 0.5)  # type: ignore[arg-type]


def test_only_contributing_stages_have_weight() -> None:
    weights = {stage: stage_alpha(stage, 3, CONFIG) for stage in STAGES}
    assert {stage for stage, alpha in weights.items() if alpha == 1.0} == {
        "blending",
        "holding",
        "fossilized",
    }
    assert {stage for stage, alpha in weights.items() if alpha == 0.0} == set(STAGES) - {
        "blending",
        "holding",
        "fossilized",
    }


# --- config -----------------------------------------------------------------------------------


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        LifecycleConfig(
            mode="sideways",  # type: ignore[arg-type]
            blend_schedule="step",  # type: ignore[arg-type]
            blend_steps=0,
            embargo_steps=1.5,  # type: ignore[arg-type]
            min_contribution=math.nan,
            max_spread=-1.0,
            min_holding_steps=9,
            max_holding_steps=8,
        )
    for piece in (
        "mode must be one of direct, isolated, got 'sideways'",
        "blend_schedule must be one of linear, cosine, sigmoid, got 'step'",
        "blend_steps must be a whole number of at least 1, got 0",
        "embargo_steps must be a whole number of at least 0, got 1.5",
        "min_contribution must be a finite number of at least 0, got nan",
        "max_spread must be a finite number of at least 0, got -1.0",
        "min_holding_steps (9) must not exceed max_holding_steps (8)",
    ):
        assert piece in str(error.value)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(LifecycleConfig)])
def test_every_setting_is_checked(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        LifecycleConfig(**{field: -3})


def test_gates_are_due_at_their_interval() -> None:
    assert [step for step in range(1, 16) if CONFIG.gate_due(step)] == [5, 10, 15]


# --- gates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "target"),
    [
        ("germinated", "training"),
        ("training", "blending"),
        ("blending", "holding"),
        ("holding", "fossilized"),
        ("embargoed", "dormant"),
    ],
)
def test_a_seed_that_meets_its_gate_moves_on(stage: Stage, target: Stage) -> None:
    move = next_transition(stage, facts(**READY[stage]), CONFIG)
    assert move is not None
    assert (move.source, move.target) == (stage, target)
    assert move.reason
    assert "stage_age_steps" in move.measurements


def test_direct_mode_goes_straight_to_holding() -> None:
    move = next_transition("germinated", facts(**READY["germinated"]), DIRECT)
    assert move is not None
    assert move.target == "holding"
    assert stage_alpha("holding", 0, DIRECT) == 1.0


@pytest.mark.parametrize(
    ("stage", "change", "why"),
    [
        ("germinated", {"registered": False}, "exactly one optimizer group"),
        ("germinated", {"preserved_error": None}, "not measured"),
        ("training", {"gradient_norm": None}, "gradient was not measured"),
        ("training", {"gradient_norm": 0.0}, "gradient norm is 0"),
        ("training", {"gradient_norm": math.inf}, "gradient norm is inf"),
        ("training", {"gradient_snr": 0.5}, "ratio of 0.5 is under 1"),
        ("training", {"gradient_snr": math.nan}, "ratio of nan is under 1"),
        ("training", {"output_ratio": 0.0}, r"output is 0 of the host's"),
        ("training", {"output_ratio": 0.7}, r"output is 0.7 of the host's, not in \(0, 0.5\]"),
        ("training", {"output_ratio": None}, "output was not measured"),
        ("holding", {"contributions": [0.05, 0.05]}, "only 2 of 3 held-out"),
        ("holding", {"held_out_loss": None}, "held-out measurements"),
        ("holding", {"held_out_loss": 100.0}, "0.045% of the loss is under 1.000%"),
        ("holding", {"contributions": [-0.05, -0.04, -0.05]}, "does not clear 2 standard errors"),
        ("holding", {"contributions": [0.0, 0.01, 0.11]}, "does not clear 2 standard errors .*varies by"),
        ("holding", {"contributions": [math.nan, 0.1, 0.1]}, "nan"),
        ("holding", {"contributions": [math.inf, -math.inf, 0.1]}, "nan"),
    ],
)
def test_a_failed_gate_waits_and_culls_when_the_time_is_over(
    stage: Stage, change: dict[str, Any], why: str
) -> None:
    known = {**READY[stage], **change}
    assert next_transition(stage, facts(**{**known, "stage_age_steps": 19}), CONFIG) is None
    move = next_transition(stage, facts(**{**known, "stage_age_steps": 20}), CONFIG)
    assert move is not None
    assert move.target == "culled"
    assert re.search(why, move.reason)


@pytest.mark.parametrize("stage", ["training", "holding", "blending", "embargoed"])
def test_no_gate_opens_before_its_time(stage: Stage) -> None:
    assert next_transition(stage, facts(**{**READY[stage], "stage_age_steps": 3}), CONFIG) is None


def test_snr_is_not_needed_where_it_was_not_measured() -> None:
    move = next_transition("training", facts(**{**READY["training"], "gradient_snr": None}), CONFIG)
    assert move is not None
    assert move.target == "blending"
    assert "gradient_snr" not in move.measurements


@pytest.mark.parametrize("error", [2e-6, math.nan, math.inf])
def test_a_seed_that_changed_the_function_is_culled_at_once(error: float) -> None:
    known = {**READY["germinated"], "preserved_error": error}
    move = next_transition("germinated", facts(**known), CONFIG)
    assert move is not None
    assert move.target == "culled"
    assert "more than 1e-06" in move.reason


@pytest.mark.parametrize("stage", ["germinated", "training", "blending", "holding"])
def test_non_finite_values_cull_an_active_seed_at_once(stage: Stage) -> None:
    move = next_transition(stage, facts(**{**READY[stage], "stage_age_steps": 0, "non_finite": 2}), CONFIG)
    assert move is not None
    assert (move.target, move.measurements["non_finite"]) == ("culled", 2.0)
    assert "not finite 2 times" in move.reason


def test_only_the_last_measurements_count() -> None:
    known = {**READY["holding"], "contributions": [-9.0, 5.0, 0.04, 0.05, 0.045]}
    move = next_transition("holding", facts(**known), CONFIG)
    assert move is not None
    assert move.target == "fossilized"
    assert move.measurements["contribution"] == pytest.approx(0.045)
    assert move.measurements["contribution_stderr"] == pytest.approx(0.005 / math.sqrt(3))
    assert "host as adapted" in move.reason


def test_blending_waits_for_full_strength() -> None:
    assert next_transition("blending", facts(alpha=0.99), CONFIG) is None


@pytest.mark.parametrize("stage", ["dormant", "fossilized"])
def test_gates_leave_these_stages_alone(stage: Stage) -> None:
    assert next_transition(stage, facts(non_finite=3), CONFIG) is None


# --- the state machine ------------------------------------------------------------------------


def test_a_whole_life_and_its_history() -> None:
    life = Lifecycle(CONFIG)
    life.move("germinated", "the policy said so", 7, score=0.5)
    for step, stage in enumerate(("germinated", "training", "blending", "holding"), 8):
        move = life.propose(facts(**READY[stage]))
        assert move is not None
        life.apply(move, step)
    assert [t.target for t in life.history] == ["germinated", "training", "blending", "holding", "fossilized"]
    assert [t.step for t in life.history] == [7, 8, 9, 10, 11]
    assert life.history[0].measurements == {"score": 0.5}
    with pytest.raises(LifecycleError, match=r"from fossilized to culled.*allows nothing"):
        life.move("culled", "late regret", 20)

    copy = Lifecycle(CONFIG)
    copy.load_state_dict(json.loads(json.dumps(life.state_dict())))
    assert (copy.stage, copy.history) == (life.stage, life.history)


def test_a_culled_site_rests_and_comes_back() -> None:
    life = Lifecycle(CONFIG, "holding")
    life.move("culled", "the governor said so", 1)
    move = life.propose(facts(stage_age_steps=0))
    assert move is not None
    life.apply(move, 1)
    assert life.propose(facts(stage_age_steps=9)) is None
    move = life.propose(facts(stage_age_steps=10))
    assert move is not None
    life.apply(move, 11)
    assert [t.target for t in life.history] == ["culled", "embargoed", "dormant"]


def test_illegal_moves_change_nothing() -> None:
    life = Lifecycle(DIRECT, "germinated")
    with pytest.raises(LifecycleError, match="mode 'direct' allows holding or culled"):
        life.move("training", "as if isolated", 1)
    with pytest.raises(LifecycleError, match="the seed is germinated"):
        life.apply(Transition("holding", "fossilized", "stale"), 1)
    assert (life.stage, life.history) == ("germinated", [])


@pytest.mark.parametrize(
    "state",
    [{}, {"stage": "asleep", "history": []}, {"stage": "holding", "history": [{"what": 1}]}],
)
def test_damaged_state_is_refused(state: dict[str, Any]) -> None:
    life = Lifecycle(CONFIG, "training")
    with pytest.raises(CheckpointError, match="damaged"):
        life.load_state_dict(state)
    assert life.stage == "training"


optional_floats = st.none() | st.floats()
any_facts = st.builds(
    Facts,
    age_steps=st.integers(0, 1000),
    stage_age_steps=st.integers(0, 40),
    gradient_norm=optional_floats,
    gradient_snr=optional_floats,
    contributions=st.lists(st.floats() | st.floats(0.01, 0.1), max_size=5),
    held_out_loss=optional_floats,
    output_ratio=optional_floats,
    non_finite=st.sampled_from([0, 0, 0, 1]),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    preserved_error=st.sampled_from([None, 0.0, 1e-6, 1.0, math.nan]),
    registered=st.booleans(),
)
# Facts that pass most gates, so that random walks also get far.
likely_facts = st.builds(
    Facts,
    age_steps=st.integers(0, 1000),
    stage_age_steps=st.integers(4, 20),
    gradient_norm=st.just(0.1),
    gradient_snr=st.floats(0.5, 3.0),
    contributions=st.lists(st.floats(0.04, 0.06), min_size=2, max_size=4),
    held_out_loss=st.just(1.0),
    output_ratio=st.floats(0.1, 0.6),
    alpha=st.just(1.0),
    preserved_error=st.just(0.0),
    registered=st.just(True),
)

# Written out once more, so that a slip in the table itself does not pass.
EDGES = {
    ("dormant", "germinated"),
    ("training", "blending"),
    ("blending", "holding"),
    ("holding", "fossilized"),
    ("culled", "embargoed"),
    ("embargoed", "dormant"),
    *((stage, "culled") for stage in ("germinated", "training", "blending", "holding")),
}


class AnyEvents(RuleBasedStateMachine):
    """Any sequence of gates, decisions, governor culls and wrong calls."""

    mode: Mode

    def __init__(self) -> None:
        super().__init__()
        self.config = dataclasses.replace(CONFIG, mode=self.mode)
        self.life = Lifecycle(self.config)
        self.edges = EDGES | {("germinated", "training" if self.mode == "isolated" else "holding")}
        self.step = 0

    @rule(measured=any_facts | likely_facts)
    def gate(self, measured: Facts) -> None:
        self.step += 1
        move = self.life.propose(measured)
        # Compared as text, because a NaN among the measurements does not equal itself.
        assert repr(move) == repr(self.life.propose(measured)), "a gate is pure"
        if move is not None:
            assert move.target in legal_targets(self.life.stage, self.mode)
            self.life.apply(move, self.step)

    @rule(wanted=st.sampled_from(STAGES))
    def order(self, wanted: Stage) -> None:
        before = self.life.stage
        if (before, wanted) in self.edges:
            self.life.move(wanted, "ordered", self.step)
        else:
            with pytest.raises(LifecycleError):
                self.life.move(wanted, "ordered", self.step)
            assert self.life.stage == before

    @rule(source=st.sampled_from(STAGES), wanted=st.sampled_from(STAGES))
    def replay(self, source: Stage, wanted: Stage) -> None:
        if source != self.life.stage:
            with pytest.raises(LifecycleError):
                self.life.apply(Transition(source, wanted, "stale"), self.step)

    @rule()
    def resume(self) -> None:
        again = Lifecycle(self.config)
        again.load_state_dict(self.life.state_dict())
        self.life = again

    @invariant()
    def history_is_a_legal_path(self) -> None:
        here: Stage = "dormant"
        for transition in self.life.history:
            assert transition.source == here
            assert (transition.source, transition.target) in self.edges
            assert transition.reason
            here = transition.target
        assert here == self.life.stage
        assert 0.0 <= stage_alpha(here, 2, self.config) <= 1.0


class AnyEventsIsolated(AnyEvents):
    mode: Mode = "isolated"


class AnyEventsDirect(AnyEvents):
    mode: Mode = "direct"


AnyEventsIsolated.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
AnyEventsDirect.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestIsolated = AnyEventsIsolated.TestCase
TestDirect = AnyEventsDirect.TestCase


@settings(max_examples=200, deadline=None)
@given(stage=st.sampled_from(STAGES), measured=any_facts | likely_facts, mode=st.sampled_from(get_args(Mode)))
def test_a_gate_never_raises_and_only_proposes_legal_moves(stage: Stage, measured: Facts, mode: Mode) -> None:
    move = next_transition(stage, measured, dataclasses.replace(CONFIG, mode=mode))
    assert move is None or move.target in legal_targets(stage, mode)
