"""Compare an export with its original on an example input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from esper.errors import ExportError
from esper.kasmina.example import Example

__all__ = ["check_batches", "difference", "outputs_of", "tolerance"]

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """All tensors that ``model`` returns for the example, on the CPU.

    Raises:
        ExportError: It returns none, so nothing could be compared.
    """
    found = [leaf for leaf in pytree.tree_leaves(_compared(example.run(model))) if isinstance(leaf, Tensor)]
    if not found:
        raise ExportError(f"{type(model).__name__} returned no tensor for the example input to compare")
    return [tensor.detach().cpu() for tensor in found]


def _compared(output: Any) -> Any:
    """What of ``output`` has to stay equal: of a model output of transformers its own tensors.

    Its hidden states and its cache list the blocks, of which an export that folds one has more.
    """
    if not (isinstance(output, Mapping) and hasattr(output, "to_tuple")):
        return output
    return [value for value in output.values() if isinstance(value, Tensor)] or output


def tolerance(expected: list[Tensor]) -> float:
    """Largest difference to accept: 1e-5 of outputs up to one, in proportion above, wider for half precision."""
    scale = max((float(t.abs().max()) for t in expected if t.is_floating_point() and t.numel()), default=1.0)
    unit = max((_TOLERANCE.get(t.dtype, 0.0) for t in expected), default=1e-5)
    return unit * max(1.0, scale)


def difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Largest absolute difference; infinite when shapes, types or NaNs differ."""
    if len(expected) != len(actual):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.numel() == 0 or torch.equal(a, b):
            continue
        if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
            return float("inf")
        gap = (a.double() - b.double()).abs().nan_to_num(0.0, posinf=0.0)
        worst = max(worst, float(gap.max()))
    return worst


def check_batches(original: Any, exported: nn.Module, example: Example) -> float:
    """Compare on the example and, where the number of samples is known, on batches of other sizes.

    Args:
        original: Called with an example; returns the expected tensors.
        exported: The export.
        example: Whose batch is varied.

    Returns:
        The largest difference.

    Raises:
        ExportError: A difference above the tolerance, or the export fails where the original does not.
    """
    examples = [example]
    if size := example.batch_size:
        examples += [example.with_batch(n) for n in (1, size + 1) if n != size]
    worst = 0.0
    for number, varied in enumerate(examples):
        try:
            expected = original(varied)
        except Exception:
            if number == 0:
                raise
            continue  # the host itself takes batches of its own size only
        samples = f" ({varied.batch_size} samples)" if varied.batch_size else ""
        try:
            actual = outputs_of(exported, varied)
        except Exception as error:  # whatever a wrongly folded model raises
            raise ExportError(
                f"the export fails on the example{samples}: {type(error).__name__}: {error}"
            ) from error
        gap = difference(expected, actual)
        if gap > tolerance(expected):
            raise ExportError(
                f"outputs differ from the model's by {gap:.3g}{samples}; allowed is {tolerance(expected):.3g}"
            )
        worst = max(worst, gap)
    return worst
