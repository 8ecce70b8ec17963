"""Give new parameters to a live optimizer, take them away again, and keep their order for a resume.

New parameters join, in place, the parameter group that holds the host parameter they belong to.
``add_param_group`` would not do: it breaks or silently distorts most schedulers (LIGHTNING.md §1).
Everything is matched by identity, because two zero biases compare equal by value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adagrad, Muon, Optimizer, SparseAdam

from esper.errors import CheckpointError, GrowthError, UnsupportedError

__all__ = [
    "check_optimizer",
    "fill_state",
    "group_names",
    "refusal",
    "register_parameters",
    "reorder_groups",
    "unregister_parameters",
    "unwrap",
]

_SHARDED = ("ZeroRedundancyOptimizer", "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3")


def unwrap(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper that keeps it as ``.optimizer``, as Lightning's does."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_optimizer(optimizer: Any) -> None:
    """Refuse an optimizer that cannot take new parameters; call it before training starts.

    Args:
        optimizer: A torch optimizer or a wrapper around one.

    Raises:
        UnsupportedError: It cannot work with growth; the message says what to use instead.
    """
    if (refused := refusal(optimizer)) is not None:
        why, way_out = refused
        raise UnsupportedError(
            "growth needs an optimizer that accepts new parameters; "
            f"{type(unwrap(optimizer)).__name__} {why}; {way_out}"
        )


def refusal(optimizer: Any) -> tuple[str, str] | None:
    """Why an optimizer, wrapped or not, cannot take new parameters, and what to do; None if it can."""
    optimizer = unwrap(optimizer)
    if isinstance(optimizer, LBFGS):
        return "keeps one flat history over all parameters, which cannot grow", "use AdamW or SGD"
    if isinstance(optimizer, SparseAdam):
        return "takes sparse gradients only, and seeds have dense ones", "use Adam"
    if any(base.__name__ in _SHARDED for base in type(optimizer).__mro__):
        return (
            "divides the parameters among processes once, so new ones would never be updated",
            "use the plain optimizer with DDP",
        )
    if isinstance(optimizer, SGD) and any(
        group["fused"] and group["momentum"] and group["dampening"] for group in optimizer.param_groups
    ):
        # Its kernel wants a buffer from the start, and dampening treats a zero one unlike a missing one.
        return "with fused=True, momentum and dampening cannot take a new parameter", "set fused=False"
    return None


def register_parameters(
    optimizers: Optimizer | Sequence[Optimizer],
    named_new: Sequence[tuple[str, nn.Parameter]],
    anchors: Sequence[nn.Parameter],
) -> list[str]:
    """Append each new parameter to the group that holds its anchor; call it between steps only.

    A parameter that some group holds already stays where it is. Groups, their lists and their
    options stay the same objects, so schedulers, clipping and wrappers go on working.

    Args:
        optimizers: All optimizers that train the host, wrapped or not.
        named_new: Name in the model and parameter.
        anchors: For each of them the host parameter whose group it joins.

    Returns:
        The names of the parameters that were added.

    Raises:
        GrowthError: A group cannot be told to be the right one. Nothing was changed.
    """
    live = _unwrap_all(optimizers)
    place = {id(p): (o, group) for o in live for group in o.param_groups for p in group["params"]}
    planned: list[tuple[str, nn.Parameter, Optimizer, dict[str, Any]]] = []
    taken = set(place)
    for (name, parameter), anchor in zip(named_new, anchors, strict=True):
        if id(parameter) in taken:
            continue
        taken.add(id(parameter))
        optimizer, group = place.get(id(anchor)) or _group_of_its_kind(live, name, parameter)
        if isinstance(optimizer, Muon) and parameter.ndim != 2:
            optimizer, group = _group_for_vectors(live, name, tuple(parameter.shape))
        planned.append((name, parameter, optimizer, group))
    for name, parameter, optimizer, group in planned:
        group["params"].append(parameter)
        if "param_names" in group:
            group["param_names"].append(name)
        fill_state(optimizer, group)
    return [name for name, *_ in planned]


def unregister_parameters(
    optimizers: Optimizer | Sequence[Optimizer], parameters: Iterable[nn.Parameter]
) -> int:
    """Remove parameters, their names and their state from every group; call it between steps only.

    Args:
        optimizers: All optimizers that train the host, wrapped or not.
        parameters: Matched by identity; those that no group holds are passed over.

    Returns:
        How many were removed.
    """
    gone = {id(p) for p in parameters}
    num_removed = 0
    for optimizer in _unwrap_all(optimizers):
        for group in optimizer.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
            if len(kept) == len(group["params"]):
                continue
            num_removed += len(group["params"]) - len(kept)
            if "param_names" in group:
                group["param_names"][:] = [group["param_names"][i] for i in kept]
            group["params"][:] = [group["params"][i] for i in kept]
        for key in [key for key in optimizer.state if id(key) in gone]:
            del optimizer.state[key]
    return num_removed


def group_names(
    optimizers: Optimizer | Sequence[Optimizer], named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[list[list[str]]]:
    """Name every parameter of every group, in order, for a checkpoint (LIGHTNING.md §2, cure A).

    Args:
        optimizers: All optimizers that train the model, wrapped or not.
        named_parameters: As ``model.named_parameters()`` gives them.

    Returns:
        For each optimizer, for each group, the names. A parameter from outside the model is
        called ``<outside O.G.K>``: the K-th such parameter of optimizer O's group G.
    """
    names = {id(p): name for name, p in named_parameters}
    return [
        [_names_in_group(group, f"{o}.{g}", names) for g, group in enumerate(optimizer.param_groups)]
        for o, optimizer in enumerate(_unwrap_all(optimizers))
    ]


def reorder_groups(
    optimizers: Optimizer | Sequence[Optimizer],
    names_per_group: Sequence[Sequence[Sequence[str]]],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> None:
    """Give every live group the parameters that a checkpoint had there, in its order.

    torch matches optimizer state by index: growth appends, but ``configure_optimizers`` of a
    resumed run sees module order, and equal shapes would take each other's moments without an
    error. Call it after ``configure_optimizers`` and before ``optimizer.load_state_dict``.

    Args:
        optimizers: The freshly configured optimizers, as many as were saved, wrapped or not.
        names_per_group: As :func:`group_names` returned it.
        named_parameters: Of the regrown model.

    Raises:
        CheckpointError: Optimizers, groups or parameters do not correspond. Nothing was changed.
    """
    live = _unwrap_all(optimizers)
    if len(names_per_group) != len(live):
        raise CheckpointError(
            f"the checkpoint has {len(names_per_group)} optimizers, but the run has {len(live)}; "
            "configure the same ones to resume"
        )
    named = list(named_parameters)
    names = {id(p): name for name, p in named}
    known = dict(named)
    for o, optimizer in enumerate(live):
        for g, group in enumerate(optimizer.param_groups):
            known.update(zip(_names_in_group(group, f"{o}.{g}", names), group["params"], strict=True))
    planned: list[tuple[dict[str, Any], list[str], list[nn.Parameter]]] = []
    for o, (optimizer, saved_groups) in enumerate(zip(live, names_per_group, strict=True)):
        if len(saved_groups) != len(optimizer.param_groups):
            raise CheckpointError(
                f"optimizer {o} ({type(optimizer).__name__}) has {len(optimizer.param_groups)} parameter "
                f"groups, but the checkpoint has {len(saved_groups)}; build the groups as in the saved run"
            )
        for group, saved in zip(optimizer.param_groups, saved_groups, strict=True):
            missing = [name for name in saved if name not in known]
            if missing:
                raise CheckpointError(
                    f"the checkpoint's optimizer {o} holds {', '.join(missing[:5])} ({len(missing)} in all), "
                    "but the model has no such parameters; load its weights first: that regrows its seeds"
                )
            planned.append((group, list(saved), [known[name] for name in saved]))
    _check_complete(live, planned, names)
    for group, saved_names, parameters in planned:
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"][:] = saved_names


def _unwrap_all(optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    # A LightningOptimizer passes for the class it wraps, so it is one optimizer here too.
    many = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    return [unwrap(optimizer) for optimizer in many]


def _group_of_its_kind(
    live: list[Optimizer], name: str, parameter: nn.Parameter
) -> tuple[Optimizer, dict[str, Any]]:
    """The group for a parameter whose host parameter is not trained.

    That is the only group there is, or the only one that holds parameters of its kind: with weight decay
    on matrices alone, a frozen layer's seed decays as the trained layers do.
    """
    places = [(optimizer, group) for optimizer in live for group in optimizer.param_groups]
    is_matrix = parameter.ndim > 1
    same_kind = [(o, group) for o, group in places if any((p.ndim > 1) == is_matrix for p in group["params"])]
    if len(places) != 1 and len(same_kind) != 1:
        raise GrowthError(
            f"parameter {name!r} should join the optimizer group of its host layer, but that layer is in "
            f"none of the {len(places)} groups (frozen?), and {len(same_kind)} of them hold "
            f"{'matrices' if is_matrix else 'vectors'}; put the host layer's weight into the group that "
            "the seed shall join (a parameter with requires_grad=False may stand there)"
        )
    return places[0] if len(places) == 1 else same_kind[0]


def _group_for_vectors(
    live: list[Optimizer], name: str, shape: tuple[int, ...]
) -> tuple[Optimizer, dict[str, Any]]:
    """Where a bias or a convolution goes whose anchor is trained by Muon, which takes matrices only."""
    places = [(o, group) for o in live if not isinstance(o, Muon) for group in o.param_groups]
    if not places:
        raise GrowthError(
            f"parameter {name!r} of shape {shape} should join its host layer's group, but Muon trains "
            "matrices only; add a second optimizer (AdamW) for the others, or use a blueprint without biases"
        )
    return max(places, key=lambda place: sum(p.ndim != 2 for p in place[1]["params"]))


def fill_state(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Give the parameters of a group what their optimizer does not make on their first step.

    Fused SGD wants momentum buffers to be all there or all missing; a zero buffer leaves the first step what
    it is without one: 0 * momentum + gradient. Adagrad makes its state when it is built in some versions of torch.
    """
    if isinstance(optimizer, SGD) and group["fused"] and group["momentum"]:
        for p in group["params"]:
            if optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(
                    p, memory_format=torch.preserve_format
                )
    if isinstance(optimizer, Adagrad) and (late := [p for p in group["params"] if p not in optimizer.state]):
        options = {name: value for name, value in group.items() if name in optimizer.defaults}
        optimizer.state.update(Adagrad(late, **options).state)


def _names_in_group(group: dict[str, Any], where: str, names: dict[int, str]) -> list[str]:
    result: list[str] = []
    outside = 0
    for p in group["params"]:
        name = names.get(id(p))
        if name is None:
            name, outside = f"<outside {where}.{outside}>", outside + 1
        result.append(name)
    return result


def _check_complete(
    live: list[Optimizer],
    planned: list[tuple[dict[str, Any], list[str], list[nn.Parameter]]],
    names: dict[int, str],
) -> None:
    """Refuse a plan that names a parameter twice or leaves a live one out."""
    placed = Counter(id(p) for _, _, parameters in planned for p in parameters)
    twice = sorted(names.get(i, "<outside>") for i, count in placed.items() if count > 1)
    if twice:
        raise CheckpointError(
            f"the checkpoint's optimizers hold {', '.join(twice[:5])} more than once; it is damaged"
        )
    held = {id(p) for optimizer in live for group in optimizer.param_groups for p in group["params"]}
    extra = sorted(names.get(i, "<outside>") for i in held - placed.keys())
    if extra:
        raise CheckpointError(
            f"the run's optimizers hold {', '.join(extra[:5])} ({len(extra)} in all), which the checkpoint's "
            "do not; configure the optimizers as in the saved run"
        )
