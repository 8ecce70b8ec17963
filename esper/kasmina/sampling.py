"""Deterministic subsampling of activations, gradients, patches and weights.

Nothing here draws random numbers: a probe must not move the run's random state. Strides are made
coprime with the period of the layout they walk over, so that a sample of a sequence or an image does not
always land on the same token or the same column.

Legend: N examples, P positions of one example (T of a sequence, H*W of an image), C channels or units,
n rows = sampled examples x sampled positions, k a kernel's height or width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, gcd, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import GrowthError

__all__ = [
    "RowPlan",
    "bypass_patches",
    "coprime_stride",
    "plan_rows",
    "sample_elements",
    "sample_rows",
    "unfold_patches",
]


def coprime_stride(total: int, limit: int, period: int) -> int:
    """Return the smallest stride that keeps at most ``limit`` of ``total`` and is coprime with ``period``."""
    if limit < 1:
        raise GrowthError(f"expected a limit of at least 1 element to sample, got {limit}; raise the limit")
    stride = max(1, ceil(total / limit))
    while stride > 1 and gcd(stride, period) != 1:
        stride += 1
    return stride


def sample_rows(
    x: Tensor, *, channels_first: bool = False, max_rows: int = 128, max_units: int = 128
) -> Tensor:
    """Copy a strided sample of rows and units out of an activation or a gradient.

    Args:
        x: ``[*, C]``, or ``[N, C, *]`` with ``channels_first`` (the output of a convolution).
        channels_first: whether units stand in dimension 1 instead of the last.
        max_rows: cap on rows (examples x positions).
        max_units: cap on units.

    Returns:
        ``[n, c]`` with n <= max_rows, c <= max_units, detached, in the dtype and on the device of ``x``.
        It owns its memory: the activation is not kept alive, and an in-place ReLU cannot change it.
    """
    x = x.detach()
    if x.ndim < (2 if channels_first else 1):
        raise GrowthError(
            f"expected an activation {'[N, C, *]' if channels_first else '[*, C]'} to sample, got shape "
            f"{tuple(x.shape)}; pass the layer's whole input or output"
        )
    units = x.shape[1 if channels_first else -1]
    total = x.numel() // units if units else 0
    step = max(1, ceil(units / max_units))
    period = max(1, prod(x.shape[2:] if channels_first else x.shape[1:-1]))
    stride = coprime_stride(total, max_rows, period)
    if not channels_first:
        return x.reshape(total, units)[::stride, ::step].clone()
    # Indexing reads only the sampled positions; moving the channels last would copy the whole tensor.
    index = torch.arange(0, total, stride, device=x.device)
    return x.reshape(x.shape[0], units, period)[:, ::step][index // period, :, index % period]


def sample_elements(weight: Tensor, max_elements: int = 1024) -> Tensor:
    """Copy at most ``max_elements`` strided elements of a weight, ``[m]``."""
    flat = weight.detach().reshape(-1)
    period = weight.shape[-1] if weight.ndim > 1 else 1
    return flat[:: coprime_stride(flat.numel(), max_elements, max(1, period))].clone()


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Which examples and positions become rows, decided once so that inputs and gradients stay aligned.

    Attributes:
        num_examples: N of the batch that the plan is for.
        grid: the target output's positions: ``()`` for ``[N, C]``, ``(T,)`` or ``(H, W)``.
        examples: the examples taken.
        positions: the flat positions taken of each of them; the same for every example.
    """

    num_examples: int
    grid: tuple[int, ...]
    examples: range
    positions: range

    @property
    def rows_per_example(self) -> int:
        """Consecutive rows that belong to one example: the block that a permutation test moves whole."""
        return len(self.positions)

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return len(self.examples) * len(self.positions)

    def rows(self, x: Tensor, *, channels_first: bool = False) -> Tensor:
        """Pick the plan's rows of a tensor on the plan's grid.

        Args:
            x: ``[N, *grid, C]``, or ``[N, C, *grid]`` with ``channels_first``.
            channels_first: whether units stand in dimension 1.

        Returns:
            ``[n, C]``, ordered example by example.
        """
        grid = tuple(x.shape[2:] if channels_first else x.shape[1:-1])
        if x.shape[0] != self.num_examples or grid != self.grid:
            raise GrowthError(
                f"expected {self.num_examples} examples on the grid {self.grid} for this row plan, got shape "
                f"{tuple(x.shape)}; make the plan from the target layer's output of the same batch"
            )
        x = x.detach()
        units = x.shape[1 if channels_first else -1]
        chosen = x[self.examples.start : self.examples.stop : self.examples.step]
        flat = chosen.reshape(len(self.examples), units, -1) if channels_first else None
        positions = slice(self.positions.start, self.positions.stop, self.positions.step)
        if flat is not None:
            return flat[:, :, positions].transpose(1, 2).reshape(-1, units)
        return chosen.reshape(len(self.examples), -1, units)[:, positions].reshape(-1, units)


def plan_rows(num_examples: int, grid: tuple[int, ...] = (), max_rows: int = 1024) -> RowPlan:
    """Choose at most ``max_rows`` rows, as many different examples as possible before more positions.

    Positions of one example are correlated, examples are not: the examples carry the information.
    """
    if num_examples < 1 or min(grid, default=1) < 1:
        raise GrowthError(f"expected at least one example and position, got {num_examples} and grid {grid}")
    total = prod(grid)
    examples = range(0, num_examples, coprime_stride(num_examples, max_rows, 1))
    stride = coprime_stride(total, max(1, max_rows // len(examples)), grid[-1] if grid else 1)
    return RowPlan(num_examples, grid, examples, range(0, total, stride))


def unfold_patches(x: Tensor, conv: nn.Conv2d, max_positions: int | RowPlan = 16) -> Tensor:
    """Return the input patches of a convolution at a sample of its output positions.

    Args:
        x: the convolution's input ``[N, C, H, W]``.
        conv: any stride, padding (and padding mode) or dilation. With ``groups > 1`` a row holds the patch
            over all channels, since a seed may read all of them.
        max_positions: cap on positions of each image; or a plan over the convolution's output grid, whose
            :meth:`RowPlan.rows` picks the aligned rows of the output's gradient.

    Returns:
        ``[n, C*k*k]`` in the order of ``conv.weight.flatten(1)``: for ``groups == 1``
        ``rows @ conv.weight.flatten(1).T + conv.bias`` is the output at those positions.
    """
    grid = output_grid(conv, x)
    if isinstance(max_positions, RowPlan):
        plan = max_positions
    else:
        plan = plan_rows(x.shape[0], grid, max_rows=x.shape[0] * max_positions)
    if plan.grid != grid or plan.num_examples != x.shape[0]:
        raise GrowthError(
            f"expected a row plan for {x.shape[0]} examples on the convolution's output grid {grid}, "
            f"got {plan.num_examples} on {plan.grid}; use bypass_patches when the gradient is a later layer's"
        )
    positions = _positions(plan, x)
    return _patches(x, conv, plan, positions // grid[1], positions % grid[1])


def bypass_patches(
    x: Tensor, source: nn.Conv2d, target: nn.Conv2d, target_input_size: tuple[int, int], plan: RowPlan
) -> Tensor:
    """Return the source convolution's patches centred where the target convolution's outputs are centred.

    A new channel between ``source`` and ``target`` reaches a target output through all the taps of the
    target's kernel, that is through the composed window (5 x 5 for two 3 x 3). A row here holds the patch
    of the *centre tap* only. **Deviation** from an exact score, on purpose: it bounds from below what the
    channel can do, and keeps p at C*k*k where the composed window would have, for 64 channels, more columns
    than there are samples and a noise floor to match. Where pooling or strided layers stand between the two
    convolutions, the centre is scaled by the ratio of the grids (rounded down; half a cell at most, more only
    for unpadded layers in between), and centres outside the source's grid are moved to its border.

    Args:
        x: the source's input ``[N, C, H, W]``.
        source: the convolution whose input the seed reads.
        target: the convolution whose output it adds to.
        target_input_size: height and width of the target's input.
        plan: rows over the *target's* output grid.

    Returns:
        ``[n, C*k*k]``, aligned with ``plan.rows(target_output_gradient, channels_first=True)``.
    """
    source_grid = output_grid(source, x)
    positions = _positions(plan, x)
    centres = []
    for axis, at in enumerate((positions // plan.grid[1], positions % plan.grid[1])):
        stride, dilation, kernel = target.stride[axis], target.dilation[axis], target.kernel_size[axis]
        before = _padding(target)[axis][0]
        centre = at * stride - before + dilation * (kernel - 1) / 2
        scaled = (centre + 0.5) * (source_grid[axis] / target_input_size[axis])
        centres.append(scaled.floor().long().clamp(0, source_grid[axis] - 1))
    return _patches(x, source, plan, centres[0], centres[1])


def output_grid(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Return height and width of the convolution's output for the input ``x [N, C, H, W]``."""
    if x.ndim != 4 or x.shape[1] != conv.in_channels:
        raise GrowthError(
            f"expected an image batch [N, {conv.in_channels}, H, W] for {conv}, got shape {tuple(x.shape)}"
        )
    sizes = [
        (x.shape[2 + a] + sum(_padding(conv)[a]) - conv.dilation[a] * (conv.kernel_size[a] - 1) - 1)
        // conv.stride[a]
        + 1
        for a in range(2)
    ]
    return sizes[0], sizes[1]


def _positions(plan: RowPlan, x: Tensor) -> Tensor:
    return torch.arange(
        plan.positions.start, plan.positions.stop, plan.positions.step, device=x.device, dtype=torch.long
    )


def _padding(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (before, after) padding of height and width; "same" puts an odd remainder after, as torch."""
    if isinstance(conv.padding, str):
        totals = (
            [0, 0]
            if conv.padding == "valid"
            else [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        )
        height, width = ((total // 2, total - total // 2) for total in totals)
        return height, width
    return (conv.padding[0], conv.padding[0]), (conv.padding[1], conv.padding[1])


def _patches(x: Tensor, conv: nn.Conv2d, plan: RowPlan, at_rows: Tensor, at_columns: Tensor) -> Tensor:
    """Gather the patches under the output cells (at_rows, at_columns) ``[m]`` of the plan's examples."""
    chosen = x.detach()[plan.examples.start : plan.examples.stop : plan.examples.step]
    (top, bottom), (left, right) = _padding(conv)
    if top or bottom or left or right:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        chosen = F.pad(chosen, (left, right, top, bottom), mode=mode)
    (kh, kw), (dh, dw) = conv.kernel_size, conv.dilation
    down = at_rows[:, None] * conv.stride[0] + torch.arange(kh, device=x.device) * dh
    across = at_columns[:, None] * conv.stride[1] + torch.arange(kw, device=x.device) * dw
    windows = chosen[:, :, down[:, :, None], across[:, None, :]]  # [N, C, m, kh, kw]
    return windows.transpose(1, 2).reshape(-1, chosen.shape[1] * kh * kw)
