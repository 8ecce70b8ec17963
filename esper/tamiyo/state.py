"""What a policy sees at a decision point, and the protocol that every policy follows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from esper.kasmina.blueprints.registry import Cost
from esper.kasmina.expressivity import SiteScore
from esper.kasmina.sites import Site
from esper.kasmina.topology import ModelTopology
from esper.messages import Decision, HealthSignal, Stage

__all__ = ["GrowthState", "LatePolicy", "Policy", "SeedView", "SiteView"]


@dataclass(frozen=True)
class SiteView:
    """A site and whether it may be used now; ``unavailable`` says why not (cooldown, embargo, occupied)."""

    site: Site
    unavailable: str = ""


@dataclass(frozen=True)
class SeedView:
    """A seed that is in the model, culled ones excluded."""

    seed_id: str
    site: str
    blueprint: str
    size: int
    stage: Stage
    contribution: float | None


@dataclass(frozen=True)
class GrowthState:
    """One decision point.

    Attributes:
        step: Optimizer steps taken so far.
        total_steps: Length of the run in optimizer steps.
        epoch: Current epoch.
        window_open: Whether ``step`` lies within the configured growth window (early in the run).
        topology: The traced host.
        sites: Every site with its availability.
        seeds: Every seed in the model.
        health: Last signal of each layer by qualified name; empty before the first sampled step.
        host_parameters: Parameters of the ungrown host.
        num_parameters: Parameters now.
        parameters_left: Parameters that the budget still allows.
        flops_left: Training FLOPs that the budget still allows growth to add (inf when unlimited).
        germinations_left: Germinations that the per-epoch limit still allows.
        train_loss: Mean training loss since the last decision point.
        measure_held_out_loss: Measures the loss on the held-out batches (once a decision point, and
            charged); returns None when there are none.
        tokens_per_parameter: Positions trained on over the whole run, divided by host parameters.
        transformer: The host has residual blocks with attention.
        cost: ``cost(site_name, blueprint, size)`` before anything is built.
        score: ``score(site_names, size)`` returns the whitened expressivity of bypass sites against
            their permutation noise floor; runs a hooked forward and backward, charged to the budget.
        generator: Random numbers for policies; part of the checkpoint.
        measure_saving: Share of the held-out loss that the named seeds save together: switched off minus on,
            over on, with the host as it has adapted to them (charged); None when nothing is held out.
        seeds_left: Seeds that may be on their way besides those that are now.
        training_flops: Training FLOPs of the run so far, scoring and culled seeds charged.
        run_id: Of the run.
    """

    step: int
    total_steps: int
    epoch: int
    window_open: bool
    topology: ModelTopology
    sites: Sequence[SiteView]
    seeds: Sequence[SeedView]
    health: Mapping[str, HealthSignal]
    host_parameters: int
    num_parameters: int
    parameters_left: int
    flops_left: float
    germinations_left: int
    train_loss: float
    measure_held_out_loss: Callable[[], float | None]
    tokens_per_parameter: float
    transformer: bool
    cost: Callable[[str, str, int], Cost]
    score: Callable[[Sequence[str], int], dict[str, SiteScore]]
    generator: torch.Generator
    measure_saving: Callable[[Sequence[str]], float | None] = lambda seed_ids: None
    seeds_left: int = sys.maxsize
    training_flops: float = 0.0
    run_id: str = ""

    @property
    def fraction(self) -> float:
        """Share of the run that is over, in [0, 1]."""
        return self.step / max(1, self.total_steps)


class Policy(Protocol):
    """Decides when, where and what to grow."""

    name: str

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer a decision point with at least one decision; WAIT is one, with its reason."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next decision depends on besides the state; plain types and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""


@runtime_checkable
class LatePolicy(Protocol):
    """A policy that may answer between decision points: somebody elsewhere decides, and training does not wait."""

    @property
    def expecting(self) -> bool:
        """Whether an answer may come before the next decision point."""

    @property
    def answered(self) -> bool:
        """Whether :meth:`collect` has something; asked at every step while an answer is expected."""

    def collect(self, step: int) -> list[Decision]:
        """What has come since the last decision point, for ``step``; vetted like any other decision."""

    def note(self, decision: Decision, *, refused: str, seed_id: str) -> None:
        """Take note of what became of a decision, of this policy or any other."""

    def close(self) -> None:
        """Hang up; a later decision point opens the line again."""
