"""Layers that compute what ``nn.Linear`` does, though they are none: of transformers and of torch-geometric.

They are known by the name of their class, so that neither library is imported.
"""

from __future__ import annotations

from torch import Tensor, nn

from esper.kasmina.layer import base_class

__all__ = ["as_weight_of", "features"]

_TRANSPOSED = ("transformers", "Conv1D")
"""Holds its weight as [inputs, outputs]."""
_PLAIN = ("torch_geometric", "Linear")


def features(layer: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a layer that maps the last dimension by a matrix; None of any other.

    Args:
        layer: ``nn.Linear`` and what inherits from it, transformers' ``Conv1D``, torch-geometric's ``Linear``.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    kind = _kind(layer)
    weight = layer._parameters.get("weight")
    if kind not in (_TRANSPOSED, _PLAIN) or weight is None or weight.dim() != 2:
        return None
    first, second = weight.shape
    return (first, second) if kind == _TRANSPOSED else (second, first)


def as_weight_of(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Lay ``matrix`` [outputs, inputs] out as ``layer`` keeps its weight."""
    return matrix.T if _kind(layer) == _TRANSPOSED else matrix


def _kind(layer: nn.Module) -> tuple[str, str]:
    cls = base_class(layer)
    return cls.__module__.split(".")[0], cls.__name__
