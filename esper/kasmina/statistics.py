"""Per-layer statistics of one sampled step, computed together for all layers.

Hooks only copy small samples (:func:`esper.kasmina.sampling.sample_rows`: no host synchronisation). At the
end of the step :func:`summarise` turns the samples of all layers into one table on their device in a fixed
number of kernels, and :func:`drain` fetches it with a single copy. (On CUDA the eigenvalue solver
synchronises by itself, so call ``summarise`` where the step ends, not in a hook.)

Legend: L layers, r rows (examples x positions), u units. Samples are scaled to a largest value of 1 and
worked on in float32, eigenvalues in float64 and on few units: a sampled step should cost little more time and
memory than another. Samples that hold NaN or inf are counted in ``error_count``; there the values are read as 0 and
finite ones are clamped to +-1e30, so that every figure stays finite and within the ranges that
``messages.HealthSignal`` demands.
An empty sample, and one that is all zero, give 0 everywhere but in ``dead_neuron_ratio`` and ``dormancy``
of an all-zero sample, which are 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "LayerSample",
    "LayerStatistics",
    "activation_variance",
    "dead_unit_ratio",
    "dormancy",
    "drain",
    "effective_rank",
    "gradient_norm",
    "gradient_snr",
    "mean_absolute_correlation",
    "nonfinite_count",
    "rank_fraction",
    "summarise",
    "tensor_norm",
    "update_ratio",
]

DORMANT_BELOW = 0.1
"""A unit is dormant when its mean |activation| is at most this share of its layer's mean (ReDo's tau)."""
MAX_GRAM_UNITS = 32
"""Correlation and rank look at this many units at most: the eigenvalues cost the cube of it."""
MAX_RATIO = 1e6
"""Ceiling of the signal-to-noise ratio, whose denominator may vanish."""
_LARGEST = 1e30
_LAYERS_AT_ONCE = 32  # bounds the memory of the padded batch on models with hundreds of layers


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What the hooks collected for one layer on one step; leave out (None, empty) what there is none of.

    Attributes:
        activation: ``[r, u]`` sample of the layer's units after their non-linearity (the consumer's input).
        output_gradient: ``[r, u]`` sample of the loss gradient at the layer's output.
        gradients: the full gradients of the layer's parameters, any shapes; or their norms.
        weight_before: ``[m]`` sample of the weight before the optimizer's step.
        weight_after: ``[m]`` the same elements after it.
    """

    activation: Tensor
    output_gradient: Tensor | None = None
    gradients: tuple[Tensor, ...] = ()
    weight_before: Tensor | None = None
    weight_after: Tensor | None = None


class LayerStatistics(NamedTuple):
    """The figures of one layer; fields are named as in ``messages.HealthSignal`` where they appear there."""

    activation_variance: float
    dead_neuron_ratio: float
    dormancy: float
    avg_correlation: float
    effective_rank: float
    rank_fraction: float
    gradient_norm: float
    gradient_snr: float
    update_ratio: float
    error_count: int


class _Batch(NamedTuple):
    """Samples of several layers padded with zeros, and what of them is real."""

    x: Tensor  # [L, r, u] float32, finite, in [-1, 1]
    scale: Tensor  # [L] float64, what x was divided by
    rows: Tensor  # [L, 1], at least 1
    units: Tensor  # [L, 1], at least 1
    row_mask: Tensor | None  # [L, r, 1], 1.0 or 0.0; None when no layer has rows of padding
    unit_mask: Tensor  # [L, u]
    errors: Tensor  # [L] number of non-finite elements

    def part(self, begin: int, end: int) -> _Batch:
        """Some of the layers."""
        x, *others = (None if field is None else field[begin:end] for field in self)
        return _Batch(x, *others)  # type: ignore[arg-type]  # the row mask alone may be None


def summarise(samples: Sequence[LayerSample]) -> Tensor:
    """Compute all statistics of all layers.

    Args:
        samples: one a layer. Layers on several devices are gathered on the first one's.

    Returns:
        float64 ``[L, 10]``, columns in the order of :class:`LayerStatistics`; not yet copied to the host.
    """
    if not samples:
        return torch.empty(0, len(LayerStatistics._fields), dtype=torch.float64)
    chunks = [samples[i : i + _LAYERS_AT_ONCE] for i in range(0, len(samples), _LAYERS_AT_ONCE)]
    return torch.cat([_summarise(chunk) for chunk in chunks])


def drain(table: Tensor) -> list[LayerStatistics]:
    """Copy a table of :func:`summarise` to the host, once, and name its columns."""
    return [LayerStatistics(*row)._replace(error_count=int(row[-1])) for row in table.tolist()]


def _summarise(samples: Sequence[LayerSample]) -> Tensor:
    device = _device_for(samples[0].activation.device)
    empty = torch.empty(0, 0, device=device)
    both = [s.activation for s in samples]
    both += [empty if s.output_gradient is None else s.output_gradient.to(device) for s in samples]
    padded = _pad(both)  # at once, as it takes many small operations and either is small
    activations, gradients = padded.part(0, len(samples)), padded.part(len(samples), len(both))
    norms = _norms([s.gradients for s in samples], device)
    ratios = _update_ratios([(s.weight_before, s.weight_after) for s in samples], device)
    mean, centred = _centre(activations)
    variance = _variance(activations, centred)
    chosen, deviation = _gram_units(activations, mean, centred, variance)
    magnitude = activations.x.abs_()  # the last use of the signs was the line before
    gram = _gram(chosen)
    rank = _effective_rank(gram)
    errors = activations.errors + gradients.errors + (~norms.isfinite()) + (~ratios.isfinite())
    columns = [
        _activation_variance(activations, variance),
        _dead_unit_ratio(activations, magnitude),
        _dormancy(activations, magnitude),
        _correlation(activations, gram, deviation),
        rank,
        _rank_fraction(activations, rank),
        _finite(norms),
        _gradient_snr(gradients),
        _finite(ratios),
        errors,
    ]
    return torch.stack([column.double() for column in columns], dim=1)


def activation_variance(x: Tensor) -> Tensor:
    """Mean over units of the variance over rows; ``x [r, u]`` -> scalar >= 0 (0 for a single row)."""
    batch = _pad([x])
    return _activation_variance(batch, _variance(batch, _centre(batch)[1]))[0]


def dead_unit_ratio(x: Tensor) -> Tensor:
    """Share of units that are zero on every sampled row; ``x [r, u]`` after the non-linearity -> [0, 1].

    "Zero" allows 1e-7 of the layer's largest value. A unit that fires on fewer rows than one in r may count.
    """
    batch = _pad([x])
    return _dead_unit_ratio(batch, batch.x.abs())[0]


def dormancy(x: Tensor) -> Tensor:
    """Share of units whose mean \\|activation\\| is at most .1 of the layer's mean; ``x [r, u]`` -> [0, 1].

    Source: ReDo (Sokar et al., 2023, eq. 1), with tau = .1 as in GROWTH.md, section 9.
    """
    batch = _pad([x])
    return _dormancy(batch, batch.x.abs())[0]


def mean_absolute_correlation(x: Tensor) -> Tensor:
    """Mean |Pearson correlation| of pairs of different units; ``x [r, u]`` -> [0, 1].

    Constant units are left out; fewer than two others, or a single row, give 0. At most 32 units count.
    """
    return _single(x, _correlation)


def effective_rank(x: Tensor) -> Tensor:
    """exp(-sum p log p), p = s / sum s, s the singular values of the centred ``x [r, u]``; 0 if constant.

    Between 0 and min(r - 1, u, 32): units beyond 32 are sampled, so divide by that bound
    (:func:`rank_fraction`) before comparing layers. Source: Roy & Vetterli, 2007.
    """
    return _single(x, lambda batch, gram, deviation: _effective_rank(gram))


def rank_fraction(x: Tensor) -> Tensor:
    """Effective rank over its largest possible value min(r - 1, u, 32); ``x [r, u]`` -> [0, 1]."""
    return _single(x, lambda batch, gram, deviation: _rank_fraction(batch, _effective_rank(gram)))


def gradient_norm(*gradients: Tensor) -> Tensor:
    """Euclidean norm of all tensors together, as float64; NaN or inf if an element is, or on overflow."""
    return _norms([gradients], gradients[0].device)[0]


def gradient_snr(gradient: Tensor) -> Tensor:
    """|mean over rows| / its standard error, of the output gradient ``[r, u]``; pure noise gives about 1.

    The standard error is sqrt(sum of unit variances / r), so the ratio of a given signal grows with sqrt(r).
    Zero gradients and a single row (no estimate of the noise) give 0; no noise at all gives 1e6.
    """
    return _gradient_snr(_pad([gradient]))[0]


def update_ratio(before: Tensor, after: Tensor) -> Tensor:
    """|after - before| / max(|before|, |after|) of a weight around one step; in [0, 2], 0 if both are zero.

    The larger norm stands below so that the first step of zero-initialised weights gives 1, not infinity.
    Not finite -> 0 (:func:`summarise` counts it as an error).
    """
    return _finite(_update_ratios([(before, after)], before.device)[0])


def nonfinite_count(x: Tensor) -> Tensor:
    """Number of NaN and infinite elements."""
    return (~x.detach().isfinite()).sum()


def _pad(tensors: Sequence[Tensor]) -> _Batch:
    # MPS has neither float64 nor eigvalsh: the small samples are finished on the CPU there.
    device = _device_for(tensors[0].device)
    rows = [t.shape[0] if t.numel() else 0 for t in tensors]
    units = [t.shape[1] if t.numel() else 0 for t in tensors]
    num_rows, num_units = max(1, *rows), max(1, *units)
    x = torch.zeros(len(tensors), num_rows, num_units, device=device)
    for layer, tensor in enumerate(tensors):
        if tensor.numel():
            x[layer, : rows[layer], : units[layer]] = _in_range(tensor.detach())
    scale = x.abs().amax((1, 2))  # of the same speed as a sum; vector_norm takes ten times as long
    errors = torch.zeros(len(tensors), dtype=torch.long, device=device)
    if not bool((scale <= _LARGEST).all()):  # NaN is not either; a clean step saves these passes
        errors = (~x.isfinite()).sum((1, 2))
        x.nan_to_num_(0.0, 0.0, 0.0).clamp_(-_LARGEST, _LARGEST)
        scale = x.abs().amax((1, 2))
    scale = torch.where(scale > 0, scale, 1.0)
    sizes = torch.tensor([rows, units], device=device)[:, :, None]
    return _Batch(
        x=x.div_(scale[:, None, None]),
        scale=scale.double(),
        rows=sizes[0].clamp(min=1),
        units=sizes[1].clamp(min=1),
        row_mask=None
        if min(rows) == num_rows
        else (torch.arange(num_rows, device=device) < sizes[0]).unsqueeze(2).float(),
        unit_mask=torch.arange(num_units, device=device) < sizes[1],
        errors=errors,
    )


def _device_for(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def _in_range(x: Tensor) -> Tensor:
    """Bring finite float64 values into the range of float32, where NaN and inf stay what they are."""
    if x.dtype != torch.float64:
        return x
    return torch.where(x.isfinite(), x.clamp(-_LARGEST, _LARGEST), x)


def _centre(batch: _Batch) -> tuple[Tensor, Tensor]:
    mean = batch.x.sum(1) / batch.rows
    centred = batch.x - mean.unsqueeze(1)
    return mean, centred if batch.row_mask is None else centred.mul_(batch.row_mask)


def _variance(batch: _Batch, centred: Tensor) -> Tensor:
    return centred.square().sum(1) / batch.rows


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0, 0.0, 0.0)


def _share(condition: Tensor, batch: _Batch) -> Tensor:
    return (condition & batch.unit_mask).sum(1) / batch.units[:, 0]


def _activation_variance(batch: _Batch, variance: Tensor) -> Tensor:
    return batch.scale.square() * variance.sum(1) / batch.units[:, 0]


def _dead_unit_ratio(batch: _Batch, magnitude: Tensor) -> Tensor:
    largest = magnitude.amax(1)
    return _share(largest <= 1e-7 * largest.amax(1, keepdim=True), batch)


def _dormancy(batch: _Batch, magnitude: Tensor) -> Tensor:
    mean = magnitude.sum(1) / batch.rows
    return _share(mean <= DORMANT_BELOW * mean.sum(1, keepdim=True) / batch.units, batch)


def _gram_units(batch: _Batch, mean: Tensor, centred: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Pick <= 32 units of each layer: centred ``[L, r, v]``, standard deviation ``[L, v]``, 0 if constant."""
    # Rounding leaves a constant unit a relative variance near 1e-14; below 1e-11 it counts as constant.
    deviation = torch.where(variance > 1e-11 * (mean.square() + variance), variance, 0.0).sqrt()
    if centred.shape[2] > MAX_GRAM_UNITS:
        index = torch.arange(MAX_GRAM_UNITS, device=centred.device)
        spread = torch.where(batch.units > MAX_GRAM_UNITS, index * batch.units // MAX_GRAM_UNITS, index)
        centred = centred.gather(2, spread.unsqueeze(1).expand(-1, centred.shape[1], -1))
        deviation = deviation.gather(1, spread)
    return centred * (deviation > 0).unsqueeze(1), deviation


def _gram(chosen: Tensor) -> Tensor:
    """``[L, r, v]`` -> ``[L, v, v]`` float64: rounding shows in small singular values by its square root."""
    exact = chosen.double()
    return exact.transpose(1, 2) @ exact


def _correlation(batch: _Batch, gram: Tensor, deviation: Tensor) -> Tensor:
    inverse = torch.where(deviation > 0, 1.0 / deviation, 0.0).double()
    pairs = (gram * inverse[:, :, None] * inverse[:, None, :]).abs_().sum((1, 2)) / batch.rows[:, 0]
    count = (deviation > 0).sum(1)
    return ((pairs - count) / (count * (count - 1)).clamp(min=1)).clamp(0.0, 1.0)


def _effective_rank(gram: Tensor) -> Tensor:
    singular = torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt()
    total = singular.sum(1, keepdim=True)
    p = singular / total.clamp(min=1e-300)
    return torch.where(total[:, 0] > 0, (-torch.xlogy(p, p).sum(1)).exp(), 0.0)


def _rank_fraction(batch: _Batch, rank: Tensor) -> Tensor:
    possible = torch.minimum(batch.rows[:, 0] - 1, batch.units[:, 0].clamp(max=MAX_GRAM_UNITS))
    return (rank / possible.clamp(min=1)).clamp(0.0, 1.0)


def _gradient_snr(batch: _Batch) -> Tensor:
    mean, centred = _centre(batch)
    signal = mean.square().sum(1).sqrt()
    rows = batch.rows[:, 0]
    noise = (centred.square().sum((1, 2)) / (rows * (rows - 1)).clamp(min=1)).sqrt()
    ratio = (signal / noise.clamp(min=1e-30)).clamp(max=MAX_RATIO)
    return torch.where((rows > 1) & (signal > 0), ratio, 0.0)


def _norms(tensors: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """Euclidean norm of each group of tensors together, ``[L]`` float64; 0 for an empty group."""
    device = _device_for(device)
    flat = [tensor_norm(tensor).to(device) for group in tensors for tensor in group]
    result = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    if flat:
        owner = torch.tensor([i for i, group in enumerate(tensors) for _ in group], device=device)
        result.index_add_(0, owner, torch.stack(flat).double().square())
    return result.sqrt()


def _update_ratios(pairs: Sequence[tuple[Tensor | None, Tensor | None]], device: torch.device) -> Tensor:
    """|after - before| / max(|before|, |after|) of each pair, ``[L]`` float64; 0 where one is missing."""
    before, after = (_stack_flat([pair[side] for pair in pairs], device) for side in (0, 1))
    change, old, new = (torch.linalg.vector_norm(t, dim=1).double() for t in (after - before, before, after))
    larger = torch.maximum(old, new)
    return change / torch.where(larger > 0, larger, 1.0) + 0.0 * larger  # NaN and inf show in either term


def _stack_flat(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    longest = max(1, *(0 if t is None else t.numel() for t in tensors))
    rows = torch.zeros(len(tensors), longest, device=_device_for(device))
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor is not None:
            row[: tensor.numel()] = _in_range(tensor.detach()).flatten()
    return rows


def tensor_norm(x: Tensor) -> Tensor:
    """Euclidean norm of one tensor in float32 or better; of a single number its absolute value as it is."""
    x = x.detach()
    if x.dim() == 0:
        return x.abs()
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32))


def _single(x: Tensor, statistic: Callable[[_Batch, Tensor, Tensor], Tensor]) -> Tensor:
    batch = _pad([x])
    mean, centred = _centre(batch)
    chosen, deviation = _gram_units(batch, mean, centred, _variance(batch, centred))
    return statistic(batch, _gram(chosen), deviation)[0]
