"""The seed layer: a host layer whose class was swapped in place so that it can carry seeds.

A swap keeps parameters, buffers, hooks, state-dict keys, identity and ``isinstance``, and costs a
call nothing while nothing grows: the forward that runs is the host's own (LIGHTNING.md §3). Assigning
``forward`` on the instance would not do: a deepcopy would go on running the original's weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = [
    "SEEDS",
    "Observer",
    "SeedLayer",
    "Slot",
    "Tap",
    "WeightSeedLayer",
    "base_class",
    "get_slot",
    "observed",
    "primary",
    "replace_primary",
    "rest",
    "restore_class",
    "seeds_of",
    "set_observer",
    "swap_class",
]

SEEDS = "esper_seeds"
"""Name of the child module that holds a layer's seeds; present only while there is one."""


class Tap:
    """Carries a source layer's input to the seed at its target within one forward pass.

    The value never travels with a copy or a pickle: it belongs to the pass that is under way.
    """

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return the stored tensor and forget it, so that no graph outlives its step."""
        value, self.value = self.value, None
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        copy = memo[id(self)] = Tap()
        return copy

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        return Tap, ()


class Observer(Protocol):
    """Looks at a layer's calls on sampled steps; must not change what it sees."""

    def observe(self, layer: nn.Module, x: Any, y: Any, latency_ms: float) -> None:
        """Receive the layer, its first input, its output and the time that the call took to issue."""


class Slot:
    """What a seed layer does besides its own work: fill taps, run seeds, be observed."""

    def __init__(self) -> None:
        self.taps: list[Tap] = []
        self.observer: Observer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"taps": self.taps, "observer": None}

    @property
    def idle(self) -> bool:
        """Whether there is nothing to fill and nobody to tell (the layer may still hold seeds)."""
        return not self.taps and self.observer is None

    def run(
        self, layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``layer``'s own forward with its taps, seeds and observer."""
        started = time.perf_counter() if self.observer is not None else 0.0
        x = args[0] if args else next(iter(kwargs.values()), None)
        for tap in self.taps:
            tap.value = x
        y = forward(*args, **kwargs)
        seeds = layer._modules.get(SEEDS)
        if seeds is not None:
            # What a stacked block is given besides its first input, whichever way the host passed that.
            further = kwargs if args else dict(list(kwargs.items())[1:])
            for seed in seeds.children():
                y = seed(x, y, args[1:], further)
        if self.observer is not None:
            self.observer.observe(layer, x, y, (time.perf_counter() - started) * 1e3)
        return y


class SeedLayer:
    """Mixin that :func:`swap_class` puts in front of a layer's own class.

    A layer at rest runs its own class's forward and pays nothing; one that has a slot is of a further
    subclass (:class:`_Awake`) that runs it.
    """

    _esper_slot: Slot | None = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The swapped class has no importable name: rebuild it from the original on unpickling.
        kind = (isinstance(self, WeightSeedLayer), isinstance(self, _Awake))
        return _rebuild, (base_class(self), *kind), self.__getstate__()


class _Awake:
    """Stands before :class:`SeedLayer` while the layer has a slot."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        slot = self._esper_slot  # type: ignore[attr-defined]
        return slot.run(self, super().forward, args, kwargs)  # type: ignore[misc]


class WeightSeedLayer(SeedLayer):
    """A seed layer whose *weight* is read from outside, as ``MultiheadAttention.out_proj``'s is.

    Its forward may never run, so its seeds act on the weight itself: ``weight`` returns W + Σ α·BA.
    """

    @property
    def weight(self) -> Tensor:
        """The host's weight plus the contributions of the seeds; same shape."""
        value: Tensor = self._parameters["weight"]  # type: ignore[attr-defined]
        seeds = self._modules.get(SEEDS)  # type: ignore[attr-defined]
        if seeds is not None:
            for seed in seeds.children():
                value = seed.on_weight(value)
        return value


_CLASSES: dict[tuple[type, bool, bool], type] = {}


def swap_class(layer: nn.Module, *, functional: bool = False) -> None:
    """Turn ``layer`` into a seed layer in place; does nothing when it already is one of that kind.

    Args:
        layer: Any module whose parameters are materialised.
        functional: The layer's weight is used without calling the layer.
    """
    if isinstance(layer, WeightSeedLayer) or (isinstance(layer, SeedLayer) and not functional):
        return
    awake = isinstance(layer, _Awake)
    layer.__class__ = _seed_class(base_class(layer), functional, awake)


def restore_class(layer: nn.Module) -> None:
    """Give ``layer`` its original class back and drop its slot."""
    if isinstance(layer, SeedLayer):
        layer.__dict__.pop("_esper_slot", None)
        layer.__class__ = base_class(layer)


def base_class(layer: object) -> type:
    """The class that ``layer`` had before the swap (its own class when it was not swapped)."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, (SeedLayer, _Awake)))


def get_slot(layer: nn.Module) -> Slot:
    """Return the slot of a seed layer, creating it when the layer has none."""
    assert isinstance(layer, SeedLayer), f"{type(layer).__name__} is not a seed layer"
    if layer._esper_slot is None:
        layer._esper_slot = Slot()
        _wake(layer, True)
    return layer._esper_slot


def rest(layer: nn.Module) -> None:
    """Drop the slot of a layer that has nothing to do, so that it costs nothing again."""
    if isinstance(layer, SeedLayer) and SEEDS not in layer._modules:
        slot = layer._esper_slot
        if slot is not None and slot.idle:
            layer._esper_slot = None
            _wake(layer, False)


def set_observer(layer: nn.Module, observer: Observer | None) -> None:
    """Let ``observer`` see the calls of a seed layer; None ends it."""
    get_slot(layer).observer = observer
    if observer is None:
        rest(layer)


@contextmanager
def observed(observers: Sequence[tuple[nn.Module, Observer]]) -> Iterator[None]:
    """Let each observer see the calls of its layer while the block runs."""
    for layer, observer in observers:
        set_observer(layer, observer)
    try:
        yield
    finally:
        for layer, _ in observers:
            set_observer(layer, None)


def seeds_of(layer: nn.Module) -> list[nn.Module]:
    """The seeds at ``layer``'s output in the order in which they run."""
    seeds = layer._modules.get(SEEDS)
    return [] if seeds is None else list(seeds.children())


def primary(value: Any) -> Any:
    """The tensor that a seed adds to: the value itself, or the first item of a tuple or list."""
    return value[0] if isinstance(value, (tuple, list)) and value else value


def replace_primary(value: Any, tensor: Tensor) -> Any:
    """Put ``tensor`` where :func:`primary` found it, keeping the container's type."""
    if isinstance(value, tuple):
        rest = (tensor, *value[1:])
        return type(value)(*rest) if hasattr(value, "_fields") else type(value)(rest)
    if isinstance(value, list):
        return [tensor, *value[1:]]
    return tensor


def _wake(layer: nn.Module, awake: bool) -> None:
    layer.__class__ = _seed_class(base_class(layer), isinstance(layer, WeightSeedLayer), awake)


def _seed_class(cls: type, functional: bool, awake: bool) -> type:
    key = (cls, functional, awake)
    if key not in _CLASSES:
        mixins = (WeightSeedLayer if functional else SeedLayer,)
        # Same module and a telling name: reprs, profilers and error messages stay readable.
        _CLASSES[key] = type(
            f"Seed{cls.__name__}",
            ((_Awake, *mixins, cls) if awake else (*mixins, cls)),
            {"__module__": cls.__module__},
        )
    return _CLASSES[key]


def _rebuild(cls: type, functional: bool, awake: bool) -> Any:
    return object.__new__(_seed_class(cls, functional, awake))
