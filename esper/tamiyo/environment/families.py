"""Families of hosts, sampled by number: the same family, split and number give the same host anywhere.

A family draws badly shaped hosts and sound ones alike: half have random widths, a quarter one narrow layer,
a quarter a shape that needs nothing (GROWTH.md §6: a policy has to learn when to WAIT).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from esper.errors import ConfigError
from esper.tamiyo.environment.corpora import CORPORA
from esper.tamiyo.environment.rates import learning_rate
from esper.tamiyo.environment.shapes import (
    choose,
    cnn_shape,
    count_parameters,
    gpt_shape,
    integer,
    log_uniform,
    mlp_shape,
    residual_shape,
)
from esper.tamiyo.environment.specs import (
    SPLITS,
    Architecture,
    Corpus,
    DigitsTask,
    FashionTask,
    HostSpec,
    PictureTask,
    ShakespeareTask,
    Shape,
    Shift,
    ShiftKind,
    Split,
    Task,
    TeacherTask,
    TextTask,
    derived_seed,
)

__all__ = ["FAMILIES", "KNOWN", "SEALED", "Draft", "sample_host", "tokens_per_parameter"]

_TPP = (30.0, 600.0)
"""Training tokens a parameter; widening begins to pay near 110 (GROWTH.md §8)."""

_CONTEXT = 32
_GPT_STEPS = (300, 1000)


@dataclass(frozen=True)
class Draft:
    """A host before its learning rate is known."""

    architecture: Architecture
    task: Task
    batch_size: int
    total_steps: int
    shift: Shift | None = None


def sample_host(family: str, split: Split, number: int) -> HostSpec:
    """Draw host ``number`` of a family.

    Args:
        family: One of :data:`FAMILIES`.
        split: ``train``, ``validation`` or ``test`` of a known family; ``sealed`` of a sealed one.
        number: From 0; each is another host, and no host is in two splits.

    Raises:
        ConfigError: There is no such family, or it does not have that split: sealed families are for the last
            judgement alone, and nothing may be trained or tuned on them.
    """
    _check(family, split, number)
    random = Random(derived_seed("host", family, split, number))
    shape: Shape = choose(random, ("random", "random", "bottleneck", "sound"))
    draft = FAMILIES[family](random, shape)
    return HostSpec(
        family=family,
        split=split,
        number=number,
        shape=shape,
        architecture=draft.architecture,
        task=draft.task,
        batch_size=draft.batch_size,
        total_steps=draft.total_steps,
        learning_rate=learning_rate(family, count_parameters(draft.architecture, draft.task)),
        # a run whose data change again and again has no end to anneal towards
        schedule="cosine" if draft.shift is None else "constant",
        shift=draft.shift,
    )


def tokens_per_parameter(spec: HostSpec) -> float:
    """Positions that a run trains on, over the parameters of its host."""
    context = spec.task.context if isinstance(spec.task, TextTask | ShakespeareTask) else 1
    return spec.total_steps * spec.batch_size * context / count_parameters(spec.architecture, spec.task)


def _check(family: str, split: Split, number: int) -> None:
    if family not in FAMILIES:
        raise ConfigError(f"no host family named {family!r}; families are {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if (family in SEALED) != (split == "sealed"):
        has = "sealed" if family in SEALED else "train, validation and test"
        why = "; nothing may be trained or tuned on a sealed family" if family in SEALED else ""
        raise ConfigError(f"family {family!r} has the split {has}, not {split!r}{why}")
    if number < 0:
        raise ConfigError(f"a host's number must be at least 0, got {number}")


def _digits_mlp(random: Random, shape: Shape) -> Draft:
    task = DigitsTask(num_train=integer(random, 400, 1078))
    return Draft(mlp_shape(random, shape), task, choose(random, (32, 64)), integer(random, 200, 600))


def _teacher_mlp(random: Random, shape: Shape) -> Draft:
    return Draft(
        mlp_shape(random, shape), _teacher(random), choose(random, (32, 64)), integer(random, 300, 1000)
    )


def _picture_mlp(random: Random, shape: Shape) -> Draft:
    return Draft(
        mlp_shape(random, shape), _picture(random), choose(random, (64, 128)), integer(random, 300, 1000)
    )


def _digits_cnn(random: Random, shape: Shape) -> Draft:
    task = DigitsTask(num_train=integer(random, 600, 1078), images=True)
    return Draft(cnn_shape(random, shape), task, 32, integer(random, 300, 600))


def _text_gpt(random: Random, shape: Shape) -> Draft:
    corpus: Corpus = choose(random, CORPORA)
    return _gpt(random, shape, TextTask(corpus=corpus, context=_CONTEXT))


def _residual_mlp(random: Random, shape: Shape) -> Draft:
    makers: tuple[Callable[[Random], Task], ...] = (_digits_task, _teacher, _picture)
    task = choose(random, makers)(random)
    return Draft(residual_shape(random, shape), task, choose(random, (32, 64)), integer(random, 300, 800))


def _shift_mlp(random: Random, shape: Shape) -> Draft:
    kind: ShiftKind = choose(random, ("labels", "inputs", "swap"))
    steps = integer(random, 600, 1000)
    count = integer(random, 1, 4)
    spacing = steps / (count + 1)
    at = tuple(round(spacing * (i + 1 + random.uniform(-0.15, 0.15))) for i in range(count))
    shift = Shift(kind=kind, at=at)
    return Draft(mlp_shape(random, shape), DigitsTask(num_train=1078), choose(random, (16, 32)), steps, shift)


def _fashion_mlp(random: Random, shape: Shape) -> Draft:
    task = FashionTask(num_train=round(log_uniform(random, 1000, 8000)))
    return Draft(mlp_shape(random, shape), task, choose(random, (32, 64)), integer(random, 300, 1000))


def _fashion_cnn(random: Random, shape: Shape) -> Draft:
    task = FashionTask(num_train=round(log_uniform(random, 1000, 8000)), images=True)
    return Draft(cnn_shape(random, shape), task, 32, integer(random, 300, 600))


def _shakespeare_gpt(random: Random, shape: Shape) -> Draft:
    return _gpt(random, shape, ShakespeareTask(context=_CONTEXT))


def _gpt(random: Random, shape: Shape, task: TextTask | ShakespeareTask) -> Draft:
    """Steps and batch follow from the tokens a parameter, which are what decides (GROWTH.md §8)."""
    architecture = gpt_shape(random, shape)
    tokens = log_uniform(random, *_TPP) * count_parameters(architecture, task)
    middle = math.sqrt(tokens / _CONTEXT) * 6.0
    steps = round(min(max(middle, _GPT_STEPS[0]), _GPT_STEPS[1]))
    return Draft(architecture, task, max(4, round(tokens / (steps * _CONTEXT))), steps)


def _digits_task(random: Random) -> DigitsTask:
    return DigitsTask(num_train=integer(random, 400, 1078))


def _teacher(random: Random) -> TeacherTask:
    return TeacherTask(
        in_features=integer(random, 6, 20),
        hidden=tuple(integer(random, 8, 32) for _ in range(integer(random, 1, 2))),
        out_features=integer(random, 1, 6),
        num_train=round(log_uniform(random, 1000, 4000)),
        seed=integer(random, 0, 2**31 - 1),
    )


def _picture(random: Random) -> PictureTask:
    side = integer(random, 32, 64)
    return PictureTask(
        picture=choose(random, ("china", "flower")),
        top=integer(random, 0, 427 - side),
        left=integer(random, 0, 640 - side),
        side=side,
        num_octaves=integer(random, 2, 4),
        seed=0,
    )


KNOWN: dict[str, Callable[[Random, Shape], Draft]] = {
    "digits_mlp": _digits_mlp,
    "teacher_mlp": _teacher_mlp,
    "picture_mlp": _picture_mlp,
    "digits_cnn": _digits_cnn,
    "text_gpt": _text_gpt,
    "residual_mlp": _residual_mlp,
    "shift_mlp": _shift_mlp,
}
"""Families that policies are trained, tuned and tested on, each on other hosts."""

SEALED: dict[str, Callable[[Random, Shape], Draft]] = {
    "fashion_mlp": _fashion_mlp,
    "fashion_cnn": _fashion_cnn,
    "shakespeare_gpt": _shakespeare_gpt,
}
"""Families for the last judgement alone; their data lie below ``ESPER_DATA_DIR``."""

FAMILIES = KNOWN | SEALED
