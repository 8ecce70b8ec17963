"""Nested state dicts in one safetensors file: tensors as tensors, all else as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esper.atomic import replacing
from esper.errors import CheckpointError

__all__ = ["load", "load_optimizer_state", "optimizer_state", "save"]

_FORMAT = "esper-learning-1"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` in one move: a kill at any moment leaves the old file or the new one.

    Args:
        path: Its folder is made.
        state: Dicts with text keys, lists, numbers, texts, None, and tensors.

    Raises:
        CheckpointError: A key is no text or begins with ``$``, or a value is of another type.
    """
    tensors: dict[str, Tensor] = {}
    facts = _flatten(state, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": _FORMAT, "facts": json.dumps(facts)})


def load(path: Path) -> dict[str, Any]:
    """Read what :func:`save` wrote; tensors on the CPU. Nothing in the file is executed.

    Raises:
        CheckpointError: There is no such file, it is cut off, or it is of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(
                    f"expected {path} to be a checkpoint of learning ({_FORMAT}), but its format is "
                    f"{metadata.get('format', 'not given')!r}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        state: dict[str, Any] = _restore(json.loads(metadata["facts"]), tensors)
    except FileNotFoundError as error:
        raise CheckpointError(f"expected a checkpoint of learning at {path}, but there is no file") from error
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file: {error}; go back to an earlier checkpoint"
        ) from error
    return state


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON types in place of ``value``, its tensors moved to ``tensors`` under their paths."""
    if isinstance(value, Tensor):
        assert path not in tensors, f"two tensors would both be named {path}"
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {"$tensor": path}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str) or key.startswith("$")]
        if wrong:
            raise CheckpointError(
                f"expected text keys that do not begin with '$' under {path or 'the top'}, got {wrong[0]!r}"
            )
        return {key: _flatten(v, f"{path}/{key}" if path else key, tensors) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise CheckpointError(
        f"expected tensors, numbers, texts, dicts or lists at {path}, got {type(value).__name__}"
    )


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"$tensor"}:
            return tensors[value["$tensor"]]
        return {key: _restore(v, tensors) for key, v in value.items()}
    if isinstance(value, list):
        return [_restore(v, tensors) for v in value]
    return value


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State dict of an optimizer with text for the numbers of its parameters."""
    state = optimizer.state_dict()
    return {**state, "state": {str(index): entry for index, entry in state["state"].items()}}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Undo :func:`optimizer_state`.

    Raises:
        CheckpointError: It is of an optimizer with other parameters.
    """
    try:
        optimizer.load_state_dict(
            {**state, "state": {int(index): entry for index, entry in state["state"].items()}}
        )
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint's optimizer does not fit this policy: {error}") from error
