"""Check a state dict against a model, seeds and all, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import CheckpointError, EsperError
from esper.kasmina.blueprints import get_blueprint, make_branch
from esper.kasmina.layer import SEEDS
from esper.kasmina.seed import SeedState, decode_state
from esper.kasmina.sites import BuildContext

__all__ = ["check_state_dict", "seed_states_in"]

_SHOWN = 5
_EXTRA = "_extra_state"
_LEAVES_KEYS_ALONE = ("esper.", "torch.distributed.")
"""Whose load hooks translate no keys; every LightningModule has one of the latter, for sharded tensors."""


def seed_states_in(state_dict: Mapping[str, Any], prefix: str = "") -> list[SeedState]:
    """Decode the seed records in a state dict.

    Args:
        state_dict: Of a grown model.
        prefix: Where in it the model's own keys begin.

    Raises:
        CheckpointError: A record cannot be read, names another place than its key, or holds impossible values.
    """
    states = []
    for key, value in state_dict.items():
        parts = key[len(prefix) :].split(".") if key.startswith(prefix) else []
        if len(parts) >= 3 and parts[-1] == _EXTRA and parts[-3] == SEEDS:
            state = decode_state(value, key)
            if parts[-2] != state.seed_id or ".".join(parts[:-3]) != state.site.target:
                raise CheckpointError(
                    f"seed record {key!r} says it is {state.seed_id!r} at {state.site.target!r}; "
                    "the checkpoint's keys were renamed or damaged"
                )
            if not (math.isfinite(state.alpha) and 0.0 <= state.alpha <= 1.0):
                raise CheckpointError(
                    f"seed record {key!r}: alpha should lie in [0, 1], got {state.alpha}; the checkpoint is damaged"
                )
            states.append(state)
    return states


def check_state_dict(
    model: nn.Module, state_dict: Mapping[str, Any], *, prefix: str = "", strict: bool = True
) -> list[SeedState]:
    """Check that ``model``, with the seeds that ``state_dict`` records, takes all of ``state_dict``.

    Keys under modules that translate keys by themselves (an own ``_load_from_state_dict`` or a load
    pre-hook) are left to them.

    Args:
        model: Host, with or without seeds; only looked at.
        state_dict: What is to be loaded.
        prefix: Where in it the model's own keys begin.
        strict: Whether missing and unexpected keys of the *host* are errors; of seeds they always are.

    Returns:
        The records of the seeds that the model should carry.

    Raises:
        CheckpointError: Names the keys that do not fit, and how.
    """
    own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    states = seed_states_in(own)
    expected = _host_tensors(model)
    for state in states:
        expected |= _seed_tensors(model, state)
    known = {(state.site.target, state.seed_id) for state in states}
    problems: list[str] = []
    translators = _translators(model)
    missing = [key for key in expected if key not in own and _counts(key, strict, translators)]
    unexpected = [key for key in own if key not in expected and _counts(key, strict, translators)]
    for key in unexpected:
        parts = key.split(".")
        if SEEDS in parts:
            at = parts.index(SEEDS)
            if (".".join(parts[:at]), ".".join(parts[at + 1 : at + 2])) not in known:
                raise CheckpointError(
                    f"the checkpoint holds weights of a seed at {prefix + key!r} but no record of what it is; "
                    "it is incomplete or its keys were renamed"
                )
    if missing:
        problems.append(f"it lacks {_some(missing)}")
    if unexpected:
        problems.append(f"the model has no {_some(unexpected)}")
    for key, wanted in expected.items():
        if wanted is None or key not in own or _translated(key, translators):
            continue
        value = own[key]
        if not isinstance(value, Tensor):
            problems.append(f"{key!r} should be a tensor, but is {type(value).__name__}")
        elif value.shape != wanted.shape:
            problems.append(f"{key!r} has shape {tuple(value.shape)}, the model's is {tuple(wanted.shape)}")
        elif value.is_floating_point() != wanted.is_floating_point():
            problems.append(f"{key!r} has type {value.dtype}, the model's is {wanted.dtype}")
    if problems:
        shown = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint does not fit {type(model).__name__}: {shown}{more}. It is of another model, of a "
            "different configuration, or damaged"
        )
    return states


def _host_tensors(model: nn.Module) -> dict[str, Tensor | None]:
    """Expected keys of the host without seeds; None where any value will do (extra state)."""
    state = model.state_dict(keep_vars=True)
    return {
        key: value if isinstance(value, Tensor) and not key.endswith(_EXTRA) else None
        for key, value in state.items()
        if SEEDS not in key.split(".")
    }


def _seed_tensors(model: nn.Module, state: SeedState) -> dict[str, Tensor | None]:
    site = state.site
    try:
        source, target = model.get_submodule(site.source), model.get_submodule(site.target)
    except AttributeError as error:
        raise CheckpointError(
            f"seed {state.seed_id!r} of the checkpoint stands at {site.name}, but {type(model).__name__} has no such "
            f"layer ({error}); it was grown in another model"
        ) from error
    context = BuildContext(site, source, target, state.output_projections)
    try:
        branch = make_branch(get_blueprint(state.blueprint), context, state.size, device=torch.device("meta"))
    except EsperError as error:
        raise CheckpointError(
            f"seed {state.seed_id!r} of the checkpoint does not fit this model: {error}"
        ) from error
    key = f"{site.target}.{SEEDS}.{state.seed_id}"
    tensors: dict[str, Tensor | None] = {f"{key}.{_EXTRA}": None}
    return tensors | {
        f"{key}.branch.{name}": value for name, value in branch.state_dict(keep_vars=True).items()
    }


def _translators(model: nn.Module) -> Sequence[str]:
    """Prefixes of the modules whose loading does more than copying tensors of the same name."""
    plain = nn.Module._load_from_state_dict
    found = []
    for name, module in model.named_modules():
        hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
        foreign = any(
            not str(getattr(hook, "__module__", "")).startswith(_LEAVES_KEYS_ALONE) for hook in hooks
        )
        if foreign or type(module)._load_from_state_dict is not plain:
            found.append(f"{name}." if name else "")
    return found


def _translated(key: str, translators: Sequence[str]) -> bool:
    return any(key.startswith(prefix) for prefix in translators)


def _counts(key: str, strict: bool, translators: Sequence[str]) -> bool:
    """Whether a key that is missing or unexpected is an error."""
    return SEEDS in key.split(".") or (strict and not _translated(key, translators))


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(repr(key) for key in keys[:_SHOWN]) + more
