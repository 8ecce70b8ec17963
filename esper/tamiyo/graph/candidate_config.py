"""Which candidates a decision point offers."""

from __future__ import annotations

from dataclasses import dataclass

from esper.tamiyo.policies.events import check_options

__all__ = ["LEARNED", "CandidateConfig"]


@dataclass(frozen=True)
class CandidateConfig:
    """Options.

    Attributes:
        blueprints: What may be grown, most wanted first.
        shares: Of what the budgets leave; a site gets a candidate for the size that each share buys.
        min_size: Smaller sizes are left out, unless the blueprint itself ends below.
        max_candidates: Of one decision point, WAIT included.
        max_long: Long bypasses; 0 offers none, and no ``shortcut`` either.
        max_sites: Single hidden layers.
        max_stacks: Blocks after which a copy may stand.
        max_beside: Pairs of a place beside a layer and a blueprint; each in its largest size alone.
        min_dormancy: Layers with a larger share of dormant units may be recycled.
        max_recycled: Layers that may be recycled, the sleepiest first.
        scored: Measure whitened expressivity where growth is possible, on hosts where it was found to tell
            something (no transformers, GROWTH.md §5). It costs FLOPs, which are charged.
        score_size: Hidden units that sites are scored for.
        shortcut: Offer long bypasses at all.
    """

    blueprints: tuple[str, ...] = (
        "widen", "conv_widen", "shortcut", "stack", "bottleneck", "lowrank", "depthwise", "attention",
    )  # fmt: skip
    shares: tuple[float, ...] = (0.25, 1.0)
    min_size: int = 4
    max_candidates: int = 64
    max_long: int = 6
    max_sites: int = 16
    max_stacks: int = 4
    max_beside: int = 8
    min_dormancy: float = 0.05
    max_recycled: int = 8
    scored: bool = True
    score_size: int = 16
    shortcut: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "blueprints", tuple(self.blueprints))  # lists come from files
        object.__setattr__(self, "shares", tuple(self.shares))
        limits = (self.max_long, self.max_sites, self.max_stacks, self.max_beside, self.max_recycled)
        check_options(
            self,
            (bool(self.blueprints), "blueprints should not be empty"),
            (bool(self.shares), "shares should not be empty"),
            (all(0.0 < share <= 1.0 for share in self.shares), "every share should lie in (0, 1]"),
            (self.min_size >= 1, "min_size should be at least 1"),
            (self.max_candidates >= 2, "max_candidates should be at least 2"),
            (min(limits) >= 0, "no max_... should be negative"),
            (0.0 <= self.min_dormancy <= 1.0, "min_dormancy should lie in [0, 1]"),
            (self.score_size >= 1, "score_size should be at least 1"),
        )


LEARNED = CandidateConfig(max_beside=2, max_long=2, max_sites=3, max_recycled=2)
"""What the oracle table was made with, and so what the learned policy was trained on and is offered: all ways to
stack and to widen alike, the narrowest layers, the two longest ways around, and of what lies beside single layers two
examples, which were found to hardly help a narrow layer (GROWTH.md §2)."""
