"""Settings of ``esper train``: the composed config, read once into checked dataclasses."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from esper.errors import ConfigError, EsperError
from esper.hosts import HostConfig, OptimConfig, host_from_dict
from esper.hosts.datamodule import HostData
from esper.tamiyo.config import TamiyoConfig, build_config

__all__ = [
    "CallbackSettings",
    "Controls",
    "DataSettings",
    "LoggerSettings",
    "TrainSettings",
    "TrainerSettings",
    "parse_settings",
]

Controls = Literal["all", "host", "none"]
LoggerKind = Literal["csv", "wandb", "tensorboard", "mlflow", "none"]
_Section = TypeVar("_Section")


@dataclass(frozen=True)
class DataSettings:
    """Which data set, and the arguments of its class.

    Attributes:
        name: ``digits``, ``fashion``, ``shakespeare`` or ``clinc``.
        options: Keyword arguments of the data module, without its seed.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> HostData:
        """Make the data module; nothing is read from disk yet.

        Raises:
            ConfigError: Unknown data, or an argument that it does not have or that is out of range.
        """
        cls = _data_class(self.name)
        known = [name for name in inspect.signature(cls).parameters if name != "seed"]
        if unknown := sorted(set(self.options) - set(known)):
            raise ConfigError(f"data {self.name!r} has the settings {known}, got also {unknown}")
        return cls(**self.options, seed=seed)


@dataclass(frozen=True)
class TrainerSettings:
    """What Lightning's trainer is told; see its documentation for the meaning of each.

    Attributes:
        num_threads: Threads of torch on the CPU; None leaves them alone. One is fastest for tiny nets.
    """

    max_epochs: int = 20
    max_steps: int = -1
    accelerator: str = "auto"
    devices: int | str = 1
    precision: str = "32-true"
    gradient_clip_val: float | None = None
    accumulate_grad_batches: int = 1
    check_val_every_n_epoch: int = 1
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    log_every_n_steps: int = 10
    deterministic: bool = True
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_epochs < 1 and self.max_steps < 1:
            raise ConfigError(
                "a run needs an end, because growth is planned over its length; set trainer.max_epochs or "
                f"trainer.max_steps to at least 1 (they are {self.max_epochs} and {self.max_steps})"
            )
        if self.log_every_n_steps < 1 or self.check_val_every_n_epoch < 1:
            raise ConfigError("trainer.log_every_n_steps and check_val_every_n_epoch must be at least 1")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"trainer.num_threads must be at least 1 or null, got {self.num_threads}")

    def lightning_arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``lightning.Trainer``."""
        arguments = dataclasses.asdict(self)
        del arguments["num_threads"]
        return arguments


@dataclass(frozen=True)
class LoggerSettings:
    """Where metrics go.

    Attributes:
        kind: ``csv`` writes ``metrics.csv``; ``wandb``, ``tensorboard`` and ``mlflow`` log there as well;
            ``none`` writes nothing, so the figure shows growth without curves.
        options: Keyword arguments of Lightning's logger class.
    """

    kind: LoggerKind = "csv"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(LoggerKind):
            raise ConfigError(f"logger.kind must be one of {get_args(LoggerKind)}, got {self.kind!r}")
        if self.kind in ("csv", "none") and self.options:
            raise ConfigError(f"logger {self.kind!r} has no options, got {sorted(self.options)}")


@dataclass(frozen=True)
class CallbackSettings:
    """Checkpoints, and further Lightning callbacks.

    Attributes:
        checkpoint_every_epochs: Epochs between two writings of ``checkpoints/last.ckpt``; it is also
            written at the end, and on Ctrl-C.
        extra: Name -> ``{"_target_": class, **arguments}``, made anew for every arm.
    """

    checkpoint_every_epochs: int = 1
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.checkpoint_every_epochs < 1:
            raise ConfigError(
                f"callbacks.checkpoint_every_epochs must be at least 1, got {self.checkpoint_every_epochs}"
            )
        for name, spec in self.extra.items():
            if not isinstance(spec, Mapping) or "_target_" not in spec:
                raise ConfigError(
                    f"callbacks.extra.{name} must be a mapping with `_target_`, the callback's class, got {spec!r}"
                )


@dataclass(frozen=True)
class TrainSettings:
    """Everything that ``esper train`` was told.

    Attributes:
        name: Of the task; runs of one name are compared with each other.
        seed: Of initialisation, data order and growth.
        controls: Which comparison arms are trained beside the growing one.
        host: The ungrown network; its input and output sizes come from the data.
        optim: Its optimizer.
        data: What it is trained on.
        growth: Settings of the callback.
        trainer: Settings of the trainer.
        logger: Where metrics go.
        callbacks: Checkpoints and further callbacks.
    """

    name: str
    seed: int
    controls: Controls
    host: HostConfig
    optim: OptimConfig
    data: DataSettings
    growth: TamiyoConfig
    trainer: TrainerSettings
    logger: LoggerSettings
    callbacks: CallbackSettings


def parse_settings(config: Mapping[str, Any]) -> TrainSettings:
    """Read a composed config, given as plain nested dicts and lists.

    Raises:
        ConfigError: Unknown keys, missing ones, or values out of range; all that can be found at once.
    """
    config = dict(config)
    config.pop("resume", None)  # says where to continue, not what to train
    mistakes: list[str] = []
    expected = {"name", "seed", "controls", "host", "data", "policy", "kasmina", "governor", "bus", "trainer",
                "logger", "callbacks"}  # fmt: skip
    if unknown := sorted(set(config) - expected):
        mistakes.append(f"the config has the keys {sorted(expected)}, got also {unknown}")
    if missing := sorted(expected - set(config)):
        raise ConfigError("; ".join([*mistakes, f"the config lacks {missing}"]))
    if config["controls"] not in get_args(Controls):
        mistakes.append(f"controls must be one of {get_args(Controls)}, got {config['controls']!r}")
    seed = config["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        mistakes.append(f"seed must be a whole number of at least 0, got {seed!r}")
    parsed: dict[str, Any] = {}
    for name, parse in (
        ("host", _parse_host),
        ("data", _parse_data),
        ("growth", _parse_growth),
        ("trainer", lambda c: _section(TrainerSettings, c["trainer"], "trainer")),
        ("logger", _parse_logger),
        ("callbacks", lambda c: _section(CallbackSettings, c["callbacks"], "callbacks")),
    ):
        try:
            parsed[name] = parse(config)
        except EsperError as error:
            mistakes.append(str(error))
        except (TypeError, ValueError) as error:  # a string where a number belongs
            mistakes.append(f"{name}: {error}")
    if mistakes:
        raise ConfigError("; ".join(mistakes))
    host, optim = parsed.pop("host")
    return TrainSettings(
        name=str(config["name"]), seed=seed, controls=config["controls"], host=host, optim=optim, **parsed
    )


def _parse_host(config: Mapping[str, Any]) -> tuple[HostConfig, OptimConfig]:
    host = dict(config["host"])
    optim = _section(OptimConfig, host.pop("optim", {}), "host.optim")
    return host_from_dict(host), optim


def _parse_data(config: Mapping[str, Any]) -> DataSettings:
    options = dict(config["data"])
    settings = DataSettings(str(options.pop("name", "")), options)
    settings.build(seed=0)  # a wrong argument shows here, before anything is trained
    return settings


def _parse_logger(config: Mapping[str, Any]) -> LoggerSettings:
    options = dict(config["logger"])
    return LoggerSettings(options.pop("kind", "csv"), options)


def _parse_growth(config: Mapping[str, Any]) -> TamiyoConfig:
    from esper.tamiyo.policies import make_policy

    policy, kasmina, bus = dict(config["policy"]), dict(config["kasmina"]), dict(config["bus"])
    name, options = policy.pop("name", None), policy.pop("options", None) or {}
    sections = {key: kasmina.pop(key, {}) for key in ("lifecycle", "budget", "probes", "rewards")}
    _known("policy", policy, ("window", "finish"), also=("name", "options"))
    _known(
        "kasmina",
        kasmina,
        ("birth_lr_multiplier", "experience", "seed_lr_multiplier", "widen_start"),
        also=tuple(sections),
    )
    make_policy(name, **options)
    return build_config(
        policy=name,
        policy_options=options,
        seed=config["seed"],
        governor=config["governor"],
        # YAML has no way to say "no mapping" in a group file, so off is a transport there.
        bus=None if bus.get("transport") == "off" else bus,
        **policy,
        **kasmina,
        **sections,
    )


def _known(where: str, values: Mapping[str, Any], names: Sequence[str], also: Sequence[str]) -> None:
    if unknown := sorted(set(values) - set(names)):
        raise ConfigError(f"{where} has the settings {[*also, *names]}, got also {unknown}")


def _section(cls: type[_Section], values: Mapping[str, Any], where: str) -> _Section:
    assert dataclasses.is_dataclass(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    _known(where, values, names, also=())
    return cls(**values)


def _data_class(name: str) -> type[Any]:
    from esper.hosts import ClincData, DigitsData, FashionData, ShakespeareData

    classes = {
        "clinc": ClincData,
        "digits": DigitsData,
        "fashion": FashionData,
        "shakespeare": ShakespeareData,
    }
    if name not in classes:
        raise ConfigError(f"data.name must be one of {sorted(classes)}, got {name!r}")
    return classes[name]
