"""The batches of a run in their order, and how the data change on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from esper.errors import ConfigError
from esper.hosts.optim import warmup_cosine
from esper.tamiyo.environment.data import Samples, TaskData, load_task
from esper.tamiyo.environment.specs import HostSpec, Shift, derived_seed

__all__ = ["Batch", "Stream", "make_optimizer", "rate_factors"]

_WARMUP = 0.05


class Batch:
    """The loss of a network on some samples, for measurements between steps."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
    ) -> None:
        self._model, self._loss, self._x, self._y = model, loss, x, y

    @property
    def num_samples(self) -> int:
        """Samples in the batch."""
        return len(self._x)

    def __call__(self) -> Tensor:
        """The mean loss."""
        return self._loss(self._model(self._x), self._y)


class Stream:
    """Every batch of one run.

    All shifts and the order are drawn from (spec, repeat), so whatever is done to the network, it sees the same
    batches.

    Args:
        spec: The run.
        repeat: Another repeat has another order; the shifts are the spec's own.
    """

    def __init__(self, spec: HostSpec, repeat: int = 0) -> None:
        data = load_task(spec.task)
        self.phases = _phases(data, spec)
        self._begins = (0, *(() if spec.shift is None else spec.shift.at))
        self._order = _order(len(data.train), spec, repeat)

    def phase(self, step: int) -> TaskData:
        """The data as they are at optimizer step ``step``, counted from 0."""
        index = 0
        while index + 1 < len(self._begins) and step >= self._begins[index + 1]:
            index += 1
        return self.phases[index]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of optimizer step ``step``, counted from 0."""
        data = self.phases[0] if len(self.phases) == 1 else self.phase(step)
        return data.train.pick(self._order[step])


def _order(num_samples: int, spec: HostSpec, repeat: int) -> Tensor:
    """Indices of each step's samples (total_steps, batch_size): epoch after epoch, each shuffled.

    Windows of a text, of which there are more than a run can see, are drawn with replacement.
    """
    draw = torch.Generator().manual_seed(derived_seed("order", spec.seed, repeat))
    wanted = spec.total_steps * spec.batch_size
    if wanted <= num_samples:
        return torch.randint(num_samples, (spec.total_steps, spec.batch_size), generator=draw)
    num_epochs = -(-wanted // num_samples)
    epochs = [torch.randperm(num_samples, generator=draw) for _ in range(num_epochs)]
    return torch.cat(epochs)[:wanted].view(spec.total_steps, spec.batch_size)


def _phases(data: TaskData, spec: HostSpec) -> list[TaskData]:
    phases = [data]
    if spec.shift is None:
        return phases
    draw = torch.Generator().manual_seed(derived_seed("shift", spec.seed))
    if spec.shift.kind == "inputs" and len(data.input_shape) != 1:
        raise ConfigError(
            f"{spec.name}: only flat inputs can be permuted, samples have shape {data.input_shape}"
        )
    for _ in spec.shift.at:
        phases.append(_shifted(data, phases[-1], spec.shift, draw))
    return phases


def _shifted(first: TaskData, last: TaskData, shift: Shift, draw: torch.Generator) -> TaskData:
    """The next phase: permuted afresh from the first one, or with two more labels of the last one swapped."""
    if shift.kind == "inputs":
        columns = torch.randperm(first.input_shape[0], generator=draw)
        return _mapped(first, lambda part: Samples(part.x[:, columns], part.y))
    labels = torch.arange(first.num_outputs)
    if shift.kind == "swap":
        a, b = torch.randperm(len(labels), generator=draw)[:2].tolist()
        labels[[a, b]] = labels[[b, a]]
    else:
        labels = torch.randperm(len(labels), generator=draw)

    def relabel(part: Samples) -> Samples:
        assert part.y is not None
        return Samples(part.x, labels[part.y])

    return _mapped(last if shift.kind == "swap" else first, relabel)


def _mapped(data: TaskData, change: Callable[[Samples], Samples]) -> TaskData:
    return replace(data, train=change(data.train), held_out=change(data.held_out), test=change(data.test))


def make_optimizer(model: nn.Module, spec: HostSpec) -> AdamW:
    """AdamW as all hosts are trained with: weight decay on matrices alone."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: a step of nets this small is spent on launching operations
    return AdamW([group for group in groups if group["params"]], lr=spec.learning_rate, fused=True)


def rate_factors(spec: HostSpec) -> list[float]:
    """Share of the peak learning rate at each step."""
    warmup = round(_WARMUP * spec.total_steps)
    if spec.schedule == "constant":
        return [min(1.0, (step + 1) / (warmup + 1)) for step in range(spec.total_steps)]
    return [
        warmup_cosine(step, num_steps=spec.total_steps, warmup_steps=warmup, final_fraction=0.0)
        for step in range(spec.total_steps)
    ]
