"""Settings of the bus."""

from __future__ import annotations

import dataclasses

import pytest

from esper.errors import ConfigError
from esper.oona import BusConfig, Subscriber


def test_defaults_stay_in_the_process_and_can_be_found() -> None:
    config = BusConfig()
    assert (config.transport, config.address, config.announce) == ("inproc", "", True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.transport = "tcp"  # type: ignore[misc]


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5555", "tcp://127.8.8.8:*", "tcp://localhost:1", "tcp://[::1]:65535"]
)
def test_loopback_addresses_are_accepted(address: str) -> None:
    assert BusConfig(transport="tcp", address=address).address == address


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "*", "192.168.1.4", "example.org", "eth0", "[::]", "", "127.0.0.1@x"]
)
def test_other_hosts_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="loopback only"):
        BusConfig(transport="tcp", address=f"tcp://{host}:5555")
    with pytest.raises(ConfigError, match="loopback only"):
        Subscriber(f"tcp://{host}:5555")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"transport": "udp"}, "one of inproc, ipc, tcp, got 'udp'"),
        ({"transport": "tcp", "address": "ipc:///tmp/x"}, "begin with tcp://"),
        ({"transport": "ipc", "address": "/tmp/x"}, "begin with ipc://"),
        ({"transport": "ipc", "address": "ipc://"}, "path of 1 to"),
        (
            {"transport": "ipc", "command_address": "ipc:///" + "d" * 120},
            r"path of 1 to \d+ bytes .* got 121",
        ),
        ({"transport": "tcp", "address": "tcp://127.0.0.1"}, "tcp://127.0.0.1:PORT"),
        ({"transport": "tcp", "address": "tcp://127.0.0.1:0"}, "port from 1"),
        ({"transport": "tcp", "address": "tcp://127.0.0.1:70000"}, "port from 1"),
        ({"address": "ipc:///tmp/x"}, "set bus.transport"),
        ({"transport": "ipc", "address": "ipc:///a", "command_address": "ipc:///a"}, "two addresses"),
        ({"high_water_mark": 0}, "high_water_mark to be a whole number of at least 1, got 0"),
        ({"high_water_mark": True}, "high_water_mark"),
        ({"max_message_bytes": 10}, "max_message_bytes"),
        ({"linger_ms": -1}, "linger_ms"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BusConfig(**settings)  # type: ignore[arg-type]


def test_an_unknown_topic_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected topics from health"):
        Subscriber("r", ["weather"])
