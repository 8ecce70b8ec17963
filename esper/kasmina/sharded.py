"""Hosts whose parameters FSDP2 shards: a seed becomes a unit of its own on its layer's mesh.

``fully_shard`` decides once what a unit holds, so parameters that come later belong to none: they would be
trained by each process on its own batches alone. A seed's branch is therefore made a unit itself. Every
process draws it from the same random numbers and keeps its part, FSDP2 gathers and reduces it like the host's
layers, and optimizers, clipping and checkpoints see parameters of one kind.

Parameters are parts (``DTensor``) between steps only; within a pass, and for FSDP2's outermost unit until the
next backward pass, other tensors stand in their places. Whatever tells parameters by identity asks
:func:`put_at_rest` first.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from esper.errors import GrowthError

__all__ = [
    "fill_new_state",
    "is_sharded",
    "own_part",
    "put_at_rest",
    "shard_as",
    "spread",
    "units",
    "whole",
    "why_unusable",
]


def _class(module: str, name: str) -> Any:
    """A class of torch's that takes long to import; None where nobody has, so that nothing can be of it."""
    return getattr(sys.modules.get(module), name, None)


def units(model: nn.Module) -> Iterator[Any]:
    """The modules inside ``model``, itself included, that ``fully_shard`` was called on."""
    kind = _class("torch.distributed.fsdp", "FSDPModule")
    if kind is not None:
        yield from (module for module in model.modules() if isinstance(module, kind))


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards anything in ``model``."""
    return next(units(model), None) is not None


def put_at_rest(model: nn.Module) -> None:
    """Make every parameter the sharded one that optimizers hold; call it outside forward and backward passes.

    FSDP2 leaves its outermost unit gathered after a pass without gradients.
    """
    for unit in units(model):
        unit.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor itself. Shares the memory."""
    kind = _class("torch.distributed.tensor", "DTensor")
    return tensor.to_local() if kind is not None and isinstance(tensor, kind) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, which every process has to ask for alike; any other tensor itself."""
    kind = _class("torch.distributed.tensor", "DTensor")
    return tensor.full_tensor() if kind is not None and isinstance(tensor, kind) else tensor


def spread(value: Any, like: Any) -> Any:
    """``value`` sharded as ``like`` is, where that is sharded and of its shape; otherwise ``value`` itself.

    Args:
        value: A whole tensor, the same on every process; or anything else.
        like: What it is to be copied to, or stand beside.
    """
    kind = _class("torch.distributed.tensor", "DTensor")
    if kind is None or not isinstance(like, kind) or not isinstance(value, Tensor):
        return value
    if isinstance(value, kind) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    placed = value.to(like.device)
    # No process sends anything: each has the whole value.
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


def why_unusable(kind: str, *, functional: bool) -> str:
    """Why a site of a sharded host cannot be used; empty where it can.

    Args:
        kind: Of the site.
        functional: Whether its seed would act on the layer's weight.
    """
    if kind == "stack":
        return "sharded by FSDP2, which lets no block be copied"
    if functional:
        return "sharded by FSDP2 and used without being called, so that a seed on its weight would not be gathered"
    return ""


def shard_as(branch: nn.Module, layer: nn.Module) -> None:
    """Make ``branch`` a unit of FSDP2 on the mesh of ``layer``.

    Args:
        branch: A seed's, with the same values on every process.
        layer: The host layer that it stands at; at rest.

    Raises:
        GrowthError: The layer is not sharded over one dimension. Nothing was changed.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    meshes = {p.device_mesh for p in layer.parameters() if isinstance(p, DTensor)}
    if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
        found = ", ".join(str(mesh) for mesh in meshes) or "none"
        raise GrowthError(
            "a seed in a model that FSDP2 shards needs a layer whose parameters lie on one mesh of one dimension, but "
            f"this {type(layer).__name__}'s lie on {found}; call fully_shard on a module around it, with a mesh for "
            "data parallelism only"
        )
    # Set explicitly: as a unit that is not below another's first pass it would else stay gathered after passes.
    fully_shard(branch, mesh=meshes.pop(), reshard_after_forward=True)


def fill_new_state(optimizer: Optimizer) -> None:
    """Give parameters that have not been stepped yet the state that they would begin with.

    torch's sharded checkpoints refuse to load a parameter without one, and a checkpoint may be written between
    a birth and its first step. The numbers are those of a state made by the first step: zeros.

    Args:
        optimizer: An Adam or AdamW, unwrapped, some of whose parameters have been stepped; nothing is done before.
    """
    assert type(optimizer) in (Adam, AdamW), f"no zero state is known of {type(optimizer).__name__}"
    if not optimizer.state:
        return
    for group in optimizer.param_groups:
        options = {name: value for name, value in group.items() if name in optimizer.defaults}
        for p in group["params"]:
            if p.requires_grad and p not in optimizer.state:
                optimizer.state[p] = _first_state(type(optimizer), p, options)


def _first_state(kind: type[Optimizer], p: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    twin = torch.zeros_like(p, requires_grad=True)
    twin.grad = torch.zeros_like(p)
    optimizer = kind([twin])  # type: ignore[call-arg]
    optimizer.param_groups[0].update(options)  # AdamW's defaults hold one that it does not take
    optimizer.step()
    state = dict(optimizer.state[twin])
    for value in state.values():
        value.zero_()  # the step count among them
    return state
