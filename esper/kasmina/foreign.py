"""Layers of a host that growth leaves alone, and why.

A seed adds to what a layer of a known kind computes from its weight. Where a layer computes something
else, where its weight is not what its parameters hold, or where another library will later put the layer
aside, a seed would be ignored, mis-exported or lost without an error.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from esper.kasmina.layer import SEEDS, SeedLayer, base_class

__all__ = ["left_alone"]

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.")
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_SHARDED = "torch.distributed."
"""Tensors from here are sharded, not quantised; the strategy is judged elsewhere."""


def left_alone(model: nn.Module) -> dict[str, str]:
    """Name the modules that can neither carry a seed nor be looked into.

    Args:
        model: The host; only looked at.

    Returns:
        Module name -> what it is, to stand behind "because it is"; empty text for what is only wrapped
        around, or hidden inside, a module that has its own entry or needs none.
    """
    found: dict[str, str] = {}
    hidden: list[str] = []  # names below which nothing is looked at; nested ones come later in the walk
    for name, module in model.named_modules():
        if hidden and name.startswith(hidden[-1]):
            found[name] = _inside(module, found[hidden[-1][:-1]])
            continue
        if SEEDS in name.split("."):
            continue
        for reason, hides in _reasons(module):
            if name:
                found[name] = reason
                if hides:
                    hidden.append(f"{name}.")
            break
    return found


def _inside(module: nn.Module, around: str) -> str:
    return f"part of a layer that is {around}" if isinstance(module, _KINDS) else ""


def _reasons(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """Why ``module`` is left alone, and whether what it holds is left alone with it."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        yield "scripted: its class cannot be changed; pass the module that it was scripted from", True
    if _is_compiled_wrapper(module):
        yield "", False  # seeds attach to the module inside
    if parametrize.is_parametrized(module):
        yield (
            "parametrised (weight_norm, spectral_norm and the like): torch generates its class and computes its "
            "weight anew in each call; seed the layers around it, or remove_parametrizations first",
            True,
        )
    if hasattr(module, "_packed_params") or (
        kind.__module__.startswith(_QUANTISED) and hasattr(module, "weight")
    ):
        yield (f"quantised ({kind.__name__}): its packed weight is not trained; grow before quantising", True)
    if "base_layer" in module._modules and not isinstance(module, _KINDS):
        yield (
            f"an adapter ({kind.__module__.split('.')[0]}'s {kind.__name__}): merging or unloading it would lose a "
            "seed inside; merge it first, or use seeds in its place",
            True,
        )
    if "forward" in module.__dict__:
        yield (
            "called through a forward that was put on the instance, so a seed would be ignored; compile a part of "
            "a model with module.compile() or torch.compile(module), and wrap it in a module of its own otherwise",
            False,
        )
    if isinstance(module, _KINDS):
        yield from ((reason, True) for reason in _foreign_layer(module))


def _foreign_layer(layer: nn.Module) -> Iterator[str]:
    """Why a layer that passes for one of the known kinds is not quite of it."""
    kind = base_class(layer) if isinstance(layer, SeedLayer) else type(layer)
    known = next(base for base in _KINDS if issubclass(kind, base))
    if known is not nn.MultiheadAttention:
        yield from _foreign_weight(layer)
    if _overridden(kind, known):
        yield (
            f"a {kind.__module__.split('.')[0]} {kind.__name__} that computes its output in its own way, not as "
            f"{known.__name__} does; seed the block around it instead"
        )


def _foreign_weight(layer: nn.Module) -> Iterator[str]:
    weight = layer._parameters.get("weight")
    if weight is None:
        yield (
            "computed from other parameters before each call (old weight_norm or spectral_norm, pruning); seed the "
            "layers around it, or remove the normalisation first"
        )
    elif is_lazy(weight):
        return
    elif not weight.is_floating_point():
        yield f"quantised (weight of {weight.dtype}): a seed is trained in floating point; grow before quantising"
    elif type(weight) not in _PLAIN_TENSORS or type(weight.data) is not Tensor:
        tensor = type(weight) if type(weight) not in _PLAIN_TENSORS else type(weight.data)
        if not tensor.__module__.startswith(_SHARDED):
            yield (
                f"given a weight of another kind ({tensor.__name__}), as quantising libraries do; grow before "
                "quantising"
            )


def _overridden(kind: type, known: type) -> bool:
    if issubclass(kind, nn.modules.lazy.LazyModuleMixin):
        return False
    names = ("forward", "_conv_forward") if known is nn.Conv2d else ("forward",)
    return any(getattr(kind, name) is not getattr(known, name) for name in names)


def _is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether ``module`` is what ``torch.compile`` makes of a module."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules
