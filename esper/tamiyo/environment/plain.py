"""A host trained without esper: the control of every episode, and what host learning rates are tuned by."""

from __future__ import annotations

import math
import time
from typing import Any

import msgspec
import torch
from torch import nn

from esper.kasmina.trace import preserved
from esper.messages import Count, NonNegative
from esper.tamiyo.environment.data import Samples, TaskData
from esper.tamiyo.environment.nets import build_network
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.environment.stream import Stream, make_optimizer, rate_factors

__all__ = ["CoursePoint", "Outcome", "evaluate", "look_steps", "train_plain"]

_ROWS = 1024


class CoursePoint(msgspec.Struct, frozen=True, array_like=True):
    """Held-out loss in nats (NaN where it was not finite) after optimizer step ``step``, and the FLOPs until then."""

    step: Count
    loss: float
    training_flops: NonNegative


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to.

    Attributes:
        held_out_loss: In nats, on all held-out samples of the last phase; what utilities are made of. NaN, as
            all four figures, when the network ended with parameters that are not finite.
        held_out_accuracy: Share right, or share of variance explained.
        test_loss: On the test part: for the final judgement alone.
        test_accuracy: The same.
        host_parameters: Of the ungrown host.
        num_parameters: At the end.
        training_flops: Of all steps, statistics, scores and culled seeds included.
        germinated: Seeds that were planted.
        culled: Seeds that were removed again.
        recycled: Layers whose dormant units were made anew.
        rollbacks: Times that the governor went back.
        refused: Why decisions were not carried out.
        train_losses: Loss of every step's batch.
        course: The held-out loss on the way and at the end; empty when it was not followed.
        wall_seconds: That the run took; not a figure to compare.
    """

    held_out_loss: float
    held_out_accuracy: float
    test_loss: float
    test_accuracy: float
    host_parameters: Count
    num_parameters: Count
    training_flops: NonNegative
    germinated: Count = 0
    culled: Count = 0
    recycled: Count = 0
    rollbacks: Count = 0
    refused: tuple[str, ...] = ()
    train_losses: tuple[float, ...] = ()
    course: tuple[CoursePoint, ...] = ()
    wall_seconds: NonNegative = 0.0


def evaluate(model: nn.Module, data: TaskData, part: Samples) -> tuple[float, float]:
    """Loss in nats and accuracy of ``model`` on one part, in eval mode; the model stays as it was."""
    outputs, targets = [], []
    with preserved(model), torch.no_grad():
        model.eval()
        for start in range(0, len(part), _ROWS):
            x, y = part.pick(slice(start, start + _ROWS))
            outputs.append(model(x))
            targets.append(y)
        output, target = torch.cat(outputs), torch.cat(targets)
        figures = data.loss(output, target), data.accuracy(output, target)
    loss, accuracy = (float(figure) for figure in figures)
    return (loss, accuracy) if math.isfinite(loss) else (math.nan, math.nan)


def look_steps(spec: HostSpec, interval: float) -> list[int]:
    """Optimizer steps after which a run is looked at: the first, and each further ``interval`` share of the run.

    They are the steps at which :class:`~esper.tamiyo.controller.Controller` decides.
    """
    return list(range(1, spec.total_steps + 1, max(1, round(interval * spec.total_steps))))


def train_plain(
    spec: HostSpec,
    *,
    repeat: int = 0,
    model: nn.Module | None = None,
    forward: float | None = None,
    follow: float | None = None,
) -> Outcome:
    """Train the host of ``spec`` from its first step to its last.

    Args:
        spec: The run.
        repeat: Other first weights and another order.
        model: A network to train in its place, such as the final shape of a grown one with fresh weights.
        forward: FLOPs of one forward pass of a sample, where dense layers and convolutions are not all of them.
        follow: Measure the held-out loss on the way, at the :func:`look_steps` of this interval.
    """
    started = time.perf_counter()
    stream = Stream(spec, repeat)
    first = stream.phases[0]
    if model is None:
        model = build_network(spec, first.input_shape, first.num_outputs, repeat=repeat)
    optimizer = make_optimizer(model, spec)
    losses, course = [], []
    followed = set() if follow is None else set(look_steps(spec, follow))
    flops_a_step = 3.0 * (forward or forward_flops(model, first)) * spec.batch_size
    model.train()
    for step, factor in enumerate(rate_factors(spec)):
        x, y = stream.batch(step)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * factor
        optimizer.zero_grad()
        loss = first.loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step + 1 in followed:
            now = stream.phase(step)
            loss_now = evaluate(model, now, now.held_out)[0]
            course.append(CoursePoint(step + 1, loss_now, flops_a_step * (step + 1)))
    last = stream.phases[-1]
    held_out, test = evaluate(model, last, last.held_out), evaluate(model, last, last.test)
    if followed and course[-1].step < spec.total_steps:
        course.append(CoursePoint(spec.total_steps, held_out[0], flops_a_step * spec.total_steps))
    size = sum(p.numel() for p in model.parameters())
    return Outcome(
        held_out_loss=held_out[0],
        held_out_accuracy=held_out[1],
        test_loss=test[0],
        test_accuracy=test[1],
        host_parameters=size,
        num_parameters=size,
        training_flops=flops_a_step * spec.total_steps,
        train_losses=tuple(torch.stack(losses).tolist()),
        course=tuple(course),
        wall_seconds=time.perf_counter() - started,
    )


def forward_flops(model: nn.Module, data: TaskData) -> int:
    """FLOPs of one forward pass of one sample, two a multiply-add, of dense layers and convolutions."""
    counted = 0

    def count(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal counted
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        per_output = weight[0].numel() if isinstance(module, nn.Conv2d) else weight.shape[1]
        counted += 2 * per_output * output[0].numel()

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with preserved(model), torch.no_grad():
            model(data.train.pick(slice(0, 1))[0])
    finally:
        for hook in hooks:
            hook.remove()
    return counted
