"""torch's fused path through transformer layers, on which a seed inside them would not be heard.

In evaluation without gradients ``nn.TransformerEncoderLayer`` hands its weights to one kernel and calls none
of its children; ``nn.TransformerEncoder`` packs padded batches into nested tensors for it. The layer leaves
the path by itself when any module in it has a forward hook: a seed inside brings one. What the encoder
packs only the fused path can read, so an encoder with a seed inside a layer does not pack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from esper.kasmina.layer import SEEDS

__all__ = ["close_after", "fused_layer_around", "open_for", "without_fast_path"]

_PACKED = "_esper_packs_padding"
"""Attribute of an encoder that packed padded batches before a seed came."""


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let torch's transformer layers call their children in evaluation, too, while the block runs."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def fused_layer_around(model: nn.Module, name: str) -> nn.Module | None:
    """The ``nn.TransformerEncoderLayer`` inside which layer ``name`` stands; None where it stands in none."""
    found = [module for module in _around(model, name) if isinstance(module, nn.TransformerEncoderLayer)]
    return found[-1] if found else None


def open_for(model: nn.Module, name: str, seed: nn.Module) -> None:
    """Make sure that ``seed``, at layer ``name`` of ``model``, is called in evaluation.

    Args:
        model: The host.
        name: Of the layer at whose output the seed stands.
        seed: The seed; carries the hook, which goes where it goes.
    """
    if fused_layer_around(model, name) is None:
        return
    seed.register_forward_pre_hook(_nothing)
    for module in _around(model, name):
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            module.__dict__[_PACKED] = True


def close_after(model: nn.Module, name: str) -> None:
    """Undo :func:`open_for` after a seed at ``name`` went, where it was the last one inside."""
    for module in _around(model, name):
        if _PACKED in module.__dict__ and not any(
            SEEDS in path.split(".") for path, _ in module.named_modules()
        ):
            del module.__dict__[_PACKED]
            module.use_nested_tensor = True  # type: ignore[assignment]


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold layer ``name``, the outermost first; not the layer itself."""
    yield model
    module = model
    for part in name.split(".")[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
        yield module


def _nothing(module: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook that only has to be there."""
