"""What came of the decisions of a run that was served, from what it told at its decision points."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from esper.errors import EsperError
from esper.tamiyo.experience.records import Observation
from esper.tamiyo.experience.settling import settle
from esper.tamiyo.experience.store import ExperienceStore
from esper.tamiyo.graph.facts import DecisionPoint

__all__ = ["write_outcomes"]

_LOG = logging.getLogger("esper.tamiyo.service")
_OVER = 0.95
"""Share of a run after which its last decision point stands for its end: the end itself is not asked about."""


def write_outcomes(store: ExperienceStore, run_id: str, training_flops: Mapping[str, float]) -> None:
    """Write down how a run stood at its decision points, and what its decisions have earned.

    The control is fitted (:mod:`esper.tamiyo.rewards.counterfactual`); culls and rollbacks that the run made by itself
    are not known here. A run that left early may come back, so only one that was nearly over is settled for good.

    Args:
        store: Holds the decisions.
        run_id: Of the run.
        training_flops: Of the run at each decision, by its id.
    """
    try:
        last: DecisionPoint | None = None
        for experience in store.iterate(run_id=run_id):
            last = experience.decision.point
            flops = training_flops.get(experience.decision.decision_id)
            if flops is not None:
                store.observe(run_id, _observation(last, flops))
        if last is None:
            return
        over = last.run.fraction >= _OVER
        if over:
            store.end_run(run_id, last.run.step)
        written = settle(store, run_id, over=over)
        _LOG.info("run %s: %d outcomes written", run_id, written)
    except EsperError:  # decisions are safe; outcomes can be settled again
        _LOG.exception("the outcomes of run %s were not written", run_id)


def _observation(point: DecisionPoint, training_flops: float) -> Observation:
    run = point.run
    return Observation(
        step=run.step,
        train_loss=run.train_losses[-1] if run.train_losses else math.nan,
        held_out_loss=run.held_out_loss,
        num_parameters=run.num_parameters,
        training_flops=training_flops,
        timestamp=point.timestamp,
    )
