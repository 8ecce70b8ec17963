"""Build a grown model of transformers anew, by its own class."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import ExportError
from esper.kasmina.export.own_config import Recipe
from esper.kasmina.linear_like import as_weight_of

__all__ = ["rebuilt"]


@torch.no_grad()
def rebuilt(grown: nn.Module, recipe: Recipe) -> nn.Module:
    """Let ``grown``'s class build a model by ``recipe``, and give it the weights of ``grown``.

    Args:
        grown: A plain model of transformers.
        recipe: As :func:`~esper.kasmina.export.own_config.fitted_config` found it; layers that come out wider
            than they are in ``grown`` get silent units.

    Returns:
        The model, in evaluation mode, on the device and in the dtypes of ``grown``.

    Raises:
        ExportError: The class ties other weights to each other than ``grown`` does.
    """
    kind: Any = type(grown)
    source: Any = grown
    with torch.random.fork_rng(devices=[]):
        made = kind._from_config(
            recipe.config,
            dtype=source.dtype,
            attn_implementation=source.config._attn_implementation,
            **recipe.options,
        )
    made = made.to(source.device).eval()
    weights = dict(source.named_parameters())
    names = [name for name, _ in made.named_parameters()]
    if set(names) != set(weights):
        odd = ", ".join(sorted(set(names) ^ set(weights))[:4])
        raise ExportError(
            f"a new {kind.__name__} ties other weights than the grown model: {odd}; tie them as the config says, or "
            f"use esper.export"
        )
    for name, parameter in made.named_parameters():
        weight = weights[name].detach()
        layer = made.get_submodule(name.rpartition(".")[0])
        # In the weight's own dtype: some layers keep to float32.
        parameter.data = _with_room(weight, parameter.data.to(weight), layer)
        parameter.requires_grad_(weights[name].requires_grad)
    held = dict(source.named_parameters(remove_duplicate=False))
    buffers = {name: value for name, value in source.state_dict().items() if name not in held}
    made.load_state_dict(buffers, strict=False)  # the names were compared before
    if getattr(source, "generation_config", None) is not None:
        made.generation_config = deepcopy(source.generation_config)
    assert isinstance(made, nn.Module)
    return made


def _with_room(weight: Tensor, room: Tensor, layer: nn.Module) -> Tensor:
    """``weight``, or, where ``room`` is larger, ``weight`` in its first corner and new silent units around it."""
    if weight.shape == room.shape:
        return weight.clone()
    inputs = 1 if as_weight_of(layer, room) is room else 0
    if (
        weight.dim() > 1
    ):  # what reads the new units starts at zero; what feeds them stays as the class drew it
        room.narrow(inputs, weight.shape[inputs], room.shape[inputs] - weight.shape[inputs]).zero_()
    room[tuple(slice(size) for size in weight.shape)] = weight
    return room
