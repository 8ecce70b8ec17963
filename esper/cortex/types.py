"""What is routed, to whom, and what came of it: the words that all parts of Cortex share.

A task is a text to be done by one of several masters, or a starving layer to be answered by one of several
families of blueprints; one code serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from esper.messages import Count, Fraction, NonNegative

__all__ = ["Master", "MasterRecord", "Opinion", "Route", "Router", "Task", "TaskOutcome"]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be done.

    Attributes:
        task_id: Unique among the tasks of a log.
        text: What is to be done, in words; a starving layer's case text in growth.
        code: Source code that belongs to it; empty without any.
        features: Numbers that belong to it (a graph state's); their names are the model's affair.
        kind: Type of task, where one is known.
        group: Tasks of one group say the same: they stand in one split and count once.
    """

    task_id: str
    text: str
    code: str = ""
    features: tuple[float, ...] = ()
    kind: str = ""
    group: str = ""


class Master(msgspec.Struct, frozen=True, kw_only=True):
    """Who can do tasks. ``description`` is enough to begin with: it says in words what belongs to this master."""

    name: str
    description: str


class MasterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """How a master has done lately.

    Attributes:
        success_rate: Share of recent tasks that succeeded; None without any.
        num_tasks: Tasks that the rate is made of.
        load: Share of its capacity in use.
        latency_ms: Median time from task to outcome; None without any.
    """

    success_rate: Fraction | None = None
    num_tasks: Count = 0
    load: Fraction = 0.0
    latency_ms: NonNegative | None = None


class Opinion(msgspec.Struct, frozen=True, kw_only=True):
    """What one member of an ensemble (or a router alone) says.

    Attributes:
        source: ``neural``, ``cases``, ``rules`` or another member's name.
        probabilities: Master -> probability; they sum to one.
        reason: For people.
        latency_ms: It took.
    """

    source: str
    probabilities: dict[str, Fraction]
    reason: str
    latency_ms: NonNegative = 0.0


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A decision about one task.

    Attributes:
        task_id: Of the task.
        master: Who is to do it; empty when the router abstains.
        ranked: Best masters with their probabilities, best first.
        confidence: Calibrated probability that ``master`` (or the best of ``ranked``) is right.
        in_scope: Score that the task belongs to any master at all; higher is more so.
        success: Probability that the task will succeed there; None where it is not predicted.
        propensity: Probability with which ``master`` was chosen (1 without exploration): what off-policy
            evaluation needs.
        abstained: Why nobody was chosen; empty when somebody was.
        opinions: Of the members that took part.
        model: Version of the model that decided.
    """

    task_id: str
    master: str
    ranked: tuple[tuple[str, Fraction], ...]
    confidence: Fraction
    in_scope: float
    success: Fraction | None = None
    propensity: Fraction = 1.0
    abstained: str = ""
    opinions: tuple[Opinion, ...] = ()
    model: str = ""


class TaskOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a task ended; None where it was not recorded.

    Attributes:
        task_id: Of the task.
        master: Who did it.
        success: Whether it was done.
        duration_s: Seconds of work.
        tokens: Language-model tokens; parameters in growth.
        ended: ``completed``, or ``censored`` when it was stopped from outside, so that ``duration_s`` is a bound.
        timestamp: Unix seconds at the end.
    """

    task_id: str
    master: str
    success: bool | None
    duration_s: NonNegative | None = None
    tokens: Count | None = None
    ended: Literal["completed", "censored"] = "completed"
    timestamp: float = 0.0


class Router(Protocol):
    """Whoever can decide about tasks."""

    def route(self, tasks: Sequence[Task], *, top_k: int = 3) -> list[Route]:
        """Decide about each task; what cannot be decided is an abstention, never a guess or an exception."""
