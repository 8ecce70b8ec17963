"""Settings are parsed and checked once, with every mistake named."""

from __future__ import annotations

import pytest

from esper.errors import ConfigError
from esper.oona.config import BusConfig
from esper.tamiyo.config import BudgetConfig, ProbeConfig, TamiyoConfig, build_config


def test_sections_may_be_mappings_or_dataclasses_and_keep_the_rest():
    base = build_config(budget={"max_seeds_alive": 2}, window=[0.1, 0.4], lifecycle={"mode": "isolated"})
    assert base.budget == BudgetConfig(max_seeds_alive=2)
    assert base.window == (0.1, 0.4)
    again = build_config(base, budget={"max_parameters_ratio": 3.0}, probes=ProbeConfig(interval_steps=7))
    assert again.budget == BudgetConfig(max_seeds_alive=2, max_parameters_ratio=3.0)
    assert again.probes.interval_steps == 7
    assert again.lifecycle.mode == "isolated"
    assert base.probes == ProbeConfig()


def test_the_bus_can_be_turned_off_and_on_again():
    off = build_config(bus=None)
    assert off.bus is None
    assert build_config(off, bus={"transport": "ipc"}).bus == BusConfig(transport="ipc")
    assert build_config().bus == BusConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"polcy": "off"}, r"unknown setting 'polcy' in TamiyoCallback; it has policy, "),
        ({"budget": {"max_params": 2}}, r"unknown setting 'max_params' in section 'budget'; it has max_param"),
        ({"budget": 3}, r"budget should be a BudgetConfig or a mapping of its fields, got int"),
        ({"window": (0.5, 0.2)}, r"window should be two shares"),
        ({"window": (0.1, 0.2, 0.3)}, r"window should be two shares"),
        ({"finish": "stop"}, r"finish should be 'keep' or 'retrain'"),
        ({"horizon_steps": 0}, r"horizon_steps should be at least 1"),
        ({"birth_lr_multiplier": 0.0}, r"birth_lr_multiplier should be positive"),
        ({"budget": {"max_parameters_ratio": 0.5}}, r"max_parameters_ratio should be at least 1"),
        ({"budget": {"max_flops_ratio": -1.0}}, r"max_flops_ratio should not be negative"),
        ({"budget": {"max_seeds_alive": 0}}, r"max_seeds_alive should be at least 1"),
        ({"budget": {"max_germinations_per_epoch": 0}}, r"max_germinations_per_epoch"),
        ({"budget": {"site_cooldown_steps": -1}}, r"site_cooldown_steps should not be negative"),
        ({"budget": {"max_scoring_fraction": 0.0}}, r"max_scoring_fraction should lie in \(0, 1\]"),
        ({"probes": {"interval_steps": -1}}, r"interval_steps should not be negative"),
        ({"probes": {"decision_interval": 0.0}}, r"decision_interval should lie in \(0, 1\]"),
        ({"probes": {"held_out_batches": 0}}, r"held_out_batches should be at least 1"),
        ({"probes": {"max_samples": 1}}, r"max_samples should be at least 2"),
        ({"lifecycle": {"mode": "bold"}}, r"mode must be one of direct, isolated"),
        ({"governor": {"patience": 0}}, r"patience must be a whole number of at least 1"),
        ({"bus": {"transport": "pigeon"}}, r"transport"),
    ],
)  # fmt: skip
def test_mistakes_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(**settings)


def test_all_mistakes_of_a_section_come_together():
    with pytest.raises(ConfigError, match=r"interval_steps.*; decision_interval.*got ProbeConfig"):
        ProbeConfig(interval_steps=-1, decision_interval=2.0)


def test_the_callback_refuses_a_wrong_policy_at_once():
    from esper.callbacks import TamiyoCallback

    with pytest.raises(ConfigError, match="no policy named 'growth'"):
        TamiyoCallback(policy="growth")
    with pytest.raises(ConfigError, match="has no option 'rate'"):
        TamiyoCallback(policy="random", policy_options={"rate": 2})
    assert TamiyoCallback(TamiyoConfig(policy="off"), seed=4).config.seed == 4
