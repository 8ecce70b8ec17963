"""Settings of ``esper serve``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from esper.errors import ConfigError
from esper.oona.codec import MAX_MESSAGE_BYTES
from esper.oona.config import check_address

__all__ = ["ServiceConfig", "load_config"]


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """How Tamiyo serves.

    Attributes:
        address: Where runs connect: ``tcp://HOST:PORT`` or ``ipc:///path``; port ``*`` picks a free one.
        keys: Folder of CURVE keys (:mod:`esper.oona.keys`); needed beyond loopback. Empty: none.
        http_address: Loopback ``HOST:PORT`` of /healthz, /readyz and /metrics; port 0 picks a free one, empty: none.
        store: SQLite file of the experiences.
        decider: ``tamiyo`` for the policy network that came with the package, the path of another one's weights
            (``.safetensors``), or a rule over candidates (:data:`esper.tamiyo.oracle.rules.RULES`); ``wait`` is one.
        cycle_ms: Least time between two decisions of one run; a request that comes sooner waits.
        cooldown_s: After an adaptation of a run, no other one within this time.
        max_adaptations: Of one run within ``rate_window_s``.
        rate_window_s: See ``max_adaptations``.
        min_confidence: Below, a choice becomes WAIT.
        max_uncertainty: Epistemic uncertainty in [0, 1] above which a choice becomes WAIT.
        max_noise: Above, a choice becomes WAIT: noise of the loss measurements over their level. How bad the losses
            are, or how fast they rise, does not matter: a run in trouble is one that needs help.
        max_runs: Runs that may be registered at once.
        max_queue: Requests that may wait altogether; further ones are told to come back.
        max_queue_per_run: The same of one run.
        max_batch: Requests decided in one pass of the network.
        retry_after_ms: What those that find the queue full are told.
        heartbeat_s: How often runs should be heard, at the latest.
        expiry_s: A run that was silent for so long is forgotten (its experiences are not).
        max_message_bytes: Longer requests are refused.
        linger_ms: How long ending waits for unsent answers.

    Raises:
        ConfigError: A value is out of range, or an address is beyond loopback without keys.
    """

    address: str = "tcp://127.0.0.1:7350"
    keys: str = ""
    http_address: str = "127.0.0.1:7351"
    store: str = "experience.db"
    decider: str = "expressivity"
    cycle_ms: float = 100.0
    cooldown_s: float = 30.0
    max_adaptations: int = 20
    rate_window_s: float = 3600.0
    min_confidence: float = 0.0
    max_uncertainty: float = 1.0
    max_noise: float = 0.5
    max_runs: int = 1024
    max_queue: int = 256
    max_queue_per_run: int = 4
    max_batch: int = 32
    retry_after_ms: int = 250
    heartbeat_s: float = 5.0
    expiry_s: float = 60.0
    max_message_bytes: int = MAX_MESSAGE_BYTES
    linger_ms: int = 1000

    def __post_init__(self) -> None:
        check_address(self.address, setting="address", keys=self.keys)
        if self.keys and not self.address.startswith("tcp://"):
            raise ConfigError(
                f"ServiceConfig: keys are for tcp:// alone, got {self.keys!r} with {self.address!r}"
            )
        if self.http_address:
            self.http_host_port()
        wrong = [
            text
            for holds, text in (
                (bool(self.store), "store should be a path"),
                (bool(self.decider), "decider should be a name or a path"),
                (self.cycle_ms >= 0, "cycle_ms should not be negative"),
                (self.cooldown_s >= 0, "cooldown_s should not be negative"),
                (self.max_adaptations >= 1, "max_adaptations should be at least 1"),
                (self.rate_window_s > 0, "rate_window_s should be positive"),
                (0 <= self.min_confidence <= 1, "min_confidence should lie in [0, 1]"),
                (0 <= self.max_uncertainty <= 1, "max_uncertainty should lie in [0, 1]"),
                (self.max_noise > 0, "max_noise should be positive"),
                (self.max_runs >= 1, "max_runs should be at least 1"),
                (self.max_queue >= 1, "max_queue should be at least 1"),
                (self.max_queue_per_run >= 1, "max_queue_per_run should be at least 1"),
                (self.max_batch >= 1, "max_batch should be at least 1"),
                (self.retry_after_ms >= 1, "retry_after_ms should be at least 1"),
                (0 < self.heartbeat_s < self.expiry_s, "heartbeat_s should be positive and below expiry_s"),
                (self.max_message_bytes >= 1024, "max_message_bytes should be at least 1024"),
                (self.linger_ms >= 0, "linger_ms should not be negative"),
            )
            if not holds
        ]
        if wrong:
            raise ConfigError(f"ServiceConfig: {'; '.join(wrong)}; got {self}")

    def http_host_port(self) -> tuple[str, int]:
        """Of ``http_address``.

        Raises:
            ConfigError: It is malformed or not loopback: what it tells is not encrypted.
        """
        host, separator, port = self.http_address.rpartition(":")
        if not separator or not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise ConfigError(f"expected http_address to be HOST:PORT, got {self.http_address!r}")
        check_address(f"tcp://{host}:{port if int(port) else '*'}", setting="http_address")
        return host.removeprefix("[").removesuffix("]"), int(port)


def load_config(
    source: str | Path = "default", settings: Sequence[str] | Mapping[str, Any] = ()
) -> ServiceConfig:
    """Read the settings of ``esper serve``.

    Args:
        source: Name of a file in ``conf/service``, or the path of a YAML file of your own.
        settings: What differs: ``KEY=VALUE`` texts or a mapping.

    Raises:
        ConfigError: There is no such file, or a setting is unknown or out of range.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from esper.benchmarks import key_values

    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        folder = resources.files("esper.conf") / "service"
        path = Path(str(folder / f"{source}.yaml"))
        if not path.is_file():
            known = sorted(p.stem for p in Path(str(folder)).glob("*.yaml"))
            raise ConfigError(
                f"expected a service config of {', '.join(known)}, or a .yaml file, got {source!r}"
            )
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"expected settings of the service in {path}, but: {error}") from error
    given = settings if isinstance(settings, Mapping) else key_values(settings)
    if not isinstance(found, dict):
        raise ConfigError(f"expected a mapping of settings in {path}, got {type(found).__name__}")
    values = {str(key): value for key, value in found.items()} | dict(given)
    fields = {field.name: field for field in dataclasses.fields(ServiceConfig)}
    if unknown := sorted(set(values) - set(fields)):
        raise ConfigError(f"the service has the settings {', '.join(fields)}; got also {', '.join(unknown)}")
    return ServiceConfig(**{name: _typed(name, value, fields[name].type) for name, value in values.items()})


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Numbers as the setting has them; YAML and JSON do not tell 30 from 30.0."""
    if kind == "str":
        fits: bool = isinstance(value, str)
    elif kind == "int":
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not fits:
        raise ConfigError(f"expected {name} of the service to be of type {kind}, got {value!r}")
    return float(value) if kind == "float" else value
