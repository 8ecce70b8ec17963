"""A plain training loop as a HostRun: what the strategist needs besides a trainer's callback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.body import attach
from esper.messages import DecisionRecord, Event, GovernorRecord, Message, TransitionRecord
from esper.tamiyo.config import TamiyoConfig, build_config
from esper.tamiyo.controller import Controller
from esper.tamiyo.policies import make_policy
from esper.tamiyo.ranks import Ranks
from esper.tamiyo.recorder import Recorder
from esper.tamiyo.state import Policy

WIDE = "bypass:0->2"
RANK = "parallel:0"

EAGER: dict[str, Any] = {
    "min_training_steps": 2,
    "min_gradient_snr": 0.0,
    "max_output_ratio": 1e9,
    "blend_steps": 4,
    "min_holding_steps": 4,
    "min_contribution": 0.0,
    "contribution_stderrs": 0.0,
    "max_spread": 1e9,
    "num_measurements": 2,
    "embargo_steps": 6,
    "gate_interval_steps": 1,
}


class Batch:
    """One fixed batch and the loss of the model on it."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y

    @property
    def num_samples(self) -> int:
        return len(self.x)

    def __call__(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)


class Sink:
    """Keeps what a recorder sends to journal and bus."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.messages: list[Message] = []

    def write(self, event: Event) -> None:
        self.events.append(event)

    def publish(self, message: Message) -> bool:
        self.messages.append(message)
        return True


class Loop:
    """Trains a narrow MLP on a teacher's labels and lets a controller act between steps."""

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        total_steps: int = 40,
        held_out: bool = True,
        lr: float = 0.01,
        **settings: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        x = torch.randn(192, 8)
        y = (x @ torch.randn(8, 4)).relu().argmax(1)
        self.train = [
            Batch(self.model, a, b) for a, b in zip(x[:128].split(32), y[:128].split(32), strict=True)
        ]
        self._held_out = [Batch(self.model, x[128:], y[128:])] if held_out else []
        self.optimizers: Sequence[torch.optim.Optimizer] = [torch.optim.AdamW(self.model.parameters(), lr=lr)]
        self.total_steps = total_steps
        self.ranks = Ranks()
        self.changes = 0
        self.step = 0
        self.body = attach(self.model, x[:4])
        self.sink = Sink()
        defaults = {
            "policy": "schedule",
            "policy_options": {"num_events": 0},
            "window": (0.0, 1.0),
            "lifecycle": EAGER,
            "budget": {"max_parameters_ratio": 10.0, "site_cooldown_steps": 0},
            "bus": None,
        }
        self.config: TamiyoConfig = build_config(**(defaults | settings))
        recorder = Recorder("run", self.sink, self.sink)
        self.controller = Controller(
            self.config,
            self.body,
            self,
            policy or make_policy(self.config.policy, **self.config.policy_options),
            recorder,
        )

    def held_out(self) -> Sequence[Batch]:
        return self._held_out

    def held_out_source(self) -> str:
        return "the last third"

    def recent(self) -> Batch:
        return self.train[(self.step - 1) % len(self.train)]

    def structure_changed(self) -> None:
        self.changes += 1

    def run(self, steps: int = 1) -> Loop:
        for _ in range(steps):
            batch = self.train[self.step % len(self.train)]
            self.optimizers[0].zero_grad()
            loss = batch()
            loss.backward()
            self.controller.warden.note_gradients(self.model.named_parameters())
            self.optimizers[0].step()
            self.step += 1
            self.controller.note_batch(loss, batch.num_samples)
            self.controller.safe_point(self.step, epoch=self.step // len(self.train))
        return self

    @property
    def decisions(self) -> list[DecisionRecord]:
        return [e for e in self.sink.events if isinstance(e, DecisionRecord)]

    @property
    def transitions(self) -> list[TransitionRecord]:
        return [e for e in self.sink.events if isinstance(e, TransitionRecord)]

    @property
    def interventions(self) -> list[GovernorRecord]:
        return [e for e in self.sink.events if isinstance(e, GovernorRecord)]
