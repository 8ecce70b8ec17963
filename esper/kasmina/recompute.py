"""Gradient checkpointing: which region of a forward pass is computed again in the backward pass.

A seed that reads the input of an earlier layer needs both layers in one region: what the earlier layer
was given in the forward pass is not there when a later region runs again, and belongs to another graph
where torch builds a new one (``use_reentrant=True``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

__all__ = ["current_region", "walkable_checkpoints"]


def current_region() -> object | None:
    """What stands for the innermost checkpointed region that is running; None outside of all.

    Two calls are in one region when this returns the same object for both. Only regions whose graph can
    be walked are seen: use it within :func:`walkable_checkpoints`.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or not getattr(hooks[0], "__qualname__", "").startswith("_checkpoint_hook"):
        return None
    found: object = hooks[0]
    return found


@contextmanager
def walkable_checkpoints() -> Iterator[None]:
    """Run reentrant checkpointing the other way while the block runs: same values, gradients and memory.

    A reentrant region is one node of the autograd graph that tells nothing about what is inside.
    """
    reentrant: Any = torch.utils.checkpoint.CheckpointFunction

    class Walkable:
        @staticmethod
        def apply(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
            if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                # Such a region gives its layers no gradient; the other kind of region would.
                return reentrant.apply(function, preserve_rng_state, *args)
            return torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

    torch.utils.checkpoint.CheckpointFunction = Walkable  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]
