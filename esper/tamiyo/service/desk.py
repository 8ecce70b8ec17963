"""The service without its sockets: requests in, replies out, decisions in rounds."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from esper.errors import EsperError, MessageError
from esper.oona.codec import FrameError
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.service.config import ServiceConfig
from esper.tamiyo.service.deciders import Choice, Decider
from esper.tamiyo.service.gates import closed_gate
from esper.tamiyo.service.protocol import (
    Answer,
    Ask,
    Beat,
    BeatBack,
    Busy,
    Cause,
    Hello,
    Leave,
    Left,
    Noted,
    Refusal,
    Reply,
    Report,
    Request,
    Welcome,
    check_point,
    read_request,
    topology_hash,
)
from esper.tamiyo.service.runs import RunEntry, RunTable, Waiting
from esper.tamiyo.service.stats import ServiceStats

__all__ = ["Book", "Desk"]

_LOG = logging.getLogger("esper.tamiyo.service")
_STORE_ERRORS = (EsperError, OSError, sqlite3.Error)


class Book(Protocol):
    """Where decisions are written down before anybody hears of them, and found again after a restart."""

    def answer(self, request_id: str) -> Answer | None:
        """The answer that a request got, if it got one."""

    def write(self, decided: Sequence[tuple[Ask, Answer]], now: float) -> None:
        """Write decisions down; they are on disk when this returns. Those that were there stay as they are."""

    def report(self, report: Report) -> bool:
        """Write down what became of a decision; False when there is no such decision."""

    def ended(self, run_id: str) -> None:
        """A run has left or fallen silent: see what has come of its decisions, in the background."""

    def adapted_at(self, run_id: str, since: float) -> dict[str, float]:
        """Request id -> Unix seconds of what a run was told to add or renew, and has not reported as undone."""


class Desk:
    """Takes requests, decides them in rounds, and says what to answer to whom.

    Args:
        config: Limits and thresholds.
        decider: Who chooses.
        book: Where it is written down.
        service_id: Of this start of the service.
        stats: Counts.
        clock: Monotonic seconds.
        wall: Unix seconds; cooldowns outlive a restart.
    """

    def __init__(
        self,
        config: ServiceConfig,
        decider: Decider,
        book: Book,
        *,
        service_id: str,
        stats: ServiceStats | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.decider = decider
        self.book = book
        self.service_id = service_id
        self.stats = stats if stats is not None else ServiceStats()
        self.runs = RunTable()
        self.stopping = False
        self.store_works = True
        self._clock = clock
        self._wall = wall

    # ---------------------------------------------------------------- requests

    def take(self, sender: bytes, data: bytes) -> Reply | None:
        """Take one frame; None when the reply comes after a round.

        Args:
            sender: Routing id.
            data: As it arrived; nothing in it is trusted.
        """
        try:
            request = read_request(data, max_message_bytes=self.config.max_message_bytes)
        except FrameError as error:
            return self._refuse("malformed" if error.kind == "unknown" else error.kind, str(error))
        try:
            reply = self._handle(sender, request)
        except _STORE_ERRORS as error:
            reply = self._unstored(request.run_id, _request_id(request), error)
        self._count()
        return reply

    def _handle(self, sender: bytes, request: Request) -> Reply | None:
        now = self._clock()
        run = self.runs.get(request.run_id)
        if run is not None:
            run.sender, run.heard_s = sender, now
        if isinstance(request, Hello):
            return self._register(sender, request, now)
        if isinstance(request, Beat):
            return BeatBack(
                run_id=request.run_id,
                number=request.number,
                service_id=self.service_id,
                registered=run is not None,
            )
        if isinstance(request, Leave):
            self.runs.remove(request.run_id)
            self.book.ended(request.run_id)
            return Left(run_id=request.run_id)
        if isinstance(request, Report):
            return self._note(request)
        return self._enqueue(run, request, now)

    def _register(self, sender: bytes, hello: Hello, now: float) -> Reply:
        if self.stopping:
            return self._refuse("stopping", "the service is ending", hello.run_id)
        if hello.run_id not in [run.run_id for run in self.runs] and len(self.runs) >= self.config.max_runs:
            return self._refuse("full", f"{len(self.runs)} runs are served, as many as may be", hello.run_id)
        run = self.runs.register(hello.run_id, sender, hello.topology, now)
        window_s = max(self.config.rate_window_s, self.config.cooldown_s)
        run.cadence.adapted_at = self.book.adapted_at(hello.run_id, self._wall() - window_s)
        return Welcome(
            run_id=hello.run_id,
            service_id=self.service_id,
            decider=self.decider.name,
            heartbeat_s=self.config.heartbeat_s,
            expiry_s=self.config.expiry_s,
            max_message_bytes=self.config.max_message_bytes,
        )

    def _enqueue(self, run: RunEntry | None, ask: Ask, now: float) -> Reply | None:
        known = self.book.answer(ask.request_id)
        if known is not None:
            if known.run_id != ask.run_id or known.candidate >= len(ask.point.candidates):
                text = f"request {ask.request_id!r} was answered before, to run {known.run_id!r} on another point"
                return self._refuse("invalid", text, ask.run_id, ask.request_id)
            self.stats.repeats += 1
            self.book.write([(ask, known)], self._wall())  # a crash may have come before its experience
            return known
        if run is not None and any(w.ask.request_id == ask.request_id for w in run.waiting):
            self.stats.repeats += 1
            return None
        if refusal := self._objection(run, ask):
            return refusal
        assert run is not None
        config = self.config
        if self.runs.num_waiting >= config.max_queue or len(run.waiting) >= config.max_queue_per_run:
            self.stats.busy += 1
            return Busy(
                run_id=ask.run_id,
                request_id=ask.request_id,
                retry_after_ms=config.retry_after_ms,
                waiting=self.runs.num_waiting,
            )
        self.runs.put(run, ask, now)
        return None

    def _objection(self, run: RunEntry | None, ask: Ask) -> Refusal | None:
        """Why a request cannot be decided; None when it can."""
        cause: Cause
        if self.stopping:
            cause, text = "stopping", "the service is ending"
        elif run is None:
            cause, text = "unregistered", f"run {ask.run_id!r} is not known here: say hello first"
        elif (found := topology_hash(ask.point.topology)) != run.topology:
            cause, text = "topology", f"run {ask.run_id!r} said topology {run.topology}, and sent {found}"
        elif ask.sequence <= run.last_sequence:
            cause, text = "order", f"request {ask.sequence} comes after {run.last_sequence}"
        else:
            try:
                check_point(ask.point, ask.run_id)
            except MessageError as error:
                cause, text = "invalid", str(error)
            else:
                return None
        return self._refuse(cause, text, ask.run_id, ask.request_id)

    def _note(self, report: Report) -> Reply:
        if not self.book.report(report):
            text = f"there was no decision {report.request_id!r} to report on"
            return self._refuse("invalid", text, report.run_id, report.request_id)
        run = self.runs.get(report.run_id)
        if run is not None and not report.applied:
            run.cadence.undo(report.request_id)
        self.stats.reports += 1
        return Noted(run_id=report.run_id, request_id=report.request_id)

    # ---------------------------------------------------------------- rounds

    def wait_s(self) -> float:
        """Seconds until a round is due; inf when nothing waits."""
        return max(0.0, self.runs.next_due_s(self._cycle_s) - self._clock())

    def expire(self) -> list[str]:
        """Forget runs that have fallen silent; returns their names."""
        silent = self.runs.expire(self._clock() - self.config.expiry_s)
        self.stats.expired += len(silent)
        for run_id in silent:
            self.book.ended(run_id)
        self._count()
        return silent

    def decide(self) -> list[tuple[bytes, Reply]]:
        """Decide what is due, in one pass; returns the replies with the routing ids they go to."""
        begun = self._clock()
        taken = self.runs.take(begun, self._cycle_s, self.config.max_batch)
        if not taken:
            return []
        choices = self._choose([waiting.ask.point for _, waiting in taken])
        replies: list[tuple[bytes, Reply]] = []
        answered: list[tuple[RunEntry, Waiting, Answer]] = []
        for (run, waiting), choice in zip(taken, choices, strict=True):
            run.decided_s = begun
            if isinstance(choice, str):
                ask = waiting.ask
                replies.append((run.sender, self._refuse("undecided", choice, ask.run_id, ask.request_id)))
            else:
                answered.append((run, waiting, self._answer(run, waiting.ask, choice)))
        replies += self._store(answered)
        self.stats.rounds += 1
        self.stats.round_time.add(self._clock() - begun)
        self._count()
        return replies

    def _choose(self, points: Sequence[DecisionPoint]) -> list[Choice | str]:
        """A choice for each point, or why there is none: one point that breaks the decider spoils no other's."""
        try:
            choices = self.decider.choose(points)
            return [choice.problem(point) or choice for choice, point in zip(choices, points, strict=True)]
        except Exception as error:  # points come from outside, and a decider is a network over them
            if len(points) > 1:
                return [self._choose([point])[0] for point in points]
            _LOG.exception(
                "the decider %s failed on a point of run %s", self.decider.name, points[0].run.run_id
            )
            return [
                f"the decider {self.decider.name} failed on this point: {type(error).__name__}: {error}"[
                    :4000
                ]
            ]

    def _answer(self, run: RunEntry, ask: Ask, choice: Choice) -> Answer:
        now = self._wall()
        gate, why = closed_gate(ask.point, choice, run.cadence, self.config, now)
        final = 0 if gate else choice.candidate
        # at once, so that a later request of the same round would meet it
        run.cadence.note(ask.request_id, ask.point.candidates[final], now)
        return Answer(
            run_id=ask.run_id,
            request_id=ask.request_id,
            sequence=ask.sequence,
            candidate=final,
            confidence=choice.confidence,
            uncertainty=choice.uncertainty,
            value=choice.value,
            urgency=choice.urgency,
            risk=choice.risk,
            reason=f"{choice.reason}; {why}" if gate else choice.reason,
            decider=self.decider.name,
            version=self.decider.version,
            preferred=choice.candidate,
            logprob=choice.logprob,
            gate=gate,
            abstained=choice.abstained,
        )

    def _store(self, answered: Sequence[tuple[RunEntry, Waiting, Answer]]) -> list[tuple[bytes, Reply]]:
        if not answered:
            return []
        try:
            self.book.write([(waiting.ask, answer) for _, waiting, answer in answered], self._wall())
        except _STORE_ERRORS as error:
            for run, _, answer in answered:
                run.cadence.undo(answer.request_id)
            return [
                (run.sender, self._unstored(answer.run_id, answer.request_id, error))
                for run, _, answer in answered
            ]
        self.store_works = True
        now = self._clock()
        for run, waiting, answer in answered:
            run.num_decisions += 1
            self.stats.latency.add(now - waiting.arrived_s)
            self.stats.decisions[waiting.ask.point.candidates[answer.candidate].action] += 1
            self.stats.abstentions += answer.abstained
            if answer.gate:
                self.stats.gated[answer.gate] += 1
        return [(run.sender, answer) for run, _, answer in answered]

    # ---------------------------------------------------------------- inside

    @property
    def _cycle_s(self) -> float:
        return 0.0 if self.stopping else self.config.cycle_ms / 1000.0

    def _refuse(self, cause: Cause, reason: str, run_id: str = "", request_id: str = "") -> Refusal:
        if not self.stats.refusals[cause]:
            _LOG.warning("refused a request (%s): %s; further ones are counted without a line", cause, reason)
        self.stats.refusals[cause] += 1
        return Refusal(cause=cause, reason=reason[:4096], run_id=run_id, request_id=request_id)

    def _unstored(self, run_id: str, request_id: str, error: Exception) -> Refusal:
        self.store_works = False
        _LOG.error("the store does not work, so nothing is decided: %s", error)
        return self._refuse(
            "unstored", f"nothing was decided, because the store failed: {error}", run_id, request_id
        )

    def _count(self) -> None:
        self.stats.num_runs, self.stats.num_waiting = len(self.runs), self.runs.num_waiting


def _request_id(request: Request) -> str:
    return request.request_id if isinstance(request, Ask | Report) else ""
