"""Real, tiny generations: what is tried, that a killed generator goes on, and that rules answer real states."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from esper.errors import ConfigError
from esper.tamiyo.environment.families import sample_host
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.oracle.generate import generate, merge
from esper.tamiyo.oracle.plan import Quota, StatePlan, plan_states
from esper.tamiyo.oracle.records import StateRecord, utilities
from esper.tamiyo.oracle.rules import RULES
from esper.tamiyo.oracle.shards import finished, read_shards
from esper.tamiyo.oracle.table import read_table

FEW = CandidateConfig(max_candidates=4, scored=False)
STEPS = 20


def tiny(number: int, family: str = "teacher_mlp") -> StatePlan:
    spec = msgspec.structs.replace(sample_host(family, "train", number), total_steps=STEPS, shift=None)
    return StatePlan(spec, "early", step=2, budget=2.0)


def without_times(records: list[StateRecord]) -> list[StateRecord]:
    return [
        msgspec.structs.replace(
            record,
            point=msgspec.structs.replace(record.point, timestamp=0.0, signals=()),
            outcomes=tuple(msgspec.structs.replace(o, wall_time_s=0.0) for o in record.outcomes),
        )
        for record in records
    ]


KILLED = """
import sys
from pathlib import Path
from test_generate import FEW, tiny
from esper.tamiyo.oracle.generate import generate
generate([tiny(number) for number in range(2)], Path(sys.argv[1]), num_workers=0, candidates=FEW)
"""


def test_a_killed_generator_goes_on_after_what_is_finished(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(shards)], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        deadline = time.monotonic() + 60
        while not finished(shards):
            assert process.poll() is None, "the generator ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = {name: (shards / f"{name}.state").read_bytes() for name in finished(shards)}
    plans = [tiny(number) for number in range(2)]
    reports = generate(plans, shards, num_workers=0, candidates=FEW)
    assert {report.state_id for report in reports} == {plan.state_id for plan in plans} - set(kept)
    assert all((shards / f"{name}.state").read_bytes() == content for name, content in kept.items())
    assert generate(plans, shards, num_workers=0, candidates=FEW) == []
    assert merge(shards, tmp_path / "table") == 2
    whole = tmp_path / "whole"
    generate(plans, whole, num_workers=0, candidates=FEW)
    assert without_times(read_table(tmp_path / "table")) == without_times(read_shards(whole))


def test_every_candidate_is_tried_in_every_repeat_from_one_state(tmp_path: Path) -> None:
    generate([tiny(0)], tmp_path, repeats=2, num_workers=0, candidates=FEW)
    (record,) = read_shards(tmp_path)
    assert [(o.candidate, o.repeat) for o in record.outcomes] == [(c, r) for c in range(4) for r in (0, 1)]
    table = utilities(record, 0.0)
    np.testing.assert_array_equal(table[0], 0.0)
    assert len(np.unique(table[1:])) == 6  # each run is one of its own
    first, second = (o.held_out_loss for o in record.outcomes[:2])
    assert first != second  # WAIT sees two orders of the data
    grown = [o for o in record.outcomes if o.candidate]
    for outcome in grown:
        added = record.point.candidates[outcome.candidate].parameters
        assert outcome.parameters in (
            record.point.run.num_parameters,
            record.point.run.num_parameters + added,
        )
        assert outcome.forward_flops > 0
        assert outcome.training_flops > record.outcomes[0].training_flops * 0.9
    assert not any(outcome.error or outcome.refused for outcome in record.outcomes)


@pytest.mark.parametrize("family", ["teacher_mlp", "residual_mlp", "digits_cnn", "text_gpt"])
def test_rules_answer_real_decision_points(tmp_path: Path, family: str) -> None:
    few = CandidateConfig(max_candidates=64, scored=True)
    from esper.tamiyo.environment.episode import Episode

    point = Episode(tiny(1, family).spec, fractions=(0.5,), candidates=few).advance()
    assert point is not None
    for variants in RULES.values():
        for rule in variants:
            chosen = point.candidates[rule.choose(point)]
            assert not chosen.unavailable
            assert chosen.action in ("wait", "grow", "recycle")
    assert RULES["random"][0].choose(point) > 0


def test_a_plan_is_fair_from_the_beginning_on() -> None:
    plans = plan_states({"digits_mlp": {"train": 20, "validation": 5}, "shift_mlp": {"train": 10}})
    assert len({plan.state_id for plan in plans}) == 35
    half = [(p.spec.family, p.spec.split) for p in plans[:17]]
    assert 9 <= half.count(("digits_mlp", "train")) <= 11
    assert 2 <= half.count(("digits_mlp", "validation")) <= 3
    moments = [plan.moment for plan in plans if plan.spec.family == "digits_mlp"]
    assert moments.count("early") > len(moments) / 2
    assert {"grown", "late"} <= set(moments)
    for plan in plans:
        assert 0 < plan.step < plan.spec.total_steps
        assert (plan.grown_at is None) == (plan.moment != "grown")
        if plan.moment == "shifted":
            assert plan.spec.shift is not None
            assert any(0 <= plan.step - at < 0.1 * plan.spec.total_steps for at in plan.spec.shift.at)


def test_long_runs_can_be_passed_over_but_for_shifting_data() -> None:
    quota: Quota = {"digits_mlp": {"train": 8}, "text_gpt": {"train": 8}, "shift_mlp": {"train": 3}}
    plans = plan_states(quota, most_steps=600)
    assert len({plan.state_id for plan in plans}) == 19
    assert all(p.spec.total_steps <= 600 for p in plans if p.spec.shift is None)
    assert [p.spec.number for p in plans if p.spec.family == "shift_mlp"] == [0, 1, 2]
    assert {p.state_id for p in plans} & {p.state_id for p in plan_states(quota)}


def test_wrong_wishes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repeats >= 2"):
        generate([tiny(0)], tmp_path, repeats=1)
    with pytest.raises(ConfigError, match="none of them negative"):
        plan_states({"digits_mlp": {"train": -1}})
    with pytest.raises(ConfigError, match="has the split sealed"):
        plan_states({"fashion_mlp": {"train": 1}})
