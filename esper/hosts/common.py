"""What the reference hosts share: activations by name and checks of their configs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import ConfigError

__all__ = ["ACTIVATIONS", "activation_by_name", "nearest_width", "num_parameters", "require_positive"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": Tensor.tanh,
}


def activation_by_name(name: str) -> Callable[[Tensor], Tensor]:
    """Return the elementwise function called ``name``.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}; set the host's `activation`"
        )
    return ACTIVATIONS[name]


def num_parameters(module: nn.Module) -> int:
    """Count the trainable scalars of ``module``; a tied weight counts once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def require_positive(where: str, **values: int | Sequence[int]) -> None:
    """Check that every value, or every member of a sequence, is an integer of at least one.

    Raises:
        ConfigError: Naming ``where``, the field and what it holds.
    """
    for name, value in values.items():
        members = [value] if isinstance(value, int) else list(value)
        if not all(isinstance(member, int) and member >= 1 for member in members):
            raise ConfigError(f"{where}.{name} must hold integers of at least 1, got {value!r}")


def nearest_width(count: Callable[[int], int], target: int) -> int:
    """Return the integer ``w`` >= 1 for which ``count(w)`` is nearest to ``target``.

    Args:
        count: Parameters as a strictly increasing function of the width.
        target: The parameter count wanted; on a tie the smaller width wins.
    """
    high = 1
    while count(high) < target:
        high *= 2
    low = 1
    while low < high:  # the first width that reaches the target
        middle = (low + high) // 2
        if count(middle) < target:
            low = middle + 1
        else:
            high = middle
    if low > 1 and target - count(low - 1) <= count(low) - target:
        return low - 1
    return low
