"""A live run as seen over the bus: its telemetry, commands into it, and what came of them.

This gives the Tamiyo document's ``oona_client``, ``execute_adaptation`` and ``compute_reward`` their meaning: a
decision is sent to the run as a command, the run's own record says what became of it, and the reward is measured on
the losses that the run publishes, against a control that is extrapolated from those before.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from esper.errors import EsperError
from esper.messages import Decision, DecisionRecord, ModelPerformance, RunRecord
from esper.oona import BusConfig, RunInfo, Subscriber, send_command
from esper.tamiyo.collection import TELEMETRY
from esper.tamiyo.graph.facts import Candidate, Placement
from esper.tamiyo.network.decision import AdaptationDecision
from esper.tamiyo.rewards import Branch, Outcome, Reward, RewardComputer, RewardConfig
from esper.tamiyo.rewards.counterfactual import fitted_control

__all__ = ["AdaptationResult", "RunClient", "RunLink"]

_LOG = logging.getLogger("esper.tamiyo.service")
_POLL_S = 0.02
_POINTS_KEPT = 1000
_ACTIONS: dict[str, str] = {"grow": "germinate", "recycle": "recycle", "cull": "cull", "hold": "hold"}


@dataclass(frozen=True)
class AdaptationResult:
    """What became of a decision.

    Attributes:
        decision: What was asked for.
        record: The run's own word on it; None where none came.
        refused: Why it was not carried out; empty when it was.
        before: How the run stood at its decision points up to the decision, oldest first.
        after: How it stood afterwards, as far as was waited for.
        ended: The run has ended meanwhile.
    """

    decision: AdaptationDecision
    record: DecisionRecord | None
    refused: str
    before: tuple[ModelPerformance, ...]
    after: tuple[ModelPerformance, ...]
    ended: bool

    @property
    def applied(self) -> bool:
        """Whether it was carried out."""
        return self.record is not None and self.record.applied


class RunClient(Subscriber):
    """The subscription of a run's telemetry that a health collector reads; it knows its way back into the run.

    Attributes:
        link: The line that it belongs to.
    """

    link: RunLink


class RunLink:
    """The line to one live run.

    Use it from one event loop. ``async with`` and ``with`` close its subscriptions.

    Args:
        run: The run's id, what :func:`esper.oona.find_runs` found, or an address of its telemetry (then it cannot be
            commanded).
        keys: Folder of CURVE keys, for a run that wants them.
        timeout_s: How long to wait for the run's answer to a command, and for its record.
        rewards: Weights and horizons of rewards; :meth:`execute_adaptation` waits for the short horizon.
        horizon_timeout_s: How long it waits for that.

    Attributes:
        oona_client: The subscription that a health collector reads.

    Raises:
        ConfigError: There is no such run, or its address is wrong.
    """

    def __init__(
        self,
        run: str | RunInfo,
        *,
        keys: str = "",
        timeout_s: float = 10.0,
        rewards: RewardConfig | None = None,
        horizon_timeout_s: float = 60.0,
    ) -> None:
        bus = BusConfig(transport="tcp", keys=keys) if keys else None
        self.run, self.keys = run, keys
        self.timeout_s, self.horizon_timeout_s = timeout_s, horizon_timeout_s
        self.oona_client = RunClient(run, TELEMETRY, config=bus)
        self.oona_client.link = self
        self._events = Subscriber(run, ("growth", "performance"), config=bus)
        self._computer = RewardComputer(rewards)
        self._points: deque[ModelPerformance] = deque(maxlen=_POINTS_KEPT)
        self._adapted_at: list[int] = []
        self._records: list[DecisionRecord] = []
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the run has said that it has ended."""
        self._drain()
        return self._ended

    async def execute_adaptation(self, decision: AdaptationDecision) -> AdaptationResult:
        """Have the run carry a decision out, and see how it goes on until the short horizon is over.

        Site, size and seed are left to the run: who saw health signals alone knows layers only.

        Args:
            decision: Anything but WAIT.

        Returns:
            What became of it; a run that refuses, or does not answer, is told of in ``refused``.
        """
        self._drain()
        mark = secrets.token_hex(6)
        refused = await self._command(decision, mark)
        record = await self._record(mark) if not refused else None
        if not refused and record is None:
            refused = f"the run took the command and told nothing of it for {self.timeout_s:g} s"
        refused = refused or (record.refused if record is not None else "")
        step = record.step if record is not None else self._points[-1].step if self._points else 0
        if record is not None and record.applied:
            await self._horizon(step)
        self._drain()
        return AdaptationResult(
            decision=decision,
            record=record,
            refused=refused,
            before=tuple(point for point in self._points if point.step <= step),
            after=tuple(point for point in self._points if point.step > step),
            ended=self._ended,
        )

    def compute_reward(self, result: AdaptationResult) -> float:
        """The reward of a result, in [−1, 1]; 0 where nothing was done, or where there is nothing to compare with."""
        reward = self.reward(result)
        if reward is None:
            _LOG.info(
                "no reward for %s: %s", result.decision.reason, result.refused or "nothing to compare with"
            )
            return 0.0
        return reward.total

    def reward(self, result: AdaptationResult) -> Reward | None:
        """The reward with its components; None where nothing was done, or there is nothing to compare with.

        The control is fitted to the training losses between the last adaptation before this one and the decision;
        with fewer than ``min_fit_points`` of them there is none.
        """
        if not result.applied or not result.before or not result.after:
            return None
        record = result.record
        assert record is not None
        since = max((step for step in self._adapted_at if step < record.step), default=-1)
        before = [point for point in result.before if point.step > since]
        if len(before) < 2:
            return None
        taken = _branch([before[-1], *result.after])
        steps = before[-1].step - before[0].step
        control = fitted_control(
            [point.step for point in before],
            [point.train_loss for point in before],
            taken,
            max(0.0, before[-1].training_flops - before[0].training_flops) / steps,
            before[-1].num_parameters,
            min_points=self._computer.config.min_fit_points,
        )
        if control is None:
            return None
        outcome = Outcome(
            candidate=_candidate(record.decision),
            total_steps=before[-1].total_steps,
            taken=taken,
            control=control.branch,
            control_stderr=control.stderr,
            control_noise=control.noise,
            held_out=False,
            adaptations_after=sum(step > record.step for step in self._adapted_at),
        )
        return self._computer.compute(outcome, over=result.ended)

    async def _command(self, decision: AdaptationDecision, mark: str) -> str:
        """Send it; returns why the run did not take it."""
        command = Decision(
            action=_ACTIONS[decision.action],  # type: ignore[arg-type]
            reason=f"{decision.reason} [{mark}]",
            policy="tamiyo-service",
            site=decision.layer,
            confidence=decision.confidence,
            urgency=min(1.0, decision.urgency),
            risk=decision.risk,
            numbers=decision.numbers,
        )
        try:
            # in a thread: the run looks into its inbox between two steps, and the loop has other things to do
            await asyncio.to_thread(send_command, self.run, command, timeout_s=self.timeout_s, keys=self.keys)
        except (EsperError, TimeoutError) as error:
            return str(error)
        return ""

    async def _record(self, mark: str) -> DecisionRecord | None:
        """The run's record of a command, which comes at its next safe point."""
        deadline_s = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline_s:
            self._drain()
            for record in self._records:
                if mark in record.decision.reason:
                    return record
            if self._ended:
                return None
            await asyncio.sleep(_POLL_S)
        return None

    async def _horizon(self, step: int) -> None:
        """Wait until the run is past the short horizon after ``step``, or over."""
        deadline_s = time.monotonic() + self.horizon_timeout_s
        while time.monotonic() < deadline_s:
            self._drain()
            last = self._points[-1] if self._points else None
            if self._ended:
                return
            if last is not None:
                end = step + round(self._computer.config.short * last.total_steps)
                if last.step >= min(end, last.total_steps):
                    return
            await asyncio.sleep(_POLL_S)

    def _drain(self) -> None:
        """Take what has come; between two calls it waits in the subscription."""
        while messages := self._events.poll(0):
            for _, message in messages:
                if isinstance(message, ModelPerformance):
                    if not self._points or message.step > self._points[-1].step:
                        self._points.append(message)
                elif isinstance(message, DecisionRecord):
                    self._records = [*self._records[-_POINTS_KEPT:], message]
                    if message.applied:
                        self._adapted_at.append(message.step)
                elif isinstance(message, RunRecord) and message.event == "end":
                    self._ended = True

    def close(self) -> None:
        """Close the subscriptions. Idempotent."""
        self.oona_client.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        name = self.run.run_id if isinstance(self.run, RunInfo) else self.run
        return f"RunLink({name!r}, {len(self._points)} decision points seen)"


def _branch(points: list[ModelPerformance]) -> Branch:
    """What was measured from the decision on; its last loss before stands for the decision itself."""
    first = points[0]
    flops, most = [], 0.0
    for point in points:
        most = max(most, point.training_flops - first.training_flops)
        flops.append(most)
    return Branch(
        steps=tuple(point.step for point in points),
        losses=tuple(point.train_loss for point in points),
        training_flops=tuple(flops),
        num_parameters=points[-1].num_parameters,
    )


def _candidate(decision: Decision) -> Candidate:
    """What was carried out, as far as the record of the run tells."""
    if decision.action in ("cull", "hold"):
        return Candidate(action=decision.action, seed_id=decision.site)
    if decision.action == "recycle":
        place = Placement(site="", source=decision.site, target=decision.site)
        return Candidate(action="recycle", placements=(place,))
    kind = decision.site.partition(":")[0]
    place = Placement(
        site=decision.site,
        source="",
        target="",
        kind=kind if kind in ("parallel", "bypass", "stack") else "",  # type: ignore[arg-type]
        blueprint=decision.blueprint,
        size=decision.size,
    )
    return Candidate(action="grow", placements=(place,))
