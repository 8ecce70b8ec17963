"""Try every candidate of a state: branch the run, carry the candidate out, train to the end of the schedule."""

from __future__ import annotations

import math
import time
from random import Random

from esper.errors import EsperError
from esper.tamiyo.environment.config import EpisodeConfig
from esper.tamiyo.environment.episode import Episode
from esper.tamiyo.environment.specs import derived_seed
from esper.tamiyo.graph.candidate_config import LEARNED, CandidateConfig
from esper.tamiyo.graph.facts import DecisionPoint
from esper.tamiyo.oracle.plan import StatePlan
from esper.tamiyo.oracle.records import Outcome, StateRecord

__all__ = ["TRIED", "reach", "try_state"]

TRIED = LEARNED
"""What is offered, and so tried: fewer places of each kind than a host has, so that a table has more hosts."""


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
    episode, point = reach(plan, candidates=candidates)
    if point is None or all(candidate.unavailable for candidate in point.candidates[1:]):
        return None
    outcomes = tuple(
        _try(episode, index, repeat)
        for index, candidate in enumerate(point.candidates)
        if not candidate.unavailable
        for repeat in range(repeats)
    )
    return StateRecord(
        state_id=plan.state_id, moment=plan.moment, spec=plan.spec, point=point, outcomes=outcomes
    )


def reach(
    plan: StatePlan, *, candidates: CandidateConfig = TRIED, later: float | None = None
) -> tuple[Episode, DecisionPoint | None]:
    """Train to the first decision point at ``plan.step`` or later, growing once on the way where that is planned.

    Args:
        plan: The state; the same one is reached each time.
        candidates: What is offered.
        later: Ask once more, this share of the run later.

    Returns:
        The run, and the decision point at which it stands; None where it ended before it was asked.
    """
    spec = plan.spec
    total = spec.total_steps
    steps = [step for step in (plan.grown_at, plan.step) if step is not None]
    if later is not None:
        steps.append(min(total - 1, plan.step + max(1, round(later * total))))
    config = EpisodeConfig(
        budget=plan.budget, fractions=tuple(step / total for step in steps), candidates=candidates
    )
    episode = Episode(spec, config)
    random = Random(derived_seed("oracle growth", spec.name))
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
    return episode, point


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
