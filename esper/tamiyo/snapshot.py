"""Host, seeds and optimizer state at one moment, to come back to when an adaptation goes wrong.

Optimizer state is kept by parameter name and put back by identity, never by index: growth and
culling change the order. Learning rates and other group options are not part of it, because the
schedule goes on from where it is. Everything is cloned to the CPU, so a snapshot takes no
accelerator memory and travels in a checkpoint. What is sharded is gathered for it, so that capturing is
then a collective operation, and every process keeps all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import CheckpointError
from esper.kasmina.optimizer import fill_state, group_names, reorder_groups, unregister_parameters, unwrap
from esper.kasmina.sharded import is_sharded, own_part, spread, whole
from esper.kasmina.structure import conform
from esper.kasmina.validation import check_state_dict

__all__ = ["Snapshot", "capture", "is_finite", "renew_optimizer_state", "restore"]


@dataclass(frozen=True)
class Snapshot:
    """What :func:`capture` found.

    Attributes:
        step: Optimizer steps taken when it was made.
        site: Site or layer of the adaptation that followed.
        model: State dict, seeds' structure included; tensors on the CPU.
        groups: Parameter names by optimizer and group, in order.
        states: For each optimizer, parameter name → that parameter's state.
    """

    step: int
    site: str
    model: dict[str, Any]
    groups: list[list[list[str]]]
    states: list[dict[str, dict[str, Any]]]

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors, so that ``torch.load(weights_only=True)`` reads it."""
        return {
            "step": self.step,
            "site": self.site,
            "model": self.model,
            "groups": self.groups,
            "states": self.states,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Snapshot:
        """Undo :meth:`state_dict`.

        Raises:
            CheckpointError: A field is missing.
        """
        try:
            return cls(state["step"], state["site"], state["model"], state["groups"], state["states"])
        except KeyError as error:
            raise CheckpointError(
                f"the governor's snapshot lacks {error}; the checkpoint is damaged"
            ) from error


def is_finite(model: nn.Module) -> bool:
    """Whether every parameter and buffer is free of NaN and inf; waits for the device once.

    Of sharded parameters this process's parts are looked at.
    """
    checks = [
        torch.isfinite(own_part(tensor)).all()
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.is_floating_point() or tensor.is_complex()
    ]
    devices = {check.device for check in checks}
    return all(bool(torch.stack([c for c in checks if c.device == device]).all()) for device in devices)


def capture(
    model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], *, step: int, site: str = ""
) -> Snapshot:
    """Clone the state of a model and its optimizers.

    Args:
        model: Host with its seeds.
        optimizers: All that train it, wrapped or not.
        step: Optimizer steps taken so far.
        site: Where the coming adaptation takes place.
    """
    live = _unwrap_all(optimizers)
    groups = group_names(live, model.named_parameters())
    states = []
    for optimizer, names in zip(live, groups, strict=True):
        states.append(
            {
                name: _clone(optimizer.state[p])
                for group, group_of_names in zip(optimizer.param_groups, names, strict=True)
                for name, p in zip(group_of_names, group["params"], strict=True)
                if p in optimizer.state
            }
        )
    return Snapshot(step, site, _clone(dict(model.state_dict())), groups, states)


def restore(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], snapshot: Snapshot) -> None:
    """Bring a model and its optimizers back to ``snapshot``; call it between steps only.

    The model's seeds follow the snapshot's state dict by the hook that ``attach`` puts on the model:
    later ones leave it and the optimizers, with their state, and earlier ones that were culled since
    are grown again. Parameters that stayed keep their identity.

    Args:
        model: The model that was captured.
        optimizers: Its optimizers, in the same order.
        snapshot: Not changed, so that it can serve again.

    Raises:
        CheckpointError: The optimizers' groups (compared before anything is changed) or the host's
            structure have changed since.
    """
    live = _unwrap_all(optimizers)
    found = [len(optimizer.param_groups) for optimizer in live]
    expected = [len(groups) for groups in snapshot.groups]
    if found != expected:
        raise CheckpointError(
            f"cannot roll back to step {snapshot.step}: it had {expected} parameter groups by optimizer, "
            f"now there are {found}; add groups before growth begins"
        )
    before = dict(model.named_parameters())
    try:
        model.load_state_dict(_sharded_as(model, snapshot.model))
    except RuntimeError as error:
        raise CheckpointError(f"cannot roll back to step {snapshot.step}: {error}") from error
    present = {id(p) for p in model.parameters()}
    unregister_parameters(live, [p for p in before.values() if id(p) not in present])
    reorder_groups(live, snapshot.groups, model.named_parameters())
    renew_optimizer_state(model, live, snapshot)


def renew_optimizer_state(
    model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], snapshot: Snapshot | None
) -> None:
    """Replace what the optimizers have gathered while the run diverged, and leave the weights alone.

    Call it after an exploding seed was culled: gradients of 1e18 leave second moments behind with which
    Adam would hardly move the host for thousands of steps, and momentum that would go on wrecking it.

    Args:
        model: Host with its remaining seeds.
        optimizers: All that train it, in the order in which they were captured.
        snapshot: Where good state is taken from, by parameter name; parameters that it does not know,
            or all when it is None, begin afresh.
    """
    live = _unwrap_all(optimizers)
    names = group_names(live, model.named_parameters())
    saved = [{}] * len(live) if snapshot is None else snapshot.states
    for optimizer, names_by_group, states in zip(live, names, saved, strict=True):
        for group, group_of_names in zip(optimizer.param_groups, names_by_group, strict=True):
            on_device = bool(group.get("fused") or group.get("capturable"))
            for name, p in zip(group_of_names, group["params"], strict=True):
                optimizer.state.pop(p, None)
                if name in states:
                    optimizer.state[p] = {
                        # torch keeps step counts on the CPU unless a kernel reads them there.
                        key: spread(_clone(value, "cpu" if key == "step" and not on_device else p.device), p)
                        for key, value in states[name].items()
                    }
            fill_state(optimizer, group)


def _unwrap_all(optimizers: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    many = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
    return [unwrap(optimizer) for optimizer in many]


def _sharded_as(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """``state`` as ``model`` takes it: where FSDP2 shards it, grown to ``state`` and with the parts of this process."""
    if not is_sharded(model):
        return state
    conform(model, check_state_dict(model, state))
    live = model.state_dict(keep_vars=True)
    return {name: spread(value, live[name]) for name, value in state.items()}


def _clone(value: Any, device: torch.device | str = "cpu") -> Any:
    """A deep copy with every tensor whole and on ``device``, without its graph."""
    if isinstance(value, Tensor):
        return whole(value.detach()).to(device, copy=True)
    if isinstance(value, dict):
        return {key: _clone(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_clone(item, device) for item in value)
    return copy.deepcopy(value)
