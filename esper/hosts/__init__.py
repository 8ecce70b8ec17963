"""Reference hosts and data: what ``esper train`` and the benchmarks grow.

Names load on first use, so that importing this package needs neither torch nor Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.hosts.build import HostConfig, build_host, fit_host, host_from_dict, host_to_dict
    from esper.hosts.clinc import ClincData
    from esper.hosts.cnn import CNN, CNNConfig
    from esper.hosts.datamodule import HostData
    from esper.hosts.digits import DigitsData
    from esper.hosts.encoder import Encoder, EncoderConfig
    from esper.hosts.fashion import FashionData
    from esper.hosts.gpt import GPT, GPTConfig
    from esper.hosts.mlp import MLP, MLPConfig
    from esper.hosts.module import ClassifierModule, LanguageModule
    from esper.hosts.optim import OptimConfig
    from esper.hosts.shakespeare import ShakespeareData

__all__ = [
    "CNN",
    "GPT",
    "MLP",
    "CNNConfig",
    "ClassifierModule",
    "ClincData",
    "DigitsData",
    "Encoder",
    "EncoderConfig",
    "FashionData",
    "GPTConfig",
    "HostConfig",
    "HostData",
    "LanguageModule",
    "MLPConfig",
    "OptimConfig",
    "ShakespeareData",
    "build_host",
    "fit_host",
    "host_from_dict",
    "host_to_dict",
]

_HOMES = {
    "build": ("HostConfig", "build_host", "fit_host", "host_from_dict", "host_to_dict"),
    "clinc": ("ClincData",),
    "cnn": ("CNN", "CNNConfig"),
    "datamodule": ("HostData",),
    "digits": ("DigitsData",),
    "encoder": ("Encoder", "EncoderConfig"),
    "fashion": ("FashionData",),
    "gpt": ("GPT", "GPTConfig"),
    "mlp": ("MLP", "MLPConfig"),
    "module": ("ClassifierModule", "LanguageModule"),
    "optim": ("OptimConfig",),
    "shakespeare": ("ShakespeareData",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
