"""Settings of the service: every one is read, and a wrong one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.errors import ConfigError
from esper.tamiyo.service.config import ServiceConfig, load_config


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"address": "tcp://0.0.0.0:7350"}, "loopback only .* without keys.*esper keys create"),
        ({"address": "ipc:///tmp/x", "keys": "k"}, "keys are for tcp"),
        ({"http_address": "0.0.0.0:80"}, "http_address to be loopback only"),
        ({"http_address": "localhost"}, "http_address to be HOST:PORT"),
        (
            {"max_batch": 0, "cycle_ms": -1.0},
            "cycle_ms should not be negative; max_batch should be at least 1",
        ),
        ({"heartbeat_s": 60.0, "expiry_s": 60.0}, "below expiry_s"),
        ({"max_noise": 0.0}, "max_noise"),
        ({"max_uncertainty": 1.5}, "max_uncertainty"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ServiceConfig(**settings)  # type: ignore[arg-type]


def test_the_shipped_files_are_read() -> None:
    assert load_config() == ServiceConfig()
    strict = load_config("strict", ["cooldown_s=5"])
    assert (strict.min_confidence, strict.max_uncertainty, strict.cooldown_s) == (0.75, 0.2, 5.0)


def test_a_file_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("")
    assert load_config(path) == ServiceConfig()
    path.write_text("store: mine.db\nmax_batch: 2\n")
    assert load_config(path, {"cycle_ms": 5}) == ServiceConfig(store="mine.db", max_batch=2, cycle_ms=5.0)


@pytest.mark.parametrize(
    ("content", "settings", "match"),
    [
        ("colour: red\n", [], "got also colour"),
        ("- 1\n", [], "expected a mapping"),
        ("a: [", [], "expected settings of the service"),
        ("max_batch: many\n", [], "max_batch of the service to be of type int, got 'many'"),
        ("max_batch: 1\n", ["store=3"], "store of the service to be of type str"),
    ],
)
def test_a_wrong_file_is_said_to_be(tmp_path: Path, content: str, settings: list[str], match: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=match):
        load_config(path, settings)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"default, strict, or a \.yaml file"):
        load_config("lenient")
