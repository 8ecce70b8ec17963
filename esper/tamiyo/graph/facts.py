"""A decision point as plain facts: what a policy is asked, a service is sent and a store keeps.

Everything here is a msgspec struct, so that the same facts travel on the bus, lie in the experience store
and in the oracle table, and can be turned into a graph again by any later version of the features.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from esper.kasmina.topology import ModelTopology
from esper.messages import Count, Fraction, HealthSignal, NonNegative, Stage

__all__ = [
    "FACTS_VERSION",
    "WAIT",
    "Candidate",
    "CandidateAction",
    "DecisionPoint",
    "Placement",
    "RunFacts",
    "SeedFacts",
]

FACTS_VERSION = 1
"""Counts changes of these structs; stored beside them."""

CandidateAction = Literal["wait", "grow", "cull", "recycle", "hold"]


class Placement(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One seed that a candidate would plant, or the place that it is about.

    Attributes:
        site: Site name; empty where the run is to choose one into ``target``.
        kind: ``parallel``, ``bypass`` or ``stack``; empty where no site is meant (a layer to recycle).
        source: Layer whose input the seed reads.
        target: Layer to whose output it adds.
        blueprint: What it is made of; empty where that is left open.
        size: As the blueprint understands it; 0 where that is left open.
        long: The site leads from the host's input, or an early layer, to an output layer.
        score: Whitened expressivity of the site; None where it was not scored.
        score_excess: ``score`` less the mean of the scores with permuted gradients (the noise floor).
        score_z: The same in standard deviations of the permuted scores.
    """

    site: str
    source: str
    target: str
    kind: Literal["", "parallel", "bypass", "stack"] = ""
    blueprint: str = ""
    size: Count = 0
    long: bool = False
    score: float | None = None
    score_excess: float | None = None
    score_z: float | None = None


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One thing that could be done at a decision point.

    ``grow`` plants every placement at once (several for a uniform widening). ``recycle`` is about one layer,
    ``cull`` and ``hold`` about the seed ``seed_id``; ``hold`` keeps a seed that is being observed from
    becoming part of the host until the next decision point. ``wait`` does nothing.

    Attributes:
        action: What.
        placements: Where; empty for ``wait``.
        seed_id: Of ``cull`` and ``hold``.
        parameters: What it would add to the model (negative for a cull).
        flops: What it would add to one forward pass of one sample.
        unavailable: Why it may not be chosen now; empty when it may.
    """

    action: CandidateAction
    placements: tuple[Placement, ...] = ()
    seed_id: str = ""
    parameters: int = 0
    flops: int = 0
    unavailable: str = ""


WAIT = Candidate(action="wait")
"""Stands first among the candidates of every decision point."""


class SeedFacts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A seed that is in the model; ``contribution`` is None before it was measured."""

    seed_id: str
    site: str
    source: str
    target: str
    blueprint: str
    size: Count
    stage: Stage
    contribution: float | None


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The run at a decision point.

    Attributes:
        run_id: Of the run.
        step: Optimizer steps so far.
        total_steps: Length of the run.
        epoch: Current epoch.
        host_parameters: Of the ungrown host.
        num_parameters: Now.
        parameters_left: That the budget still allows.
        flops_left: Training FLOPs that the budget still allows growth to add; inf without a limit.
        germinations_left: In this epoch.
        tokens_per_parameter: Positions trained on over the whole run, over ``host_parameters``.
        transformer: The host has residual blocks with attention.
        window_open: The step lies in the growth window.
        price: λ, utility lost per unit of log(parameters / host parameters).
        steps: Of ``train_losses``, ascending.
        train_losses: Mean training loss between decision points, the last one up to now.
        held_out_loss: Now; None when nothing is held out or it was not measured.
        seeds: In the model, culled ones excluded.
    """

    run_id: str
    step: Count
    total_steps: Count
    epoch: Count
    host_parameters: Count
    num_parameters: Count
    parameters_left: Count
    flops_left: NonNegative
    germinations_left: Count
    tokens_per_parameter: NonNegative
    transformer: bool
    window_open: bool
    price: NonNegative = 0.0
    steps: tuple[Count, ...] = ()
    train_losses: tuple[float, ...] = ()
    held_out_loss: float | None = None
    seeds: tuple[SeedFacts, ...] = ()

    @property
    def fraction(self) -> Fraction:
        """Share of the run that is over, in [0, 1]."""
        return min(1.0, self.step / max(1, self.total_steps))


class DecisionPoint(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a learned policy knows when it decides.

    Attributes:
        run: The run.
        topology: The traced host.
        signals: Health signals of the last sampled steps, oldest first.
        candidates: What could be done, :data:`WAIT` first.
        timestamp: Unix seconds; not used for deciding.
    """

    run: RunFacts
    topology: ModelTopology
    signals: tuple[HealthSignal, ...]
    candidates: tuple[Candidate, ...]
    timestamp: float = 0.0
