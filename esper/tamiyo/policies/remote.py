"""``remote``: a service decides, over the network, and training never waits for it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from esper.errors import GrowthError
from esper.messages import Decision
from esper.oona.config import check_address
from esper.tamiyo.graph.candidate_config import CandidateConfig
from esper.tamiyo.graph.carry_out import decisions
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.graph.history import History
from esper.tamiyo.graph.point import decision_point
from esper.tamiyo.policies.base import wait
from esper.tamiyo.policies.events import check_options
from esper.tamiyo.policies.registry import make_policy
from esper.tamiyo.service.client import ServiceClient
from esper.tamiyo.service.protocol import Answer, Refusal

if TYPE_CHECKING:
    from esper.tamiyo.state import GrowthState

__all__ = ["RemoteConfig", "RemotePolicy"]

_WAIT = "wait"


@dataclass(frozen=True)
class RemoteConfig:
    """Options.

    Attributes:
        address: Of the service, ``tcp://HOST:PORT`` or ``ipc:///path``.
        keys: Folder of CURVE keys (:mod:`esper.oona.keys`); needed beyond loopback.
        timeout_ms: How long an answer is expected; then it counts as missing.
        fallback: Policy that decides where an answer is missing; ``wait`` grows nothing then.
        fallback_options: Of that policy.
        max_age: Share of the run after which an answer is not applied any more.
        price: λ: the held-out loss, in nats, that a unit of log(parameters / host parameters) has to save.
        candidates: Which candidates are offered
            (:class:`~esper.tamiyo.graph.candidate_config.CandidateConfig`).
    """

    address: str = "tcp://127.0.0.1:7350"
    keys: str = ""
    timeout_ms: float = 10_000.0
    fallback: str = _WAIT
    fallback_options: Mapping[str, Any] = field(default_factory=dict)
    max_age: float = 0.05
    price: float = 0.03
    candidates: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_address(self.address, to_bind=False, setting="address", keys=self.keys)
        unknown = sorted(
            set(self.candidates) - {option.name for option in dataclasses.fields(CandidateConfig)}
        )
        check_options(
            self,
            (self.timeout_ms > 0, "timeout_ms should be positive"),
            (self.fallback != "remote", "fallback should be another policy than remote itself"),
            (self.fallback != _WAIT or not self.fallback_options, "waiting has no fallback_options"),
            (0.0 < self.max_age <= 1.0, "max_age should lie in (0, 1]"),
            (0.0 <= self.price < float("inf"), "price should be finite and not negative"),
            (not unknown, f"candidates has no option {', '.join(unknown)}"),
        )


@dataclass(frozen=True)
class _Question:
    """What was asked, and when (monotonic seconds)."""

    request_id: str
    point: DecisionPoint
    asked_s: float


@dataclass
class _Order:
    """An answer on its way into the model: what is still to be carried out, and what became of the rest."""

    request_id: str
    left: list[Decision]
    seed_ids: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    num_applied: int = 0


class RemotePolicy:
    """Sends the decision point away, and carries out what comes back.

    At a decision point the facts are sent in the background and the answer to that is WAIT; at the first step at
    which the service's answer is there it is applied, vetted as everything is. One request is under way at a time. A
    run that loses the service trains on, grows nothing (or lets ``fallback`` decide), and picks the service up again.

    Several processes that train one host act at decision points alone, so there an answer is applied at the next one.

    Args:
        config: Options.
    """

    name: str = "remote"
    config_type: ClassVar[type[RemoteConfig]] = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self.fallback = (
            None if config.fallback == _WAIT else make_policy(config.fallback, **config.fallback_options)
        )
        self._offers = CandidateConfig(**config.candidates)
        self._history = History()
        self._client: ServiceClient | None = None
        self._question: _Question | None = None
        self._order: _Order | None = None
        self._sequence = self._step = 0
        self._news = ""

    # ---------------------------------------------------------------- decision points

    def decide(self, state: GrowthState) -> list[Decision]:
        """Send the decision point away, unless an earlier one is still under way."""
        arrived = self.collect(state.step)
        if arrived:
            return arrived
        news, self._news = self._news, ""
        if self.expecting:
            self._history.note(state)
            assert self._question is not None
            return self._wait(state, f"the answer to step {self._question.point.run.step} is under way", news)
        missed, self._question = self._question, None
        point = decision_point(
            state, self._history, run_id=state.run_id or "run", price=self.config.price, config=self._offers
        )
        if all(candidate.unavailable for candidate in point.candidates[1:]):
            return self._wait(state, "nothing but waiting is available", news)
        self._ask(point, state.training_flops)
        if missed is not None and self.fallback is not None:
            return self.fallback.decide(state)
        lost = f"step {missed.point.run.step} was not answered in time" if missed is not None else ""
        return self._wait(state, "asked the service", lost or news)

    def _ask(self, point: DecisionPoint, training_flops: float) -> None:
        run = point.run
        if self._client is None or self._client.run_id != run.run_id:
            self.close()
            self._client = ServiceClient(self.config.address, run.run_id, keys=self.config.keys)
        self._sequence += 1
        # by its step: a run that is continued from a checkpoint asks the same again, and is answered the same
        self._question = _Question(f"{run.run_id}:{run.step}", point, time.monotonic())
        self._client.ask(self._question.request_id, self._sequence, point, training_flops=training_flops)

    def _wait(self, state: GrowthState, reason: str, news: str) -> list[Decision]:
        line = self._client.state if self._client is not None else "not connected"
        told = "; ".join(text for text in (reason, news, line) if text)
        return [wait(self.name, told, {"fraction": state.fraction, "train_loss": state.train_loss})]

    # ---------------------------------------------------------------- late answers

    @property
    def expecting(self) -> bool:
        """Whether an answer may still come in time."""
        question = self._question
        return question is not None and (
            1000.0 * (time.monotonic() - question.asked_s) < self.config.timeout_ms
        )

    @property
    def answered(self) -> bool:
        """Whether something has come."""
        return self._client is not None and self._client.answered

    def collect(self, step: int) -> list[Decision]:
        """Turn what has come into decisions; an answer that is too old, or WAIT, into none."""
        self._step = step
        for reply in self._client.take() if self._client is not None else ():
            question = self._question
            if question is None or reply.request_id not in (question.request_id, ""):
                continue  # to a question that was given up
            self._question = None
            if isinstance(reply, Refusal):
                self._news = f"the service refused: {reply.reason}"
            elif found := self._carry(reply, question, step):
                return found
        return []

    def _carry(self, answer: Answer, question: _Question, step: int) -> list[Decision]:
        point, request_id = question.point, answer.request_id
        assert self._client is not None
        if answer.candidate == 0:
            self._news = f"{answer.decider} waits: {answer.reason}"
            return []
        age = step - point.run.step
        if age > self.config.max_age * point.run.total_steps:
            why = f"came {age} steps late, more than {self.config.max_age:.0%} of the run"
        elif answer.candidate >= len(point.candidates):
            why = f"candidate {answer.candidate} of {len(point.candidates)} was chosen"
        else:
            try:
                orders = decisions(
                    point.candidates[answer.candidate],
                    policy=self.name,
                    reason=f"{answer.decider}: {answer.reason}",
                    confidence=answer.confidence,
                    urgency=answer.urgency,
                    risk=answer.risk,
                    numbers={
                        "asked_at_step": point.run.step,
                        "uncertainty": answer.uncertainty,
                        "value": answer.value,
                        "abstained": float(answer.abstained),
                    },
                )
            except GrowthError as error:
                why = str(error)
            else:
                self._order = _Order(request_id, list(orders))
                return orders
        self._news = f"the answer to step {point.run.step} was not used: {why}"
        self._client.report(request_id, applied=False, refused=why, step=step)
        return []

    def note(self, decision: Decision, *, refused: str, seed_id: str) -> None:
        """Report to the service when all of an answer was carried out or refused."""
        order = self._order
        if order is None or decision.policy != self.name:
            return
        about = (decision.action, decision.site)
        match = next((left for left in order.left if (left.action, left.site) == about), None)
        if match is None:
            return
        order.left.remove(match)
        order.num_applied += not refused
        order.seed_ids += [seed_id] if seed_id and decision.action == "germinate" else []
        order.refused += [refused] if refused else []
        if not order.left and self._client is not None:
            self._order = None
            self._client.report(
                order.request_id,
                applied=order.num_applied > 0,
                refused="; ".join(order.refused)[:4000],
                step=self._step,
                seed_ids=tuple(order.seed_ids),
            )

    def close(self) -> None:
        """Hang up; a later decision point opens the line again."""
        if self._client is not None:
            self._client.close()
            self._client = None
        self._question = None

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint; what is under way is asked again."""
        return {
            "history": self._history.state_dict(),
            "sequence": self._sequence,
            "fallback": None if self.fallback is None else self.fallback.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        self._history.load_state_dict(state["history"])
        self._sequence = int(state["sequence"])
        if self.fallback is not None and state["fallback"] is not None:
            self.fallback.load_state_dict(state["fallback"])
