"""A run becomes experiences: every decision, with what the run made of it and what came of it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from loop import RANK, WIDE, Loop

from esper.errors import ConfigError, StoreError
from esper.messages import Decision, GovernorRecord
from esper.tamiyo.experience import ExperienceStore
from esper.tamiyo.experience.recording import ExperienceRecorder, RecordingPolicy
from esper.tamiyo.experience.settling import settle
from esper.tamiyo.policies import make_policy
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.rewards import RewardConfig
from esper.tamiyo.state import GrowthState

ENTRIES = [[0.5, WIDE, "widen", 8]]


class Scripted:
    """Answers as a test says, by step."""

    name = "scripted"

    def __init__(self, **answers: list[Decision]) -> None:
        self.answers = {int(step.removeprefix("at_")): decisions for step, decisions in answers.items()}

    def decide(self, state: GrowthState) -> list[Decision]:
        wait = Decision(action="wait", reason="nothing to do", policy=self.name, confidence=0.5)
        return self.answers.get(state.step, [wait])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def germinate(site: str, blueprint: str, size: int) -> Decision:
    return Decision(
        action="germinate", reason="a test", policy="scripted", site=site, blueprint=blueprint, size=size
    )


class Recorded:
    """A plain loop whose policy and events go into a store."""

    def __init__(self, path: Path, policy: Any, *, run_id: str = "run", **settings: Any) -> None:
        self.recorder = ExperienceRecorder(path, run_id, rewards=RewardConfig(short=0.1, medium=0.25))
        self.loop = Loop(
            RecordingPolicy(policy, self.recorder),
            probes={"decision_interval": 0.05},
            **({"total_steps": 80} | settings),
        )
        sink = self.loop.sink
        own = Recorder(run_id, sink, sink, [self.recorder.hear])
        controller = self.loop.controller
        for part in (controller, controller.gatekeeper, controller.warden):
            name = "recorder" if hasattr(part, "recorder") else "_recorder"
            assert hasattr(part, name)
            setattr(part, name, own)

    def run(self, steps: int = 80, *, end: bool = True) -> ExperienceStore:
        from esper.messages import RunRecord

        self.loop.run(steps)
        if end:
            self.recorder.hear(RunRecord("run", "end", self.loop.step, {}, 0.0))
        return self.recorder.store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "experiences.sqlite"


def schedule(entries: list[list[Any]]) -> Any:
    return make_policy("schedule", entries=entries)


def test_every_decision_is_kept_with_its_outcome_waits_too(path):
    recorded = Recorded(path, schedule(ENTRIES))
    store = recorded.run()
    kept = list(store.iterate())
    steps = [e.decision.point.run.step for e in kept]
    assert steps == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61, 65, 69, 73, 77]
    grown = [e for e in kept if e.decision.candidate.action == "grow"]
    assert [e.decision.point.run.step for e in grown] == [41]
    (grow,) = grown
    assert [p.site for p in grow.decision.candidate.placements] == [WIDE]
    assert grow.decision.candidate.placements[0].size == 8
    assert grow.decision.candidate.parameters > 0
    assert (grow.seed_ids, grow.refused) == (("s1",), "")
    assert {e.decision.policy for e in kept} == {"schedule"}
    assert {e.decision.run_id for e in kept} == {"run"}
    assert all(e.outcome is not None and e.outcome.reward is not None for e in kept)
    assert store.ended("run") == 80
    for e in kept:
        if e is grow:
            continue
        assert e.outcome.measured.provenance == "itself"
        assert e.outcome.reward.total == 0.0
    reward, measured = grow.outcome.reward, grow.outcome.measured
    assert reward.provenance.startswith("fitted ± ")
    assert reward.final
    assert set(reward.horizons) == {"short", "medium", "long"}
    assert measured.held_out
    assert measured.taken.steps[0] == 41
    assert measured.taken.steps[-1] == 77
    assert measured.taken.num_parameters > measured.control.num_parameters
    assert measured.taken.training_flops[-1] > measured.control.training_flops[-1]
    assert measured.control_stderr[0] == 0.0
    assert all(math.isfinite(x) for x in measured.control_stderr)
    assert kept[0].outcome.measured.adaptations_after == 1
    assert measured.adaptations_after == 0


def test_recording_does_not_change_the_run(path):
    plain = Loop(schedule(ENTRIES), total_steps=80, probes={"decision_interval": 0.05}).run(80)
    recorded = Recorded(path, schedule(ENTRIES))
    recorded.run()
    mine, its = (loop.model.state_dict() for loop in (recorded.loop, plain))
    assert all((mine[name] == its[name]).all() for name in its)
    assert [d.decision for d in recorded.loop.decisions] == [d.decision for d in plain.decisions]


def test_outcomes_come_when_horizons_are_over_and_not_only_at_the_end(path):
    recorded = Recorded(path, schedule([[0.4, WIDE, "widen", 8]]))
    store = recorded.run(49, end=False)
    (grow,) = [e for e in store.iterate() if e.decision.candidate.action == "grow"]
    assert grow.decision.point.run.step == 33
    assert set(grow.outcome.reward.horizons) == {"short"}
    assert not grow.outcome.reward.final
    recorded.run(31)
    grow = store.get(grow.decision.decision_id)
    assert set(grow.outcome.reward.horizons) == {"short", "medium", "long"}


def test_a_run_that_was_killed_can_be_settled_by_whoever_finds_it(path):
    Recorded(path, schedule(ENTRIES)).run(60, end=False)
    with ExperienceStore(path) as store:
        assert store.ended("run") is None
        assert settle(store, "run") > 0
        assert all(e.outcome is not None for e in store.iterate())


def test_without_enough_past_the_measurements_are_kept_without_a_reward(path):
    store = Recorded(path, schedule([[0.1, WIDE, "widen", 8]])).run()
    (grow,) = [e for e in store.iterate() if e.decision.candidate.action == "grow"]
    assert grow.outcome.reward is None
    assert grow.outcome.measured.provenance == "none"
    assert len(grow.outcome.measured.taken.losses) == 18
    assert [e.decision.decision_id for e in store.iterate(rewarded=False)] == ["run:9"]


def test_what_no_candidate_is_and_what_is_refused_is_kept_as_it_was_asked_for(path):
    policy = Scripted(
        at_9=[germinate(RANK, "lowrank", 3), germinate(WIDE, "widen", 5)],
        at_21=[germinate("bypass:no->where", "widen", 4)],
        at_25=[Decision(action="cull", reason="a test", policy="scripted", site="s99")],
    )
    store = Recorded(path, policy).run(40)
    both, nowhere, cull = (store.get(f"run:{step}") for step in (9, 21, 25))
    assert {(p.site, p.blueprint, p.size) for p in both.decision.candidate.placements} == {
        (RANK, "lowrank", 3),
        (WIDE, "widen", 5),
    }
    assert both.seed_ids == ("s1", "s2")
    assert both.decision.chosen == len(both.decision.point.candidates) - 1  # put at the end
    assert "no->where" in nowhere.refused
    assert nowhere.outcome.measured.provenance == "itself"  # nothing was done
    assert cull.refused == "there is no seed 's99'"
    assert cull.decision.candidate.action == "cull"


def test_an_answer_of_several_kinds_is_several_decisions(path):
    policy = Scripted(
        at_9=[
            germinate(WIDE, "widen", 8),
            Decision(action="recycle", reason="a test", policy="scripted", site="0"),
        ]
    )
    store = Recorded(path, policy).run(20)
    first, second = store.get("run:9"), store.get("run:9:1")
    assert (first.decision.candidate.action, second.decision.candidate.action) == ("grow", "recycle")
    assert first.seed_ids == ("s1",)
    assert second.seed_ids == ()


def test_a_culled_seed_and_a_rollback_are_charged_to_the_decision_that_made_them(path):
    slow = {"min_holding_steps": 60}
    policy = Scripted(
        at_33=[germinate(WIDE, "widen", 8)],
        at_49=[Decision(action="cull", reason="a test", policy="scripted", site="s1")],
    )
    from loop import EAGER

    recorded = Recorded(path, policy, lifecycle=EAGER | slow)
    recorded.run(60, end=False)
    recorded.recorder.hear(
        GovernorRecord("run", 58, 0, "rollback", WIDE, "the loss exploded", {"loss": math.inf}, 0.0)
    )
    store = recorded.run(20)
    taken = store.get("run:33").outcome.measured.taken
    assert (taken.culls, taken.rollbacks, taken.non_finite) == (1, 1, 1)
    assert store.get("run:33").outcome.reward.components["safety"] == -1.0
    assert store.get("run:49").outcome.measured.taken.culls == 0
    assert store.get("run:45").outcome.measured.taken.rollbacks == 0


def test_the_policys_own_state_can_be_continued_with_and_without_the_record(path):
    inner = schedule(ENTRIES)
    recording = RecordingPolicy(inner, ExperienceRecorder(path, "run"))
    loop = Loop(recording, probes={"decision_interval": 0.05}).run(21)
    state = recording.state_dict()
    fresh = schedule(ENTRIES)
    fresh.load_state_dict(state)
    assert fresh.state_dict() == inner.state_dict()
    again = RecordingPolicy(schedule(ENTRIES), recording.recorder)
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.load_state_dict(inner.state_dict())
    assert loop.controller.policy.name == "schedule"


def test_a_store_that_fails_is_told_of_once_and_the_run_goes_on(path, caplog):
    recorded = Recorded(path, schedule(ENTRIES))
    recorded.run(20, end=False)
    recorded.recorder.store.close()
    with caplog.at_level(logging.ERROR):
        recorded.loop.run(60)
    assert recorded.loop.step == 80
    told = [r for r in caplog.records if "no longer recorded" in r.getMessage()]
    assert len(told) == 1
    assert told[0].exc_info is not None
    assert told[0].exc_info[0] is StoreError
    with ExperienceStore(path) as store:
        assert len(store) == 5


def test_a_policy_that_asks_a_service_is_not_recorded_here(path):
    class Late(Scripted):
        expecting = answered = False

        def collect(self, step: int) -> list[Decision]:
            return []

        def note(self, decision: Decision, *, refused: str, seed_id: str) -> None: ...

        def close(self) -> None: ...

    with pytest.raises(ConfigError, match=r"expected experience=None .* a service decides"):
        RecordingPolicy(Late(), ExperienceRecorder(path, "run"))
