"""Find the config by which a model's own class builds the shapes that the grown model has.

The class itself is asked: it is built on the meta device, where nothing is allocated, from the config
changed in one field at a time, until all names and shapes agree. So no list of architectures is kept here,
and nothing is imported from the library that the class comes from.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn

from esper.errors import ExportError
from esper.kasmina.export.numbering import is_config

__all__ = ["Mismatch", "Recipe", "UnfitError", "changed_fields", "fitted_config", "read_back"]

_WIDTHS = ("intermediate_size", "n_inner", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
"""Fields to try first for a width, as several may happen to have its value."""

_UNIMPORTANT = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path")


class Mismatch(NamedTuple):
    """What the class builds under a name, and what the grown model has: a shape, a number of blocks, or None."""

    built: tuple[int, ...] | int | None
    grown: tuple[int, ...] | int | None


class UnfitError(ExportError):
    """No config makes the class build the grown model.

    Attributes:
        names: Parameters and containers that are to blame.
    """

    def __init__(self, text: str, names: tuple[str, ...]) -> None:
        super().__init__(text)
        self.names = names


class Recipe(NamedTuple):
    """From what a class builds the grown model: its ``config``, and ``options`` of the constructor beside it."""

    config: Any
    options: dict[str, bool]

    def build(self, kind: type[nn.Module]) -> nn.Module:
        """Build a model of class ``kind`` on the default device."""
        return kind(deepcopy(self.config), **self.options)


def fitted_config(model: nn.Module, *, fill: bool = False) -> Recipe:
    """Return the recipe by which ``type(model)`` builds a model of ``model``'s names and shapes.

    Args:
        model: A plain model that holds its config as ``config``; only its widths and depths may be others
            than the config says.
        fill: Whether layers may come out wider than they are in ``model``.

    Raises:
        UnfitError: There is none: layers that one field sizes have several sizes, or the class never builds
            such layers.
        ExportError: The class cannot be built from its own config.
    """
    recipe = Recipe(read_back(model.config), {})
    wrong = _mismatches(model, recipe, fill)
    while wrong:
        trials = [
            (field, trial, _try(model, trial, fill)) for field, trial in _trials(type(model), recipe, wrong)
        ]
        fitting = [(trial, left) for _, trial, left in trials if left is not None and set(left) < set(wrong)]
        if not fitting:
            raise _unfit(wrong, [(field, left) for field, _, left in trials if left is not None])
        recipe, wrong = fitting[0]
    return recipe


def read_back(config: Any) -> Any:
    """A copy of ``config`` that went through its file's format, as ``from_pretrained`` will read it.

    Raises:
        ExportError: It cannot be written or read.
    """
    try:
        return type(config).from_dict(json.loads(config.to_json_string(use_diff=False)))
    except Exception as error:  # each config checks itself in its own way
        raise ExportError(
            f"the {type(config).__name__} of the grown model cannot be written and read back: "
            f"{type(error).__name__}: {error}"
        ) from error


def changed_fields(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configs differ, with both values."""
    old, new = (dict(_flat(config.to_dict())) for config in (before, after))
    return {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields, those of configs inside too, as ``text_config.num_hidden_layers``."""
    for name, value in fields.items():
        if name in _UNIMPORTANT:
            continue
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...] | int]:
    """Shapes of what a checkpoint holds, and lengths of the lists of blocks."""
    shapes: dict[str, tuple[int, ...] | int] = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
    lists = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return shapes | lists


def _mismatches(model: nn.Module, recipe: Recipe, fill: bool) -> dict[str, Mismatch]:
    """What is not as ``model`` has it when its class is built by ``recipe``; lists of blocks first."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            built = _shapes(recipe.build(type(model)))
    except Exception as error:  # whatever the class raises
        raise ExportError(
            f"{type(model).__name__} cannot be built from its config: {type(error).__name__}: {error}"
        ) from error
    grown = _shapes(model)
    found = {
        name: Mismatch(built.get(name), grown.get(name))
        for name in (*grown, *(name for name in built if name not in grown))
        if built.get(name) != grown.get(name) and not (fill and _holds(built.get(name), grown.get(name)))
    }
    return dict(sorted(found.items(), key=lambda item: not isinstance(item[1].grown, int)))


def _holds(built: tuple[int, ...] | int | None, grown: tuple[int, ...] | int | None) -> bool:
    """Whether a tensor of shape ``built`` has room for one of shape ``grown``."""
    if not (isinstance(built, tuple) and isinstance(grown, tuple)) or len(built) != len(grown):
        return False
    return all(room >= size for room, size in zip(built, grown, strict=True))


def _try(model: nn.Module, recipe: Recipe, fill: bool) -> dict[str, Mismatch] | None:
    try:
        return _mismatches(model, recipe, fill)
    except ExportError:
        return None  # a value that this class does not take


def _trials(
    kind: type[nn.Module], recipe: Recipe, wrong: dict[str, Mismatch]
) -> Iterator[tuple[str, Recipe]]:
    """Recipes with one field changed so that it may set the first mismatch right, and the field's name."""
    config = recipe.config
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if type(parameter.default) is bool and name not in recipe.options:  # such as add_pooling_layer
            yield name, Recipe(config, {**recipe.options, name: not parameter.default})
    first = next((m for m in wrong.values() if m.built is not None and m.grown is not None), None)
    if first is None:
        return
    if isinstance(first.built, int) and isinstance(first.grown, int):
        pairs = [(first.built, first.grown)]
    else:
        assert isinstance(first.built, tuple)
        assert isinstance(first.grown, tuple)
        pairs = [(a, b) for a, b in zip(first.built, first.grown, strict=False) if a != b]
    for old, new in pairs:
        for path, value in _fields(config):
            if (value == old and type(value) is int) or (value is None and path[-1] in _WIDTHS):
                changed: Any = new
            elif "ratio" in str(path[-1]) and type(value) in (int, float):  # a width in units of another one
                changed = type(value)(value * new / old) if value * new % old == 0 else value * new / old
            else:
                continue
            trial = deepcopy(config)
            try:
                _set(trial, path, changed)
            except Exception:  # configs check what they are given, each in its own way
                continue
            yield ".".join(map(str, path)), recipe._replace(config=trial)


def _set(config: Any, path: tuple[str | int, ...], value: Any) -> None:
    """Set a field, or one entry of a field that is a list."""
    *names, last = path
    if isinstance(last, int):
        entries = list(_get(config, names))
        entries[last] = value
        *names, last = names
        value = entries
    setattr(_get(config, names), str(last), value)


def _get(config: Any, names: list[str | int]) -> Any:
    for name in names:
        config = getattr(config, str(name))
    return config


def _fields(config: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """All fields of a config and of those inside it, and entries of lists; usual widths first."""
    found: list[tuple[tuple[str | int, ...], Any]] = []
    for name, value in vars(config).items():
        if is_config(value):
            found += _fields(value, (*path, name))
        elif isinstance(value, (list, tuple)) and all(type(entry) is int for entry in value):
            found += [((*path, name, index), entry) for index, entry in enumerate(value)]
        else:
            found.append(((*path, name), value))
    return sorted(found, key=lambda item: item[0][-1] not in _WIDTHS)


def _unfit(wrong: dict[str, Mismatch], trials: list[tuple[str, dict[str, Mismatch]]]) -> UnfitError:
    """Say why no field will do."""
    strange = tuple(name for name, m in wrong.items() if m.built is None)
    if strange:
        shown = ", ".join(strange[:4]) + (f" and {len(strange) - 4} more" if len(strange) > 4 else "")
        return UnfitError(f"its class never builds {shown}", strange)
    name, mismatch = next(iter(wrong.items()))
    if mismatch.grown is None:
        return UnfitError(f"its class builds {name}, which the grown model does not have", tuple(wrong))
    for field, left in trials:
        broken = [other for other in left if other not in wrong]
        if name not in left and broken:
            set_right = tuple(other for other in wrong if other not in left)
            return UnfitError(
                f"its config has one {field} for all: {name} is {_size(mismatch.grown)}, but {broken[0]} is still "
                f"{_size(left[broken[0]].grown)}",
                set_right,
            )
    return UnfitError(
        f"no single field of its config makes {name} {_size(mismatch.grown)} instead of {_size(mismatch.built)}",
        tuple(wrong),
    )


def _size(value: tuple[int, ...] | int | None) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
