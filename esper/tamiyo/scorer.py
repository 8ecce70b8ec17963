"""Scores and computed starts at the precision that a run's FLOPs allow, charged to its books."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple

import torch

from esper.errors import GrowthError
from esper.kasmina.blueprints.dense import init_widen_closed_form
from esper.kasmina.blueprints.units import HiddenUnits
from esper.kasmina.body import Body
from esper.kasmina.closed_form import closed_form_start
from esper.kasmina.expressivity import SiteScore
from esper.kasmina.scoring import capture_rows, estimate_flops, score_sites
from esper.kasmina.seed import Seed
from esper.kasmina.sites import Site
from esper.messages import CacheHitRates
from esper.tamiyo.config import TamiyoConfig
from esper.tamiyo.host_run import HostRun, LossOnBatch
from esper.tamiyo.ledger import Ledger
from esper.tamiyo.ranks import mean_of
from esper.tamiyo.recorder import Recorder

__all__ = ["Scorer"]

_PRECISIONS = ((1, 16), (2, 16), (2, 8), (4, 8), (4, 4))
"""What is tried in turn: divisor of the rows, permutations of the null."""


class Scorer:
    """Asks the held-out batches (the last training batch where there are none) where capacity is missing.

    Args:
        config: Limits of rows and FLOPs.
        body: The host.
        run: Gives the batches.
        ledger: Charged.
        recorder: Told how often a score was reused.
        generator: Source of permutations and of random fan-in.
    """

    def __init__(
        self,
        config: TamiyoConfig,
        body: Body,
        run: HostRun,
        ledger: Ledger,
        recorder: Recorder,
        generator: torch.Generator,
    ) -> None:
        self.last: dict[str, float] = {}
        """Last whitened expressivity into each layer, by name."""
        self._config = config
        self._body = body
        self._run = run
        self._ledger = ledger
        self._recorder = recorder
        self._generator = generator
        self._cache: dict[tuple[int, tuple[str, ...], int], dict[str, SiteScore]] = {}
        self._hits = self._misses = 0

    def score(self, names: Sequence[str], size: int, *, step: int, total_steps: int) -> dict[str, SiteScore]:
        """Score bypass sites for ``size`` units; asking twice at one step costs once.

        Raises:
            GrowthError: An unknown site, or not even one can be scored for the FLOPs that are left.
        """
        key = (step, tuple(names), size)
        if key in self._cache:
            self._hits += 1
            return self._cache[key]
        self._misses += 1
        ranks = self._run.ranks
        scores = _mean_scores(
            ranks.attempt("scores of sites", lambda: self._scores(names, size, step, total_steps))
        )
        for name, score in scores.items():
            self.last[self._body.site(name).target] = score.score
        self._cache = {key: scores}
        self._recorder.publish(
            CacheHitRates(self._recorder.run_id, step, self._hits, self._misses, time.time())
        )
        return scores

    def _scores(
        self, names: Sequence[str], size: int, step: int, total_steps: int
    ) -> dict[str, tuple[float, ...]]:
        """Scores by site name, as the numbers of :class:`SiteScore`, on this process's batches."""
        batch = self._batch()
        wanted = [self._body.site(name) for name in names]
        sites, rows, permutations, price = self._affordable(wanted, batch.num_samples, step, total_steps)
        scores = score_sites(
            self._body,
            batch,
            sites,
            size=size,
            generator=self._generator,
            max_samples=rows,
            num_permutations=permutations,
        )
        self._ledger.charge_scoring(price)
        return {name: astuple(score) for name, score in scores.items()}

    def compute_start(self, seed: Seed) -> None:
        """Point new hidden units at what the loss gradient misses at their site (GROWTH.md §2).

        Raises:
            GrowthError: No gradient reaches the site.
        """
        branch = seed.branch
        assert isinstance(branch, HiddenUnits)
        batch = self._batch()
        most = self._config.probes.max_samples
        found = capture_rows(self._body, batch, [seed.site], max_samples=most).get(seed.site.name)
        ranks = self._run.ranks
        unreached = ranks.objection(
            "a closed-form start", "no gradient reaches the site" if found is None else ""
        )
        if found is None or unreached:
            raise GrowthError(f"closed-form start at {seed.site.name}: {unreached}; use widen_start='random'")
        A, B, G = (ranks.gather(rows) for rows in (found.A, found.B, found.G))
        start = closed_form_start(A, B, G, seed.size, generator=self._generator)
        init_widen_closed_form(branch, start.weight_in, start.bias_in)
        self._ledger.charge_measurement(
            estimate_flops(self._body, [seed.site], batch.num_samples, max_samples=most, num_permutations=0)
        )

    def batches(self) -> list[LossOnBatch]:
        """The batches to measure on."""
        return list(self._run.held_out()) or [self._run.recent()]

    def _batch(self) -> LossOnBatch:
        """The one batch whose rows scores are made of: a layer keeps those of its last call only."""
        return self.batches()[-1]

    def _affordable(
        self, sites: Sequence[Site], samples: int, step: int, total_steps: int
    ) -> tuple[list[Site], int, int, float]:
        """The best precision that the share of the run's FLOPs allows; then the cheapest sites alone."""
        most = self._config.probes.max_samples
        precisions = [(max(2, most // divisor), permutations) for divisor, permutations in _PRECISIONS]
        passes = self._price([], samples, *precisions[0])
        prices = {
            site.name: [self._price([site], samples, *precision) - passes for precision in precisions]
            for site in sites
        }
        given_up = sorted(sites, key=lambda site: (math.prod(site.source_shape), site.name))
        left = dict.fromkeys(site.name for site in sites)
        totals = [passes + sum(prices[name][i] for name in left) for i in range(len(precisions))]
        while left:
            for (rows, permutations), price in zip(precisions, totals, strict=True):
                if self._ledger.may_score(price, step, total_steps):
                    return [site for site in sites if site.name in left], rows, permutations, price
            last = given_up.pop().name
            del left[last]
            if left:
                totals = [total - price for total, price in zip(totals, prices[last], strict=True)]
        raise GrowthError(
            f"scoring a single site would cost {totals[-1]:.3g} FLOPs, more than max_scoring_fraction="
            f"{self._config.budget.max_scoring_fraction:g} of the run's training leaves"
        )

    def _price(self, sites: Sequence[Site], samples: int, rows: int, permutations: int) -> float:
        return estimate_flops(self._body, sites, samples, max_samples=rows, num_permutations=permutations)


def _mean_scores(answers: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, SiteScore]:
    """The mean over ranks of the scores of every site that all of them could score."""
    scores = {}
    for name in answers[0]:
        if all(name in answer for answer in answers):
            numbers = mean_of([answer[name] for answer in answers])
            scores[name] = SiteScore(*(number for number in numbers if number is not None))
    return scores
