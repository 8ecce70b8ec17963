"""What came of the decisions of a run, from what was observed of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

from esper.errors import DataFormatError
from esper.tamiyo.experience.records import Experience, Incident, Observation, OutcomeFacts
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.facts import WAIT
from esper.tamiyo.rewards import Branch, Outcome, RewardComputer
from esper.tamiyo.rewards.counterfactual import fitted_control

__all__ = ["measured", "settle"]


def settle(
    store: ExperienceStore,
    run_id: str,
    computer: RewardComputer | None = None,
    *,
    over: bool = True,
    only: Collection[str] | None = None,
) -> int:
    """Write down the outcomes of a run's decisions as far as they are known; those that are final stay.

    A live run has no control, so one is fitted to the losses between the last adaptation and the decision
    (:mod:`esper.tamiyo.rewards.counterfactual`); with too few of them the measurements are kept without a reward.
    Later adaptations fall into the same account, and are counted in it.

    Args:
        store: Holds decisions, observations and incidents.
        run_id: Of the run.
        computer: Of rewards.
        over: The run has ended.
        only: Ids of the decisions to look at; all of the run when None.

    Returns:
        Outcomes written, all in one transaction.
    """
    computer = computer or RewardComputer()
    observations = {o.step: o for o in store.observations(run_id)}
    seen = sorted(observations.values(), key=lambda o: o.step)
    incidents = store.incidents(run_id)
    known: set[str] = set()
    found: dict[str, OutcomeFacts] = {}
    for experience in store.iterate(run_id=run_id) if only is None else filter(None, map(store.get, only)):
        if experience.outcome is not None and experience.outcome.final:
            reward = experience.outcome.reward
        else:
            outcome = measured(experience, seen, incidents, min_points=computer.config.min_fit_points)
            if outcome is None:
                continue
            reward = computer.compute(outcome, over=over, known=known)
            if reward is None and not over:
                continue  # there will be more to see
            found[experience.decision.decision_id] = OutcomeFacts(measured=outcome, reward=reward)
        if reward is not None and reward.new_kind:
            known.add(reward.new_kind)
    return store.add_outcomes(found) if found else 0


def measured(
    experience: Experience,
    observations: Sequence[Observation],
    incidents: Sequence[Incident],
    *,
    min_points: int = 6,
) -> Outcome | None:
    """Measurements of one decision and of its control, or None where the run was not observed at it.

    Args:
        experience: The decision.
        observations: Of its run, ascending by step.
        incidents: Of its run.
        min_points: Losses before the decision without which no control is fitted.

    Raises:
        DataFormatError: Observations contradict each other.
    """
    point = experience.decision.point
    start = point.run.step
    after = [o for o in observations if o.step >= start]
    if not after or after[0].step != start:
        return None
    adaptations = [i for i in incidents if i.kind == "adaptation"]
    last_before = max((i.step for i in adaptations if i.step < start), default=-1)
    before = [o for o in observations if last_before < o.step <= start]
    held_out = all(o.held_out_loss is not None for o in (*before, *after))
    refused = bool(experience.refused) and not experience.seed_ids
    taken = _branch(after, experience, incidents, held_out)
    control = None
    if experience.decision.candidate.action != "wait" and not refused and len(before) > 1:
        steps_before = before[-1].step - before[0].step
        control = fitted_control(
            [o.step for o in before],
            [_loss(o, held_out) for o in before],
            taken,
            (before[-1].training_flops - before[0].training_flops) / steps_before,
            before[-1].num_parameters,
            min_points=min_points,
            seconds_per_step=max(0.0, before[-1].timestamp - before[0].timestamp) / steps_before,
        )
    return Outcome(
        candidate=WAIT if refused else experience.decision.candidate,  # nothing was done
        total_steps=point.run.total_steps,
        price=point.run.price,
        taken=taken,
        control=None if control is None else control.branch,
        control_stderr=() if control is None else control.stderr,
        control_noise=0.0 if control is None else control.noise,
        held_out=held_out,
        adaptations_after=sum(start < i.step <= after[-1].step for i in adaptations),
    )


def _branch(
    after: Sequence[Observation], experience: Experience, incidents: Sequence[Incident], held_out: bool
) -> Branch:
    start = after[0]
    places = experience.decision.candidate.placements
    own = {*experience.seed_ids, *(p.site or p.target for p in places)}
    kinds = [i.kind for i in incidents if start.step <= i.step <= after[-1].step and i.target in own]
    flops = [o.training_flops - start.training_flops for o in after]
    if any(b < a for a, b in itertools.pairwise(flops)):
        raise DataFormatError(
            f"run {experience.decision.run_id}: expected training FLOPs that ascend, got {flops} from step "
            f"{start.step} on; two runs of one id have written to the store"
        )
    return Branch(
        steps=tuple(o.step for o in after),
        losses=tuple(_loss(o, held_out) for o in after),
        training_flops=tuple(flops),
        seconds=_ascending([o.timestamp - start.timestamp for o in after]),
        num_parameters=after[-1].num_parameters,
        rollbacks=kinds.count("rollback"),
        culls=kinds.count("cull"),
        non_finite=kinds.count("non_finite"),
    )


def _loss(observation: Observation, held_out: bool) -> float:
    loss = observation.held_out_loss if held_out else observation.train_loss
    return math.nan if loss is None else loss


def _ascending(seconds: Sequence[float]) -> tuple[float, ...]:
    """Wall time; a clock that was set back stands still."""
    found: list[float] = []
    for value in seconds:
        found.append(max(value, found[-1] if found else 0.0))
    return tuple(found)
