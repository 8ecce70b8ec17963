"""Thresholds from made-up numbers: what is known, what is not, and what the fallback would have done."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pipeline_tables import records

from esper.tamiyo.network.config import PolicyConfig
from esper.tamiyo.network.judging import Reading
from esper.tamiyo.pipeline.dataset import Case, make_dataset
from esper.tamiyo.pipeline.deciding import choices
from esper.tamiyo.pipeline.gate import CONFIDENCES, Read, calibrate
from esper.tamiyo.pipeline.judging import difference, score, utility

POLICY = PolicyConfig(hidden_dim=8)


def cases(split: str = "validation") -> list[Case]:
    data = make_dataset([r for r in records() if r.split != "sealed"], (0.0,))
    found: tuple[Case, ...] = getattr(data, split)
    return list(found)


def reading(
    case: Case, choice: int, *, odds: float = 5.0, epistemic: float = 0.0, novelty: float = 0.0
) -> Reading:
    logits = torch.full((len(case.means),), -20.0)
    logits[0], logits[choice] = 0.0, odds if choice else 0.0
    return Reading(
        logits, torch.zeros_like(logits), 0.0, 0.0, torch.zeros_like(logits), epistemic, 0.0, novelty
    )


def best(case: Case) -> int:
    return int(np.nanargmax(case.means))


def worst(case: Case) -> int:
    return int(np.nanargmin(case.means))


def with_fallback(case: Case, choice: int) -> Case:
    return dataclasses.replace(case, fallback=choice)


def test_a_network_that_is_right_everywhere_is_never_silenced() -> None:
    known = [with_fallback(case, worst(case)) for case in cases()]
    read = Read(known, [reading(c, best(c), epistemic=0.1 * i) for i, c in enumerate(known)])
    gate = calibrate(POLICY, read, [])
    assert gate.chosen.coverage == 1.0
    assert gate.chosen.known == pytest.approx(utility(known, [best(c) for c in known]))
    assert np.isnan(gate.chosen.unknown)


@pytest.mark.parametrize("signal", ["epistemic", "novelty"])
def test_it_is_silenced_where_it_errs_and_says_so(signal: str) -> None:
    known = [with_fallback(case, best(case)) for case in cases()]
    readings = [
        reading(c, best(c) if i else worst(c), **{signal: 0.02 if i else 0.6}) for i, c in enumerate(known)
    ]
    gate = calibrate(POLICY, Read(known, readings), [])
    config = gate.config(POLICY)
    found = choices(config, known, readings)
    assert list(found.abstained) == [True] + [False] * (len(known) - 1)
    assert found.candidates == [best(c) for c in known]
    assert gate.chosen.known > gate.never.known


def test_families_that_it_does_not_know_count_as_much_as_known_ones() -> None:
    known = [with_fallback(case, best(case)) for case in cases()]
    strange = [with_fallback(case, best(case)) for case in cases("train")]
    right = Read(known, [reading(c, best(c), novelty=0.0) for c in known])
    wrong = Read(strange, [reading(c, worst(c), novelty=0.5) for c in strange])
    gate = calibrate(POLICY, right, [wrong])
    assert gate.chosen.novelty < 0.5
    assert gate.chosen.coverage == 1.0
    assert gate.chosen.coverage_unknown == 0.0
    assert gate.chosen.unknown == pytest.approx(gate.always.unknown)
    # without strangers to learn from the documented threshold stays
    assert calibrate(POLICY, right, []).chosen.novelty == POLICY.novelty_threshold


def test_confidence_is_as_high_as_costs_nothing() -> None:
    known = cases()
    sure = Read(known, [reading(c, best(c), odds=5.0) for c in known])
    assert calibrate(POLICY, sure, []).confidence == CONFIDENCES[-1]
    # sigmoid(0.5) is .62: a higher threshold would do nothing at all
    shy = Read(known, [reading(c, best(c), odds=0.5) for c in known])
    assert calibrate(POLICY, shy, []).confidence == 0.6


def test_scores_by_hand() -> None:
    known = cases()
    right, never = [best(c) for c in known], [0] * len(known)
    found = score(known, right)
    assert found.accuracy.mean == found.strict.mean == 1.0
    assert found.regret.mean == pytest.approx(0.0, abs=1e-9)
    assert found.wait_where_best == 1.0
    assert found.wait_elsewhere == 0.0
    assert found.utility.mean == pytest.approx(np.mean([np.nanmax(c.means) for c in known]))
    assert score(known, never).utility.mean == 0.0
    assert difference(known, right, never).mean == pytest.approx(found.utility.mean)
