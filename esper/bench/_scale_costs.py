"""What attaching, watching and deciding cost on a host of a given depth, in a process of its own."""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from esper.bench._hosts_to_time import Batches
from esper.bench._overhead_arms import HORIZON_STEPS, quiet
from esper.bench._scale_hosts import ScaleModule, make_batches
from esper.bench._turns import BlockTimes, Turn, time_in_turns
from esper.callbacks import TamiyoCallback
from esper.kasmina.body import Body, attach
from esper.kasmina.probes import ProbeRunner
from esper.messages import Decision, DecisionRecord, Event, Message, SignalBatch
from esper.oona.codec import encode
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.controller import Controller
from esper.tamiyo.policies import make_policy
from esper.tamiyo.policies.base import EventPolicy
from esper.tamiyo.ranks import Ranks
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.state import GrowthState

__all__ = ["costs", "quiet", "time_arms"]

TOTAL_STEPS = 1000
"""Announced length of the run in which decisions are made."""
_HELD_OUT = 4
_PLAIN_STEPS = 4


class _Sink:
    """Stands for journal and bus: takes what is written and sent, and counts it."""

    def __init__(self) -> None:
        self.decisions: list[DecisionRecord] = []
        self.signal_bytes = 0

    def write(self, event: Event) -> None:
        if isinstance(event, DecisionRecord):
            self.decisions.append(event)

    def publish(self, message: Message) -> bool:
        if isinstance(message, SignalBatch):
            self.signal_bytes = len(encode(message))
        return True


class _Timed:
    """A policy that notes when it has answered; what follows is the growth itself, not the decision."""

    def __init__(self, policy: EventPolicy[Any]) -> None:
        self.timed = policy
        self.name = policy.name
        self.decided_at = 0.0

    def decide(self, state: GrowthState) -> list[Decision]:
        decisions = self.timed.decide(state)
        self.decided_at = time.thread_time()
        return decisions

    def state_dict(self) -> dict[str, Any]:
        return self.timed.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.timed.load_state_dict(state)


class _Loss:
    """The module's loss on one batch."""

    def __init__(self, module: ScaleModule, batch: tuple[Tensor, Tensor]) -> None:
        self._module, self._batch = module, batch

    @property
    def num_samples(self) -> int:
        return len(self._batch[0])

    def __call__(self) -> Tensor:
        return self._module.training_step(self._batch, 0)


class PlainRun:
    """A training loop without a trainer, as the strategist sees it."""

    def __init__(self, module: ScaleModule, batches: Sequence[Any]) -> None:
        self.module = module
        self.losses = [_Loss(module, batch) for batch in batches]
        self.optimizers: Sequence[torch.optim.Optimizer] = [module.configure_optimizers()]
        self.total_steps = TOTAL_STEPS
        self.ranks = Ranks()

    def held_out(self) -> Sequence[_Loss]:
        return self.losses[1:]

    def held_out_source(self) -> str:
        return "fixed random batches"

    def recent(self) -> _Loss:
        return self.losses[0]

    def structure_changed(self) -> None:
        """One process, nothing wrapped."""

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """Train on the first batch."""
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        self.losses[0]().backward()
        before_update()
        optimizer.step()


def costs(task: tuple[str, int, int]) -> dict[str, float]:
    """Measure one host; in a fresh process, because memory is told by what the process has allocated.

    Args:
        task: Kind of host, dense layers, repeats of each measurement.

    Returns:
        ``layers``, ``sites``; ``step_ms`` without anything; ``attach_ms``; ``probe_ms`` that a sampled step takes
        longer; ``decision_ms`` of the decision round of a growth event up to the policy's answer,
        ``germination_ms`` of each of the ``seeds`` that it asked for, and ``idle_decision_ms`` of a round in which no
        event is due; ``signal_bytes`` and ``decision_bytes`` of the messages;
        ``memory_mb`` that all of this added. Times are processor times of this thread.
    """
    kind, num_layers, repeats = task
    torch.manual_seed(0)
    _warm_up(kind)
    run = PlainRun(ScaleModule(kind, num_layers), make_batches(kind, 1 + _HELD_OUT))
    for _ in range(2):
        run.step()
    memory_before = _allocated_mb()
    started = time.thread_time()
    body = _attach(run, kind)
    attach_ms = 1e3 * (time.thread_time() - started)
    sink = _Sink()
    plain, sampled = _sample(run, body, _controller(body, run, sink), repeats)
    decisions = _decide(body, run, sink, repeats)
    return {
        "layers": float(sum(not layer.block for layer in body.topology.layers)),
        "sites": float(len(body.sites)),
        "step_ms": plain,
        "attach_ms": attach_ms,
        "probe_ms": sampled - plain,
        **decisions,
        "signal_bytes": float(sink.signal_bytes),
        "decision_bytes": float(max(len(encode(record)) for record in sink.decisions)),
        "memory_mb": _allocated_mb() - memory_before,
    }


def _attach(run: PlainRun, kind: str) -> Body:
    (x, y), *_ = make_batches(kind, 1)
    return attach(run.module.host, x, loss=lambda logits: run.module.loss(logits, y))


def _warm_up(kind: str) -> None:
    """Let libraries load and start what they do once a process."""
    run = PlainRun(ScaleModule(kind, 6), make_batches(kind, 1 + _HELD_OUT))
    sink = _Sink()
    body = _attach(run, kind)
    _sample(run, body, _controller(body, run, sink), 1)
    _decide(body, run, sink, 1)


def _controller(body: Body, run: PlainRun, sink: _Sink) -> Controller:
    """The default settings, which is to say the default policy and budget."""
    config = TamiyoConfig(bus=None)
    policy = make_policy(config.policy, **config.policy_options)
    assert isinstance(policy, EventPolicy)
    return Controller(config, body, run, _Timed(policy), Recorder("run", sink, sink))


def _sample(run: PlainRun, body: Body, controller: Controller, repeats: int) -> tuple[float, float]:
    """Milliseconds of a plain step, and of a sampled one with its message; medians, taken in turns."""
    plain, sampled = [], []
    probes = ProbeRunner(body)
    for step in range(1, repeats + 1):
        for _ in range(_PLAIN_STEPS):
            started = time.thread_time()
            run.step()
            plain.append(time.thread_time() - started)
        started = time.thread_time()
        probes.begin()
        run.step(probes.note_gradients)
        signals = probes.end(step=step, epoch=0, scores=controller.scores)
        controller.note_health(signals)
        sampled.append(time.thread_time() - started)
    return 1e3 * statistics.median(plain), 1e3 * statistics.median(sampled)


def _decide(body: Body, run: PlainRun, sink: _Sink, repeats: int) -> dict[str, float]:
    """Time the round in which the first growth event is due, and those before it; see :func:`costs`.

    Every repeat is a run of its own: after a germination a round's time would be that of the gates, which
    measure what the seed is worth. Of a transformer so many tokens are announced that its growth pays.
    """
    deciding: list[float] = []
    idle: list[float] = []
    germinating: list[float] = []
    num_seeds = 0
    topology = body.topology
    tokens = 2 * 110 * topology.num_parameters / (topology.positions * TOTAL_STEPS)
    num_samples = max(run.recent().num_samples, round(tokens) if topology.transformer else 0)
    for _ in range(repeats):
        controller = _controller(body, run, sink)
        policy = controller.policy
        assert isinstance(policy, _Timed)
        loss = run.recent()().detach()
        interval = round(controller.config.probes.decision_interval * TOTAL_STEPS)
        for step in range(interval, TOTAL_STEPS, interval):
            for _ in range(interval):
                controller.note_batch(loss, num_samples)
            falls_here = policy.timed.events.due(step, TOTAL_STEPS)
            started = time.thread_time()
            controller.safe_point(step, 0)
            ended = time.thread_time()
            seeds = body.seeds
            num_seeds += len(seeds)
            if seeds:
                germinating.append((ended - policy.decided_at) / len(seeds))
            (deciding if falls_here else idle).append((policy.decided_at if seeds else ended) - started)
            for seed in seeds:
                body.cull(seed, run.optimizers)
            if falls_here:
                break
    return {
        "decision_ms": 1e3 * statistics.median(deciding),
        "idle_decision_ms": 1e3 * statistics.median(idle),
        "germination_ms": 1e3 * statistics.median(germinating) if germinating else 0.0,
        "seeds": num_seeds / repeats,
    }


def _allocated_mb() -> float:
    """Memory that this process has allocated for itself, in MB; 0 where the system does not tell."""
    gc.collect()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            lines = dict(line.split(":", 1) for line in status)
    except FileNotFoundError:
        return 0.0
    return int(lines["RssAnon"].split()[0]) / 1e3


ARMS: dict[str, Callable[[], list[L.Callback]]] = {
    "without": list,
    "again": list,
    "callback": lambda: [TamiyoCallback(bus=None, policy_options={"num_events": 0})],
}
"""Arm -> its callbacks; none of them samples or decides within the first 200 steps of 10,000."""


def time_arms(task: tuple[str, int, int, int]) -> BlockTimes:
    """Train a host with the callback, and twice without, in turns.

    Args:
        task: Kind of host, dense layers, steps a block, blocks an arm.
    """
    kind, num_layers, block_steps, num_blocks = task
    fits = {arm: partial(_fit, kind, num_layers, callbacks) for arm, callbacks in ARMS.items()}
    return time_in_turns(fits, block_steps=block_steps, num_blocks=num_blocks)


def _fit(kind: str, num_layers: int, callbacks: Callable[[], list[L.Callback]], turn: Turn) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module = ScaleModule(kind, num_layers)
    batches = make_batches(kind, 8)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[turn, *callbacks()], default_root_dir=folder,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(
            module,
            train_dataloaders=Batches(batches[:4], HORIZON_STEPS),
            val_dataloaders=Batches(batches[4:], _HELD_OUT),
        )
