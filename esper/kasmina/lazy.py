"""Lazy modules: their layers take their shapes here before seeds are looked for, or planted, at them.

A lazy layer changes its class on its first forward pass. It would throw off the class of a seed layer with
it, and run without its seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from esper.kasmina.layer import SEEDS

__all__ = ["settle_by_pass", "settle_by_state"]


def settle_by_pass(model: nn.Module, run: Callable[[], object]) -> None:
    """Let lazy layers take their shapes and first weights, as the model's own first pass would.

    Args:
        model: The host; nothing happens where it has no lazy layer.
        run: Calls the model once; in evaluation and without gradients, so that no statistics move.
    """
    if not any(is_lazy(p) for p in model.parameters()):
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            run()
    finally:
        for module, mode in modes:
            module.training = mode


def settle_by_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Let lazy layers take the shapes that a state dict has for them; their values come by loading it.

    Args:
        model: The host; nothing happens where it has no lazy layer, or where the state dict is of another host.
        state_dict: What is to be loaded.
        prefix: Where in it the model's own keys begin.
    """
    layers = [(name, module) for name, module in model.named_modules() if _unsettled(module)]
    if not layers:
        return
    own = {key[len(prefix) :] for key in state_dict if key.startswith(prefix)}
    if {key for key in own if SEEDS not in key.split(".")} != set(model.state_dict(keep_vars=True)):
        return
    with torch.random.fork_rng(devices=[]):
        for name, layer in layers:
            weight = state_dict.get(f"{prefix}{name}.weight", state_dict.get(f"{prefix}{name}.running_mean"))
            if isinstance(weight, Tensor):
                infer: Any = layer._infer_parameters  # torch's own hook before the first forward pass
                infer(layer, (torch.empty(_input_shape(layer, weight), device=_device(layer)),), {})


def _unsettled(module: nn.Module) -> bool:
    return isinstance(module, LazyModuleMixin) and any(is_lazy(value) for value in _own(module))


def _device(layer: nn.Module) -> torch.device:
    return next(value for value in _own(layer) if is_lazy(value)).device


def _own(module: nn.Module) -> list[Tensor]:
    return [v for v in (*module._parameters.values(), *module._buffers.values()) if v is not None]


def _input_shape(layer: nn.Module, weight: Tensor) -> tuple[int, ...]:
    """An input that gives ``layer`` a weight of the same shape as ``weight``."""
    spread = tuple(weight.shape[2:])
    if weight.dim() < 2 or getattr(layer, "transposed", False):
        return (1, weight.shape[0], *(spread or (1,)))
    return (1, weight.shape[1] * getattr(layer, "groups", 1), *spread)
