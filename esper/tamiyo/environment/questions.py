"""The policy of an episode: it answers nothing by itself, but stops the run where somebody is to be asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from esper.messages import Decision
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.specs import HostSpec
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.policies.base import wait
from esper.tamiyo.state import GrowthState

__all__ = ["Questions"]


class Questions:
    """Turns due decision points into questions.

    Args:
        spec: The run.
        config: When it is asked.

    Attributes:
        history: Of the run.
        open: The question that waits for an answer; None when none does.
    """

    name = "episode"

    def __init__(self, spec: HostSpec, config: EpisodeConfig) -> None:
        self.history = History()
        self.open: DecisionPoint | None = None
        self._run_id = spec.name
        self._config = config
        self._moments = config.moments(spec)
        self._asked = 0

    def decide(self, state: GrowthState) -> list[Decision]:
        """Open a question when one is due; WAIT in any case, as the answer is asked for afterwards."""
        if self.done or state.step < self._moments[self._asked]:
            self.history.note(state)
            return [wait(self.name, "nobody is to be asked here")]
        while self._asked < len(self._moments) and state.step >= self._moments[self._asked]:
            self._asked += 1
        point = decision_point(
            state,
            self.history,
            run_id=self._run_id,
            price=self._config.price,
            config=self._config.candidates,
        )
        self.open = msgspec.structs.replace(
            point, timestamp=0.0
        )  # the same run asks the same, whenever it runs
        return [wait(self.name, "whoever trains this run is asked")]

    @property
    def done(self) -> bool:
        """Whether nobody is going to be asked any more."""
        return self._asked >= len(self._moments)

    def answered(self, chosen: Sequence[Decision], step: int) -> None:
        """Close the open question, and remember what was decided."""
        self.open = None
        self.history.note_decisions(chosen, step)

    def close(self) -> None:
        """Ask nothing any more."""
        self._asked = len(self._moments)

    def state_dict(self) -> dict[str, Any]:
        """Plain values; the open question as its facts."""
        return {
            "history": self.history.state_dict(),
            "asked": self._asked,
            "open": None if self.open is None else msgspec.to_builtins(self.open),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self.history.load_state_dict(state["history"])
        self._asked = int(state["asked"])
        self.open = None if state["open"] is None else msgspec.convert(state["open"], DecisionPoint)
