"""``expressivity``: grow where the gradient says that capacity is missing, and only there.

The rule, at a due event:

1. *Transformers* go by tokens per parameter: at 110 or fewer wait, above widen every MLP alike
   (GROWTH.md §8; by score it was 0.04-0.05 nats worse, §5).
2. Other hosts whose data passes three or more layers in series: test the longest free bypass around the
   hidden layers. If it clears the floor, germinate it: the strongest single action measured (§6).
3. Else test the bypasses over single hidden layers, and the long ones from early layers, and germinate at
   the largest excess among those that clear the floor.
4. If nothing clears the floor, wait; that event is used up, because looking costs FLOPs.

A site clears the floor when its score stands above the 95 % quantile of its permuted scores, by ``min_z``
of their standard deviations, and the excess explains at least ``min_share`` of the directions that the
loss gradient has at the target. Significance alone is not enough: at n = 1024 it finds ever-present
traces that are not worth a seed. Measured on 18 digits MLPs (Adam, 30 epochs, cosine; a linear map from
the input to the logits at 7 % of the run; held-out loss, 2 seeds): where the excess was .01 of the
directions the final loss fell by 3 %, at .07-.09 by 15-18 %, at .17-.21 by 33-47 %, from .29 on by 43-74 %.

Where scoring is not possible (its share of the FLOPs is too small), the shape decides alone: a layer
less than ``bad_shape`` as wide as what comes before and behind it is a neck to lead around, or to widen.

Apart from events, layers whose dormancy passes ``recycle_above`` are recycled (§9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from esper.errors import GrowthError
from esper.messages import Decision
from esper.tamiyo.policies.base import Choice, EventPolicy, Pause
from esper.tamiyo.policies.dormant import Recycler
from esper.tamiyo.policies.events import EventConfig, check_options
from esper.tamiyo.policies.shape import HiddenLayer, hidden_layers, layers_in_series, long_bypasses, units

if TYPE_CHECKING:
    from esper.kasmina.expressivity import SiteScore
    from esper.kasmina.sites import Site
    from esper.tamiyo.state import GrowthState

__all__ = ["ExpressivityConfig", "ExpressivityPolicy"]

AROUND = ("widen", "shortcut")
"""What is laid along a long bypass: hidden units of its own where it takes them, else a linear map."""
_MOST_TOLD = 32
"""Layers whose width or neck a decision tells: the narrowest."""
ENOUGH_IN_SERIES = 3
"""Layers in series from which on a long bypass can be worth more than widening."""


@dataclass(frozen=True)
class ExpressivityConfig(EventConfig):
    """Options; with ``num_events=0`` it recycles and does not grow.

    Attributes:
        min_z: Standard deviations of the permuted scores by which a score has to exceed their mean.
        min_share: Excess, over the smaller width of source and target, that makes a seed worth having.
        min_tokens_per_parameter: A transformer that sees no more tokens per parameter than this waits.
        max_sites: Sites scored at one event besides the way around; of more, the narrower half is where layers
            are narrowest, and the rest is drawn at random.
        bad_shape: A layer narrower than this share of what lies before and behind it is a neck; asked
            only where sites cannot be scored.
        recycle_above: Dormancy above which a layer is recycled; 1 for never.
        recycle_cooldown_steps: Optimizer steps between two recyclings of one layer.
    """

    min_z: float = 3.0
    min_share: float = 0.025
    min_tokens_per_parameter: float = 110.0
    max_sites: int = 16
    bad_shape: float = 0.5
    recycle_above: float = 0.3
    recycle_cooldown_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            self,
            (self.min_z >= 0.0, "min_z should not be negative"),
            (0.0 <= self.min_share <= 1.0, "min_share should lie in [0, 1]"),
            (self.min_tokens_per_parameter >= 0.0, "min_tokens_per_parameter should not be negative"),
            (self.max_sites >= 1, "max_sites should be at least 1"),
            (0.0 <= self.bad_shape <= 1.0, "bad_shape should lie in [0, 1]"),
            (0.0 <= self.recycle_above <= 1.0, "recycle_above should lie in [0, 1]"),
            (self.recycle_cooldown_steps >= 0, "recycle_cooldown_steps should not be negative"),
        )


@dataclass(frozen=True)
class _Candidate:
    """A bypass that may be germinated, with its score where there is one."""

    site: Site
    blueprint: str
    around: bool = False
    score: SiteScore | None = None

    @property
    def share(self) -> float:
        """Excess over the directions that the seed could explain at all."""
        image = len(self.site.source_shape) == 3
        directions = max(1, min(units(self.site.source_shape, image), self.site.target_units))
        return self.excess / directions

    @property
    def excess(self) -> float:
        """Score above its noise floor."""
        return 0.0 if self.score is None else self.score.excess


class ExpressivityPolicy(EventPolicy[ExpressivityConfig]):
    """Early and few events, tested against noise; see the module for the rule."""

    name: str = "expressivity"
    config_type: ClassVar[type[ExpressivityConfig]] = ExpressivityConfig

    def __init__(self, config: ExpressivityConfig) -> None:
        super().__init__(config)
        self._recycler = Recycler(self.name, config.recycle_above, config.recycle_cooldown_steps)

    def decide(self, state: GrowthState) -> list[Decision]:
        """Answer a decision point with recyclings and germinations, or one WAIT."""
        recyclings = self._recycler.decide(state)
        growth = super().decide(state)
        acts = any(decision.action != "wait" for decision in growth)
        return [*recyclings, *growth] if acts or not recyclings else recyclings

    def choose(self, state: GrowthState) -> list[Choice] | Pause:
        """Follow the rule for the kind of host."""
        return self._transformer(state) if state.transformer else self._bypass(state)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {**super().state_dict(), "recycler": self._recycler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take on what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._recycler.load_state_dict(state["recycler"])

    def _transformer(self, state: GrowthState) -> list[Choice] | Pause:
        """Widen every MLP alike if the run is long for the host's size."""
        tpp, least = state.tokens_per_parameter, self.config.min_tokens_per_parameter
        layers = hidden_layers(state)
        numbers = {"tokens_per_parameter": tpp, "min_tokens_per_parameter": least}
        numbers |= {f"width:{layer.name}": float(layer.width) for layer in layers[:_MOST_TOLD]}
        if tpp <= least:
            few = f"{tpp:.0f} tokens a parameter are too few for growth to pay; it does above {least:.0f}"
            return Pause(few, numbers)
        over = {layer.view.site.name for layer in layers}
        grown = {seed.site: seed.size for seed in state.seeds if seed.site in over}
        todo = [layer for layer in layers if layer.view.site.name not in grown]
        free = [layer for layer in todo if not layer.view.unavailable]
        if not free:
            rest = f"{len(todo)} MLPs are unavailable" if todo else f"all {len(layers)} MLPs are widened"
            return Pause(rest if layers else "this transformer has no MLP that can be widened", numbers)
        # Those that no germination is left for come with a later event, and are to be no wider.
        size = self.fit(state, [(layer.view.site.name, layer.blueprint) for layer in todo], whole=True)
        size = min([size, *grown.values()])
        if not size:
            return self.too_small(state, f"widening {len(todo)} MLPs")
        reason = f"{tpp:.0f} tokens a parameter, more than {least:.0f}: all MLPs are widened by {size} units"
        return [
            Choice(layer.view.site.name, layer.blueprint, size, reason, numbers=numbers)
            for layer in free[: state.germinations_left]
        ]

    def _bypass(self, state: GrowthState) -> list[Choice] | Pause:
        """Lead around the hidden layers, or widen one of them."""
        layers = hidden_layers(state)
        in_series = layers_in_series(state.topology)
        necks = {layer.name: layer.neck for layer in layers}
        numbers: dict[str, float] = {"layers_in_series": in_series, "bad_shape": self.config.bad_shape}
        narrowest = sorted(necks, key=lambda name: necks[name])[:_MOST_TOLD]
        numbers |= {f"neck:{name}": necks[name] for name in narrowest}
        lead, others = self._candidates(state, layers, in_series)
        deep = len(others) > self.config.max_sites
        others = self._sampled(state, others, necks)
        if not lead and not others:
            return Pause("no bypass is available", numbers)
        seen: list[_Candidate] = []
        problem = ""
        small = False
        together = _score(state, [*lead, *others], self.config.min_size) if deep and lead else None
        # The way around is tried alone first: if it clears the floor, the rest need not be paid for. Only through
        # so many layers a second pass costs more than the scores of a sample.
        for candidates in (lead, others):
            if not candidates:
                continue
            scored, problem = together or _score(state, candidates, self.config.min_size)
            names = {candidate.site.name for candidate in candidates}
            scored = [candidate for candidate in scored if candidate.site.name in names]
            seen += scored
            numbers |= _score_numbers(scored)
            good = sorted(filter(self._clears, scored), key=lambda c: -c.excess)
            for candidate in good if scored else self._by_shape(candidates, necks):
                place = (candidate.site.name, candidate.blueprint)
                size = self.fit(state, [place], whole=candidates is lead)
                small = small or not size
                if size:
                    return [_choice(candidate, size, necks, numbers)]
        if small:
            return Pause(self.too_small(state, "what would help").reason, numbers, spends=bool(seen))
        if not seen:
            return Pause(f"sites cannot be scored ({problem}), and no free layer is a neck", numbers)
        best = max(seen, key=lambda c: c.share)
        share = f"{best.share:.1%} of the gradient's directions"
        return Pause(
            f"no site clears its noise floor; {best.site.name}, the best, would explain {share}",
            numbers,
            spends=True,
        )

    def _candidates(
        self, state: GrowthState, layers: Sequence[HiddenLayer], in_series: int
    ) -> tuple[list[_Candidate], list[_Candidate]]:
        """The way around from the host's input, if there is one to test first; and all other bypasses."""
        lead: list[_Candidate] = []
        others = [
            _Candidate(layer.view.site, layer.blueprint) for layer in layers if not layer.view.unavailable
        ]
        if in_series >= ENOUGH_IN_SERIES:
            over = {layer.view.site.name for layer in layers}
            for bypass in long_bypasses(state, AROUND):
                site = bypass.view.site
                if not bypass.used and not bypass.view.unavailable and site.name not in over:
                    first = bypass.from_input and not lead
                    (lead if first else others).append(_Candidate(site, bypass.blueprint, around=True))
        return lead, others

    def _sampled(
        self, state: GrowthState, candidates: list[_Candidate], necks: Mapping[str, float]
    ) -> list[_Candidate]:
        """No more candidates than are scored at one event, in their order."""
        if len(candidates) <= self.config.max_sites:
            return candidates
        drawn = torch.randperm(len(candidates), generator=state.generator).tolist()
        # The narrowest layer is the right one in half to three quarters of states (GROWTH.md §1). Sorting is
        # stable, so that of equally narrow ones the order drawn decides.
        narrow = sorted(drawn, key=lambda i: _neck(candidates[i], necks))[: self.config.max_sites // 2]
        others = [i for i in drawn if i not in narrow]
        chosen = sorted([*narrow, *others[: self.config.max_sites - len(narrow)]])
        return [candidates[i] for i in chosen]

    def _clears(self, candidate: _Candidate) -> bool:
        score = candidate.score
        assert score is not None
        significant = score.score > score.quantile and score.z >= self.config.min_z
        return significant and score.excess > 0 and candidate.share >= self.config.min_share

    def _by_shape(self, candidates: Sequence[_Candidate], necks: Mapping[str, float]) -> list[_Candidate]:
        """What leads around, or widens, a neck: the narrowest first."""
        if min(necks.values(), default=1.0) >= self.config.bad_shape:
            return []
        around = [candidate for candidate in candidates if candidate.around]
        over = [c for c in candidates if not c.around and necks[c.site.source] < self.config.bad_shape]
        return [*around, *sorted(over, key=lambda c: necks[c.site.source])]


def _neck(candidate: _Candidate, necks: Mapping[str, float]) -> float:
    return 1.0 if candidate.around else necks[candidate.site.source]


def _score(state: GrowthState, candidates: Sequence[_Candidate], size: int) -> tuple[list[_Candidate], str]:
    """Those candidates that could be scored, with their scores; or none, and why."""
    try:
        scores = state.score([candidate.site.name for candidate in candidates], size)
    except GrowthError as error:  # beyond its share of the FLOPs, or nothing finite to score
        return [], str(error)
    found = [replace(c, score=scores[c.site.name]) for c in candidates if c.site.name in scores]
    return found, "" if found else "no gradient reaches them"


def _choice(
    candidate: _Candidate, size: int, necks: Mapping[str, float], numbers: Mapping[str, float]
) -> Choice:
    site, score = candidate.site, candidate.score
    if score is None:
        neck = min(necks, key=lambda name: necks[name]) if candidate.around else site.source
        reason = f"{neck} is a neck, {necks[neck]:.2f} times as wide as what lies around it (sites were not scored)"
        # A rule of thumb: the narrowest layer is the right one in half to three quarters of states (GROWTH.md §1).
        return Choice(site.name, candidate.blueprint, size, reason, 0.5, numbers)
    share = f"{candidate.share:.1%} of the directions of the gradient at {site.target}"
    reason = (
        f"the input of {site.source} explains {share} beyond noise (z = {score.z:.1f}) that nothing reads yet"
    )
    return Choice(site.name, candidate.blueprint, size, reason, 1.0 - score.p_value, numbers)


def _score_numbers(scored: Sequence[_Candidate]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for candidate in scored:
        score, name = candidate.score, candidate.site.name
        assert score is not None
        numbers |= {
            f"score:{name}": score.score,
            f"floor:{name}": score.floor,
            f"excess:{name}": score.excess,
            f"z:{name}": score.z,
            f"share:{name}": candidate.share,
        }
    return numbers
