"""Settings of the bus."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal

import zmq

from esper.errors import ConfigError
from esper.oona.codec import MAX_MESSAGE_BYTES

__all__ = ["BusConfig", "check_address"]

_TRANSPORTS = ("inproc", "ipc", "tcp")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\*|\[[0-9A-Za-z:.%]+\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class BusConfig:
    """How a run publishes, and how it takes commands.

    Every run is reachable inside its own process over ``inproc``; ``transport`` says what it offers to
    other processes beside that.

    Attributes:
        transport: ``inproc`` (the default) opens a socket file for ``esper watch`` only while
            ``announce`` is set, and goes on without it where that is impossible. ``ipc`` and ``tcp`` insist
            on their address: training does not start when it cannot be bound. ``tcp`` is loopback only, unless
            there are keys.
        address: where telemetry is published: ``ipc:///path`` or ``tcp://127.0.0.1:5555`` (port ``*`` picks
            a free one). Empty: a socket file in the runtime directory, or any free loopback port.
        command_address: where commands are taken; as ``address``.
        keys: folder of CURVE keys (:mod:`esper.oona.keys`) for ``tcp``: only known clients may then connect, and
            everything is encrypted. Anything beyond loopback needs them. Empty: none.
        announce: write a descriptor by which :func:`esper.oona.find_runs` and ``esper watch`` find the run.
        high_water_mark: messages that may wait for one reader; further ones are dropped, never waited for.
        max_message_bytes: larger messages are neither sent nor read.
        linger_ms: how long closing waits for unsent messages, in milliseconds.

    Raises:
        ConfigError: a value is out of range, or an address does not fit its transport or is not loopback.
    """

    transport: Literal["inproc", "ipc", "tcp"] = "inproc"
    address: str = ""
    command_address: str = ""
    keys: str = ""
    announce: bool = True
    high_water_mark: int = 1000
    max_message_bytes: int = MAX_MESSAGE_BYTES
    linger_ms: int = 200

    def __post_init__(self) -> None:
        if self.transport not in _TRANSPORTS:
            raise ConfigError(
                f"expected bus.transport to be one of {', '.join(_TRANSPORTS)}, got {self.transport!r}"
            )
        for name in ("address", "command_address"):
            address = getattr(self, name)
            if not address:
                continue
            if self.transport == "inproc":
                raise ConfigError(
                    f"expected no bus.{name} with transport=inproc (it is derived from the run id), "
                    f"got {address!r}: leave it empty, or set bus.transport to ipc or tcp"
                )
            check_address(address, transport=self.transport, setting=f"bus.{name}", keys=self.keys)
        if self.keys and self.transport != "tcp":
            raise ConfigError(
                f"expected bus.keys with transport=tcp alone, got {self.keys!r} with {self.transport!r}: "
                "the file system already says who may open the sockets of ipc"
            )
        if self.address and self.address == self.command_address and not self.address.endswith(":*"):
            raise ConfigError(
                f"expected two addresses, got {self.address!r} for both bus.address and bus.command_address"
            )
        for name, low in (("high_water_mark", 1), ("max_message_bytes", 1024), ("linger_ms", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(
                    f"expected bus.{name} to be a whole number of at least {low}, got {value!r}"
                )


def check_address(
    address: str, *, to_bind: bool = True, transport: str = "", setting: str = "address", keys: str = ""
) -> None:
    """Refuse an endpoint that is malformed, of another transport, or beyond loopback without keys.

    Args:
        address: ``ipc:///path`` or ``tcp://HOST:PORT``.
        to_bind: whether port ``*`` (any free one) is allowed.
        transport: the scheme it must have; empty accepts both.
        setting: its name in the error.
        keys: folder of CURVE keys, with which other machines may be reached; empty: none.

    Raises:
        ConfigError: with what to write instead.
    """
    scheme, separator, rest = address.partition("://")
    if not separator or scheme not in ("ipc", "tcp") or (transport and scheme != transport):
        raise ConfigError(
            f"expected {setting} to begin with {transport + '://' if transport else 'ipc:// or tcp://'}, "
            f"got {address!r}"
        )
    if scheme == "ipc":
        path_bytes = len(rest.encode())
        if not 0 < path_bytes <= zmq.IPC_PATH_MAX_LEN:
            raise ConfigError(
                f"expected {setting} to hold a path of 1 to {zmq.IPC_PATH_MAX_LEN} bytes (the limit of the "
                f"operating system for sockets), got {path_bytes}: {address!r}"
            )
        return
    host, _, port = rest.rpartition(":")
    if not ((to_bind and port == "*") or (port.isascii() and port.isdigit() and 0 < int(port) < 65536)):
        raise ConfigError(
            f"expected {setting} to be tcp://127.0.0.1:PORT, with a port from 1 to 65535, got {address!r}"
        )
    if _is_loopback(host):
        return
    if not keys:
        raise ConfigError(
            f"expected {setting} to be loopback only (127.0.0.1, [::1] or localhost) without keys, got host {host!r}: "
            "anyone who reached it could steer the run; make keys with `esper keys create FOLDER` and name the "
            "folder, or use an SSH tunnel"
        )
    if not _HOST.fullmatch(host) or (host == "*" and not to_bind):
        raise ConfigError(f"expected {setting} to be tcp://HOST:PORT, got host {host!r}")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
