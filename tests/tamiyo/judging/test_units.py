"""Real short runs: pairing, equal FLOPs, failures, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from esper.errors import ConfigError, DataFormatError
from esper.tamiyo.environment.config import BUDGETS, PRICES
from esper.tamiyo.judging.arms import Learned, LookingAhead, Plain, Rule
from esper.tamiyo.judging.matches import Match, available, draw_matches
from esper.tamiyo.judging.units import SCRATCH, Unit, read_journal, work
from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.network import TamiyoNetwork
from esper.tamiyo.network.weights import save_network

STEPS = 100


@pytest.fixture(scope="module")
def match() -> Match:
    return draw_matches(["digits_mlp"], hosts=1, max_steps=STEPS)[0]


def played(
    name: str, arm: Plain | Rule | Learned | LookingAhead, match: Match
) -> dict[tuple[str, str], object]:
    found = work(Unit(name, arm, match))
    assert found is not None
    return {(trial.arm, trial.view): trial for trial in found}


def test_hosts_come_in_turn_and_keep_their_price_and_budget() -> None:
    families = ["digits_mlp", "teacher_mlp"]
    drawn = draw_matches(families, hosts=2, repeats=2)
    assert [m.spec.family for m in drawn] == families * 4
    assert len({m.name for m in drawn}) == len(drawn)
    prices = {(m.spec.name, m.price, m.budget) for m in drawn}
    assert len(prices) == 4  # repeats share them
    assert {m.price for m in drawn} <= set(PRICES)
    assert {m.budget for m in drawn} <= set(BUDGETS)
    assert {m.group for m in drawn} == {"fresh"}
    assert {m.spec.split for m in draw_matches(["text_gpt", "fashion_mlp"], hosts=1, validation=True)} == {
        "validation"
    }


def test_sealed_families_without_data_are_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    found, notes = available(["digits_mlp", "shakespeare_gpt"])
    assert found == ["digits_mlp"]
    assert len(notes) == 1
    assert notes[0].startswith("shakespeare_gpt is skipped")
    with pytest.raises(ConfigError, match="no host family moon"):
        available(["moon"])


def test_a_growing_arm_meets_the_flops_of_its_host() -> None:
    # measurements cost as much in a short run as in a long one, so this one must not be too short
    match = draw_matches(["digits_mlp"], hosts=1, max_steps=2 * STEPS)[0]
    found = played("narrowest", Rule(policy="narrowest"), match)
    steps, flops = found["narrowest", "steps"], found["narrowest", "flops"]
    assert steps.total_steps == 2 * STEPS
    assert steps.flops_ratio > 1.1
    assert steps.germinated > 0
    assert flops.total_steps < 2 * STEPS
    # a per cent, or half a step where that is more
    assert flops.flops_ratio == pytest.approx(1.0, abs=max(0.01, 1.0 / flops.total_steps))


def test_the_same_unit_gives_the_same_trials_and_waiting_gives_those_of_the_host(match: Match) -> None:
    none = played("none", Plain(), match)["none", "flops"]
    again = played("none", Plain(), match)["none", "flops"]
    assert msgspec.structs.replace(again, seconds=none.seconds) == none
    assert none.flops_ratio == 1.0
    waiting = played(
        "recycle", Rule(policy="expressivity", options={"num_events": 0, "recycle_above": 1.0}), match
    )
    assert waiting["recycle", "flops"].test_loss == none.test_loss
    assert waiting["recycle", "flops"].idle
    faster = played("rate_x2", Plain(factor=2.0), match)["rate_x2", "flops"]
    assert faster.test_loss != none.test_loss


def test_look_ahead_pays_for_all_its_branches(match: Match) -> None:
    found = played("look_ahead", LookingAhead(candidates=2), match)
    one, two = found["look_ahead", "steps"], found["look_ahead", "flops"]
    # two moments, two branches beside the kept one, a tenth of the run each
    assert one.flops_ratio > 1.0 + 2 * 2 * 0.1 - 0.05
    assert two.total_steps < STEPS


def test_the_learned_policy_is_watched_and_its_shape_trained_from_scratch(
    match: Match, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = PolicyConfig(
        hidden_dim=8, num_gnn_layers=1, adaptation_confidence_threshold=0.0, safety_margin=0.0,
        epistemic_weight=0.0, uncertainty_threshold=1.0, novelty_threshold=1.0,
    )  # fmt: skip
    path = tmp_path / "policy.safetensors"
    save_network(TamiyoNetwork(config), path, card="# Untrained\n")
    found = played("learned", Learned(weights=str(path), scratch=True), match)
    learned, scratch = found["learned", "flops"], found[SCRATCH, "flops"]
    assert learned.asked > 0
    assert learned.fell_back == 0
    assert scratch.num_parameters == learned.num_parameters
    assert scratch.host_parameters == learned.host_parameters
    assert scratch.flops_ratio == pytest.approx(1.0, abs=max(0.01, 1.0 / scratch.total_steps))
    gated = played("learned", Learned(weights=str(path), options={"uncertainty_threshold": 0.0}), match)
    assert gated["learned", "steps"].fell_back == gated["learned", "steps"].asked > 0


def test_a_failed_run_says_why(match: Match) -> None:
    found = played("broken", Rule(policy="cond", options={"ratio": 7.0}), match)
    assert {trial.view for trial in found.values()} == {"flops", "steps"}
    for trial in found.values():
        assert trial.failed
        assert "ratio should lie in" in trial.error


def test_the_journal_survives_a_line_that_was_cut_short(match: Match, tmp_path: Path) -> None:
    journal = tmp_path / "runs.jsonl"
    unit = Unit("none", Plain(), match, str(journal))
    trials = work(unit)
    with journal.open("ab") as file:
        file.write(b'["cut short')
    assert read_journal(journal) == {unit.key: trials}
    other = Unit("rate_x2", Plain(factor=2.0), match, str(journal))
    work(other)
    assert set(read_journal(journal)) == {unit.key, other.key}
    journal.write_bytes(b"{}\n" + journal.read_bytes())
    with pytest.raises(DataFormatError, match="line 1: expected the trials of one unit"):
        read_journal(journal)


def test_a_unit_whose_time_is_over_is_left_for_later(match: Match, tmp_path: Path) -> None:
    assert work(Unit("none", Plain(), match, str(tmp_path / "runs.jsonl"), deadline=0.0)) is None
    assert not list(tmp_path.iterdir())


def test_a_units_key_depends_on_arm_and_match_and_not_on_where_it_is_written(match: Match) -> None:
    unit = Unit("none", Plain(), match)
    assert unit.key == Unit("none", Plain(), match, "elsewhere.jsonl", 1.0).key
    assert unit.key != Unit("none", Plain(factor=2.0), match).key
    assert unit.key != Unit("none", Plain(), msgspec.structs.replace(match, price=0.5)).key
    assert (
        Unit("a", Learned(weights="w", digest="1"), match).key != Unit("a", Learned(weights="w"), match).key
    )
