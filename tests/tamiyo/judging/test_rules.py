"""Rules are chosen on validation hosts, once, and what was chosen can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest
from judged_trials import trial

from esper.errors import ConfigError
from esper.tamiyo.judging import rules
from esper.tamiyo.judging.rules import GRID, NONE, choose_rules, frozen_rules, grid_arms, write_rules
from esper.tamiyo.judging.trial import VIEWS, Trial
from esper.tamiyo.policies import make_policy


def validation(losses: dict[str, float], host: int = 0) -> list[Trial]:
    """Every variant on one host; those that are not named are like the host, with twice its parameters."""
    found = []
    for name in grid_arms():
        size = 100 if name == NONE else 200
        loss = losses.get(name, 1.0)
        for view in VIEWS:
            found.append(
                trial(
                    name, host, view=view, group="validation", num_parameters=size, test_loss=loss, price=0.0
                )
            )
    return found


def test_the_best_variant_and_the_best_rules_are_chosen() -> None:
    losses = {"cond(ratio=0.5)": 0.9, "shortcut()": 0.8}
    chosen = choose_rules([*validation(losses), *validation(losses, 1)])
    assert chosen.variants["cond"] == "ratio=0.5"
    assert chosen.variants["expressivity"] == ""  # of equals, as it ships
    flops = chosen.views["flops"]
    assert (flops.best, flops.best_shortcut_free) == ("shortcut", "cond")
    # log 2 x 0.3 parameters cost more than any rule gains
    assert flops.best_by_price["0"] == "shortcut"
    assert flops.best_by_price["0.3"] == NONE
    assert chosen.arms["cond"].options == {"ratio": 0.5}
    assert len(chosen.hosts) == 2


def test_nothing_is_chosen_on_hosts_that_are_judged_on() -> None:
    with pytest.raises(ConfigError, match="validation hosts alone"):
        choose_rules([trial(NONE)])


def test_hosts_that_not_all_have_played_are_left_out() -> None:
    with pytest.raises(ConfigError, match="no validation host was played by every variant"):
        choose_rules(validation({})[:-2])


def test_what_was_chosen_can_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = choose_rules(validation({"cond()": 0.5}))
    write_rules(chosen, tmp_path / "rules.json")
    monkeypatch.setattr(rules, "RULES_FILE", tmp_path / "rules.json")
    found = frozen_rules()
    assert found.variants == chosen.variants
    assert found.views["steps"].best == "cond"


def test_the_committed_choice_fits_the_rules_and_every_variant_can_be_made() -> None:
    assert set(frozen_rules().variants) == set(GRID)
    for variants in GRID.values():
        for arm in variants.values():
            make_policy(arm.policy, **arm.options)
