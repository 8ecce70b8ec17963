"""``esper export``: from a Lightning checkpoint to a file, or a folder, that runs without esper."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import CheckpointError, ConfigError, EsperError
from esper.hosts import ClassifierModule, GPTConfig, HostConfig, host_from_dict
from esper.kasmina.export import save
from esper.kasmina.loading import load, read_checkpoint
from esper.progress import EXAMPLE_SHAPE
from esper.quiet import quiet

__all__ = ["example_input", "export_checkpoint", "import_class", "import_named"]


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    model: str | None = None,
    input_shape: Sequence[int] | None = None,
    pretrained: bool = False,
) -> str:
    """Write the grown network of ``checkpoint`` to ``out`` as plain PyTorch; the suffix chooses the format.

    Checkpoints of ``esper train`` describe their host. For others the module's class is named; it is built
    from the hyperparameters that ``save_hyperparameters`` put into the checkpoint.

    Args:
        checkpoint: A Lightning checkpoint; read with ``weights_only=True``.
        out: ``.pt``, ``.onnx`` or ``.safetensors``; its folder is made. With ``pretrained`` a new folder.
        model: ``package.module:Class``; None for checkpoints of ``esper train``.
        input_shape: Of one float sample; by default what the checkpoint says, or the module's
            ``example_input_array``.
        pretrained: Write the model of transformers that the network is or holds as a larger one of its own
            class, for ``from_pretrained``.

    Returns:
        What was written, and what became of each seed.

    Raises:
        CheckpointError: The file is damaged, or does not fit the model.
        ConfigError: The class cannot be imported or built.
        ExportError: The network cannot be written in this format.
        MissingExtraError: The format needs a package that is not installed.
    """
    content = read_checkpoint(checkpoint)
    if "state_dict" not in content:
        raise CheckpointError(
            f"expected a Lightning checkpoint with a state_dict at {checkpoint}, but it has none"
        )
    parameters = content.get("hyper_parameters", {})
    example: Any
    if model is None:
        module, config, shape = _own_module(checkpoint, content, parameters)
        load(module, checkpoint)
        network: nn.Module = module.host  # without the loss and the metrics around it
        example = None if pretrained else example_input(config, shape)
    else:
        network = _build(import_class(model), parameters)
        load(network, checkpoint)
        # That of a module is none of the model inside it.
        example = None if pretrained else getattr(network, "example_input_array", None)
    if input_shape is not None:
        example = torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    if pretrained:
        from esper.pretrained import save_pretrained  # transformers takes seconds to import

        return f"{out}: {save_pretrained(network, out, example)}"
    with quiet():
        made = save(network, out, example)
    return f"{out}: {made}"


def example_input(host: HostConfig, shape: tuple[int, ...]) -> Tensor:
    """Return a batch that a host of config ``host`` can read: tokens for a GPT, else values."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(host, GPTConfig):
        return torch.randint(host.vocab_size, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def import_class(name: str) -> type[nn.Module]:
    """Import the module class ``package.module:Class``.

    Raises:
        ConfigError: It cannot be imported, or is no module class.
    """
    found = import_named(name)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model {name!r} should be a subclass of nn.Module, but is {found!r}")
    return found


def import_named(name: str) -> Any:
    """Import ``package.module:Name``, from the working directory too, as ``python -m`` does.

    Raises:
        ConfigError: It cannot be imported.
    """
    home, _, attribute = name.partition(":")
    if not home or not attribute:
        raise ConfigError(f"a model is named as package.module:Class, got {name!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = import_module(home)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model {name!r} cannot be imported: {error}") from error
    return found


def _own_module(
    checkpoint: Path, content: Mapping[str, Any], parameters: Mapping[str, Any]
) -> tuple[ClassifierModule, HostConfig, tuple[int, ...]]:
    """The module of an ``esper train`` checkpoint, its host's config and the shape of a batch."""
    shape = content.get(EXAMPLE_SHAPE)
    if "host" not in parameters or "optim" not in parameters or shape is None:
        raise CheckpointError(
            f"{checkpoint} was not written by `esper train`: it does not say which reference host it holds; name the "
            "class of your own module by --model package.module:Class"
        )
    try:
        config = host_from_dict(parameters["host"])
        module = ClassifierModule(config, parameters["optim"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"the hyperparameters in {checkpoint} cannot be read: {error!r}") from error
    return module, config, tuple(shape)


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
