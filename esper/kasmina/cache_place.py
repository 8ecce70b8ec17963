"""A place of its own, in its host's cache of keys and values, for each further block.

Transformers that generate token by token keep each block's keys and values in a cache that the blocks
share; each finds its place by its number (``layer_idx``). A copied block carries its original's number:
without a place of its own it would read, and append to, the keys and values of its original.

Nothing here imports the library that the caches come from: a cache is told by its shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from esper.errors import UnsupportedError
from esper.kasmina.layer import SEEDS

__all__ = ["NUMBERS", "cache_among", "first_free_number", "numbered_in", "own_place"]

NUMBERS = ("layer_idx", "layer_id")
"""Attributes by which modules of transformers know the number of their block."""

_PLACES = "_esper_places"
"""Attribute of a cache that notes which seed has which place; it travels with copies of the cache."""


def numbered_in(block: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Modules of ``block`` that know a number: the module, the attribute's name, the number."""
    return [
        (module, name, module.__dict__[name])
        for module in block.modules()
        for name in NUMBERS
        if type(module.__dict__.get(name)) is int
    ]


def first_free_number(model: nn.Module) -> int:
    """One more than the highest number that a module of the host knows; 0 when none knows any."""
    return 1 + max(
        (
            module.__dict__[name]
            for path, module in model.named_modules()
            for name in NUMBERS
            if type(module.__dict__.get(name)) is int and SEEDS not in path.split(".")
        ),
        default=-1,
    )


def cache_among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any | None:
    """The cache that is given to a block with its other arguments; None when there is none."""
    return next((value for value in (*args, *kwargs.values()) if _parts(value)), None)


@contextmanager
def own_place(cache: Any, block: nn.Module, owner: str, first_free: int) -> Iterator[None]:
    """Let ``block`` use its own place in ``cache`` while the ``with`` lasts.

    Args:
        cache: As :func:`cache_among` found it.
        block: A copy of a host's block, about to be called; one that knows no number is left alone.
        owner: Unique name of the copy in its model: one place each.
        first_free: As :func:`first_free_number` returns it for the host.

    Raises:
        UnsupportedError: The cache is of a kind that cannot be given another place.
    """
    numbered = numbered_in(block)
    if not numbered:
        yield
        return
    place = _place(cache, owner, first_free, original=numbered[0][2])
    for module, name, _ in numbered:
        module.__dict__[name] = place
    try:
        yield
    finally:
        for module, name, number in numbered:
            module.__dict__[name] = number


def _parts(value: Any) -> list[Any]:
    """The lists of places that a cache consists of: two of an encoder-decoder, else one; none of other things."""
    if value is None or isinstance(value, (Tensor, bool, int, tuple)):
        return []
    inner = [getattr(value, name, None) for name in ("self_attention_cache", "cross_attention_cache")]
    found = [part for part in (inner if inner[0] is not None else [value]) if part is not None]
    return [part for part in found if callable(getattr(part, "update", None)) and _layers(part) is not None]


def _layers(part: Any) -> list[Any] | None:
    layers = getattr(part, "layers", None)
    return layers if isinstance(layers, list) else None


def _place(cache: Any, owner: str, first_free: int, *, original: int) -> int:
    places: dict[str, int] = cache.__dict__.setdefault(_PLACES, {})
    if owner not in places:
        parts = _parts(cache)
        place = max(first_free + len(places), *(len(part.layers) for part in parts))
        for part in parts:
            # Some caches make places by themselves when they are written to; the others have a fixed number.
            if getattr(part, "layer_class_to_replicate", None) is None:
                while len(part.layers) <= place:
                    part.layers.append(_empty_like(part.layers[original]))
        places[owner] = place
    return places[owner]


def _empty_like(layer: Any) -> Any:
    """A new cache layer with the settings of ``layer``, which it keeps under its constructor's names."""
    settings = {}
    for name, parameter in list(inspect.signature(type(layer).__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if hasattr(layer, name):
            settings[name] = getattr(layer, name)
        elif parameter.default is parameter.empty:
            raise UnsupportedError(
                f"a stacked block needs a place of its own in the cache, but a {type(layer).__name__} does not "
                f"keep the setting {name!r} that another one would be made with; call the model with use_cache=False"
            )
    return type(layer)(**settings)
