"""One stream of ``esper bench shift``: a narrow net learns task after task, and meets each example once.

A plain training loop around the same parts that the callback uses: probes, policy, governor, recycling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam, Optimizer

from esper.hosts import FashionData, MLPConfig, build_host
from esper.kasmina.body import Body, attach
from esper.kasmina.probes import ProbeRunner
from esper.tamiyo.config import build_config
from esper.tamiyo.controller import Controller
from esper.tamiyo.policies import make_policy
from esper.tamiyo.ranks import Ranks
from esper.tamiyo.recorder import Recorder

__all__ = ["Stream", "one_thread", "train_stream"]

Arm = Literal["continue", "reset", "recycle"]
Shift = Literal["swap", "drift"]

_POOL = 25_000
_DRIFT_SHARE = 0.02


@dataclass(frozen=True)
class Stream:
    """What to train on what.

    Attributes:
        arm: ``continue`` training, ``reset`` the net at every shift, or ``recycle`` by the policy's rule.
        shift: Between tasks ``swap`` two labels, or ``drift``: 2 % of the pixels trade places.
        seed: Of weights, images and shifts; arms of one seed see the very same stream.
        lr: Of Adam.
        num_tasks: Tasks.
        steps: Batches a task.
        batch_size: Images a batch.
        width: Of the three hidden layers.
        pool: Which half of the training images: ``tune`` for choosing settings, ``report`` for figures.
    """

    arm: Arm
    shift: Shift
    seed: int
    lr: float
    num_tasks: int = 30
    steps: int = 250
    batch_size: int = 32
    width: int = 32
    pool: Literal["tune", "report"] = "report"


def one_thread() -> None:
    """Prepare a worker process."""
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _images(pool: str) -> tuple[Tensor, Tensor]:
    x, y = FashionData(inputs="pixels").splits.train[:]
    half = slice(0, _POOL) if pool == "tune" else slice(_POOL, 2 * _POOL)
    return x[half].contiguous(), y[half].contiguous()


class _Batch:
    """The loss on the batch that was trained on last, for measurements between steps."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self._model, self._x, self._y = model, x, y

    @property
    def num_samples(self) -> int:
        return len(self._y)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self._model(self._x), self._y)


class _StreamRun:
    """A :class:`~esper.tamiyo.host_run.HostRun`: nothing is held out of a stream."""

    def __init__(self, optimizers: Sequence[Optimizer], total_steps: int) -> None:
        self.optimizers = optimizers
        self.total_steps = total_steps
        self.ranks = Ranks()
        self.last: _Batch | None = None

    def held_out(self) -> Sequence[_Batch]:
        return ()

    def held_out_source(self) -> str:
        return "nothing: every example of the stream is trained on once"

    def recent(self) -> _Batch:
        assert self.last is not None
        return self.last

    def structure_changed(self) -> None:
        """Recycling changes no structure."""


class _Recycler:
    """The policy's rule at work in a plain loop: ``expressivity`` without growth events."""

    def __init__(self, model: nn.Module, example: Tensor, optimizer: Optimizer, stream: Stream) -> None:
        config = build_config(
            policy="expressivity", policy_options={"num_events": 0}, seed=stream.seed, bus=None
        )
        self._interval = config.probes.interval_steps
        self._run = _StreamRun([optimizer], stream.num_tasks * stream.steps)
        body: Body = attach(model, example, seed=stream.seed)
        policy = make_policy(config.policy, **config.policy_options)
        self._controller = Controller(config, body, self._run, policy, Recorder("bench-shift"))
        self._probes = ProbeRunner(body)
        self._stream = stream

    @property
    def num_recycled(self) -> int:
        return self._controller.ledger.recycled

    def before_forward(self, step: int) -> None:
        if step % self._interval == 0:
            self._probes.begin()

    def before_step(self, step: int, model: nn.Module) -> None:
        self._probes.note_gradients()
        if self._controller.warden.wants_gradients(step):
            self._controller.warden.note_gradients(model.named_parameters())

    def after_step(self, step: int, loss: Tensor, batch: _Batch) -> None:
        self._run.last = batch
        epoch = (step - 1) // self._stream.steps
        if self._probes.active:
            self._controller.note_health(self._probes.end(step=step, epoch=epoch))
        self._controller.note_batch(loss, batch.num_samples)
        self._controller.safe_point(step, epoch)


def train_stream(stream: Stream) -> dict[str, Any]:
    """Train one arm on one stream.

    Returns:
        Plain values: the stream's name, seed and rate, ``accuracy``, the mean over all examples of whether
        each was predicted right before it was trained on, in per cent, ``recycled`` layers, and
        ``late_dormancy``, the mean dormancy of the hidden layers after the last step.
    """
    x, y = _images(stream.pool)
    draw = torch.Generator().manual_seed(1_000_003 * stream.seed + 17)
    order = torch.randint(len(x), (stream.num_tasks, stream.steps, stream.batch_size), generator=draw)
    labels, pixels = torch.arange(10), torch.arange(x.shape[1])
    torch.manual_seed(stream.seed)
    model, optimizer = _fresh(stream, x.shape[1])
    recycler = _Recycler(model, x[:2], optimizer, stream) if stream.arm == "recycle" else None
    right = torch.zeros((), dtype=torch.int64)
    step = 0
    for task in range(stream.num_tasks):
        if task and stream.shift == "swap":
            a, b = torch.randperm(10, generator=draw)[:2].tolist()
            labels[[a, b]] = labels[[b, a]]
        elif task:
            moved = torch.randperm(len(pixels), generator=draw)[: int(_DRIFT_SHARE * len(pixels))]
            pixels[moved] = pixels[moved.roll(1)]
        if task and stream.arm == "reset":
            model, optimizer = _fresh(stream, x.shape[1])
        for index in order[task]:
            step += 1
            images = x[index] if stream.shift == "swap" else x[index][:, pixels]
            targets = labels[y[index]]
            if recycler is not None:
                recycler.before_forward(step)
            logits = model(images)
            right += (logits.argmax(1) == targets).sum()
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            if recycler is not None:
                recycler.before_step(step, model)
            optimizer.step()
            if recycler is not None:
                recycler.after_step(step, loss, _Batch(model, images, targets))
    return {
        "arm": stream.arm,
        "shift": stream.shift,
        "seed": stream.seed,
        "lr": stream.lr,
        "accuracy": 100.0 * float(right) / order.numel(),
        "recycled": 0 if recycler is None else recycler.num_recycled,
        "late_dormancy": _dormancy(model, x[:1000] if stream.shift == "swap" else x[:1000][:, pixels]),
    }


def _fresh(stream: Stream, num_features: int) -> tuple[nn.Module, Optimizer]:
    model = build_host(MLPConfig(in_features=num_features, hidden=(stream.width,) * 3))
    return model, Adam(model.parameters(), lr=stream.lr)


def _dormancy(model: nn.Module, x: Tensor) -> float:
    """Mean over hidden layers of the share of units under a tenth of their layer's mean (GROWTH.md §9)."""
    from esper.kasmina.statistics import dormancy

    shares = []
    with torch.no_grad():
        for layer in model.layers:  # type: ignore[union-attr]
            x = layer(x).relu()
            shares.append(float(dormancy(x)))
    return sum(shares) / len(shares)
