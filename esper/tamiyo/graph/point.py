"""From a run's state to the plain facts that a learned policy decides on."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from esper.tamiyo.graph.candidates import CandidateConfig, candidates
from esper.tamiyo.graph.facts import Candidate, DecisionPoint, RunFacts, SeedFacts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from esper.tamiyo.graph.history import History
    from esper.tamiyo.state import GrowthState

__all__ = ["decision_point"]


def decision_point(
    state: GrowthState,
    history: History,
    *,
    run_id: str = "",
    price: float = 0.0,
    config: CandidateConfig | None = None,
    measure: bool = True,
) -> DecisionPoint:
    """Write down everything that is known when a decision is due.

    Args:
        state: The run now.
        history: Of this run; takes note of ``state``.
        run_id: Of the run.
        price: λ, utility lost per unit of log(parameters / host parameters).
        config: Which candidates are offered.
        measure: Measure the held-out loss (charged), when something may grow.
    """
    history.note(state)
    found = candidates(state, config, plan=history.plan, recycled=history.recycled)
    may_grow = any(c.action == "grow" and not c.unavailable for c in found)
    held_out = state.measure_held_out_loss() if measure and may_grow else None
    return DecisionPoint(
        run=_facts(state, history, found, run_id, price, held_out),
        topology=state.topology,
        signals=history.signals,
        candidates=found,
        timestamp=time.time(),
    )


def _facts(
    state: GrowthState,
    history: History,
    found: Sequence[Candidate],
    run_id: str,
    price: float,
    held_out: float | None,
) -> RunFacts:
    sites = {view.site.name: view.site for view in state.sites}
    return RunFacts(
        run_id=run_id,
        step=state.step,
        total_steps=state.total_steps,
        epoch=state.epoch,
        host_parameters=state.host_parameters,
        num_parameters=state.num_parameters,
        parameters_left=max(0, state.parameters_left),
        flops_left=max(0.0, state.flops_left),
        germinations_left=max(0, state.germinations_left),
        tokens_per_parameter=state.tokens_per_parameter,
        transformer=state.transformer,
        window_open=state.window_open,
        price=price,
        steps=history.steps,
        train_losses=history.train_losses,
        held_out_loss=held_out if held_out is not None and math.isfinite(held_out) else None,
        seeds=tuple(
            SeedFacts(
                seed_id=seed.seed_id,
                site=seed.site,
                source=sites[seed.site].source,
                target=sites[seed.site].target,
                blueprint=seed.blueprint,
                size=seed.size,
                stage=seed.stage,
                contribution=seed.contribution,
            )
            for seed in state.seeds
        ),
    )
