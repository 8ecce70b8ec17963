"""Shapes of hosts, drawn at random: badly shaped, with one narrow layer, or sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import TypeVar

from esper.tamiyo.environment.corpora import VOCABULARY
from esper.tamiyo.environment.specs import (
    Architecture,
    CNNShape,
    DigitsTask,
    FashionTask,
    GPTShape,
    MLPShape,
    PictureTask,
    ResidualShape,
    Shape,
    Task,
    TeacherTask,
    TextTask,
)

__all__ = [
    "choose",
    "cnn_shape",
    "count_parameters",
    "gpt_shape",
    "integer",
    "log_uniform",
    "mlp_shape",
    "residual_shape",
]

_T = TypeVar("_T")

_SHAKESPEARE_VOCABULARY = 66
"""Characters of the training part and the unknown one, known without reading the sealed text."""


def choose(random: Random, items: Sequence[_T]) -> _T:
    """One of ``items``; drawn from ``random()`` alone, whose sequence Python keeps from version to version."""
    return items[int(random.random() * len(items))]


def integer(random: Random, low: int, high: int) -> int:
    """A whole number in [low, high]."""
    return low + int(random.random() * (high - low + 1))


def log_uniform(random: Random, low: float, high: float) -> float:
    """A number in [low, high) whose logarithm is uniform."""
    return low * math.exp(random.random() * math.log(high / low))


def _widths(random: Random, shape: Shape, depth: int, low: int, sound: tuple[int, int]) -> tuple[int, ...]:
    """``depth`` widths: each log-uniform from ``low``; or alike but for one narrow layer; or alike."""
    if shape == "random":
        return tuple(round(log_uniform(random, low, sound[1])) for _ in range(depth))
    width = round(log_uniform(random, *sound))
    widths = [width] * depth
    if shape == "bottleneck":
        widths[integer(random, 0, depth - 1)] = integer(random, 2, max(2, width // 6))
    return tuple(widths)


def mlp_shape(random: Random, shape: Shape) -> MLPShape:
    """Two to four hidden layers; sound ones have 24 to 64 units each."""
    return MLPShape(hidden=_widths(random, shape, integer(random, 2, 4), 3, (24, 64)))


def residual_shape(random: Random, shape: Shape) -> ResidualShape:
    """One to three blocks on a residual stream, half of them with a way from the input to the output."""
    inner = _widths(random, shape, integer(random, 1, 3), 3, (16, 48))
    return ResidualShape(width=integer(random, 16, 40), inner=inner, shortcut=random.random() < 0.5)


def cnn_shape(random: Random, shape: Shape) -> CNNShape:
    """Two or three convolutions of which the last, or the first and the last, halve the image."""
    depth = integer(random, 2, 3)
    strides = choose(random, ((1, 2), (2, 1))) if depth == 2 else choose(random, ((1, 2, 1), (2, 1, 2)))
    norm = "group" if random.random() < 0.5 else "none"
    return CNNShape(
        widths=_widths(random, shape, depth, 3, (10, 24)),
        strides=strides,
        norm="group" if norm == "group" else "none",
    )


def gpt_shape(random: Random, shape: Shape) -> GPTShape:
    """One or two blocks of width 8 to 16; MLPs from a quarter of it (``bottleneck``) to four times."""
    d_model = choose(random, (8, 12, 16))
    ratio = {"random": log_uniform(random, 0.5, 4.0), "bottleneck": 0.25, "sound": 4.0}[shape]
    return GPTShape(
        d_model=d_model, depth=integer(random, 1, 2), num_heads=2, mlp_width=max(2, round(ratio * d_model))
    )


def count_parameters(architecture: Architecture, task: Task) -> int:
    """Parameters of a host, from its spec alone."""
    d_in, d_out = _inputs(task), _outputs(task)
    if isinstance(architecture, MLPShape):
        widths = (d_in, *architecture.hidden, d_out)
        return sum((a + 1) * b for a, b in pairwise(widths))
    if isinstance(architecture, ResidualShape):
        width = architecture.width
        blocks = sum((width + 1) * units + (units + 1) * width for units in architecture.inner)
        ends = (d_in + 1) * width + (width + 1) * d_out
        return ends + blocks + (d_in * d_out if architecture.shortcut else 0)
    if isinstance(architecture, CNNShape):
        extra = 1 if architecture.norm == "none" else 2
        channels = (1, *architecture.widths)
        return sum((9 * a + extra) * b for a, b in pairwise(channels)) + (channels[-1] + 1) * d_out
    d, m = architecture.d_model, architecture.mlp_width
    block = (d + 1) * 4 * d + (d + 1) * m + (m + 1) * d + 4 * d
    return d_out * d + d_in * d + architecture.depth * block + 2 * d


def _inputs(task: Task) -> int:
    """Values a flat sample has; positions of a window."""
    if isinstance(task, DigitsTask | FashionTask):
        return 64
    if isinstance(task, TeacherTask):
        return task.in_features
    return 2 + 4 * task.num_octaves if isinstance(task, PictureTask) else task.context


def _outputs(task: Task) -> int:
    if isinstance(task, DigitsTask | FashionTask):
        return 10
    if isinstance(task, TeacherTask):
        return task.out_features
    if isinstance(task, PictureTask):
        return 3
    return len(VOCABULARY) + 1 if isinstance(task, TextTask) else _SHAKESPEARE_VOCABULARY
