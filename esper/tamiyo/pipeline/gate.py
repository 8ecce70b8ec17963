"""When to ask the rule instead: thresholds set by what choices were worth, on known and on unknown families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.judging import Reading
from esper.tamiyo.pipeline.dataset import Case
from esper.tamiyo.pipeline.deciding import choices
from esper.tamiyo.pipeline.judging import utility

__all__ = ["Gate", "Read", "Trial", "calibrate"]

CONFIDENCES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
"""Confidence thresholds that are tried; the last is the design document's."""

_SHARES = (0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Of known states, the shares that a threshold is tried to let through; one lets through everything."""

_NEVER = 1.0


@dataclass(frozen=True)
class Read:
    """Cases, and what a network says of each that was not trained on them."""

    cases: Sequence[Case]
    readings: Sequence[Reading]


@dataclass(frozen=True)
class Trial:
    """One pair of thresholds.

    Attributes:
        uncertainty: Above which the network abstains.
        novelty: Above which it does too.
        known: Mean utility on validation states.
        unknown: The same on families that the network was not trained on; NaN where none were held out.
        coverage: Share of validation states in which it does not abstain.
        coverage_unknown: The same of the others.
    """

    uncertainty: float
    novelty: float
    known: float
    unknown: float
    coverage: float
    coverage_unknown: float

    @property
    def worth(self) -> float:
        """Known and unknown families count alike."""
        return self.known if np.isnan(self.unknown) else 0.5 * (self.known + self.unknown)


@dataclass(frozen=True)
class Gate:
    """Thresholds, and what they were chosen from.

    Attributes:
        confidence: Threshold on confidence.
        chosen: Thresholds on uncertainty and novelty.
        never: The same states without any abstaining.
        always: All left to the fallback.
        confidences: Mean utility on validation states at each of :data:`CONFIDENCES`.
        trials: All pairs that were tried.
    """

    confidence: float
    chosen: Trial
    never: Trial
    always: Trial
    confidences: Sequence[float]
    trials: Sequence[Trial]

    def config(self, policy: PolicyConfig) -> PolicyConfig:
        """A network's config with these thresholds."""
        return replace(
            policy,
            adaptation_confidence_threshold=self.confidence,
            uncertainty_threshold=self.chosen.uncertainty,
            novelty_threshold=self.chosen.novelty,
        )


def calibrate(policy: PolicyConfig, known: Read, unknown: Sequence[Read]) -> Gate:
    """Choose thresholds by the mean utility of the choices that they lead to.

    First the confidence that a candidate needs, on validation states without abstaining: a logit is a utility
    over the temperature, so the documented .75 would ask for 1.1 temperatures of predicted utility before
    anything is done, however sure the network is. Then uncertainty and novelty together, on validation states and
    on families that were held out, which count alike: on validation states alone, which are like those that the
    network was trained on, nothing would be learned of when it has to be silent. Of equals the one that lets
    through most is taken, and then the one nearest to the documented thresholds.

    Args:
        policy: Of the network.
        known: Validation states.
        unknown: States of each family, read by a network that was trained without it.
    """
    confidences = [
        _trial(replace(policy, adaptation_confidence_threshold=c), known, [], _NEVER, _NEVER).known
        for c in CONFIDENCES
    ]
    # of equal worth, the highest: it acts least
    confidence = max((round(worth, 9), c) for worth, c in zip(confidences, CONFIDENCES, strict=True))[1]
    policy = replace(policy, adaptation_confidence_threshold=confidence)
    documented = PolicyConfig()
    uncertain = _levels(known, lambda reading: reading.epistemic, documented.uncertainty_threshold)
    novel = _levels(known, lambda reading: reading.novelty, documented.novelty_threshold)
    trials = [_trial(policy, known, unknown, u, n) for u in uncertain for n in novel]
    chosen = max(trials, key=partial(_preference, documented))
    never = next(t for t in trials if t.uncertainty == t.novelty == _NEVER)
    return Gate(confidence, chosen, never, _fallback(known, unknown), confidences, trials)


def _preference(documented: PolicyConfig, trial: Trial) -> tuple[float, float, float, float]:
    away = abs(trial.uncertainty - documented.uncertainty_threshold)
    away += abs(trial.novelty - documented.novelty_threshold)
    # rounding may not decide between thresholds that lead to the same choices
    return round(trial.worth, 9), trial.coverage, float(np.nan_to_num(trial.coverage_unknown)), -away


def _levels(known: Read, read: Callable[[Reading], float], documented: float) -> list[float]:
    """Thresholds that let through given shares of known states, everything, and the documented one."""
    values = np.array([read(reading) for reading in known.readings])
    # a threshold on a value lets that value through; between neighbours it holds for others as well
    levels = {float(min(1.0, max(0.0, q))) for q in np.quantile(values, _SHARES)}
    return sorted({round(level, 4) for level in levels} | {documented, _NEVER})


def _trial(
    policy: PolicyConfig, known: Read, unknown: Sequence[Read], uncertainty: float, novelty: float
) -> Trial:
    config = replace(policy, uncertainty_threshold=uncertainty, novelty_threshold=novelty)
    own = choices(config, known.cases, known.readings)
    cases = [case for read in unknown for case in read.cases]
    others = choices(config, cases, [reading for read in unknown for reading in read.readings])
    return Trial(
        uncertainty,
        novelty,
        known=utility(known.cases, own.candidates),
        unknown=utility(cases, others.candidates) if cases else float("nan"),
        coverage=own.coverage,
        coverage_unknown=others.coverage if cases else float("nan"),
    )


def _fallback(known: Read, unknown: Sequence[Read]) -> Trial:
    cases = [case for read in unknown for case in read.cases]
    return Trial(
        0.0,
        0.0,
        known=utility(known.cases, [case.fallback for case in known.cases]),
        unknown=utility(cases, [case.fallback for case in cases]) if cases else float("nan"),
        coverage=0.0,
        coverage_unknown=0.0,
    )
