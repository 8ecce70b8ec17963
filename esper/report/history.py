"""The life of each seed, put together from a run's events: for the swimlane, the counts, the size curve."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from esper.messages import DecisionRecord, Event, GovernorRecord, RunRecord, Stage, TransitionRecord

__all__ = [
    "Mark",
    "Outcomes",
    "SeedHistory",
    "Segment",
    "growth_marks",
    "outcomes",
    "parameter_curve",
    "seeds",
]

GONE: frozenset[Stage] = frozenset({"culled", "embargoed", "dormant"})
"""Stages in which a seed is no longer in the network."""

MarkKind = Literal["germinate", "fossilise", "cull", "recycle", "rollback", "restart"]


@dataclass
class Segment:
    """One stage of one seed from step ``start``; ``end`` is None while it lasts."""

    stage: Stage
    start: int
    end: int | None = None


@dataclass
class SeedHistory:
    """One seed's way through the stages; ``size`` is 0 where its blueprint has none or it is not known."""

    seed_id: str
    site: str
    blueprint: str
    size: int = 0
    segments: list[Segment] = field(default_factory=list)
    fossilized_at: int | None = None
    culled_at: int | None = None

    @property
    def label(self) -> str:
        """``widen @ bypass:fc1->fc2 (16)``."""
        return f"{self.blueprint} @ {self.site}" + (f" ({self.size})" if self.size else "")

    def enter(self, stage: Stage, step: int) -> None:
        """Close the current stage at ``step`` and open the next one, unless the seed is gone."""
        if self.segments and self.segments[-1].end is None:
            self.segments[-1].end = step
        if stage == "fossilized":
            self.fossilized_at = step
        if stage == "culled":
            self.culled_at = step
        if stage not in GONE:
            self.segments.append(Segment(stage, step))


@dataclass(frozen=True)
class Outcomes:
    """What became of a run's seeds. Those still on their way at the end are the difference."""

    germinated: int
    fossilized: int
    culled: int


@dataclass(frozen=True)
class Mark:
    """A moment worth marking on a curve; ``label`` says what, in two or three words."""

    step: int
    kind: MarkKind
    label: str


def seeds(events: Iterable[Event]) -> list[SeedHistory]:
    """Return the seeds of a run in the order of germination."""
    found: dict[str, SeedHistory] = {}
    for event in events:
        if isinstance(event, DecisionRecord):
            decision = event.decision
            if not (event.applied and decision.action == "germinate" and event.seed_id):
                continue
            seed = found.get(event.seed_id)
            if seed is None:
                seed = found[event.seed_id] = SeedHistory(event.seed_id, decision.site, decision.blueprint)
                seed.enter("germinated", event.step)
            seed.size = decision.size
        elif isinstance(event, TransitionRecord):
            seed = found.get(event.seed_id)
            if seed is None:
                if event.target in GONE:  # the end of an embargo whose seed was in a part that was cut off
                    continue
                seed = found[event.seed_id] = SeedHistory(event.seed_id, event.site, event.blueprint)
            elif event.target == "germinated":
                continue  # the decision has opened it
            seed.enter(event.target, event.step)
    return list(found.values())


def outcomes(events: Iterable[Event]) -> Outcomes:
    """Count seeds germinated, fossilised and culled."""
    histories = seeds(events)
    return Outcomes(
        germinated=len(histories),
        fossilized=sum(seed.fossilized_at is not None and seed.culled_at is None for seed in histories),
        culled=sum(seed.culled_at is not None for seed in histories),
    )


def growth_marks(events: Iterable[Event]) -> list[Mark]:
    """Return germinations, fossilisations, culls, recyclings, rollbacks and restarts in order of step."""
    events = list(events)
    marks: list[Mark] = []
    for seed in seeds(events):
        if seed.segments:
            size = f" {seed.size}" if seed.size else ""
            marks.append(Mark(seed.segments[0].start, "germinate", seed.blueprint + size))
        if seed.fossilized_at is not None:
            marks.append(Mark(seed.fossilized_at, "fossilise", f"{seed.blueprint} kept"))
        if seed.culled_at is not None:
            marks.append(Mark(seed.culled_at, "cull", f"{seed.blueprint} culled"))
    for event in events:
        if isinstance(event, DecisionRecord) and event.applied and event.decision.action == "recycle":
            marks.append(Mark(event.step, "recycle", "recycle"))
        elif isinstance(event, DecisionRecord) and event.applied and event.decision.action == "wait":
            marks.append(Mark(event.step, "restart", "trained afresh"))  # finish=retrain: the search is over
        elif isinstance(event, GovernorRecord) and event.action == "rollback":
            marks.append(Mark(event.step, "rollback", "rollback"))
    return sorted(marks, key=lambda mark: mark.step)


def parameter_curve(events: Sequence[Event], initial: int | None = None) -> list[tuple[float, int]]:
    """Return (step, parameters) at every change, from the counts that events carry.

    Of several events in one step the last one stands: it was written after the change.

    Args:
        events: of one run, in order.
        initial: parameters before the first step, where known.
    """
    latest: dict[int, int] = {} if initial is None else {0: initial}
    for event in events:
        if isinstance(event, DecisionRecord | TransitionRecord):
            latest[event.step] = event.num_parameters
        elif isinstance(event, RunRecord) and isinstance(event.info.get("num_parameters"), int):
            latest[event.step] = event.info["num_parameters"]
    curve: list[tuple[float, int]] = []
    for step in sorted(latest):
        if not curve or curve[-1][1] != latest[step]:
            curve.append((step, latest[step]))
    return curve
