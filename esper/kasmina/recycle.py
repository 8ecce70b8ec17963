"""Recycle dormant units: fresh fan-in, zero fan-out, fresh optimizer moments, (nearly) the same function.

After ReDo (Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep RL", algorithm 1), with two differences:
the mean output of a recycled unit is folded into its consumers' biases, so the function moves only by how far
the unit's output strays from its mean; and fan-in is drawn from He's distribution by an explicit generator.

Legend: n rows (examples, or examples x positions), u units of the producer, m units to recycle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import GrowthError
from esper.kasmina.statistics import DORMANT_BELOW

__all__ = ["Consumer", "RecycleReport", "change_bound", "dormant_units", "recycle"]

Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True, slots=True)
class Consumer:
    """A layer that reads exactly the producer's units, with nothing that mixes units in between.

    Every reader of the units must be listed, a seed's branch included, or the function changes there.

    Attributes:
        layer: Linear, or Conv2d with ``groups == 1``.
        columns_per_unit: consecutive input columns that belong to one unit: the number of positions when a
            convolution's output is flattened into a Linear layer, else 1.
    """

    layer: Layer
    columns_per_unit: int = 1


@dataclass(frozen=True, slots=True)
class RecycleReport:
    """What was done.

    Attributes:
        units: indices recycled.
        max_change: bound on the change of any consumer's output (see :func:`change_bound`).
        num_states: optimizer state tensors in which slices were reset.
    """

    units: tuple[int, ...]
    max_change: float
    num_states: int


def dormant_units(activations: Tensor, threshold: float = DORMANT_BELOW) -> Tensor:
    """Return the indices of units whose mean |activation| is at most ``threshold`` x their layer's mean.

    Args:
        activations: ``[n, u]`` after the non-linearity. Of a layer that is all zero every unit is dormant.
        threshold: ReDo's tau.

    Returns:
        int64 ``[m]``, ascending.

    Raises:
        GrowthError: not two-dimensional, empty or not finite.
    """
    _check_activations(activations, None)
    mean = activations.detach().double().abs().mean(0)
    return torch.nonzero(mean <= threshold * mean.mean()).flatten()


def change_bound(consumers: Sequence[Consumer], units: Sequence[int] | Tensor, activations: Tensor) -> float:
    """Bound the change of any consumer output from recycling ``units``, over the range of ``activations``.

    With the mean a_j folded into the bias the change is sum_j W[o, j] (a_j - mean_j) at most
    sum_j |W[o, j]| max |a_j - mean_j|. Where the mean cannot be folded exactly (no bias, or a convolution
    that pads with zeros) the largest |a_j| counts if it is larger. Data beyond that range can exceed it.

    Args:
        consumers: as for :func:`recycle`.
        units: indices to recycle.
        activations: ``[n, u]`` of the producer's units as the consumers see them.

    Returns:
        the bound, in units of the consumers' outputs; 0 without consumers or units.
    """
    index = _index(units, activations.shape[1])
    if index.numel() == 0:
        return 0.0
    sample = activations.detach().double()[:, index.to(activations.device)]
    deviation = (sample - sample.mean(0)).abs().amax(0)
    largest = torch.maximum(deviation, sample.abs().amax(0))
    bound = 0.0
    for consumer in consumers:
        reach = _fan_out(consumer, index).detach().abs().double().sum(2)  # [outputs, m]
        spread = deviation if _folds_exactly(consumer.layer) else largest
        bound = max(bound, float((reach * spread.to(reach.device)).sum(1).max()))
    return bound


@torch.no_grad()
def recycle(
    producer: Layer,
    consumers: Sequence[Consumer],
    units: Sequence[int] | Tensor,
    activations: Tensor,
    *,
    generator: torch.Generator,
    optimizers: Sequence[Optimizer] = (),
    tolerance: float = math.inf,
) -> RecycleReport:
    """Re-initialise units of a layer; call it between optimizer steps only.

    Fan-in rows are drawn N(0, 2 / fan-in), their biases set to 0. The consumers' columns are set to 0, after
    the units' mean contribution is added to the consumers' biases. Optimizer state of these slices is made
    as for a new parameter; step counts stay, as they are shared by the whole parameter, and so do factored
    moments (Adafactor), which have no such slices. Adam's second moments
    become the mean of the other slices'. Running statistics of a normalisation in between are left alone: its
    channels are independent, and the recycled ones are read by nobody yet.

    Args:
        producer: Linear or Conv2d whose output units are recycled.
        consumers: all its readers.
        units: indices to recycle; none at all is allowed and does nothing.
        activations: ``[n, u]`` sample of the producer's units as the consumers see them.
        generator: source of the new fan-in.
        optimizers: their state is matched by parameter identity.
        tolerance: refuse, changing nothing, when :func:`change_bound` exceeds it.

    Raises:
        GrowthError: layers, indices, activations or tolerance do not fit; nothing has been changed then.
    """
    index = _validate(producer, consumers, units, activations)
    bound = change_bound(consumers, index, activations)
    if not bound <= tolerance:
        raise GrowthError(
            f"expected recycling {index.numel()} units of {producer} to change its consumers' outputs by at "
            f"most {tolerance:g}, but the bound is {bound:g}; recycle fewer units or raise the tolerance"
        )
    if index.numel() == 0:
        return RecycleReport((), 0.0, 0)
    mean = activations.double()[:, index.to(activations.device)].mean(0)
    for consumer in consumers:
        weight, bias = consumer.layer.weight, consumer.layer.bias
        if bias is not None:
            total = _fan_out(consumer, index).double().sum(2)
            bias.add_((total @ mean.to(total.device)).to(bias))
        weight.index_fill_(1, _columns(consumer, index).to(weight.device), 0.0)
    weight = producer.weight
    shape = (index.numel(), *weight.shape[1:])
    fresh = torch.randn(shape, generator=generator, device=generator.device)
    rows = index.to(weight.device)
    weight.index_copy_(0, rows, (fresh * math.sqrt(2.0 / weight[0].numel())).to(weight))
    num_states = _reset_state(optimizers, weight, 0, rows)
    if producer.bias is not None:
        producer.bias.index_fill_(0, rows, 0.0)
        num_states += _reset_state(optimizers, producer.bias, 0, rows)
    for consumer in consumers:
        columns = _columns(consumer, index).to(consumer.layer.weight.device)
        num_states += _reset_state(optimizers, consumer.layer.weight, 1, columns)
    return RecycleReport(tuple(index.tolist()), bound, num_states)


def _validate(
    producer: Layer, consumers: Sequence[Consumer], units: Sequence[int] | Tensor, activations: Tensor
) -> Tensor:
    """Check everything before the first write, and return the indices ``[m]`` on the CPU."""
    layers = [producer, *(consumer.layer for consumer in consumers)]
    for layer in layers:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise GrowthError(
                f"expected Linear or Conv2d layers to recycle between, got {layer}; leave it out"
            )
        if "weight" not in layer._parameters:
            raise GrowthError(
                f"expected {layer} to own its weight, but it is computed (a parametrization); recycling "
                "would write to a temporary tensor; leave this layer out or remove the parametrization"
            )
    if len({id(layer.weight) for layer in layers}) < len(layers):
        raise GrowthError(
            f"expected producer and consumers with weights of their own, but two of {layers} share one; "
            "units of tied layers cannot be recycled"
        )
    num_units = producer.weight.shape[0]
    for consumer in consumers:
        width = consumer.layer.weight.shape[1]
        grouped = isinstance(consumer.layer, nn.Conv2d) and consumer.layer.groups != 1
        blocked = isinstance(consumer.layer, nn.Conv2d) and consumer.columns_per_unit != 1
        if grouped or blocked or width != num_units * consumer.columns_per_unit:
            raise GrowthError(
                f"expected a consumer that reads {num_units} units x {consumer.columns_per_unit} columns (a "
                f"Conv2d: one channel a unit, groups=1), got {consumer.layer} with weight "
                f"{tuple(consumer.layer.weight.shape)} behind {producer}"
            )
    _check_activations(activations, num_units)
    return _index(units, num_units)


def _check_activations(activations: Tensor, num_units: int | None) -> None:
    fits = (
        activations.ndim == 2
        and activations.numel() > 0
        and activations.shape[1] == (num_units or activations.shape[1])
    )
    if not fits or not bool(activations.isfinite().all()):
        raise GrowthError(
            f"expected finite activations [n, {num_units or 'units'}], n >= 1, got shape "
            f"{tuple(activations.shape)}{' with NaN or inf' if fits else ''}; sample the consumer's input"
        )


def _index(units: Sequence[int] | Tensor, num_units: int) -> Tensor:
    index = torch.as_tensor(units, dtype=torch.long, device="cpu").flatten()
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= num_units):
        raise GrowthError(f"expected unit indices in [0, {num_units - 1}], got {index.tolist()}")
    if index.unique().numel() != index.numel():
        raise GrowthError(f"expected each unit once, got {index.tolist()}; remove the duplicates")
    return index


def _columns(consumer: Consumer, index: Tensor) -> Tensor:
    """Input columns (dimension 1 of the weight) of the units, ``[m * columns_per_unit]``."""
    block = torch.arange(consumer.columns_per_unit)
    return (index[:, None] * consumer.columns_per_unit + block).flatten()


def _fan_out(consumer: Consumer, index: Tensor) -> Tensor:
    """Weights from the units, ``[outputs, m, columns or taps]``."""
    weight = consumer.layer.weight
    chosen = weight.index_select(1, _columns(consumer, index).to(weight.device))
    return chosen.reshape(weight.shape[0], index.numel(), -1)


def _folds_exactly(layer: Layer) -> bool:
    if layer.bias is None:
        return False
    if isinstance(layer, nn.Linear) or layer.padding_mode != "zeros":
        return True
    return layer.padding == "valid" or (not isinstance(layer.padding, str) and not any(layer.padding))


# Value of a state tensor on a parameter that was just added, where that is not zero.
_FRESH_STATE: dict[str, Callable[[Tensor, dict[str, Any]], Tensor | float]] = {
    "ax": lambda parameter, group: parameter,  # ASGD averages the parameter itself
    "step_size": lambda parameter, group: float(group["lr"]),  # Rprop
    "sum": lambda parameter, group: float(group.get("initial_accumulator_value", 0.0)),  # Adagrad
}


# Adam's second moments start at zero only together with a step count of zero, which corrects their bias. Here
# the count is shared by the whole parameter and stays, so zeros would make the first hundred or so updates of
# the fresh units up to 6.5 times too large (beta2 = .999; on shifting tasks at a rate of .01 that cost more than
# recycling gains: 69.7 % against 74.3 % without it, and 80.2 % with this start; experiments/shift).
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def _typical(state: Tensor, dim: int, index: Tensor) -> float:
    """Mean of a state tensor over the slices that stay; over all of them when none does."""
    stays = torch.ones(state.shape[dim], dtype=torch.bool, device=state.device)
    stays[index.to(state.device)] = False
    kept = state.index_select(dim, stays.nonzero().flatten())
    return float((kept if kept.numel() else state).mean())


def _reset_state(optimizers: Sequence[Optimizer], parameter: Tensor, dim: int, index: Tensor) -> int:
    """Reset slices of every state tensor that has the parameter's shape; return how many tensors."""
    count = 0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if not any(member is parameter for member in group["params"]):
                continue
            for name, state in optimizer.state.get(parameter, {}).items():
                if not isinstance(state, Tensor) or state.shape != parameter.shape:
                    continue
                if name in _SECOND_MOMENTS:
                    value: Tensor | float = _typical(state, dim, index)
                else:
                    value = _FRESH_STATE[name](parameter, group) if name in _FRESH_STATE else 0.0
                if isinstance(value, Tensor):
                    state.index_copy_(dim, index, value.index_select(dim, index).to(state))
                else:
                    state.index_fill_(dim, index, value)
                count += 1
    return count
