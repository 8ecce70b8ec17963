"""Turn a real run into experiences: what was decided as it is decided, and what came of it when that is known.

Nothing happens between decision points. A decision and the state of the run are on the disk before the run acts
on it; outcomes are written when a horizon is over and at the end of the run.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from esper.errors import ConfigError, EsperError
from esper.messages import Decision, DecisionRecord, Event, GovernorRecord, RunRecord, TransitionRecord
from esper.tamiyo.experience.matching import match
from esper.tamiyo.experience.records import DecisionFacts, Incident, Observation
from esper.tamiyo.experience.settling import settle
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.candidate_config import CandidateConfig
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.rewards import RewardComputer, RewardConfig
from esper.tamiyo.rewards.config import HORIZONS
from esper.tamiyo.state import LatePolicy

if TYPE_CHECKING:
    from esper.tamiyo.graph.facts import DecisionPoint
    from esper.tamiyo.state import GrowthState, Policy

__all__ = ["ExperienceRecorder", "RecordingPolicy"]

_log = logging.getLogger(__name__)


class ExperienceRecorder:
    """Writes one run into a store.

    A store that cannot be written to (a full disk) does not end the run: the error is logged once, and nothing
    more is recorded.

    Args:
        path: Of the store, which other runs may share.
        run_id: Of the run.
        rewards: Settings of the rewards of outcomes.

    Raises:
        DataFormatError: The file is damaged, foreign, or of a newer version.
        StoreError: It cannot be opened.
    """

    def __init__(
        self, path: str | os.PathLike[str], run_id: str, *, rewards: RewardConfig | None = None
    ) -> None:
        self.run_id = run_id
        self.store = ExperienceStore(path)
        self._computer = RewardComputer(rewards)
        self.failed = False
        """Whether recording was given up."""
        self._open: list[tuple[str, list[Decision]]] = []
        self._open_step = -1
        self._due: list[tuple[int, str]] = []

    def observe(self, observation: Observation) -> None:
        """Write down how the run stands at a decision point; outcomes of horizons that are over follow."""
        self._try(self.store.observe, self.run_id, observation)
        due = {decision_id for step, decision_id in self._due if step <= observation.step}
        if due:
            self._due = [entry for entry in self._due if entry[0] > observation.step]
            self._try(settle, self.store, self.run_id, self._computer, over=False, only=due)

    def decided(self, facts: DecisionFacts, answers: Sequence[Decision]) -> None:
        """Write down a decision.

        Args:
            facts: The decision.
            answers: What the run is told to do; its records of them tell what became of it.
        """
        if facts.point.run.step > self._open_step:
            self._open = []
        self._open_step = facts.point.run.step
        self._open.append((facts.decision_id, list(answers)))
        self._try(self.store.add_decision, facts)
        if facts.candidate.action == "wait":
            return  # earns nothing at any horizon; the end of the run is time enough to say so
        total, config = facts.point.run.total_steps, self._computer.config
        for horizon in HORIZONS[:-1]:
            end = facts.point.run.step + round(config.horizon_share(horizon) * total)
            self._due.append((end, facts.decision_id))

    def hear(self, event: Event) -> None:
        """Take what happened in the run: a listener of :class:`~esper.tamiyo.recorder.Recorder`."""
        if isinstance(event, DecisionRecord):
            self._heard_decision(event)
        elif isinstance(event, TransitionRecord) and event.target == "culled":
            self._incident(Incident(step=event.step, kind="cull", target=event.seed_id), event.timestamp)
        elif isinstance(event, GovernorRecord):
            self._heard_governor(event)
        elif isinstance(event, RunRecord) and event.event == "resume":
            self._try(self.store.undo_after, self.run_id, event.step)
        elif isinstance(event, RunRecord) and event.event == "end":
            self._try(self.store.end_run, self.run_id, event.step)
            self._try(settle, self.store, self.run_id, self._computer)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _heard_decision(self, event: DecisionRecord) -> None:
        decision = event.decision
        if event.applied:
            target = event.seed_id or decision.site
            self._incident(Incident(step=event.step, kind="adaptation", target=target), event.timestamp)
        if event.step != self._open_step or (decision.action == "wait" and not event.refused):
            return
        for decision_id, answers in self._open:
            if any(_same(decision, answer) for answer in answers):
                seeds = [event.seed_id] if event.applied and decision.action == "germinate" else []
                self._try(self.store.note_applied, decision_id, seed_ids=seeds, refused=event.refused)
                return

    def _heard_governor(self, event: GovernorRecord) -> None:
        if event.action == "rollback":
            self._incident(Incident(step=event.step, kind="rollback", target=event.target), event.timestamp)
        if not all(map(math.isfinite, event.measurements.values())):
            self._incident(Incident(step=event.step, kind="non_finite", target=event.target), event.timestamp)

    def _incident(self, incident: Incident, timestamp: float) -> None:
        self._try(self.store.note_incident, self.run_id, incident, timestamp=timestamp)

    def _try(self, write: Callable[..., object], *values: object, **options: object) -> None:
        if self.failed:
            return
        try:
            write(*values, **options)
        except EsperError:
            self.give_up()

    def give_up(self) -> None:
        """Log the error at hand, and record nothing more of this run."""
        self.failed = True
        _log.exception("experiences of run %s are no longer recorded; the run goes on", self.run_id)


class RecordingPolicy:
    """A policy whose decisions are recorded; it decides exactly as the one that it holds.

    The held-out loss is measured at every decision point, and charged like everything that is measured: outcomes
    are judged by it. Sites are not scored for the record; what the policy itself had scored is in its numbers.

    Args:
        policy: Decides.
        recorder: Writes it down.

    Raises:
        ConfigError: The policy asks a service, which knows what was decided and keeps it.
    """

    def __init__(self, policy: Policy, recorder: ExperienceRecorder) -> None:
        if isinstance(policy, LatePolicy):
            raise ConfigError(
                f"expected experience=None with policy {policy.name!r}, got the store {recorder.store.path}: a service "
                "decides, and keeps the experiences (its setting store)"
            )
        self.policy = policy
        self.recorder = recorder
        self.name = policy.name
        self._history = History()
        self._offers = CandidateConfig(scored=False)

    def decide(self, state: GrowthState) -> list[Decision]:
        """Ask the policy, and write its answer down."""
        answers = self.policy.decide(state)
        if self.recorder.failed:
            return answers
        try:
            self._write_down(state, answers)
        except EsperError:  # the answer stands, whatever becomes of its record
            self.recorder.give_up()
        return answers

    def _write_down(self, state: GrowthState, answers: Sequence[Decision]) -> None:
        self.recorder.observe(
            Observation(
                step=state.step,
                train_loss=state.train_loss,
                held_out_loss=state.measure_held_out_loss(),
                num_parameters=state.num_parameters,
                training_flops=state.training_flops,
                timestamp=time.time(),
            )
        )
        judgement = getattr(self.policy, "last", None)  # of a policy that knows candidates, TamiyoPolicy
        if judgement is not None and judgement.point.run.step == state.step:
            self._record(judgement.point, answers, state, judgement.verdict)
        else:
            self._record(decision_point(state, self._history, config=self._offers), answers, state)

    def _record(
        self, point: DecisionPoint, answers: Sequence[Decision], state: GrowthState, verdict: Any = None
    ) -> None:
        run = msgspec.structs.replace(point.run, run_id=self.recorder.run_id)
        point = msgspec.structs.replace(point, run=run)
        for index, (known, chosen, decisions) in enumerate(match(point, answers, state)):
            self.recorder.decided(
                DecisionFacts(
                    decision_id=f"{self.recorder.run_id}:{state.step}" + (f":{index}" if index else ""),
                    point=known,
                    chosen=chosen,
                    policy=self.name,
                    confidence=decisions[0].confidence,
                    uncertainty=None if verdict is None else verdict.decision.uncertainty,
                ),
                decisions,
            )

    def state_dict(self) -> dict[str, Any]:
        """The policy's, with what the record needs beside it; either can be continued without the other."""
        return {**self.policy.state_dict(), _HISTORY: self._history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned, or that of the policy alone."""
        if _HISTORY in state:
            self._history.load_state_dict(state[_HISTORY])
        self.policy.load_state_dict({key: value for key, value in state.items() if key != _HISTORY})


_HISTORY = "recorded_history"


def _same(done: Decision, asked: Decision) -> bool:
    """Whether a record is about a decision; carrying one out may add numbers to it."""
    fields = ("action", "site", "blueprint", "size", "policy")
    return all(getattr(done, field) == getattr(asked, field) for field in fields)
