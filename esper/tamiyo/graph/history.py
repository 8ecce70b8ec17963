"""What a run remembers between decision points: health signals and losses, both bounded."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from esper.errors import CheckpointError, ConfigError
from esper.messages import Decision, HealthSignal
from esper.tamiyo.graph.plan import HostPlan

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["History"]


class History:
    """The last health signals of every layer and seed, and the training loss at every decision point.

    Args:
        window: Sampled steps that are kept of one layer or seed.
        max_signals: Told of all together, and one of each at least; in a deep host the oldest are left out,
            whatever ``window`` says, so that a decision point can be stored and turned into a graph quickly.
        max_losses: Decision points whose loss is kept.

    Attributes:
        plan: Places and prices found out so far; not part of the state, because they can be found out again.
        recycled: Layer -> step of the last decision to recycle it.
    """

    def __init__(self, window: int = 100, *, max_signals: int = 4096, max_losses: int = 100) -> None:
        if min(window, max_signals, max_losses) < 1:
            raise ConfigError(
                "History expects window, max_signals and max_losses of at least 1, got "
                f"{window}, {max_signals} and {max_losses}"
            )
        self.window = window
        self.max_signals = max_signals
        self.plan = HostPlan()
        self.recycled: dict[str, int] = {}
        self._signals: dict[tuple[str, str], deque[HealthSignal]] = {}
        self._losses: deque[tuple[int, float]] = deque(maxlen=max_losses)

    def note(self, state: GrowthState) -> None:
        """Take note of a decision point, and forget culled seeds; noting one twice changes nothing."""
        alive = {"", *(seed.seed_id for seed in state.seeds)}
        self._signals = {key: known for key, known in self._signals.items() if key[1] in alive}
        self.extend(signal for signal in state.health.values() if signal.seed_id in alive)
        for known in self._signals.values():
            while len(known) > self._each:
                known.popleft()
        if math.isfinite(state.train_loss):
            while self._losses and self._losses[-1][0] >= state.step:
                self._losses.pop()
            self._losses.append((state.step, state.train_loss))

    def extend(self, signals: Iterable[HealthSignal]) -> None:
        """Take signals, oldest first; of a run that went back to a snapshot, what came after it is forgotten."""
        for signal in signals:
            known = self._signals.setdefault((signal.layer_id, signal.seed_id), deque(maxlen=self.window))
            while known and known[-1].step >= signal.step:
                known.pop()
            known.append(signal)

    def note_decisions(self, decisions: Iterable[Decision], step: int) -> None:
        """Remember what was decided at ``step``, as far as the next candidates depend on it."""
        for decision in decisions:
            if decision.action == "recycle":
                self.recycled[decision.site] = step

    @property
    def signals(self) -> tuple[HealthSignal, ...]:
        """All that is kept, oldest first; of one step in the order in which layers first spoke."""
        each = self._each
        recent = [s for known in self._signals.values() for s in list(known)[-each:]]
        return tuple(sorted(recent, key=lambda signal: signal.step))

    @property
    def _each(self) -> int:
        """Signals of one layer or seed that there is room for."""
        return max(1, self.max_signals // max(1, len(self._signals)))

    @property
    def steps(self) -> tuple[int, ...]:
        """Of the losses."""
        return tuple(step for step, _ in self._losses)

    @property
    def train_losses(self) -> tuple[float, ...]:
        """Mean training loss up to each of :attr:`steps`, since the one before it."""
        return tuple(loss for _, loss in self._losses)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        kept = [list(known) for known in self._signals.values()]
        return {
            "signals": msgspec.to_builtins(kept),
            "losses": [list(pair) for pair in self._losses],
            "recycled": dict(self.recycled),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned.

        Raises:
            CheckpointError: It is none. Nothing was changed.
        """
        try:
            kept = msgspec.convert(state["signals"], list[list[HealthSignal]])
            losses = msgspec.convert(state["losses"], list[tuple[int, float]])
            recycled = msgspec.convert(state["recycled"], dict[str, int])
        except (KeyError, msgspec.ValidationError) as error:
            raise CheckpointError(
                f"expected the state of a History (signals, losses, recycled), but {error!r}; was the "
                "checkpoint written by another version?"
            ) from error
        self._signals = {
            (known[0].layer_id, known[0].seed_id): deque(known, maxlen=self.window) for known in kept if known
        }
        self._losses = deque(losses, maxlen=self._losses.maxlen)
        self.recycled = recycled
