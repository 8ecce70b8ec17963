"""The registry of blueprints: what a seed can be made of.

A user adds one by decorating a function that builds the branch::

    @blueprint("tiny", kinds=("parallel",))
    def tiny(context: BuildContext, size: int) -> nn.Module:
        ...

The branch must return zeros when it is new, so that growth preserves the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.errors import GrowthError
from esper.kasmina.sites import BuildContext, Site, SiteKind

__all__ = ["Blueprint", "Cost", "blueprint", "cost", "fitting", "get_blueprint", "names"]

Builder = Callable[[BuildContext, int], nn.Module]
Reads = Literal["source", "output", "block"]


class Cost(NamedTuple):
    """Price of a seed: ``parameters``, and ``flops`` of one forward pass of one sample."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class Blueprint:
    """A registered way to make a seed.

    Attributes:
        name: Registered name.
        build: Makes the branch for a context and a size; its output must be zero when new.
        kinds: Kinds of site it fits.
        reads: What the branch is given: the source tensor, the target's output, or the block's input.
        default_size: Size used when none is asked for, from the context.
        accepts: Returns why the blueprint does not fit a context, or None when it does.
    """

    name: str
    build: Builder
    kinds: tuple[SiteKind, ...]
    reads: Reads
    default_size: Callable[[BuildContext], int]
    accepts: Callable[[BuildContext], str | None]


_REGISTRY: dict[str, Blueprint] = {}


def blueprint(
    name: str,
    *,
    kinds: Sequence[SiteKind],
    reads: Reads = "source",
    default_size: int | Callable[[BuildContext], int] = 16,
    accepts: Callable[[BuildContext], str | None] = lambda context: None,
) -> Callable[[Builder], Builder]:
    """Register the decorated function as a blueprint; see :class:`Blueprint` for the arguments.

    Raises:
        GrowthError: The name is taken by another function, or an argument is none of the known words.
    """
    unknown = set(kinds) - set(get_args(SiteKind))
    if unknown or not kinds or reads not in get_args(Reads):
        raise GrowthError(
            f"blueprint {name!r}: kinds should be some of {', '.join(get_args(SiteKind))} and reads one of "
            f"{', '.join(get_args(Reads))}; got kinds={tuple(kinds)} and reads={reads!r}"
        )

    def register(build: Builder) -> Builder:
        known = _REGISTRY.get(name)
        same = known is not None and (known.build.__module__, known.build.__qualname__) == (
            build.__module__,
            build.__qualname__,
        )  # a notebook cell that is run again replaces its own blueprint
        if known is not None and not same:
            raise GrowthError(
                f"blueprint {name!r} is already registered by {known.build.__module__}."
                f"{known.build.__qualname__}; choose another name"
            )
        _REGISTRY[name] = Blueprint(name, build, tuple(kinds), reads, _sized(default_size), accepts)
        return build

    return register


def get_blueprint(name: str) -> Blueprint:
    """Return the blueprint registered under ``name``.

    Raises:
        GrowthError: There is none; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise GrowthError(f"no blueprint named {name!r}; registered are {', '.join(names())}")
    return _REGISTRY[name]


def names() -> list[str]:
    """Names of all registered blueprints, sorted."""
    return sorted(_REGISTRY)


def fitting(context: BuildContext) -> tuple[str, ...]:
    """Names of the blueprints that fit ``context``, sorted."""
    return tuple(
        name
        for name, entry in sorted(_REGISTRY.items())
        if context.site.kind in entry.kinds and entry.accepts(context) is None
    )


def cost(entry: Blueprint, context: BuildContext, size: int) -> Cost:
    """Count what a seed would cost by building and running it on the meta device: nothing is allocated.

    Args:
        entry: The blueprint.
        context: The place.
        size: As passed to the builder.

    Returns:
        Parameters, and FLOPs of one forward pass of one sample (2 per multiply-add; products of dense
        layers, convolutions and attention scores). Of a further block only the dense layers are counted.

    Raises:
        GrowthError: The blueprint does not fit the place, or its branch gives another shape than the target.
    """
    branch = make_branch(entry, context, size, device=torch.device("meta"))
    parameters = sum(p.numel() for p in branch.parameters())
    site = context.site
    if entry.reads == "block":
        # A block may need masks that only its host can give, so it is not run.
        return Cost(parameters, 2 * _positions(context) * _matrix_elements(branch))
    reads_source = entry.reads == "source"
    shape = _with_sample(*((site.source_shape, site.source_samples) if reads_source else _target(site)))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        if site.functional:
            given = branch.delta_weight().shape  # type: ignore[operator]
            wanted = context.target_layer._parameters["weight"].shape  # type: ignore[union-attr]
        else:
            given = branch(torch.empty(shape, device="meta")).shape
            wanted = torch.Size(_with_sample(*_target(site)))
    if given != wanted:
        raise GrowthError(
            f"blueprint {entry.name!r} at site {site.name!r}: its branch should give shape {tuple(wanted)}, "
            f"but gives {tuple(given)}; correct the blueprint's builder"
        )
    return Cost(parameters, int(counter.get_total_flops()))


def make_branch(entry: Blueprint, context: BuildContext, size: int, *, device: torch.device) -> nn.Module:
    """Build a branch on ``device``.

    Raises:
        GrowthError: The blueprint does not fit the place, or the size is not positive.
    """
    site = context.site
    reason = (
        f"it fits {' and '.join(entry.kinds)} sites"
        if site.kind not in entry.kinds
        else entry.accepts(context)
    )
    if reason is not None:
        raise GrowthError(f"blueprint {entry.name!r} does not fit site {site.name!r}: {reason}")
    if size < 1:
        raise GrowthError(f"blueprint {entry.name!r} at {site.name!r}: size should be at least 1, got {size}")
    with device:
        branch = entry.build(context, size)
    return branch.to(device)


def _target(site: Site) -> tuple[tuple[int, ...], int | None]:
    return site.target_shape, site.target_samples


def _with_sample(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """The shape of a batch of one sample."""
    at = dim or 0
    return (*shape[:at], 1, *shape[at:])


def _sized(default: int | Callable[[BuildContext], int]) -> Callable[[BuildContext], int]:
    return default if callable(default) else lambda context: default


def _positions(context: BuildContext) -> int:
    """Positions at which a block's matrices apply: pixels when it is made of convolutions."""
    block, shape = context.target_layer, context.site.target_shape
    layers = [block.get_submodule(name) for name in context.output_projections]
    return prod(shape[1:]) if any(isinstance(layer, nn.Conv2d) for layer in layers) else prod(shape[:-1])


def _matrix_elements(branch: nn.Module) -> int:
    return sum(p.numel() for p in branch.parameters() if p.dim() > 1)
