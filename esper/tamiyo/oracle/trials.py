"""Try every candidate of a state: branch the run, carry the candidate out, train to the end of the schedule."""

from __future__ import annotations

import math
import time
from random import Random

from esper.errors import EsperError
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.specs import derived_seed
from esper.tamiyo.graph.candidates import CandidateConfig
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.oracle.plan import StatePlan
from esper.tamiyo.oracle.records import Outcome, StateRecord

__all__ = ["TRIED", "try_state"]

TRIED = CandidateConfig(max_beside=3, max_long=4)
"""What is offered, and so tried: all ways to widen, to stack and to recycle, the long ways in part, and of what lies
beside single layers three examples, which were found to hardly help a narrow layer (GROWTH.md §2)."""


def try_state(
    plan: StatePlan, *, repeats: int = 2, candidates: CandidateConfig = TRIED
) -> StateRecord | None:
    """Bring a run to the state and try everything that is offered there.

    Args:
        plan: The state.
        repeats: Orders of the data in which each candidate is tried.
        candidates: What is offered.

    Returns:
        The state with all outcomes; None where nothing but WAIT is offered, or the run ends before it is asked.

    Raises:
        DataNotFoundError: A sealed host's data are not below ``ESPER_DATA_DIR``.
    """
    spec = plan.spec
    steps = [step for step in (plan.grown_at, plan.step) if step is not None]
    config = EpisodeConfig(
        budget=plan.budget,
        fractions=tuple(step / spec.total_steps for step in steps),
        candidates=candidates,
    )
    episode = Episode(spec, config)
    point = _reach(episode, plan)
    if point is None or all(candidate.unavailable for candidate in point.candidates[1:]):
        return None
    outcomes = tuple(
        _try(episode, index, repeat)
        for index, candidate in enumerate(point.candidates)
        if not candidate.unavailable
        for repeat in range(repeats)
    )
    return StateRecord(state_id=plan.state_id, moment=plan.moment, spec=spec, point=point, outcomes=outcomes)


def _reach(episode: Episode, plan: StatePlan) -> DecisionPoint | None:
    """Train to the first decision point at ``plan.step`` or later, growing once on the way where that is planned."""
    random = Random(derived_seed("oracle growth", plan.spec.name))
    grows = plan.grown_at is not None
    while (point := episode.advance()) is not None and episode.step < plan.step:
        most = point.run.parameters_left // 2  # or nothing would be left to choose between later
        growths = [
            index
            for index, candidate in enumerate(point.candidates)
            if candidate.action == "grow" and not candidate.unavailable and candidate.parameters <= most
        ]
        chosen = growths[int(random.random() * len(growths))] if grows and growths else 0
        grows = grows and not chosen
        episode.act(chosen)
    return point


def _try(episode: Episode, candidate: int, repeat: int) -> Outcome:
    """The end of the run after one candidate, in the order of data number ``repeat``."""
    started = time.perf_counter()
    branch = episode.branch(repeat=repeat + 1)  # 0 is the order in which the run got here
    try:
        branch.act(candidate)
        end = branch.finish()
    except EsperError as error:
        return _failed(branch, candidate, repeat, started, f"{type(error).__name__}: {error}")
    if not (math.isfinite(end.held_out_loss) and math.isfinite(end.test_loss)):
        return _failed(branch, candidate, repeat, started, "ended without a finite loss")
    return Outcome(
        candidate=candidate,
        repeat=repeat,
        held_out_loss=end.held_out_loss,
        test_loss=end.test_loss,
        test_accuracy=end.test_accuracy,
        parameters=end.num_parameters,
        training_flops=end.training_flops,
        forward_flops=branch.body.flops,
        wall_time_s=time.perf_counter() - started,
        culled=end.culled,
        rolled_back=end.rollbacks,
        refused="; ".join(end.refused),
    )


def _failed(branch: Episode, candidate: int, repeat: int, started: float, error: str) -> Outcome:
    return Outcome(
        candidate=candidate,
        repeat=repeat,
        held_out_loss=math.inf,
        test_loss=math.inf,
        test_accuracy=None,
        parameters=branch.body.num_parameters,
        training_flops=0.0,
        forward_flops=branch.body.flops,
        wall_time_s=time.perf_counter() - started,
        error=error,
    )
