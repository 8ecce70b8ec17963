"""``esper doctor``: look at a model by name before it is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from esper.benchmarks import key_values
from esper.callbacks import TamiyoCallback
from esper.callbacks.checks import Conflict
from esper.callbacks.doctor import Checkup, check_up
from esper.errors import ConfigError, EsperError
from esper.export_command import import_named
from esper.kasmina.example import Example
from esper.quiet import quiet
from esper.report.checkup import checkup_tables
from esper.tamiyo.config import BudgetConfig

__all__ = ["doctor", "parse_inputs"]

_HEALTHY, _NOT = 0, 1


class _Given(NamedTuple):
    """What the model is run on, and whether it is a batch for its training step."""

    batch: Any
    step: bool


def doctor(
    model: str,
    *,
    settings: Sequence[str] = (),
    inputs: Sequence[str] = (),
    trainer: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Print what can grow in a model, what cannot and why, what conflicts, and what growth could cost.

    Args:
        model: ``package.module:Class`` of a LightningModule or an ``nn.Module``, or a function that makes one; the
            working directory is looked in too.
        settings: Arguments of the constructor as ``key=value``; a value is JSON, or a string where it is not.
        inputs: Arguments of ``forward``, as :func:`parse_inputs` reads them. Without any the module's
            ``example_input_array`` serves, or else the first batch of its ``train_dataloader``.
        trainer: Settings of a trainer as ``key=value``, which are looked at for conflicts.
        as_json: Print one object instead of tables.

    Returns:
        0 if something can grow and nothing conflicts, else 1.

    Raises:
        ConfigError: The model cannot be imported or built, there is nothing to run it on, or an option is malformed.
        AttachError: The model cannot be copied, or fails on what it was given.
    """
    given = parse_inputs(inputs) if inputs else None
    module = _build(model, key_values(settings))
    if trainer and not isinstance(module, L.LightningModule):
        raise ConfigError(
            f"--trainer looks at how a LightningModule will be trained, but {model} is a {type(module).__name__}; "
            "leave it out, or name the LightningModule around this network"
        )
    runner, problem = _trainer(key_values(trainer, "--trainer")) if trainer else (None, None)
    batch, step = (given, False) if given is not None else _own_batch(module, model)
    found = check_up(
        module, batch, callback_type=TamiyoCallback, budget=BudgetConfig(), trainer=runner, step=step
    )
    if problem is not None:
        found = Checkup(found.model, found.diagnosis, (problem, *found.conflicts), found.budget, found.notes)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(checkup_tables(found.as_dict()))
    return _HEALTHY if found.healthy else _NOT


def parse_inputs(texts: Sequence[str]) -> Example:
    """Make arguments of ``forward`` from ``[name=]shape[:dtype]``, such as ``1,1,28,28`` or ``ids=2,16:int64``.

    Args:
        texts: Those without a name are positional. Floats are normal random numbers; integers are 0 and 1, which
            any vocabulary has; booleans are true. Another dtype than float32 is named as in torch.

    Raises:
        ConfigError: One cannot be read.
    """
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        name, _, rest = text.rpartition("=")
        shape_text, _, dtype_text = rest.partition(":")
        dtype = getattr(torch, dtype_text or "float32", None)
        try:
            shape = [int(size) for size in shape_text.split(",")]
        except ValueError:
            shape = []
        if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
            raise ConfigError(
                f"--input expects [NAME=]N,N,...[:DTYPE] with positive sizes, the batch first, such as 1,1,28,28 or "
                f"input_ids=2,16:int64; got {text!r}"
            )
        value = _values(shape, dtype, generator)
        if name:
            kwargs[name] = value
        else:
            args.append(value)
    return Example(tuple(args), kwargs)


def _values(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(*shape, generator=generator).to(dtype)
    if dtype == torch.bool:
        return torch.ones(*shape, dtype=dtype)
    return torch.randint(2, tuple(shape), generator=generator).to(dtype)


def _build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    make: Callable[..., Any] = import_named(name)
    if not callable(make):
        raise ConfigError(
            f"{name!r} should be a module class, or a function that makes a module, but is {make!r}"
        )
    try:
        module = make(**arguments)
    except EsperError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        given = ", ".join(sorted(arguments)) or "none"
        raise ConfigError(
            f"{name} cannot be built with the arguments that were given ({given}): {type(error).__name__}: {error}; "
            "give them by --set KEY=VALUE"
        ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name!r} should make an nn.Module, but made a {type(module).__name__}")
    return module


def _own_batch(module: nn.Module, name: str) -> _Given:
    """What the module itself says it can be run on."""
    example = getattr(module, "example_input_array", None)
    if example is not None:
        return _Given(Example.of(example), step=False)
    if isinstance(module, L.LightningModule) and is_overridden("train_dataloader", module):
        try:
            module.prepare_data()
            module.setup("fit")
            loader = module.train_dataloader()
            return _Given(next(iter(loader)), step=True)
        except StopIteration:
            raise ConfigError(f"the train_dataloader of {name} gave no batch; give --input") from None
        except Exception as error:  # a user's data may raise anything
            raise ConfigError(
                f"no batch could be had from the train_dataloader of {name}: {type(error).__name__}: {error}; give the "
                "shape of an input by --input"
            ) from error
    raise ConfigError(
        f"there is nothing to run {name} on: it has neither example_input_array nor train_dataloader; give the shape "
        "of an input, the batch first, by --input, such as --input 1,1,28,28"
    )


def _trainer(options: Mapping[str, Any]) -> tuple[L.Trainer | None, Conflict | None]:
    """A trainer of these settings, or why Lightning itself will not have them."""
    defaults = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        with quiet():
            return L.Trainer(**{**defaults, **options}), None
    except Exception as error:  # ValueError, MisconfigurationException, or a missing package of a strategy
        told = ", ".join(f"{key}={value}" for key, value in options.items())
        return None, Conflict(
            f"the trainer's settings {told}",
            f"Lightning refuses them on this machine: {error}",
            "correct them, or ask again on the machine that trains",
        )
