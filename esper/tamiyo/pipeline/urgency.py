"""What waiting costs, measured: the same run, the same candidate, one decision interval later."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np

from esper.atomic import replacing
from esper.errors import DataFormatError, EsperError
from esper.tamiyo.environment.config import BUDGETS
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.workers import LocalWorkers
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.graph.facts import Candidate, DecisionPoint
from esper.tamiyo.oracle.plan import GROWN_AT, StatePlan
from esper.tamiyo.oracle.records import StateRecord, utilities
from esper.tamiyo.oracle.trials import TRIED, reach
from esper.tamiyo.pipeline.dataset import Urgency

__all__ = ["INTERVAL", "measure_urgency"]

INTERVAL = 0.05
"""Share of a run between two decision points, as in :class:`~esper.tamiyo.environment.config.EpisodeConfig`."""


class _Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Of one state: nothing where waiting is best, or the state or the candidate could not be had again."""

    state_id: str
    found: tuple[Urgency, ...]


def measure_urgency(
    records: Sequence[StateRecord],
    path: Path,
    workers: LocalWorkers,
    done: Callable[[str], None],
    candidates: CandidateConfig = TRIED,
) -> list[Urgency]:
    """Measure what it costs to do the best candidate one interval later.

    The best candidate of one half of the repeats is postponed in a repeat of the other half, so that it is not
    chosen for the luck that it is then held against. The run is brought to the state anew and goes on in the
    order of data in which the candidate was tried at once. A state that is not reached again as the table has
    it, bit for bit (another version or processor made the table), is left out.

    Args:
        records: Training states.
        path: JSON file of what was measured, written after each few states.
        workers: Processes.
        done: Told of each state.
        candidates: What the table was offered.

    Raises:
        DataFormatError: The file is damaged.
    """
    known = {m.state_id: m for m in _read(path)}
    todo = [record for record in records if record.state_id not in known]
    for record in records:
        if record.state_id in known:
            done(record.state_id)
    size = max(1, 2 * workers.num_workers)
    for start in range(0, len(todo), size):
        for measured in workers.map(partial(_measure, offers=candidates), todo[start : start + size]):
            known[measured.state_id] = measured
            done(measured.state_id)
        _write(path, list(known.values()))
    return [urgency for record in records for urgency in known[record.state_id].found]


def _measure(record: StateRecord, offers: CandidateConfig) -> _Measured:
    table = utilities(record, 0.0)
    repeats = range(record.num_repeats)
    costs: dict[int, list[float]] = {}
    for repeat in repeats:
        others = [r for r in repeats if r != repeat]
        means = table[:, others].mean(axis=1)
        best = int(np.where(np.isnan(means), -np.inf, means).argmax())
        now = record.array(lambda outcome: outcome.held_out_loss)[best, repeat]
        if best == 0 or not math.isfinite(now):
            continue
        later = _later(record, best, repeat, offers)
        if later is not None:
            costs.setdefault(best, []).append(later - float(now))
    found = tuple(
        Urgency(state_id=record.state_id, candidate=candidate, cost=max(0.0, statistics.fmean(own)))
        for candidate, own in costs.items()
    )
    return _Measured(state_id=record.state_id, found=found)


def _later(record: StateRecord, candidate: int, repeat: int, offers: CandidateConfig) -> float | None:
    """Held-out loss at the end when the candidate is done an interval later; None where it cannot be."""
    episode, point = reach(_plan(record), candidates=offers, later=INTERVAL)
    if point is None or _course(point) != _course(record.point):
        return None
    branch = episode.branch(repeat=repeat + 1)  # the order in which the candidate was tried at once
    branch.act(0)
    following = branch.advance()
    if following is None:
        return None
    wanted = _places(record.point.candidates[candidate])
    same = [
        index
        for index, offered in enumerate(following.candidates)
        if _places(offered) == wanted and not offered.unavailable
    ]
    if not same:
        return None
    loss = _end(branch, same[0])
    return loss if math.isfinite(loss) else None


def _end(branch: Episode, candidate: int) -> float:
    try:
        branch.act(candidate)
        return branch.finish().held_out_loss
    except EsperError:  # a run that failed has no loss, as in the table
        return math.inf


def _plan(record: StateRecord) -> StatePlan:
    run, total = record.point.run, record.spec.total_steps
    budget = (run.num_parameters + run.parameters_left) / run.host_parameters
    return StatePlan(
        record.spec,
        record.moment,
        run.step,
        min(BUDGETS, key=lambda known: abs(known - budget)),
        round(GROWN_AT * total) if record.moment == "grown" else None,
    )


def _course(point: DecisionPoint) -> tuple[object, ...]:
    """What tells whether a state is the one that the table has."""
    run = point.run
    return run.step, run.num_parameters, run.train_losses, run.held_out_loss


def _places(candidate: Candidate) -> tuple[object, ...]:
    """What a candidate does, whatever its scores are."""
    places = tuple((p.site, p.source, p.target, p.blueprint, p.size) for p in candidate.placements)
    return candidate.action, places


def _read(path: Path) -> list[_Measured]:
    if not path.is_file():
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[_Measured])
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise DataFormatError(f"{path} holds no measured costs of waiting: {error}; delete it") from error


def _write(path: Path, measured: Sequence[_Measured]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(msgspec.json.encode(measured))
