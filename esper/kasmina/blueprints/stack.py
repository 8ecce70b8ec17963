"""``stack``: a further copy of a residual block that starts as the identity.

Legend: the block computes x + f(x), where f ends in the output projections.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import GrowthError
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.layer import SEEDS, restore_class
from esper.kasmina.sites import BuildContext

__all__ = ["plain_copy", "stack"]


def plain_copy(block: nn.Module) -> nn.Module:
    """Copy ``block`` as if it had never carried a seed: original classes, no seeds, no taps.

    Parameters and buffers are copied onto the default device, so that a cost can be counted on the
    meta device without allocating anything. Sharing between layers of the block is kept; gradients
    are not copied.
    """
    device = torch.empty(0).device
    memo: dict[int, Any] = {}
    for module in block.modules():
        holder = module._modules.get(SEEDS)
        if holder is not None:
            memo[id(holder)] = nn.ModuleDict()  # deepcopy takes what the memo holds: the seeds stay behind
    for name, parameter in block.named_parameters():
        if SEEDS not in name.split("."):
            memo[id(parameter)] = nn.Parameter(_copied(parameter, device), parameter.requires_grad)
    for name, buffer in block.named_buffers():
        if SEEDS not in name.split("."):
            memo[id(buffer)] = _copied(buffer, device)
    copy: nn.Module = deepcopy(block, memo)
    for module in copy.modules():
        module._modules.pop(SEEDS, None)
        restore_class(module)
    return copy


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _reason(context: BuildContext) -> str | None:
    site = context.site
    if not context.output_projections:
        return (
            f"{site.target!r} is no pre-norm residual block: its output is not its input plus outputs of "
            "linear layers, so no copy of it can start as the identity"
        )
    if site.source_shape != site.target_shape:
        return f"its output {site.target_shape} does not have the shape {site.source_shape} of its input"
    for name in context.output_projections:
        try:
            context.target_layer.get_submodule(name)
        except AttributeError:
            return f"{site.target!r} has no output projection {name!r}"
    return None


@blueprint("stack", kinds=("stack",), reads="block", default_size=1, accepts=_reason)
def stack(context: BuildContext, size: int) -> nn.Module:
    """A copy of the block, to run after it, whose output projections are zero.

    Source: G_stack and its function-preserving variants, Du et al. 2024, arXiv 2405.15319; measured in
    GROWTH.md §5 to be better than plain stacking.

    Raises:
        GrowthError: ``size`` is not 1.
    """
    if size != 1:
        raise GrowthError(
            f"blueprint 'stack' at {context.site.name!r} adds one block, so its size should be 1, "
            f"got {size}; germinate again for a further block"
        )
    copy = plain_copy(context.target_layer)
    for name in context.output_projections:
        layer = copy.get_submodule(name)
        # torch's attention applies its projection as a child that it never calls
        projection = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer
        for parameter in projection.parameters(recurse=False):
            nn.init.zeros_(parameter)
    for module in copy.modules():
        # The copy runs within its original's checkpointed region: one of its own would be recomputed twice.
        if module.__dict__.get("gradient_checkpointing") is True:
            module.gradient_checkpointing = False  # type: ignore[assignment]
    return copy
