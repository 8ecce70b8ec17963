"""The composed config: every option composes, becomes checked settings, and refuses what it does not know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from esper.errors import ConfigError
from esper.hosts import CNNConfig, EncoderConfig, GPTConfig, MLPConfig
from esper.settings import TrainSettings, parse_settings
from esper.tamiyo.config import BudgetConfig, ProbeConfig
from esper.tamiyo.policies import policy_names
from esper.tamiyo.policies.registry import policy_options

CONF = Path(__file__).parent.parent / "conf"
GROUPS = (
    "host",
    "data",
    "policy",
    "kasmina",
    "governor",
    "bus",
    "trainer",
    "logger",
    "callbacks",
    "experiment",
)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


PRESETS = {"adapters": "uniform"}
"""Policy files that hold other settings of a policy that has a file of its own."""


@pytest.fixture(scope="module", autouse=True)
def hydra_config() -> Iterator[None]:
    with initialize_config_module("esper.conf", version_base="1.3"):
        yield


def plain(*overrides: str) -> dict[str, Any]:
    config = OmegaConf.to_container(compose("train", list(overrides)), resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def usable(group: str) -> list[str]:
    """Options of a group; the learned policy is one only where its weights came with the installation."""
    ships = (CONF.parent / "esper/tamiyo/weights/tamiyo.safetensors").is_file()
    return [name for name in options(group) if ships or name != "tamiyo"]


def settings(*overrides: str) -> TrainSettings:
    return parse_settings(plain(*overrides))


def test_groups_are_the_folders() -> None:
    assert {path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_"} == {
        *GROUPS,
        "hydra",
        "service",  # of `esper serve`, which reads it itself
    }


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in usable(group)])
def test_every_option_composes(choice: str) -> None:
    assert isinstance(settings(choice), TrainSettings)


@pytest.mark.parametrize("policy", usable("policy"))
@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_policy_goes_with_every_experiment(experiment: str, policy: str) -> None:
    made = settings(f"experiment={experiment}", f"policy={policy}")
    assert made.name == experiment
    assert made.growth.policy == PRESETS.get(policy, policy)


def test_a_bare_command_is_the_digits_experiment() -> None:
    made = settings()
    assert made.name == "digits_mlp"
    assert made.data.name == "digits"
    assert made.host == MLPConfig(hidden=(16, 4, 16, 6))
    assert (made.controls, made.logger.kind, made.seed) == ("all", "csv", 0)


@pytest.mark.parametrize(
    ("experiment", "family"),
    [
        ("fashion_mlp", MLPConfig),
        ("fashion_cnn", CNNConfig),
        ("shakespeare_gpt", GPTConfig),
        ("finetune_clinc", EncoderConfig),
    ],
)
def test_an_experiment_chooses_its_host(experiment: str, family: type) -> None:
    assert isinstance(settings(f"experiment={experiment}").host, family)


def test_the_command_line_wins_over_an_experiment() -> None:
    made = settings(
        "experiment=fashion_mlp", "policy=random", "kasmina=isolated", "host.hidden=[5,6]", "seed=7"
    )
    assert isinstance(made.host, MLPConfig)
    assert made.host.hidden == (5, 6)
    assert (made.growth.policy, made.growth.lifecycle.mode, made.growth.seed) == ("random", "isolated", 7)


def test_every_policy_has_a_file_with_all_its_options() -> None:
    assert options("policy") == sorted([*policy_names(), *PRESETS])
    assert {name: settings(f"policy={name}").growth.policy for name in PRESETS} == PRESETS
    for name in policy_names():
        given = plain(f"policy={name}")["policy"]["options"]
        known = {field.name for field in dataclasses.fields(policy_options(name))}
        assert set(given) == known, name


def test_policy_files_hold_the_defaults() -> None:
    for name in policy_names():
        given = plain(f"policy={name}")["policy"]["options"]
        config_type = policy_options(name)
        assert config_type(**given) == config_type(), name


def test_default_groups_hold_the_defaults_of_the_callback() -> None:
    growth = settings().growth
    assert growth.budget == BudgetConfig()
    assert growth.probes == dataclasses.replace(ProbeConfig(), interval_steps=growth.probes.interval_steps)


def test_bus_off_means_no_bus() -> None:
    assert settings("bus=off").growth.bus is None
    bus = settings("bus=tcp").growth.bus
    assert bus is not None
    assert bus.transport == "tcp"


@pytest.mark.parametrize(
    "override", ["policy.nonsense=1", "host.layers=3", "colour=red", "kasmina.budget.most=2"]
)
def test_hydra_refuses_unknown_keys(override: str) -> None:
    with pytest.raises(ConfigCompositionException, match=r"Could not override"):
        plain(override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+colour=red"], "got also .'colour'"),
        (["+host.layers=3"], "host family 'mlp' has the fields"),
        (["+host.optim.rate=3"], "host.optim has the settings"),
        (["+data.shards=3"], "data 'digits' has the settings"),
        (["data.name=cifar"], "data.name must be one of"),
        (["+policy.patience=3"], "policy has the settings"),
        (["policy.name=oracle"], "oracle"),
        (["+policy.options.nonsense=3"], "nonsense"),
        (["+kasmina.budget.most=3"], "most"),
        (["kasmina.lifecycle.mode=sideways"], "mode"),
        (["+governor.mood=3"], "mood"),
        (["+bus.speed=3"], "speed"),
        (["+trainer.epochs=3"], "trainer has the settings"),
        (["trainer.max_epochs=0"], "needs an end"),
        (["trainer.num_threads=0"], "num_threads"),
        (["logger.kind=paper"], "logger.kind must be one of"),
        (["+logger.colour=1"], "has no options"),
        (["callbacks.checkpoint_every_epochs=0"], "checkpoint_every_epochs"),
        (["+callbacks.extra.mine={a: 1}"], "_target_"),
        (["controls=some"], "controls must be one of"),
        (["seed=-1"], "seed must be a whole number"),
        (["host.hidden=[0]"], "at least 1"),
        (["host.optim.lr=fast"], "host"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(*overrides)


def test_several_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"controls must be one of.*data.name must be one of"):
        settings("controls=some", "data.name=cifar")


def test_a_missing_section_is_named() -> None:
    config = plain()
    del config["governor"]
    with pytest.raises(ConfigError, match=r"lacks \['governor'\]"):
        parse_settings(config)


def test_settings_hold_no_omegaconf() -> None:
    def walk(value: Any) -> Iterator[Any]:
        yield value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, dict):
            for part in value.values():
                yield from walk(part)
        elif isinstance(value, list | tuple):
            for part in value:
                yield from walk(part)

    assert not any(type(part).__module__.startswith("omegaconf") for part in walk(settings()))


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_names_its_command_on_top(path: Path) -> None:
    first, second = path.read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert second.startswith("# ")
    assert "esper train" in second
    assert path.stem == "digits_mlp" or f"experiment={path.stem}" in second
