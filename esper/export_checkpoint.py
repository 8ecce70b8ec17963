"""From a Lightning checkpoint to an exported file: what ``esper export CKPT OUT`` does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.errors import CheckpointError, ConfigError, EsperError
from esper.kasmina.export import ExportReport, save
from esper.loading import load, read_checkpoint

__all__ = ["export_checkpoint", "import_class"]

_IMAGE_SIDE = 28


def export_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | type[nn.Module] | None = None,
    example_input: Any = None,
    input_shape: Sequence[int] | None = None,
) -> ExportReport:
    """Rebuild the module of a Lightning checkpoint, grow it as the checkpoint has it, and export it.

    Checkpoints of ``esper train`` describe their host; for others the module's class has to be named. It is
    built from the hyperparameters that ``save_hyperparameters`` put into the checkpoint.

    Args:
        checkpoint: The Lightning checkpoint; read with ``weights_only=True``.
        out: Path of the result: ``.pt``, ``.onnx`` or ``.safetensors``.
        model: ``package.module:Class`` or the class itself; None for checkpoints of ``esper train``.
        example_input: One batch as the module's ``forward`` takes it. By default the module's
            ``example_input_array``, or for ``esper train``'s hosts one made from their config.
        input_shape: Of one float sample, instead of ``example_input``.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not fit the class.
        ConfigError: The class cannot be found or built.
        ExportError: The model cannot be written.
    """
    path = Path(checkpoint)
    content = read_checkpoint(path)
    parameters = content.get("hyper_parameters", {})
    if not isinstance(parameters, Mapping):
        raise CheckpointError(
            f"{path}: hyper_parameters should be a mapping, got {type(parameters).__name__}"
        )
    if model is None:
        module, made = _own_module(path, parameters)
    else:
        module, made = _build(import_class(model) if isinstance(model, str) else model, parameters), None
    load(module, path)
    exported: nn.Module = module
    if model is None:
        exported = module.get_submodule("host")  # without the loss and the metrics around it
    if input_shape is not None and example_input is None:
        example_input = torch.zeros(2, *input_shape).uniform_(-1.0, 1.0, generator=_generator())
    if example_input is None:
        example_input = made if made is not None else getattr(module, "example_input_array", None)
    return save(exported, out, example_input)


def import_class(name: str) -> type[nn.Module]:
    """Import ``package.module:Class``.

    Raises:
        ConfigError: It cannot be imported, or is no module class.
    """
    home, _, attribute = name.partition(":")
    if not home or not attribute:
        raise ConfigError(f"a model is named as package.module:Class, got {name!r}")
    try:
        found: Any = import_module(home)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model {name!r} should be a subclass of nn.Module, but is {found!r}")
    return found


def _own_module(path: Path, parameters: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The module of an ``esper train`` checkpoint, and an input for its host."""
    from esper.hosts import ClassifierModule, GPTConfig, LanguageModule, MLPConfig, host_from_dict

    if not isinstance(parameters.get("host"), Mapping):
        raise CheckpointError(
            f"{path} was not written by `esper train`: it names no host; name its class with --model MODULE:CLASS"
        )
    config = host_from_dict(parameters["host"])
    cls = LanguageModule if isinstance(config, GPTConfig) else ClassifierModule
    generator = _generator()
    if isinstance(config, GPTConfig):
        example = torch.randint(config.vocab_size, (2, config.context), generator=generator)
    elif isinstance(config, MLPConfig):
        example = torch.rand(2, config.in_features, generator=generator)
    else:  # a CNN takes any height and width
        example = torch.rand(2, config.in_channels, _IMAGE_SIDE, _IMAGE_SIDE, generator=generator)
    return _build(cls, parameters), example


def _build(cls: type[nn.Module], parameters: Mapping[str, Any]) -> nn.Module:
    try:
        return cls(**parameters)
    except EsperError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        given = ", ".join(sorted(map(str, parameters))) or "none"
        raise ConfigError(
            f"{cls.__name__} cannot be built from the checkpoint's hyperparameters ({given}): "
            f"{type(error).__name__}: {error}; call self.save_hyperparameters() in its __init__ before training"
        ) from error


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
