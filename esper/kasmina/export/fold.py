"""Make seeds part of the host's own layers: merged weights, wider layers, longer containers.

Each fold edits a draft in place and keeps its function in evaluation. Whether it really did is for the
caller to verify on an example; what can be told from the structure is told here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from esper.kasmina.blueprints.dense import LowRank
from esper.kasmina.blueprints.units import HiddenUnits
from esper.kasmina.export.draft import Branch, Draft
from esper.kasmina.export.numbering import adopt_configs, deepen_configs, numbering, renumber
from esper.kasmina.linear_like import as_weight_of

__all__ = ["containers_of", "is_widening", "merge_low_rank", "stack_block", "widen_layers", "widening_groups"]

_DENSE = (nn.Linear, nn.Conv2d)


def is_shared(model: nn.Module, parameter: Tensor | None) -> bool:
    """Whether more than one module of ``model`` holds ``parameter``."""
    if parameter is None:
        return False
    owners = {id(m) for m in model.modules() for p in m._parameters.values() if p is parameter}
    return len(owners) > 1


@torch.no_grad()
def merge_low_rank(draft: Draft, branch: Branch) -> str | None:
    """Add a low-rank branch to its layer's weight.

    A tied weight keeps the branch beside it, unless the weight is all that there is to act on: then the
    layer gets a weight of its own.

    Returns:
        Why it cannot be merged, or None when it was.
    """
    layer, low_rank = branch.target, branch.module
    if not isinstance(low_rank, LowRank):
        return "it is no low-rank branch"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its layer has no weight parameter of its own"
    tied = is_shared(draft.model, weight)
    if tied and not branch.functional:
        return "its layer's weight is tied to another layer's, which the seed does not act on"
    if any(other.reads != "source" for other in _before(draft, branch)):
        return "a branch that runs before it reads the layer's output"
    merged = weight + branch.alpha * as_weight_of(layer, low_rank.delta_weight()).to(weight)
    if tied:
        layer._parameters["weight"] = nn.Parameter(merged, requires_grad=weight.requires_grad)
        draft.notes.append(
            f"seed {branch.seed_id}: its layer's weight was tied to another's and is now its own"
        )
    else:
        weight.copy_(merged)
    draft.drop(branch)
    return None


def containers_of(model: nn.Module, block: nn.Module) -> list[nn.Sequential | nn.ModuleList]:
    """The containers in ``model`` that hold ``block`` and run, or let the host run, their items in order."""
    found: list[nn.Sequential | nn.ModuleList] = []
    for module in model.modules():
        iterates = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
        )
        if iterates and any(child is block for child in module.children()):
            assert isinstance(module, (nn.Sequential, nn.ModuleList))
            found.append(module)
    return found


def stack_block(draft: Draft, branch: Branch) -> str | None:
    """Insert a stacked block after its original in the host's container.

    Blocks that know their number are numbered anew, and a config that counts them counts one more.

    Returns:
        Why it cannot be inserted, or None when it was.
    """
    if branch.reads != "block":
        return "it is no block"
    if branch.alpha != 1.0:
        return "only a block at full strength can stand in the host's own sequence"
    if draft.at(branch.target)[-1] is not branch:
        return "a branch that runs after it stays"
    containers = containers_of(draft.model, branch.target)
    if len(containers) != 1:
        return f"its block stands in {len(containers)} containers that run it in order, and one is needed"
    blocks = list(containers[0].children())
    first = numbering(blocks)
    if first is None:
        return "its container's blocks carry numbers (layer_idx) that do not count their positions"
    index = next(i for i, child in enumerate(blocks) if child is branch.target)
    containers[0].insert(index + 1, branch.module)
    renumber(list(containers[0].children()), first)
    adopt_configs(branch.module, branch.target)
    name = next(name for name, module in draft.model.named_modules() if module is containers[0])
    deepen_configs(draft.model, name, index + 1, len(blocks))
    draft.drop(branch)
    return None


def is_widening(branch: Branch) -> bool:
    """Whether ``branch`` is further hidden units between two layers of one kind."""
    module = branch.module
    return (
        branch.crosses
        and isinstance(module, HiddenUnits)
        and any(
            all(
                isinstance(layer, kind)
                for layer in (branch.source, branch.target, module.fan_in, module.fan_out)
            )
            for kind in _DENSE
        )
    )


def widening_groups(draft: Draft, chains: Iterable[Branch]) -> list[list[Branch]]:
    """Group the branches that can be folded into wider layers; a group has to be folded in one go.

    Args:
        draft: The draft.
        chains: Widening branches whose source layer is read by their target alone.

    Returns:
        Groups of branches whose layers touch: a layer that gets inputs from one may get outputs from another.
    """
    wanted = [b for b in chains if is_widening(b) and _plain_layers(draft, b)]
    while True:  # whatever stays a branch keeps the layers around it as wide as they are
        staying = [other for other in draft.branches if not any(other is b for b in wanted)]
        kept = [b for b in wanted if not any(_blocks(draft, other, b) for other in staying)]
        if len(kept) == len(wanted):
            break
        wanted = kept
    groups: list[list[Branch]] = []
    for branch in wanted:
        layers = {id(branch.source), id(branch.target)}
        touching = [g for g in groups if any({id(b.source), id(b.target)} & layers for b in g)]
        groups = [g for g in groups if not any(g is t for t in touching)]
        groups.append([*(b for g in touching for b in g), branch])
    return groups


@torch.no_grad()
def widen_layers(draft: Draft, group: list[Branch]) -> None:
    """Append the units of each branch of ``group`` to its source layer and its target layer.

    New units always stand last, so weights of layers that became wider for another branch of the group
    are filled up with zeros: a branch reads and writes the host's original units only.
    """
    for branch in group:
        units = branch.module
        assert isinstance(units, HiddenUnits)
        source, target = branch.source, branch.target
        assert isinstance(source, _DENSE)
        assert isinstance(target, _DENSE)
        fan_in, fan_out = units.fan_in, units.fan_out
        assert isinstance(fan_in, _DENSE)
        assert isinstance(fan_out, _DENSE)
        added = fan_in.weight.shape[0]
        rows = _filled(fan_in.weight.to(source.weight), source.weight.shape[1], 1)
        columns = _filled(branch.alpha * fan_out.weight.to(target.weight), target.weight.shape[0], 0)
        if source.bias is None and fan_in.bias is not None:
            source.bias = nn.Parameter(
                source.weight.new_zeros(source.weight.shape[0]), source.weight.requires_grad
            )
        if source.bias is not None:
            bias = fan_in.bias if fan_in.bias is not None else source.weight.new_zeros(added)
            source.bias = _joined(source.bias, bias.to(source.bias), 0)
        source.weight = _joined(source.weight, rows, 0)
        target.weight = _joined(target.weight, columns, 1)
        _set_widths(source, outputs=source.weight.shape[0])
        _set_widths(target, inputs=target.weight.shape[1])
        for norm in branch.through:
            assert isinstance(norm, _BatchNorm)
            _widen_norm(norm, added)
            draft.notes.append(
                f"seed {branch.seed_id}: the normalisation behind it is the identity for its units in evaluation; "
                "further training would normalise them"
            )
        draft.drop(branch)


def _plain_layers(draft: Draft, branch: Branch) -> bool:
    """Whether the layers' tensors may be replaced: nothing else holds them, and no groups divide them."""
    for layer in (branch.source, branch.target):
        shared = any(is_shared(draft.model, parameter) for parameter in layer._parameters.values())
        if shared or "weight" not in layer._parameters or getattr(layer, "groups", 1) != 1:
            return False
    return all(isinstance(norm, _BatchNorm) and norm.running_mean is not None for norm in branch.through)


def _blocks(draft: Draft, staying: Branch, widening: Branch) -> bool:
    """Whether a branch that stays keeps ``widening`` from being folded."""
    reads_widened = staying.reads == "source" and staying.source is widening.target
    adds_to_widened = staying.target is widening.source or any(staying.target is n for n in widening.through)
    earlier = staying.reads != "source" and any(b is staying for b in _before(draft, widening))
    return reads_widened or adds_to_widened or earlier


def _before(draft: Draft, branch: Branch) -> list[Branch]:
    """Branches at the same output that run before ``branch``."""
    same = draft.at(branch.target)
    return same[: next(i for i, other in enumerate(same) if other is branch)]


def _filled(weight: Tensor, size: int, dim: int) -> Tensor:
    missing = size - weight.shape[dim]
    if missing == 0:
        return weight
    shape = [missing if axis == dim else n for axis, n in enumerate(weight.shape)]
    return torch.cat([weight, weight.new_zeros(shape)], dim)


def _joined(parameter: Tensor, new: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter, new], dim), requires_grad=parameter.requires_grad)


def _set_widths(
    layer: nn.Linear | nn.Conv2d, *, inputs: int | None = None, outputs: int | None = None
) -> None:
    names = (
        ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("in_channels", "out_channels")
    )
    for name, value in zip(names, (inputs, outputs), strict=True):
        if value is not None:
            setattr(layer, name, value)


def _widen_norm(norm: _BatchNorm, added: int) -> None:
    """Add channels that pass unchanged in evaluation: (x - 0) / sqrt(1 - eps + eps)."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean, norm.running_var
    norm.running_mean = torch.cat([mean, mean.new_zeros(added)])
    norm.running_var = torch.cat([var, var.new_full((added,), 1.0 - norm.eps)])
    if norm.affine:
        norm.weight = _joined(norm.weight, norm.weight.new_ones(added), 0)
        norm.bias = _joined(norm.bias, norm.bias.new_zeros(added), 0)
    norm.num_features += added
