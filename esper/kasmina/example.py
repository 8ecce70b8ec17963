"""Example inputs: how one is called with, and the small one that an attached model keeps.

An attached model remembers a few samples of what it was traced with, so that :func:`esper.export`
can prove its result without being given an input again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Example", "forget_example", "keep_example", "kept_example"]

_ATTRIBUTE = "_esper_example"
_KEPT_SAMPLES = 2


class Example(NamedTuple):
    """Arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, value: Any) -> Example:
        """Read a tensor, a tuple of positional or a mapping of keyword arguments."""
        if isinstance(value, Example):
            return value
        if isinstance(value, Mapping):
            return cls((), dict(value))
        return cls(value if isinstance(value, tuple) else (value,), {})

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, nested ones too."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int | None:
        """Samples in the batch; None when there is not exactly one tensor to tell it by."""
        tensors = self.tensors
        return int(tensors[0].shape[0]) if len(tensors) == 1 and tensors[0].dim() else None

    def with_batch(self, size: int) -> Example:
        """The same call with ``size`` samples, repeated as needed; only where ``batch_size`` is known."""
        assert self.batch_size, "the number of samples is not known"

        def resize(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value[torch.arange(size, device=value.device) % value.shape[0]]

        return self.map(resize)

    def map(self, change: Any) -> Example:
        """Apply ``change`` to every leaf of the arguments."""
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs))
        return Example(args, kwargs)

    def like(self, model: nn.Module) -> Example:
        """The same call on the device of ``model``, with tensors that have no gaps in memory.

        ``torch.export`` takes the strides of a slice, such as ``tokens[:, :-1]``, for those of every call.
        """
        reference = next((p for p in model.parameters()), None)

        def like(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return (value if reference is None else value.to(reference.device)).contiguous()

        return self.map(like)

    def run(self, model: nn.Module) -> Any:
        """Call ``model`` with the arguments, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def keep_example(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember at most two samples of a call of ``model``, on the CPU.

    Calls with several tensors are kept whole, because it cannot be told which dimension counts samples.
    """
    example = Example(args, kwargs)
    if example.batch_size and example.batch_size > _KEPT_SAMPLES:
        example = example.with_batch(_KEPT_SAMPLES)
    if example.tensors:
        kept = example.map(lambda v: v.detach().cpu().clone() if isinstance(v, Tensor) else v)
        model.__dict__[_ATTRIBUTE] = tuple(kept)  # past __setattr__: neither a buffer nor a child


def kept_example(model: nn.Module) -> Example | None:
    """What :func:`keep_example` remembered for ``model``, on the model's device."""
    kept = model.__dict__.get(_ATTRIBUTE)
    return None if kept is None else Example(*kept).like(model)


def forget_example(model: nn.Module) -> None:
    """Drop what ``model`` and its children remember."""
    for module in model.modules():
        module.__dict__.pop(_ATTRIBUTE, None)
