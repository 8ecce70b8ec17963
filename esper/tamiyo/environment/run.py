"""An episode's training run, as the controller wants to see it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.tamiyo.environment.data import TaskData
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.environment.stream import Batch, Stream
from esper.tamiyo.ranks import Ranks

__all__ = ["EpisodeRun"]

_GATE_POSITIONS = 512
"""Held-out predictions that gates and scores look at; the whole part makes the outcome."""


class EpisodeRun:
    """A :class:`~esper.tamiyo.host_run.HostRun` over a stream.

    What is held out shifts with the data, as a user's validation set would that is drawn from the present.

    Args:
        spec: The run.
        model: The host.
        optimizer: That trains it.
        stream: Its data.
    """

    def __init__(self, spec: HostSpec, model: nn.Module, optimizer: Optimizer, stream: Stream) -> None:
        self.optimizers: Sequence[Optimizer] = [optimizer]
        self.total_steps = spec.total_steps
        self.ranks = Ranks()
        self.num_train = max(1, len(stream.phases[0].train))
        self._model = model
        self._stream = stream
        self._step = 0
        self._last: tuple[Tensor, Tensor] | None = None
        self._held_out: tuple[TaskData, list[Batch]] | None = None

    def note(self, step: int, x: Tensor, y: Tensor) -> None:
        """Remember the batch of optimizer step ``step``, counted from 1."""
        self._step, self._last = step, (x, y)

    def held_out(self) -> Sequence[Batch]:
        """One batch of held-out samples of the present phase."""
        data = self._stream.phase(max(0, self._step - 1))
        if self._held_out is None or self._held_out[0] is not data:
            count = max(8, _GATE_POSITIONS // data.positions)
            x, y = data.held_out.pick(slice(0, count))
            self._held_out = data, [Batch(self._model, data.loss, x, y)]
        return self._held_out[1]

    def held_out_source(self) -> str:
        """Where the held-out batch comes from."""
        return "the first samples of the task's held-out part"

    def recent(self) -> Batch:
        """The batch that was trained on last."""
        assert self._last is not None
        return Batch(self._model, self._stream.phases[0].loss, *self._last)

    def structure_changed(self) -> None:
        """Nothing beside model and optimizer has to follow."""
